"""Parallel: a causal transformer over items whose heads name all codes of the next item at once.

RPG's generator (Hou et al. 2025): an item is one position, the mean of its codes' vectors; each
level has a head of its own, and codes are scored by cosine. Given the history the levels' codes are
independent, so a search reads the history once and then only looks up. It refuses to know how long
a search is or how wide.

Positions: START, then one per item; position n predicts item n, and START alone is the empty
history.

Shapes: B requests, H history items, L levels, R live rows, M predicted items, K codes of a level,
D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.models.base import Batch, LossOutput
from genrec.models.causal import NORM_EPS
from genrec.models.hstu import ItemPositionsBackbone, ItemPositionsConfig
from genrec.models.layers import module_list
from genrec.models.request_features import Reading


@dataclass(frozen=True)
class ParallelState:
    """What a search has read; codes chosen since do not matter.

    Args:
        level: the level that was scored last.
        queries_BLD: what each level's codes are scored with.
        requests_R: which request each row of the last call is of.
    """

    level: int
    queries_BLD: Tensor
    requests_R: Tensor


class LevelHead(nn.Module):
    """A residual block in front of one level's codes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the query of the level, (..., D) -> (..., D)."""
        return x + F.silu(self.linear(x))


class Parallel(ItemPositionsBackbone):
    """Transformer over item positions with a head per level; see the module's text."""

    class Config(ItemPositionsConfig):
        """Widths are those of the other causal backbones; RPG's are 448 in 2 layers."""

        name: Literal["parallel"] = "parallel"
        """Name in the registry."""
        head_temperature: float = Field(default=0.07, gt=0)
        """Cosines of heads and codes are divided by it (RPG: 0.03 to 0.07)."""

    config: Config
    training_unit: ClassVar[Literal["target", "sequence"]] = "sequence"

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        self.make_layers()
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.heads = module_list(LevelHead(config.d_model) for _ in range(self.num_levels))
        self.complete(config.max_history + 1)

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        The loss is RPG's multi-token prediction, summed over levels as everywhere here. Sequences
        longer than `max_history + 1` keep their last items.
        """
        batch = batch.last(self.config.max_history + 1)
        reading = Reading.of_sequence(batch)
        x_BTD = self.read_all(reading)
        valid_BH = batch.history_BH >= 0
        if not self.config.predict_first:
            valid_BH[:, :1] = False
        return self.items_nll(
            self._queries(x_BTD).flatten(0, 1),
            batch.history_BH.flatten(),
            valid_BH.flatten(),
            None if batch.weights is None else batch.weights.flatten(),
        )

    def begin(self, batch: Batch) -> tuple[Tensor, ParallelState]:
        """Read the histories once; see `Backbone.begin`."""
        batch = batch.kept(self.config.max_history, self.config.truncation)
        reading = Reading.of_history(batch)
        x_BD = self.read_last(reading)
        queries_BLD = self._queries(x_BD)
        requests_B = torch.arange(len(x_BD), device=x_BD.device)
        return self.level_logits(queries_BLD[:, 0], 0), ParallelState(0, queries_BLD, requests_B)

    def step(
        self, codes_R: Tensor, state: ParallelState, parents_R: Tensor
    ) -> tuple[Tensor, ParallelState]:
        """Score the next level, whatever the codes are; see `Backbone.step`."""
        level, requests_R = state.level + 1, state.requests_R[parents_R]
        new = ParallelState(level, state.queries_BLD, requests_R)
        if level >= self.num_levels:  # nothing is left to choose
            return state.queries_BLD.new_empty((len(requests_R), 0), dtype=torch.float32), new
        return self.level_logits(state.queries_BLD[:, level], level)[requests_R], new

    def code_scores(self, hidden: Tensor, level: int) -> Tensor:
        """Return cosines with the level's codes over the temperature; see `Backbone`."""
        first = self._first_tokens[level]
        return self._cosines(hidden, slice(first, first + self.codebook_sizes[level]))

    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Return cosines with all tokens over the temperature."""
        return self._cosines(hidden, slice(None))

    def _cosines(self, hidden: Tensor, rows: slice) -> Tensor:
        weight_KD = F.normalize(self.output_weight_VD[rows], dim=-1)
        cosines = F.linear(F.normalize(hidden, dim=-1), weight_KD.to(hidden.dtype))
        return cosines.float() / self.config.head_temperature

    def _queries(self, x: Tensor) -> Tensor:
        """Return what each level's codes are scored with, (..., D) -> (..., L, D)."""
        x = self.norm(x)
        return torch.stack([head(x) for head in self.heads], dim=-2)
