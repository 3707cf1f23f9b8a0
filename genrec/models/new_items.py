"""How likely is it that the next item is one that nobody has consumed yet?

A choice that is trained among consumed items only says how the others rank among themselves, not
how often one of them is taken: nobody ever took one. Targets that came later tell, so one number is
added to the scores of all new items such that these targets are most likely. It knows no network.

Shapes: M choices, C items to choose from, P targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST_BIAS = 20.0
HALVINGS = 60  # of an interval of 2 * LARGEST_BIAS: to the last digit of a float


class NewItemBias(nn.Module):
    """A number that is added to the scores of new items: 0 until it was fitted."""

    value_1: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value_1", torch.zeros(1))

    def forward(self, scores_MC: Tensor, is_new_MC: Tensor) -> Tensor:
        """Return the scores, those of new items moved."""
        return scores_MC + self.value_1 * is_new_MC

    @torch.no_grad()
    def fit(self, log_odds_P: Tensor, is_new_P: Tensor) -> None:
        """Choose the number under which these targets are most likely.

        The likelihood is a logistic regression's with nothing but an intercept: it is largest where
        as many new targets are expected as there are. Half a target of either kind is added
        (Jeffreys' prior), so that no kind is ruled out for not having been seen.

        Args:
            log_odds_P: for each target, without the number: the log of the new items' probability
                over the others', among the items that the choice was made from. Infinite where it
                was made among one kind; such targets tell nothing.
            is_new_P: bool, whether the target is new.
        """
        tells_P = log_odds_P.isfinite()
        odds_P, count = log_odds_P[tells_P].double(), int(tells_P.sum())
        if not count:
            self.value_1.zero_()
            return
        share = (float(is_new_P[tells_P].sum()) + 0.5) / (count + 1)
        low, high = -LARGEST_BIAS, LARGEST_BIAS
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if float((odds_P + middle).sigmoid().mean()) < share:
                low = middle
            else:
                high = middle
        self.value_1.fill_((low + high) / 2)
