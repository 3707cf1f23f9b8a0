"""What is learned beside the next item? Text: of what a user wants next, and of items.

Three objectives on a backbone's own states, each with a small head that is thrown away after
training. "Text" is an item's vector, whatever it was made from. They know no tokens and no search.

Shapes: M predicted items, X drawn items, N items, E width of item vectors, D model width.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.config import StrictConfig
from genrec.errors import ConfigError
from genrec.models.base import Backbone, Batch, LossOutput, Targets

NAMES = ("user_text", "item_text", "reconstruction")


class ObjectivesConfig(StrictConfig):
    """Weights of what is learned beside the next item; all need item vectors, of which they read
    those made without interactions."""

    user_text: float = Field(default=0.0, ge=0)
    """Contrast of the state after a history with the text of what came next (CALRec's L_UT, Li et
    al. 2024; they use 0.025)."""
    item_text: float = Field(default=0.0, ge=0)
    """Contrast of an item's code vectors with its text (after CALRec's L_TT; they use 0.125)."""
    reconstruction: float = Field(default=0.0, ge=0)
    """One minus the cosine of an item's text and what a linear map makes of its code vectors."""
    temperature: float = Field(default=0.07, gt=0)
    """Of both contrasts: cosines are divided by it."""
    num_negatives: int = Field(default=256, ge=1)
    """Items that the targets of a step are set against, drawn anew from the catalogue in each."""

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the objectives with a weight."""
        return tuple(name for name in NAMES if getattr(self, name))

    def negatives(self, num_items: int, seed: int, step: int) -> Tensor:
        """Return int64 item rows (X,) for a step: the same for all its targets and processes."""
        rng = np.random.default_rng([seed, step, 4])
        count = min(self.num_negatives, num_items)
        return torch.from_numpy(np.sort(rng.choice(num_items, count, replace=False)))


class Heads(nn.Module):
    """Maps between a model's states and item vectors.

    Args:
        width: D.
        vector_width: E.
    """

    def __init__(self, names: tuple[str, ...], width: int, vector_width: int) -> None:
        super().__init__()
        for name in names:
            sizes = (width, vector_width) if name == "reconstruction" else (vector_width, width)
            self.add_module(name, nn.Linear(*sizes, bias=False))


class Learner(nn.Module):
    """A backbone with objectives: its call gives the sum of all losses.

    The sums go over targets, and the drawn items are the same for all targets of a step: neither
    accumulation nor the number of processes changes the result. (CALRec contrasts with the other
    items of a batch, which changes with its size.)

    Args:
        model: the backbone.
        config: weights of the objectives.
        vectors_NE: float32 item vectors of the catalogue; None where there are none.
        seed: of the heads' initial weights.

    Raises:
        ConfigError: no vectors, or a backbone without what an objective needs.
    """

    vectors_NE: Tensor

    def __init__(
        self, model: Backbone, config: ObjectivesConfig, vectors_NE: Tensor | None, *, seed: int
    ) -> None:
        super().__init__()
        if vectors_NE is None or len(vectors_NE) != len(model.tokens_NL):
            got = "no item vectors made without interactions"
            if vectors_NE is not None:
                got = f"{len(vectors_NE)} item vectors"
            raise ConfigError(
                f"trainer.objectives: got {got} for {len(model.tokens_NL)} items, expected one "
                "vector per item. Choose features and a tokenizer that reads them, or leave "
                f"{', '.join(config.active)} out."
            )
        self.model, self.config = model, config
        unit_NE = F.normalize(vectors_NE, dim=-1)
        self.register_buffer("vectors_NE", unit_NE.to(model.device), persistent=False)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            some = torch.zeros(1, dtype=torch.int64, device=model.device)
            width = model.item_representations(some).shape[-1]
            self.heads = Heads(config.active, width, vectors_NE.shape[1]).to(model.device)

    def forward(self, batch: Batch) -> LossOutput:
        """Return the loss of the next items plus the weighted objectives, summed over targets.

        Raises:
            ConfigError: a backbone that does not say what it predicted from.
        """
        output = self.model.loss(batch)
        targets = output.targets
        if targets is None or batch.negatives is None:
            raise ConfigError(
                f"trainer.objectives: a {type(self.model).__name__} does not hand out the states "
                "it predicts from, expected a backbone that does. Choose another, or leave the "
                "objectives out."
            )
        sums = [self._objective(name, targets, batch.negatives) for name in self.config.active]
        total = output.loss_sum
        for name, value in zip(self.config.active, sums, strict=True):
            total = total + getattr(self.config, name) * value
        figures = torch.stack([output.loss_sum, *sums]).detach()
        return LossOutput.of(total, output.num_targets, output.normalizer, figures=figures)

    def _objective(self, name: str, targets: Targets, negatives_X: Tensor) -> Tensor:
        rows_M = targets.rows_M.clamp(min=0)
        head = self.heads.get_submodule(name)
        if name == "user_text":
            states_MD = targets.states_MD
        else:
            states_MD = self.model.item_representations(rows_M)
        if name == "reconstruction":
            loss_M = 1.0 - F.cosine_similarity(head(states_MD.float()), self.vectors_NE[rows_M])
        else:
            loss_M = contrast(
                states_MD.float(),
                head(self.vectors_NE[rows_M]),
                head(self.vectors_NE[negatives_X]),
                same_MX=rows_M[:, None] == negatives_X,
                temperature=self.config.temperature,
            )
        return (loss_M * targets.weights_M).sum()


def contrast(
    states_MD: Tensor, own_MD: Tensor, drawn_XD: Tensor, *, same_MX: Tensor, temperature: float
) -> Tensor:
    """Return InfoNCE losses (M,): -log of the own vector's share among it and the drawn ones.

    Args:
        states_MD: what should be near.
        own_MD: to what.
        drawn_XD: and to what not.
        same_MX: bool, drawn vectors that are the own one; they do not count.
        temperature: cosines are divided by it (van den Oord et al. 2018).
    """
    states_MD, drawn_XD = F.normalize(states_MD, dim=-1), F.normalize(drawn_XD, dim=-1)
    own_M = (states_MD * F.normalize(own_MD, dim=-1)).sum(-1) / temperature
    others_MX = (states_MD @ drawn_XD.T / temperature).masked_fill(same_MX, -torch.inf)
    return torch.cat([own_M[:, None], others_MX], 1).logsumexp(1) - own_M
