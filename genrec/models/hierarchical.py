"""Hierarchical: a causal transformer over items, and a small recurrent decoder over their codes.

An item is one position, whatever the number of its codes, so a history is L times shorter than in
`decoder_only`; a search runs only the small decoder per beam. The codes from level `items_from` on
are decided by the items' own vectors: a softmax over the real items below the prefix (hierarchical
softmax of Goodman 2001 and Morin & Bengio 2005, with semantic IDs as its classes), of which the
codes' probabilities are sums. It refuses to know how long a search is or how wide.

Positions: START, then one per item; position n predicts item n, and START alone is the empty
history.

Shapes: B requests, H history items, L levels, R live rows, M predicted items, C items of a group,
K codes of a level, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import ConfigError
from genrec.models.base import IGNORED, START, Batch, LossOutput, keep_last
from genrec.models.causal import (
    NORM_EPS,
    CausalConfig,
    CausalLayer,
    init_weights,
    prefill,
)
from genrec.models.item_groups import NO_ITEM, ItemGroups
from genrec.models.layers import module_list, rotary_tables
from genrec.models.scratch import ScratchBackbone, check_heads

GATHER_COST = 16  # reading a vector per candidate costs as much as so many products in a matrix


@dataclass(frozen=True)
class HierarchicalState:
    """What a search has chosen so far; one entry per row of the last call.

    Args:
        level: the level that was scored last.
        memory_RD: the level decoder's memory.
        prefixes_R: the prefix's number among the item groups.
        items_RC: items below the prefix of length `items_from`, once it is reached.
        scores_RC: their scores, -inf where they are no longer below the prefix.
    """

    level: int
    memory_RD: Tensor
    prefixes_R: Tensor
    items_RC: Tensor | None = None
    scores_RC: Tensor | None = None


class LevelDecoder(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over the codes of one item."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.code = nn.Linear(width, 3 * width, bias=True)
        self.memory = nn.Linear(width, 3 * width, bias=False)
        self.output_norm = nn.RMSNorm(width, eps=NORM_EPS)

    def forward(self, memory_MD: Tensor, code_MD: Tensor) -> Tensor:
        """Return the memory after one more code."""
        from_code = self.code(self.norm(code_MD)).chunk(3, -1)
        from_memory = self.memory(memory_MD).chunk(3, -1)
        keep = torch.sigmoid(from_code[0] + from_memory[0])
        reset = torch.sigmoid(from_code[1] + from_memory[1])
        new = torch.tanh(from_code[2] + reset * from_memory[2])
        return keep * memory_MD + (1 - keep) * new

    def query(self, memory_MD: Tensor) -> Tensor:
        """Return the vector that codes or items are scored with."""
        query: Tensor = self.output_norm(memory_MD)
        return query


class Hierarchical(ScratchBackbone):
    """Transformer over item positions with a decoder over levels; see the module's text."""

    class Config(CausalConfig):
        """Defaults are measured in docs/models.md."""

        name: Literal["hierarchical"] = "hierarchical"
        """Name in the registry."""
        item_vectors: bool = True
        """Give each item a learned vector of its own, added to those of its codes."""
        item_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Probability that a training step does without an item's own vector, in the history as
        among the candidates: items that are rare or new then rank by their codes."""
        items_from: int | None = Field(default=None, ge=0)
        """Codes from this level on follow from a softmax over the items below the prefix. None: no
        level; 0: all, a softmax over the whole catalogue (SASRec's, with shared code vectors)."""

    config: Config
    training_unit: ClassVar[Literal["target", "sequence"]] = "sequence"
    item_tables: ClassVar[tuple[str, ...]] = ("own.weight",)
    own: nn.Embedding
    groups: ItemGroups
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        head_width = check_heads(config)
        self._check_items_from()
        self.layers = module_list(CausalLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        if self._num_code_levels > 1 or (self._has_items and self._num_code_levels):
            self.level_decoder = LevelDecoder(config.d_model)
        if config.item_vectors:
            self.own = nn.Embedding(len(self.tokens_NL), config.d_model)
        if self._has_items:
            codes_NL = self.tokens_NL - self.level_offsets_L
            self.groups = ItemGroups(codes_NL, self.codebook_sizes, self._num_code_levels)
        cos, sin = rotary_tables(config.max_history + 1, head_width, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        init_weights(self, self.layers, config.init_std)

    def _check_items_from(self) -> None:
        first = self.config.items_from
        if first is not None and first >= self.num_levels:
            raise ConfigError(
                f"model.items_from: got {first} for semantic IDs of {self.num_levels} codes, "
                f"expected at most {self.num_levels - 1}. Leave it out to score codes only."
            )

    @property
    def _has_items(self) -> bool:
        return self.config.items_from is not None

    @property
    def _num_code_levels(self) -> int:
        """Levels whose codes are scored by code vectors."""
        first = self.config.items_from
        return self.num_levels if first is None else first

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors of items, (...) -> (..., D); anything where a row is negative.

        In training the whole table is made once where more rows are asked for than there are items.
        """
        rows = rows.clamp(min=0)
        if rows.numel() > len(self.tokens_NL):
            every_N = torch.arange(len(self.tokens_NL), device=rows.device)
            return F.embedding(rows, self.item_vectors(every_N))
        vectors: Tensor = self.embedding(self.tokens_NL[rows]).sum(-2)
        if not self.config.item_vectors:
            return vectors
        return vectors + self.own(rows) * self._keeps_own(rows)

    def _keeps_own(self, rows: Tensor) -> Tensor | float:
        """Return 0 for items that this training step knows by their codes only, else 1."""
        if not self.training or not self.config.item_dropout:
            return 1.0
        return (self._draws_N[rows] >= self.config.item_dropout).unsqueeze(-1)

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        Sequences longer than `max_history + 1` keep their last items; a trainer that wants all of
        them as targets cuts windows.
        """
        if self.training and self.config.item_dropout:
            self._draws_N = torch.rand(len(self.tokens_NL), device=self.device)
        sequence_BH = keep_last(batch.history_BH, self.config.max_history + 1)
        x_BTD = self._embed(sequence_BH[:, :-1])
        length = x_BTD.shape[1]
        for layer in self.layers:
            x_BTD, _ = layer(x_BTD, self.cos[:length], self.sin[:length])
        valid_BH = sequence_BH >= 0
        if not self.config.predict_first:
            valid_BH[:, :1] = False
        return self._nll(self.norm(x_BTD).flatten(0, 1), sequence_BH.flatten(), valid_BH.flatten())

    def _nll(self, memory_MD: Tensor, rows_M: Tensor, valid_M: Tensor) -> LossOutput:
        """Return the loss of M items from the outputs of the positions that predict them."""
        tokens_ML = self.tokens_NL[rows_M.clamp(min=0)]
        queries = [memory_MD]
        for level in range(self._num_code_levels - (not self._has_items)):
            memory_MD = self.level_decoder(memory_MD, self.embedding(tokens_ML[:, level]))
            queries.append(self.level_decoder.query(memory_MD))
        total = memory_MD.new_zeros((), dtype=torch.float32)
        if self._num_code_levels:
            hidden_MLD = torch.stack(queries[: self._num_code_levels], dim=1)
            total = total + self.items_nll(hidden_MLD, rows_M, valid_M).loss_sum
        if self._has_items:
            items_MC = self.groups.around(rows_M.clamp(min=0))
            scores_MC = self._scores(queries[-1], items_MC)
            place_M = (items_MC == rows_M[:, None]).int().argmax(1)
            place_M = place_M.masked_fill(~valid_M, IGNORED)
            total = total + F.cross_entropy(scores_MC, place_M, reduction="sum")
        return LossOutput.of(total, valid_M.sum())

    def _scores(self, query_MD: Tensor, items_MC: Tensor) -> Tensor:
        """Return float32 scores of items, -inf for filling."""
        num_items = len(self.tokens_NL)
        if self.training and items_MC.shape[1] * GATHER_COST > num_items:
            # One product with all items reads less memory than the vectors of large groups.
            every_ND = self.item_vectors(torch.arange(num_items, device=items_MC.device))
            scores_MC = F.linear(query_MD, every_ND).gather(1, items_MC.clamp(min=0))
        else:
            vectors_MCD = self.item_vectors(items_MC)
            scores_MC = (vectors_MCD @ query_MD.unsqueeze(-1).to(vectors_MCD.dtype)).squeeze(-1)
        return scores_MC.float().masked_fill(items_MC == NO_ITEM, -torch.inf)

    def begin(self, batch: Batch) -> tuple[Tensor, HierarchicalState]:
        """Read the histories once; see `Backbone.begin`."""
        history_BH = keep_last(batch.history_BH, self.config.max_history)
        visible_BT = F.pad(history_BH >= 0, (1, 0), value=True)
        tables = self.cos, self.sin
        x_BD, _ = prefill(self.layers, self._embed(history_BH), tables, visible_BT)
        memory_BD = self.norm(x_BD)
        prefixes_B = torch.zeros(len(memory_BD), dtype=torch.int64, device=memory_BD.device)
        return self._answer(memory_BD, HierarchicalState(0, memory_BD, prefixes_B))

    def step(
        self, codes_R: Tensor, state: HierarchicalState, parents_R: Tensor
    ) -> tuple[Tensor, HierarchicalState]:
        """Append one code per row; see `Backbone.step`."""
        level = state.level
        memory_RD = state.memory_RD[parents_R]
        if state.items_RC is not None and state.scores_RC is not None:
            items_RC, scores_RC = state.items_RC[parents_R], state.scores_RC[parents_R]
            scores_RC = self.groups.keep_code(scores_RC, items_RC, codes_R, level)
            new = HierarchicalState(
                level + 1, memory_RD, state.prefixes_R[parents_R], items_RC, scores_RC
            )
            return self._answer(memory_RD, new)
        code_RD = self.embedding(self.code_tokens(codes_R, level))
        memory_RD = self.level_decoder(memory_RD, code_RD)
        prefixes_R = state.prefixes_R[parents_R]
        if self._has_items:
            prefixes_R = self.groups.extend(prefixes_R, codes_R, level)
        query_RD = self.level_decoder.query(memory_RD)
        return self._answer(query_RD, HierarchicalState(level + 1, memory_RD, prefixes_R))

    def _answer(
        self, query_RD: Tensor, state: HierarchicalState
    ) -> tuple[Tensor, HierarchicalState]:
        """Return the logits of the state's level, and the state with what they were made from."""
        level = state.level
        if level < self._num_code_levels:
            return self.level_logits(query_RD, level), state
        items_RC, scores_RC = state.items_RC, state.scores_RC
        if items_RC is None or scores_RC is None:
            items_RC = self.groups.below(state.prefixes_R)
            scores_RC = self._scores(query_RD, items_RC)
            state = replace(state, items_RC=items_RC, scores_RC=scores_RC)
        if level >= self.num_levels:  # nothing is left to choose
            return scores_RC.new_empty((len(scores_RC), 0)), state
        logits_RK = self.groups.code_logits(scores_RC, items_RC, level)
        if self.spans_vocabulary:  # no other token competes with an item
            logits_RK = logits_RK.log_softmax(-1)
        return logits_RK, state

    def _embed(self, items_BH: Tensor) -> Tensor:
        """Return START and the items' vectors, (B, 1 + H, D)."""
        start_B1D = self.embedding.weight[START].expand(len(items_BH), 1, -1)
        x_BTD = torch.cat([start_B1D, self.item_vectors(items_BH)], dim=1)
        return F.dropout(x_BTD, self.config.dropout, self.training)
