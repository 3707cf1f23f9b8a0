"""Hierarchical: a causal transformer over items, and a small recurrent decoder over their codes.

An item is one position, whatever the number of its codes, so a history is L times shorter than in
`decoder_only`; a search runs only the small decoder per beam. From level `items_from` on the items'
own vectors decide instead (`genrec.models.item_choice`). It refuses to know how long a search is or
how wide.

Positions: START, then one per item; position n predicts item n, and START alone is the empty
history.

Shapes: B requests, H history items, L levels, R live rows, M predicted items, C items of a group,
K codes of a level, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from genrec.models.base import Batch, LossOutput
from genrec.models.causal import NORM_EPS
from genrec.models.item_choice import ItemChoiceBackbone, ItemChoiceConfig
from genrec.models.request_features import Reading


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


class Hierarchical(ItemChoiceBackbone):
    """Transformer over item positions with a decoder over levels; see the module's text."""

    class Config(ItemChoiceConfig):
        """Sizes suit MovieLens-100K; what options were worth is in docs/models.md and log.md."""

        name: Literal["hierarchical"] = "hierarchical"
        """Name in the registry."""

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
        if self.num_code_levels > 1 or (self.has_items and self.num_code_levels):
            self.level_decoder = LevelDecoder(config.d_model)
        self.make_item_choice()
        self.complete(config.max_history + 1)

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        Sequences longer than `max_history + 1` keep their last items; a trainer that wants all of
        them as targets cuts windows.
        """
        self.draw_items()
        batch = batch.last(self.config.max_history + 1)
        sequence_BH, weights = batch.history_BH, batch.weights
        reading = Reading.of_sequence(batch)
        x_BTD = self.read_all(reading)
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
        for level in range(self.num_code_levels - (not self.has_items)):
            memory_MD = self.level_decoder(memory_MD, self.embedding(tokens_ML[:, level]))
            queries.append(self.level_decoder.query(memory_MD))
        total = memory_MD.new_zeros((), dtype=torch.float32)
        if self.num_code_levels:
            hidden_MLD = torch.stack(queries[: self.num_code_levels], dim=1)
            total = total + self.items_nll(hidden_MLD, rows_M, valid_M, weights_M).loss_sum
        if self.has_items:
            total = total + self.item_choice_nll(
                queries[-1], rows_M, valid_M, weights_M, sequence_BH
            )
        return self.loss_output(total, queries[0], rows_M, valid_M, weights_M)

    def begin(self, batch: Batch) -> tuple[Tensor, HierarchicalState]:
        """Read the histories once; see `Backbone.begin`."""
        batch = batch.kept(self.config.max_history, self.config.truncation)
        history_BH, reading = batch.history_BH, Reading.of_history(batch)
        memory_BD = self.norm(self.read_last(reading))
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
            items_RC, scores_RC = self.scores_after(
                state.items_RC, state.scores_RC, parents_R, codes_R, level
            )
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
        if self.has_items:
            prefixes_R = self.groups.extend(prefixes_R, codes_R, level)
        query_RD = self.level_decoder.query(memory_RD)
        state = replace(state, level=level + 1, memory_RD=memory_RD, prefixes_R=prefixes_R)
        return self._answer(query_RD, state)

    @torch.no_grad()
    def meet_targets(self, batches: Iterable[Batch]) -> None:
        """With `consumed_only`, learn how likely new items are; see `Backbone.meet_targets`."""
        if not self.config.consumed_only:
            return
        found = [self._odds_of_new(batch) for batch in batches if len(batch)]
        if found:
            odds, is_new = zip(*found, strict=True)
            self.new_items.fit(torch.cat(odds), torch.cat(is_new))

    def _odds_of_new(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the log-odds of new items below the targets' first codes, and which are new."""
        rows_P = batch.target_B
        assert rows_P is not None
        codes_PL = self.tokens_NL[rows_P] - self.level_offsets_L
        requests_P = torch.arange(len(rows_P), device=rows_P.device)
        _, state = self.begin(batch)
        for level in range(self.num_code_levels):
            _, state = self.step(codes_PL[:, level], state, requests_P)
        assert state.items_RC is not None and state.scores_RC is not None
        return self.log_odds_of_new(state.items_RC, state.scores_RC), self.is_new(rows_P)

    def _answer(
        self, query_RD: Tensor, state: HierarchicalState
    ) -> tuple[Tensor, HierarchicalState]:
        """Return the logits of the state's level, and the state with what they were made from."""
        level = state.level
        if level < self.num_code_levels:
            return self.level_logits(query_RD, level), state
        items_RC, scores_RC = state.items_RC, state.scores_RC
        if items_RC is None or scores_RC is None:
            seen = None
            if state.seen is not None and state.requests_R is not None:
                seen = state.seen[0][state.requests_R], state.seen[1][state.requests_R]
            items_RC, scores_RC = self.scores_below(query_RD, state.prefixes_R, seen)
            state = replace(state, items_RC=items_RC, scores_RC=scores_RC)
        if level >= self.num_levels:  # nothing is left to choose
            return scores_RC.new_empty((len(scores_RC), 0)), state
        logits_RK = self.groups.code_logits(scores_RC, items_RC, level)
        if self.spans_vocabulary:  # no other token competes with an item
            logits_RK = logits_RK.log_softmax(-1)
        return logits_RK, state
