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
from genrec.models.base import IGNORED, START, Batch, LossOutput
from genrec.models.causal import NORM_EPS, init_weights
from genrec.models.item_groups import NO_ITEM, ItemGroups
from genrec.models.item_vectors import ItemVectorsBackbone, ItemVectorsConfig
from genrec.models.layers import rotary_tables
from genrec.models.request_features import Reading
from genrec.models.scratch import check_heads
from genrec.repeats import RepeatBias
from genrec.sampled_softmax import sampled_logits, seen_items

RUNS_BY_GROUP = ("cpu",)  # devices on which predictions of one group share a product
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
        requests_R: which request each row belongs to; with `seen` only.
        seen: items of the requests' histories (B, H), and what `RepeatBias` says of them.
    """

    level: int
    memory_RD: Tensor
    prefixes_R: Tensor
    items_RC: Tensor | None = None
    scores_RC: Tensor | None = None
    requests_R: Tensor | None = None
    seen: tuple[Tensor, Tensor] | None = None


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


class Hierarchical(ItemVectorsBackbone):
    """Transformer over item positions with a decoder over levels; see the module's text."""

    class Config(ItemVectorsConfig):
        """Sizes suit MovieLens-100K; what options were worth is in docs/models.md and log.md."""

        name: Literal["hierarchical"] = "hierarchical"
        """Name in the registry."""
        items_from: int | None = Field(default=None, ge=0)
        """Codes from this level on follow from a softmax over the items below the prefix. None: no
        level; 0: all, a softmax over the whole catalogue (SASRec's, with shared code vectors)."""
        num_negatives: int | None = Field(default=None, ge=1)
        """Train with a softmax over the target, the items seen and so many random ones, instead of
        the whole catalogue. For `items_from: 0`; null: all items."""
        repeat_bias: bool = False
        """Learn how much more or less likely an item becomes by standing in the history, by how
        long ago (RepeatNet, Ren et al. 2019, asks the same). Needs `items_from`."""

    config: Config
    training_unit: ClassVar[Literal["target", "sequence"]] = "sequence"
    groups: ItemGroups
    repeats: RepeatBias

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
        self.make_layers()
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        if self._num_code_levels > 1 or (self._has_items and self._num_code_levels):
            self.level_decoder = LevelDecoder(config.d_model)
        if self._has_items:
            codes_NL = self.tokens_NL - self.level_offsets_L
            self.groups = ItemGroups(codes_NL, self.codebook_sizes, self._num_code_levels)
        if config.repeat_bias:
            self.repeats = RepeatBias(config.max_history)
        self.make_request_features()
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
        if self.config.num_negatives and first != 0:
            raise ConfigError(
                f"model.num_negatives: got {self.config.num_negatives} with items_from {first}, "
                "expected items_from 0, the softmax over the whole catalogue that they stand for. "
                "Set model.items_from=0 or model.num_negatives=null."
            )
        if first is None and self.config.repeat_bias:
            raise ConfigError(
                "model.repeat_bias: got true without model.items_from, expected a level from which "
                "items are scored, since codes do not tell which item was seen. Set "
                "model.items_from=1."
            )

    @property
    def _has_items(self) -> bool:
        return self.config.items_from is not None

    @property
    def _num_code_levels(self) -> int:
        """Levels whose codes are scored by code vectors."""
        first = self.config.items_from
        return self.num_levels if first is None else first

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        Sequences longer than `max_history + 1` keep their last items; a trainer that wants all of
        them as targets cuts windows.
        """
        self.draw_items()
        batch = batch.last(self.config.max_history + 1)
        sequence_BH, weights = batch.history_BH, batch.weights
        reading = Reading.of_sequence(batch)
        x_BTD = self.read_all(self._embed(reading), reading)
        valid_BH = sequence_BH >= 0
        if not self.config.predict_first:
            valid_BH[:, :1] = False
        return self._nll(
            self.norm(x_BTD).flatten(0, 1),
            sequence_BH.flatten(),
            valid_BH.flatten(),
            None if weights is None else weights.flatten(),
            sequence_BH,
        )

    def _nll(
        self,
        memory_MD: Tensor,
        rows_M: Tensor,
        valid_M: Tensor,
        weights_M: Tensor | None,
        sequence_BH: Tensor,
    ) -> LossOutput:
        """Return the loss of M items from the outputs of the positions that predict them."""
        tokens_ML = self.tokens_NL[rows_M.clamp(min=0)]
        queries = [memory_MD]
        for level in range(self._num_code_levels - (not self._has_items)):
            memory_MD = self.level_decoder(memory_MD, self.embedding(tokens_ML[:, level]))
            queries.append(self.level_decoder.query(memory_MD))
        total = memory_MD.new_zeros((), dtype=torch.float32)
        if self._num_code_levels:
            hidden_MLD = torch.stack(queries[: self._num_code_levels], dim=1)
            total = total + self.items_nll(hidden_MLD, rows_M, valid_M, weights_M).loss_sum
        if self._has_items:
            total = total + self._items_nll(queries[-1], rows_M, valid_M, weights_M, sequence_BH)
        return self.loss_output(total, queries[0], rows_M, valid_M, weights_M)

    def _items_nll(
        self,
        query_MD: Tensor,
        rows_M: Tensor,
        valid_M: Tensor,
        weights_M: Tensor | None,
        sequence_BH: Tensor,
    ) -> Tensor:
        """Return the summed loss of the choice among the items of each target's group."""
        if self.training and self.config.num_negatives:
            logits_MX = self._sampled_logits(query_MD, rows_M, sequence_BH)
            target_M = torch.zeros_like(rows_M).masked_fill(~valid_M, IGNORED)
            return self.choice_nll(logits_MX, target_M, weights_M)
        known_M = rows_M.clamp(min=0)
        group_M = self.groups.group_N[known_M]
        scores_MC = self._training_scores(query_MD, group_M)
        if self.config.repeat_bias:
            bias_BHH = self.repeats.between(sequence_BH)
            seen_MH = sequence_BH.clamp(min=0)[:, None].expand_as(bias_BHH).flatten(0, 1)
            scores_MC = self._biased(scores_MC, group_M, seen_MH, bias_BHH.flatten(0, 1))
        place_M = self.groups.place_N[known_M].masked_fill(~valid_M, IGNORED)
        return self.choice_nll(scores_MC, place_M, weights_M)

    def _sampled_logits(self, query_MD: Tensor, rows_M: Tensor, sequence_BH: Tensor) -> Tensor:
        """Return logits (M, 1 + X + H) of the target, X random items and those seen."""
        every_ND = self.item_vectors(torch.arange(len(self.tokens_NL), device=self.device))
        drawn_X = torch.randperm(len(every_ND), device=self.device)[: self.config.num_negatives]
        query_BHD = query_MD.view(*sequence_BH.shape, -1)
        read_HH = torch.ones_like(sequence_BH[0, :, None] == sequence_BH[0]).tril(-1)
        vectors_BHD = F.embedding(sequence_BH.clamp(min=0), every_ND)
        seen_scores_BHH = (query_BHD @ vectors_BHD.transpose(1, 2)).float()
        target_scores_BH = (query_BHD * vectors_BHD).sum(-1).float()
        if self.config.repeat_bias:
            bias_BHH = self.repeats.of_items(sequence_BH)
            seen_scores_BHH = seen_scores_BHH + bias_BHH
            target_scores_BH = target_scores_BH + bias_BHH.diagonal(dim1=1, dim2=2)
        return sampled_logits(
            target_scores_BH.flatten(),
            F.linear(query_MD, every_ND[drawn_X]).float(),
            seen_scores_BHH.flatten(0, 1),
            targets_P=rows_M.clamp(min=0),
            drawn_M=drawn_X,
            seen_PT=seen_items(sequence_BH, read_HH).flatten(0, 1),
            num_items=len(every_ND),
        )

    def _training_scores(self, query_MD: Tensor, group_M: Tensor) -> Tensor:
        """Return float32 scores (M, C) of the items of each prediction's group, -inf for filling.

        On a CPU predictions of one group share one product. A GPU, which would have to tell the
        host how many groups there are, reads vectors per prediction, or multiplies with all items
        where that reads less. The three are equal (test).
        """
        if query_MD.device.type in RUNS_BY_GROUP:
            return self._scores_by_group(query_MD, group_M)
        items_MC, num_items = self.groups.below(group_M), len(self.tokens_NL)
        if items_MC.shape[1] * GATHER_COST <= num_items:
            return self._scores(query_MD, items_MC)
        every_ND = self.item_vectors(torch.arange(num_items, device=items_MC.device))
        scores_MC = F.linear(query_MD, every_ND).gather(1, items_MC.clamp(min=0))
        return scores_MC.float().masked_fill(items_MC == NO_ITEM, -torch.inf)

    def _scores_by_group(self, query_MD: Tensor, group_M: Tensor) -> Tensor:
        """Read the items' vectors once for up to S predictions of one group.

        S is twice the mean per group: a popular group takes several units of S, so that it does not
        make all others as long as itself.
        """
        group_U, which_M = group_M.unique(return_inverse=True)
        counts_U = which_M.bincount()
        order_M = which_M.argsort(stable=True)
        number_M = torch.empty_like(order_M)  # of a prediction within its group
        firsts_U = counts_U.cumsum(0) - counts_U
        number_M[order_M] = torch.arange(len(order_M)) - firsts_U[which_M[order_M]]
        slots = min(int(counts_U.max()), 2 * -(-len(group_M) // len(group_U)))
        units_U = -(-counts_U // slots)
        unit_M = (units_U.cumsum(0) - units_U)[which_M] + number_M // slots
        slot_M = number_M % slots
        items_VC = self.groups.below(group_U.repeat_interleave(units_U))
        query_VSD = query_MD.new_zeros(len(items_VC), slots, query_MD.shape[1])
        query_VSD = query_VSD.index_put((unit_M, slot_M), query_MD)
        scores_VSC = (query_VSD @ self.item_vectors(items_VC).transpose(1, 2)).float()
        scores_VSC = scores_VSC.masked_fill((items_VC == NO_ITEM)[:, None], -torch.inf)
        return scores_VSC[unit_M, slot_M]

    def _scores(self, query_MD: Tensor, items_MC: Tensor) -> Tensor:
        """Return float32 scores of items, -inf for filling."""
        vectors_MCD = self.item_vectors(items_MC)
        scores_MC = (vectors_MCD @ query_MD.unsqueeze(-1).to(vectors_MCD.dtype)).squeeze(-1)
        return scores_MC.float().masked_fill(items_MC == NO_ITEM, -torch.inf)

    def _biased(
        self, scores_MC: Tensor, group_M: Tensor, seen_MH: Tensor, bias_MH: Tensor
    ) -> Tensor:
        """Return the scores of a group's items plus the biases of those that were seen."""
        mine_MH = self.groups.group_N[seen_MH] == group_M[:, None]
        return scores_MC.scatter_add(1, self.groups.place_N[seen_MH], bias_MH * mine_MH)

    def begin(self, batch: Batch) -> tuple[Tensor, HierarchicalState]:
        """Read the histories once; see `Backbone.begin`."""
        batch = batch.kept(self.config.max_history, self.config.truncation)
        history_BH, reading = batch.history_BH, Reading.of_history(batch)
        memory_BD = self.norm(self.read_last(self._embed(reading), reading))
        prefixes_B = torch.zeros(len(memory_BD), dtype=torch.int64, device=memory_BD.device)
        state = HierarchicalState(0, memory_BD, prefixes_B)
        if self.config.repeat_bias:
            requests_B = torch.arange(len(memory_BD), device=memory_BD.device)
            seen = history_BH.clamp(min=0), self.repeats.of_history(history_BH)
            state = replace(state, requests_R=requests_B, seen=seen)
        return self._answer(memory_BD, state)

    def step(
        self, codes_R: Tensor, state: HierarchicalState, parents_R: Tensor
    ) -> tuple[Tensor, HierarchicalState]:
        """Append one code per row; see `Backbone.step`."""
        level = state.level
        memory_RD = state.memory_RD[parents_R]
        if state.requests_R is not None:
            state = replace(state, requests_R=state.requests_R[parents_R])
        if state.items_RC is not None and state.scores_RC is not None:
            items_RC, scores_RC = state.items_RC[parents_R], state.scores_RC[parents_R]
            scores_RC = self.groups.keep_code(scores_RC, items_RC, codes_R, level)
            new = replace(
                state,
                level=level + 1,
                memory_RD=memory_RD,
                prefixes_R=state.prefixes_R[parents_R],
                items_RC=items_RC,
                scores_RC=scores_RC,
            )
            return self._answer(memory_RD, new)
        code_RD = self.embedding(self.code_tokens(codes_R, level))
        memory_RD = self.level_decoder(memory_RD, code_RD)
        prefixes_R = state.prefixes_R[parents_R]
        if self._has_items:
            prefixes_R = self.groups.extend(prefixes_R, codes_R, level)
        query_RD = self.level_decoder.query(memory_RD)
        state = replace(state, level=level + 1, memory_RD=memory_RD, prefixes_R=prefixes_R)
        return self._answer(query_RD, state)

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
            if state.seen is not None and state.requests_R is not None:
                seen_RH, bias_RH = (part[state.requests_R] for part in state.seen)
                scores_RC = self._biased(scores_RC, state.prefixes_R, seen_RH, bias_RH)
            state = replace(state, items_RC=items_RC, scores_RC=scores_RC)
        if level >= self.num_levels:  # nothing is left to choose
            return scores_RC.new_empty((len(scores_RC), 0)), state
        logits_RK = self.groups.code_logits(scores_RC, items_RC, level)
        if self.spans_vocabulary:  # no other token competes with an item
            logits_RK = logits_RK.log_softmax(-1)
        return logits_RK, state

    def _embed(self, reading: Reading) -> Tensor:
        """Return START and the items' vectors, (B, 1 + H, D)."""
        items_BH = reading.items_BH
        start_B1D = self.embedding.weight[START].expand(len(items_BH), 1, -1)
        x_BTD = torch.cat([start_B1D, self.item_vectors(items_BH)], dim=1)
        x_BTD = self.with_request(x_BTD, reading)
        return F.dropout(x_BTD, self.config.dropout, self.training)
