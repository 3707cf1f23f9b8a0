"""Can a small model spare a large one most of its turns, without changing a single result?

Draft and verify over levels (AtSpeed, arXiv 2410.05165, strict mode): a draft model searches some
levels ahead, the target scores the whole drafted tree in one call, and a level counts only if every
prefix that the target's own beam keeps was drafted. So the lists are those of `beam_search`, with
fewer and larger calls of the target. It knows no network; see `StepModel` and `LevelsModel`.

Shapes: B requests, W rows of a request, R = B*W, X drafted rows of a request, C children, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from genrec.decoding.beam import beam_search, step_logprobs
from genrec.decoding.boosts import Boosts
from genrec.decoding.csr import CSRIndex
from genrec.decoding.protocol import Beams, Filters, Scoring, StepModel, speaker
from genrec.errors import UserError

_NOWHERE = -1


@runtime_checkable
class LevelsModel(StepModel, Protocol):
    """A StepModel that scores a tree of several levels in one call; others are called in turn."""

    def step_levels(
        self, codes: Sequence[Tensor], state: Any, parents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Any]]:
        """Append a tree of codes.

        Args:
            codes: per level, the codes (R_i,) of its rows, as many for each request.
            state: what the previous call returned.
            parents: per level, the row that each row extends: of `state` for the first level, of
                the level before for the others.

        Returns:
            per level, logits (R_i, K) of what follows its rows, and the state after it.
        """


def step_levels(
    model: StepModel, codes: Sequence[Tensor], state: Any, parents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Any]]:
    """Do what `LevelsModel.step_levels` says with any StepModel, level by level if need be."""
    if isinstance(model, LevelsModel):
        return model.step_levels(codes, state, parents)
    logits, states = [], []
    for codes_R, parents_R in zip(codes, parents, strict=True):
        logits_RK, state = model.step(codes_R, state, parents_R)
        logits.append(logits_RK)
        states.append(state)
    return logits, states


@dataclass(frozen=True)
class SpeculationReport:
    """What drafting was good for.

    Args:
        num_levels: levels that the search asked for after the prefill.
        num_calls: calls of the target that answered them (levels without drafting).
        num_accepted: levels that needed no call of their own, `num_levels - num_calls`.
        rows_drafted: drafted rows that the target scored.
        rows_used: of these, rows that the search asked for.
    """

    num_levels: int
    num_calls: int
    num_accepted: int
    rows_drafted: int
    rows_used: int

    @property
    def accepted_per_call(self) -> float:
        """Mean number of levels that a call of the target settled beyond its own."""
        return self.num_accepted / max(1, self.num_calls)


def speculative_beam_search(
    target: StepModel,
    draft: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    width: int,
    k: int,
    ahead: int = 2,
    draft_width: int | None = None,
    draft_batch: Any = None,
    filters: Filters | None = None,
    boosts: Boosts | None = None,
    scoring: Scoring = "renormalized",
) -> tuple[Beams, SpeculationReport]:
    """Return what `beam_search(target, ...)` returns, and how many calls of the target it took.

    The lists are equal whatever the draft says: a poor draft costs calls, never quality. (Scores of
    networks differ in the last bits, as they do between any two batch shapes.) A level is accepted
    for the batch as a whole, so small batches accept more; the method is meant for large models at
    batch 1. Whether rows were drafted is read from the device after each level.

    Args:
        target: the model whose lists are wanted; a `LevelsModel` to gain anything.
        draft: a cheaper model over the same codes.
        batch: B requests for the target.
        constraint: as in `beam_search`.
        width: as in `beam_search`.
        k: as in `beam_search`.
        ahead: levels drafted per call (AtSpeed's gamma), >= 1.
        draft_width: prefixes drafted per level (default: 2 * width), >= width to accept anything.
        draft_batch: the same requests for the draft, if it reads another form of them.
        filters: as in `beam_search`; drafts know nothing of them.
        boosts: as in `beam_search`; drafts know nothing of them.
        scoring: as in `beam_search`.

    Raises:
        UserError: as in `beam_search`; ahead or draft_width below 1.
    """
    draft_width = 2 * width if draft_width is None else draft_width
    for name, value in (("ahead", ahead), ("draft_width", draft_width)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected an integer >= 1. Set e.g. {name}=2.")
    model = DraftedModel(
        target,
        draft,
        constraint,
        ahead=ahead,
        draft_width=draft_width,
        draft_batch=draft_batch,
        scoring=scoring,
    )
    beams = beam_search(
        model,
        batch,
        constraint,
        width=width,
        k=k,
        filters=filters,
        boosts=boosts,
        scoring=scoring,
    )
    return beams, model.report()


@dataclass(frozen=True)
class _Rows:
    """Prefixes of one depth that the target has scored.

    Args:
        nodes_BX: their nodes, -1 where a row is filling.
        scores_BX: what the drafts rank by, -inf for filling.
        logits_RK: the target's logits of the next level.
        target: the target's state.
        draft: the draft's state, or None at the last drafted depth, where `pending` tells how to
            get it.
        pending: codes, the draft's state before, and parents.
    """

    nodes_BX: Tensor
    scores_BX: Tensor
    logits_RK: Tensor
    target: Any
    draft: Any
    pending: tuple[Tensor, Any, Tensor] | None = None


@dataclass(frozen=True)
class _State:
    """What the search has chosen and what the target has scored ahead of it.

    Args:
        depth: codes chosen so far.
        rows: the scored prefixes of that depth.
        places_R: where the rows of the search stand among them.
        ahead: deeper scored prefixes, by depth.
    """

    depth: int
    rows: _Rows
    places_R: Tensor
    ahead: tuple[_Rows, ...]


class DraftedModel:
    """A StepModel that answers like the target, from drafted trees where it can.

    One search at a time: it counts what it does. See `speculative_beam_search`.
    """

    def __init__(
        self,
        target: StepModel,
        draft: StepModel,
        constraint: CSRIndex,
        *,
        ahead: int,
        draft_width: int,
        draft_batch: Any = None,
        scoring: Scoring = "renormalized",
    ) -> None:
        self.target, self.draft = speaker(target, scoring), speaker(draft, scoring)
        self.constraint = constraint
        self.num_ahead, self.draft_width = ahead, draft_width
        self.draft_batch, self.scoring = draft_batch, scoring
        self._counts = {"levels": 0, "calls": 0, "drafted": 0, "used": 0}

    def report(self) -> SpeculationReport:
        """Return the counts of the last search."""
        counts = self._counts
        accepted = counts["levels"] - counts["calls"]
        return SpeculationReport(
            counts["levels"], counts["calls"], accepted, counts["drafted"], counts["used"]
        )

    def over_vocabulary(self) -> DraftedModel:
        """Return itself: under scoring="raw" it already asks both models over their vocabulary."""
        return self

    def begin(self, batch: Any) -> tuple[Tensor, _State]:
        """Read the histories with both models."""
        self._counts = dict.fromkeys(self._counts, 0)
        logits_BK, target = self.target.begin(batch)
        _, draft = self.draft.begin(batch if self.draft_batch is None else self.draft_batch)
        roots_B1 = self.constraint.root(len(logits_BK))[:, None]
        rows = _Rows(roots_B1, torch.zeros_like(roots_B1).float(), logits_BK, target, draft)
        places_B = torch.arange(len(logits_BK), device=logits_BK.device)
        return logits_BK, _State(0, rows, places_B, ())

    def step(self, codes_R: Tensor, state: _State, parents_R: Tensor) -> tuple[Tensor, _State]:
        """Answer from the drafted tree if all rows are in it, else draft and call the target."""
        self._counts["levels"] += 1
        num_requests = len(state.rows.nodes_BX)
        places_R = state.places_R[parents_R]
        parents = state.rows.nodes_BX.reshape(-1)[places_R].clamp(min=0)
        nodes_BW = self.constraint.levels[state.depth].find(parents, codes_R).view(num_requests, -1)
        if state.ahead:
            found = self._found(nodes_BW, state.ahead[0], state.depth + 1)
            if found is not None:
                rows = state.ahead[0]
                self._counts["used"] += len(found)
                return rows.logits_RK[found], _State(state.depth + 1, rows, found, state.ahead[1:])
        return self._call_target(codes_R, state, places_R, nodes_BW)

    def _found(self, nodes_BW: Tensor, rows: _Rows, depth: int) -> Tensor | None:
        """Return the places of prefixes among drafted rows, or None if one is missing.

        Where nothing is left to decide any answer will do.
        """
        same_BWX = nodes_BW[:, :, None] == rows.nodes_BX[:, None]
        known_BW = same_BWX.any(2) | self.constraint.is_settled(nodes_BW, depth, self.scoring)
        if not bool(known_BW.all()):
            return None
        first_B1 = torch.arange(len(nodes_BW), device=nodes_BW.device)[:, None]
        return (first_B1 * rows.nodes_BX.shape[1] + same_BWX.int().argmax(2)).reshape(-1)

    def _call_target(
        self, codes_R: Tensor, state: _State, places_R: Tensor, nodes_BW: Tensor
    ) -> tuple[Tensor, _State]:
        """Draft below the rows of the search, and score them and the drafts in one call."""
        codes, parents, draft = [codes_R], [places_R], self._draft_state(state.rows)
        fronts = [(nodes_BW, self._scores(state, places_R, nodes_BW))]
        states: list[Any] = []
        deepest = min(state.depth + 1 + self.num_ahead, self.constraint.depth - 1)
        for depth in range(state.depth + 1, deepest):
            logits_RK, draft_after = self.draft.step(codes[-1], draft, parents[-1])
            grown = self._grow(*fronts[-1], logits_RK, depth)
            if grown is None:
                break
            states.append((draft_after, None))
            draft = draft_after
            codes.append(grown[0])
            parents.append(grown[1])
            fronts.append(grown[2])
        states.append((None, (codes[-1], draft, parents[-1])))
        logits, targets = step_levels(self.target, codes, state.rows.target, parents)
        self._counts["calls"] += 1
        self._counts["drafted"] += sum(len(rows) for rows in codes[1:])
        scored = [
            _Rows(*front, answer, target, *drafts)
            for front, answer, target, drafts in zip(fronts, logits, targets, states, strict=True)
        ]
        places_R = torch.arange(len(codes_R), device=codes_R.device)
        return logits[0], _State(state.depth + 1, scored[0], places_R, tuple(scored[1:]))

    def _draft_state(self, rows: _Rows) -> Any:
        """Return the draft's state at scored prefixes; the deepest drafts get it when needed."""
        return rows.draft if rows.pending is None else self.draft.step(*rows.pending)[1]

    def _scores(self, state: _State, places_R: Tensor, nodes_BW: Tensor) -> Tensor:
        """Return the target's log-probabilities of the prefixes that the search asks for."""
        level, nodes_R = self.constraint.levels[state.depth], nodes_BW.reshape(-1)
        parents_R = state.rows.nodes_BX.reshape(-1)[places_R].clamp(min=0)
        expansion = level.expand(parents_R)
        logits_RK = state.rows.logits_RK[places_R]
        steps_RC = step_logprobs(expansion, logits_RK, self.scoring)
        steps_R = steps_RC.gather(1, level.columns(parents_R, nodes_R)[:, None])[:, 0]
        scores_R = state.rows.scores_BX.reshape(-1)[places_R] + steps_R
        return scores_R.nan_to_num(nan=-torch.inf).view(nodes_BW.shape)

    def _grow(
        self, nodes_BX: Tensor, scores_BX: Tensor, logits_RK: Tensor, depth: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None:
        """Return the best prefixes one level deeper: codes, parents, and (nodes, scores).

        None where nothing below is left to decide. Such prefixes are not drafted: the search does
        not ask for them.
        """
        expansion = self.constraint.levels[depth].expand(nodes_BX.reshape(-1).clamp(min=0))
        steps_RC = step_logprobs(expansion, logits_RK, self.scoring)
        settled_RC = self.constraint.is_settled(expansion.states(), depth + 1, self.scoring)
        drafted_RC = expansion.valid_RC & ~settled_RC
        grown_RC = torch.where(drafted_RC, scores_BX.reshape(-1, 1) + steps_RC, -torch.inf)
        grown_BY = grown_RC.nan_to_num(nan=-torch.inf).view(len(nodes_BX), -1)
        count = min(self.draft_width, int((grown_BY > -torch.inf).sum(1).max()))
        if count == 0:
            return None
        scores_BY, chosen_BY = grown_BY.topk(count, dim=1)
        num_columns = steps_RC.shape[1]
        first_B1 = torch.arange(len(nodes_BX), device=nodes_BX.device)[:, None] * nodes_BX.shape[1]
        parents_BY = first_B1 + chosen_BY // num_columns
        codes_BY, nodes_BY = expansion.select(parents_BY, chosen_BY % num_columns)
        nodes_BY = nodes_BY.masked_fill(scores_BY == -torch.inf, _NOWHERE)
        return codes_BY.reshape(-1), parents_BY.reshape(-1), (nodes_BY, scores_BY)
