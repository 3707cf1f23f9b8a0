"""Ensemble: several networks of one kind that answer with the mean of their probabilities.

Deep ensembles (Lakshminarayanan et al. 2017, 1612.01474): the members differ in their first weights
and in dropout, and each learns from every batch by itself. They share one item index. At a prefix a
member counts as much as it found that prefix likely, so the product over levels is the mean over
members of an item's probability, and a search, its certificates and filters see one distribution
like any other. It refuses to know what its members are made of.

Shapes: B requests, H history items, L levels, R live rows, K codes of a level, P targets,
M members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from genrec.config import StrictConfig, parse_component
from genrec.errors import ConfigError
from genrec.item_index import END, ItemIndex
from genrec.models import BACKBONES
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.models.batch import Order, Truncation
from genrec.models.layers import module_list
from genrec.models.scratch import ScratchBackbone

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions


@dataclass(frozen=True)
class EnsembleState:
    """What a search has chosen so far; one entry per row of the last call.

    Args:
        states: each member's own.
        logprobs_MRK: the members' log-probabilities of the codes of the level scored last.
        paths_MR: their log-probabilities of the codes chosen before.
    """

    states: tuple[Any, ...]
    logprobs_MRK: Tensor
    paths_MR: Tensor


class Ensemble(Backbone):
    """Several backbones trained side by side; see the module's text.

    Args:
        config: how many members of which kind.
        tokens_NL: as for `Backbone`.
        codebook_sizes: as for `Backbone`.
        shared_vocabulary: as for `Backbone`.
    """

    class Config(StrictConfig):
        """Learning and searching cost as much as `size` models of that kind."""

        name: Literal["ensemble"] = "ensemble"
        """Name in the registry."""
        size: int = Field(default=3, ge=2)
        """Members."""
        of: dict[str, Any]
        """The `model` section of each member: a backbone that is trained from random weights."""

        @field_validator("of")
        @classmethod
        def _checked(cls, of: dict[str, Any]) -> dict[str, Any]:
            kind, config = parse_component(BACKBONES, of, path="")
            if not issubclass(kind, ScratchBackbone):
                raise ConfigError(
                    f"name: got {of['name']!r}, expected a backbone that is trained from random "
                    "weights (hierarchical, decoder_only, encoder_decoder, parallel). Members that "
                    "stand on a language model would hold it several times."
                )
            return config.to_dict()

        @cached_property
        def member(self) -> Any:
            """The configuration of each member."""
            return parse_component(BACKBONES, self.of, path="model.of")[1]

        @property
        def max_history(self) -> int:
            """The members'."""
            found: int = self.member.max_history
            return found

        def for_histories(self, training: Interactions) -> Self:
            """Return the configuration with the `max_history` that these users give the members."""
            return self._of(self.member.for_histories(training))

        def with_max_history(self, limit: int) -> Self:
            """Return the configuration with this `max_history` of the members."""
            return self._of(self.member.with_max_history(limit))

        def _of(self, member: Any) -> Self:
            # A new object: `member` is kept once it is known.
            return type(self)(name=self.name, size=self.size, of=member.to_dict())

        @property
        def truncation(self) -> Truncation:
            """The members'."""
            found: Truncation = self.member.truncation
            return found

        @property
        def history_order(self) -> Order:
            """The members'."""
            found: Order = self.member.history_order
            return found

        @property
        def softmax(self) -> str:
            """How the ensemble's own levels are normalised; members train as they are told."""
            return "level"

        @property
        def needs_vectors(self) -> bool:
            """The members'."""
            found: bool = self.member.needs_vectors
            return found

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return what the members read; see `Backbone.Config.reads`."""
            found: dict[str, str] = self.member.reads(catalog)
            return found

    config: Config  # type: ignore[assignment]  # it says what a backbone's says, by its members

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)  # type: ignore[arg-type]
        kind = parse_component(BACKBONES, config.of, path="model.of")[0]
        self.take(
            [
                kind(config.member, tokens_NL, codebook_sizes, shared_vocabulary)
                for _ in range(config.size)
            ]
        )

    def take(self, members: Sequence[ScratchBackbone]) -> None:
        """Answer with these members from now on."""
        self.members = module_list(members)
        first = members[0]
        self.training_unit = first.training_unit  # type: ignore[misc]  # the members' kind decides
        self.item_tables = tuple(  # type: ignore[misc]
            f"members.{place}.{name}" for place in range(len(members)) for name in first.item_tables
        )

    @classmethod
    def _check_order(cls, config: Any) -> None:
        """Members check it, each for its kind."""

    @classmethod
    def for_saved(
        cls, config: Any, index: ItemIndex, facts: Mapping[str, Any], *, base: str | None = None
    ) -> Self:
        """Build an ensemble that saved weights are loaded into; see `Backbone.for_saved`."""
        found = super().for_saved(config, index, facts, base=base)
        kind, member = parse_component(BACKBONES, config.of, path="model.of")
        of_members = facts.get("members", [{}] * config.size)
        found.take([kind.for_saved(member, index, of_member) for of_member in of_members])
        return found

    def facts(self) -> dict[str, Any]:
        """Return the members' facts; see `Backbone.facts`."""
        found = [member.facts() for member in self.members]
        return {"members": found} if any(found) else {}

    @property
    def reads_content(self) -> bool:
        """Whether a member knows items by their content; see `Backbone.reads_content`."""
        return any(member.reads_content for member in self.members)

    def describe(self, first: int, vectors_MC: np.ndarray) -> None:
        """Let every member take in items that join later; see `Backbone.describe`."""
        for member in self.members:
            member.describe(first, vectors_MC)

    def start_from(self, catalog: Catalog) -> None:
        """Let every member start from what is known of the items."""
        for member in self.members:
            member.start_from(catalog)

    @property
    def reads_times(self) -> bool:
        """Whether times change what the members answer."""
        return self.members[0].reads_times

    def meet_items(self, counts_N: np.ndarray, *, more: bool = False) -> None:
        """Let every member take in how well the training data know items."""
        for member in self.members:
            member.meet_items(counts_N, more=more)

    def meet_targets(self, batches: Iterable[Batch]) -> None:
        """Let every member take in targets that training does not see."""
        batches = list(batches)
        for member in self.members:
            member.meet_targets(batches)

    def meet_users(self, users: Sequence[str], has_history_U: np.ndarray) -> None:
        """Let every member take in the users of the training data."""
        for member in self.members:
            member.meet_users(users, has_history_U)

    def user_rows(self, users: Sequence[str | None]) -> np.ndarray | None:
        """Return users' rows, which are the same in all members; see `Backbone.user_rows`."""
        return self.members[0].user_rows(users)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Let the members forget their activations; see `Backbone.checkpoint_gradients`."""
        for member in self.members:
            member.checkpoint_gradients(enabled)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.members[0].device

    def loss(self, batch: Batch) -> LossOutput:
        """Return the loss that members learn by, or in evaluation mode the ensemble's own.

        In training it is the mean of the members' losses, so that each learns by itself; that is
        above -log of the mean of their probabilities, which is what the ensemble answers with.
        """
        if not self.training:
            return self._answered_loss(batch)
        outputs = [member.loss(batch) for member in self.members]
        loss_sum = torch.stack([output.loss_sum for output in outputs]).mean()
        return LossOutput.of(loss_sum, outputs[0].num_targets, outputs[0].total_weight)

    def _answered_loss(self, batch: Batch) -> LossOutput:
        """Return the loss of what `begin` and `step` answer, one request per target."""
        if self.training_unit == "sequence":
            batch = self._one_request_per_target(batch)
        assert batch.target_B is not None
        valid_B = batch.target_B >= 0
        counted_B = valid_B.float() if batch.weights is None else batch.weights * valid_B
        codes_BL = self.tokens_NL[batch.target_B.clamp(min=0)] - self.level_offsets_L
        rows_B = torch.arange(len(batch), device=self.device)
        nll_B = torch.zeros(len(batch), device=self.device)
        if not len(batch):
            return LossOutput.of(nll_B.sum(), valid_B.sum())
        logits_BK, state = self.begin(batch)
        for level in range(self.num_levels):
            if level:
                logits_BK, state = self.step(codes_BL[:, level - 1], state, rows_B)
            step_B = -logits_BK.log_softmax(-1)[rows_B, codes_BL[:, level]]
            if level and self.shared_vocabulary:  # what follows the end is certain
                step_B = step_B * (codes_BL[:, :level] != END).all(1)
            nll_B = nll_B + step_B
        return LossOutput.of((nll_B * counted_B).sum(), valid_B.sum(), counted_B.sum())

    def _one_request_per_target(self, batch: Batch) -> Batch:
        """Return the items of sequences as targets, each with the history before it."""
        batch = batch.last(self.config.max_history + 1)
        sequence_BH, times_BH = batch.history_BH, batch.times_BH
        valid_BH = sequence_BH >= 0
        if not self.config.member.predict_first:
            valid_BH[:, :1] = False
        which_P, place_P = valid_BH.nonzero(as_tuple=True)
        later_PH = torch.arange(sequence_BH.shape[1], device=self.device) >= place_P[:, None]
        return Batch(
            sequence_BH[which_P].masked_fill(later_PH, -1),
            sequence_BH[which_P, place_P],
            None if batch.weights is None else batch.weights[which_P, place_P],
            times_BH=None if times_BH is None else times_BH[which_P].masked_fill(later_PH, 0),
            now_B=None if times_BH is None else times_BH[which_P, place_P],
            users_B=None if batch.users_B is None else batch.users_B[which_P],
        )

    def begin(self, batch: Batch) -> tuple[Tensor, EnsembleState]:
        """Let every member read the histories; see `Backbone.begin`."""
        found = [member.begin(batch) for member in self.members]
        paths_MR = torch.zeros(len(found), len(batch), device=self.device)
        return self._mean(found, paths_MR)

    def step(
        self, codes_R: Tensor, state: EnsembleState, parents_R: Tensor
    ) -> tuple[Tensor, EnsembleState]:
        """Let every member append one code per row; see `Backbone.step`."""
        chosen_MR = state.logprobs_MRK[:, parents_R, codes_R]
        found = [
            member.step(codes_R, of_member, parents_R)
            for member, of_member in zip(self.members, state.states, strict=True)
        ]
        return self._mean(found, state.paths_MR[:, parents_R] + chosen_MR)

    def _mean(
        self, found: Sequence[tuple[Tensor, Any]], paths_MR: Tensor
    ) -> tuple[Tensor, EnsembleState]:
        """Return the logits of the mean over members, and the state."""
        logits_MRK = torch.stack([logits for logits, _ in found])
        if logits_MRK.shape[-1] and not self.spans_vocabulary:  # "raw" logits are logs already
            logits_MRK = logits_MRK.log_softmax(-1)
        states = tuple(of_member for _, of_member in found)
        shares_MR = paths_MR.log_softmax(0)
        logits_RK = (shares_MR[..., None] + logits_MRK).logsumexp(0)
        return logits_RK, EnsembleState(states, logits_MRK, paths_MR)

    def over_vocabulary(self) -> Self:
        """Return a view whose members speak over all tokens; see `Backbone.over_vocabulary`."""
        view = super().over_vocabulary()
        view._modules = dict(self._modules)  # the copy shares the dictionary
        view.members = module_list(member.over_vocabulary() for member in self.members)
        return view

    def code_scores(self, hidden: Tensor, level: int) -> Tensor:
        """Refuse: members have hidden states, their mean has none."""
        raise self._has_no_states()

    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Refuse: members have hidden states, their mean has none."""
        raise self._has_no_states()

    def _has_no_states(self) -> ConfigError:
        return ConfigError(
            "model.name: an ensemble has no hidden states that codes could be scored from, "
            "expected a single network. Choose the member's own name."
        )
