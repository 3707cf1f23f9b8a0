"""How much does it matter that an item stands in the history already, and how long ago?

Where users never take an item twice the answer is a large negative number, where they do a positive
one (RepeatNet, Ren et al. 2019, 1812.02646, learns the same with a decoder of its own). A network
of a few dozen dimensions cannot hold which of fifty items were seen; these few numbers can. It
knows neither networks nor codes.

Shapes: B sequences or requests, H items of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPEED = 10.0  # an optimizer moves each weight by about the learning rate; these have far to go


class RepeatBias(nn.Module):
    """Adds to an item's score for each time that it stands in the history.

    One number per distance to the prediction, in powers of two: 1, 2 to 3, 4 to 7 items ago ...

    Args:
        max_history: largest distance.
    """

    def __init__(self, max_history: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(max_history.bit_length()))

    def at(self, distance: Tensor) -> Tensor:
        """Return the bias of an item that stood so many places before the prediction (>= 1)."""
        bucket = distance.clamp(min=1).float().log2().floor().long()
        return SPEED * self.weight[bucket.clamp(max=len(self.weight) - 1)]

    def between(self, sequence_BH: Tensor) -> Tensor:
        """Return, at each place of sequences (rows), the bias of what stands before it (columns).

        Args:
            sequence_BH: int64 item rows, -1 for padding.

        Returns:
            (B, H, H) float32, 0 for what does not stand before the place.
        """
        return self._before(sequence_BH) * (sequence_BH >= 0)[:, None]

    def of_items(self, sequence_BH: Tensor) -> Tensor:
        """Return, at each place (rows), the bias of the items of a sequence (columns), (B, H, H).

        It is the sum over the places before that hold the same item, which `between` gives one by
        one; on the diagonal stands the bias of the item that is to be predicted.
        """
        same_BHH = (sequence_BH[:, :, None] == sequence_BH[:, None]).float()
        return self._before(sequence_BH) @ same_BHH

    def of_history(self, history_BH: Tensor) -> Tensor:
        """Return the bias of each place for what follows the history, (B, H) float32.

        Args:
            history_BH: int64 item rows, oldest first, right-padded with -1.
        """
        exists_BH = history_BH >= 0
        places_H = torch.arange(history_BH.shape[1], device=history_BH.device)
        return self.at(exists_BH.sum(1, keepdim=True) - places_H) * exists_BH

    def _before(self, sequence_BH: Tensor) -> Tensor:
        places_H = torch.arange(sequence_BH.shape[1], device=sequence_BH.device)
        distance_HH = places_H[:, None] - places_H
        return self.at(distance_HH) * (distance_HH > 0)
