"""Which k items does a model rank highest, found with a beam over the tree of the catalogue?

One search for all backbones: constrained, renormalised, batched, with fixed shapes and no
synchronisation with the host. It knows neither networks (see `StepModel`) nor item ids. The slow
twin is `trie.reference_beam_search`; docs/decoding.md explains the method.

Shapes: B requests, W beam width, U rows of a request that the model sees (U <= W), R = B*U rows,
C columns of children, K codes, X candidates of a request, Y of them chosen, L levels, k results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from genrec.decoding.boosts import Boosts
from genrec.decoding.csr import CSRIndex
from genrec.decoding.filters import NodeFilter
from genrec.decoding.levels import Expansion
from genrec.decoding.protocol import (
    NO_ROW,
    Beams,
    Filters,
    Scoring,
    StepModel,
    check_numbers,
    check_search,
    speaker,
)

# Added to the high bits of a key, it carries NaN, and only NaN, over into the sign.
_NAN_FIRST = (0x7FFF_FFFF - 0x7F80_0000) << 32


@torch.no_grad()
def beam_search(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    width: int,
    k: int,
    filters: Filters | None = None,
    boosts: Boosts | None = None,
    scoring: Scoring = "renormalized",
    static_shapes: bool | None = None,
) -> Beams:
    """Return the k best items of each request that a beam of `width` prefixes finds.

    A score is the sum of the natural log-probabilities of the codes. Under "renormalized" (default)
    each is taken among the codes that lead to an item of the catalogue, so that the probabilities
    of all items sum to 1; under "level", among all codes of the level; under "raw", among all
    tokens of the model. Filters and rules take items away and leave the scores of the others as
    they are. What follows the end of a semantic ID costs nothing.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests, whatever `model.begin` reads.
        constraint: the catalogue, or a restricted view of it, on the model's device.
        width: prefixes kept after each level, >= 1.
        k: list length, 1 <= k <= width (a k above the number of items is padded instead).
        filters: rows that each request excludes or allows.
        boosts: what each item's score gets on top, built on the same constraint.
        scoring: "renormalized", "level" or "raw" (needs a `VocabularyModel`).
        static_shapes: True: shapes follow from the arguments alone and nothing is read back from
            the device. False: the number of prefixes that still need the model is read at each
            level, and only these run. None: False on the CPU, where reading costs nothing, else
            True. The results are equal.

    Returns:
        Lists ordered by (score descending, row ascending), padded to k columns; all padding where
        the filters leave nothing.

    Raises:
        UserError: width or k below 1, k above width, filters that do not fit batch or catalogue, or
            a model that gives NaN.
    """
    check_search(width, k, constraint.num_items, scoring)
    model = speaker(model, scoring)
    logits_BK, state = model.begin(batch)
    rules = None if filters is None else NodeFilter(constraint, filters, len(logits_BK))
    search = Search(
        constraint, rules=rules, scoring=scoring, boosts=boosts, static_shapes=static_shapes
    )
    beams = search.run(model, logits_BK, state, width=width, k=k)
    check_numbers(beams.logprobs_Bk)
    return beams


@dataclass(frozen=True)
class _Front:
    """The kept prefixes of one depth, best first.

    Args:
        scores_BW: log-probabilities, -inf for beams that hold nothing.
        nodes_BW: nodes of that depth, valid ones even where a beam holds nothing.
        codes_BW: their last codes.
        parents_BW: the row of the model's last call that each beam extends (any row of the request
            where the model need not see the beam again).
    """

    scores_BW: Tensor
    nodes_BW: Tensor
    codes_BW: Tensor
    parents_BW: Tensor


@dataclass(frozen=True)
class _Rows:
    """Which beams the model evaluates at a level.

    Args:
        slots_BU: their places in the front.
        live_BU: False for filling.
        rest_BW: the scores of the settled beams (-inf elsewhere), None where none can be settled.
    """

    slots_BU: Tensor
    live_BU: Tensor
    rest_BW: Tensor | None


@dataclass(frozen=True)
class _Candidates:
    """Extensions of a front by one code: U*C from evaluated rows, then W settled beams, if any.

    Args:
        scores_BX: log-probabilities, -inf where a cell is no child or not allowed.
        keys_BX: what ranks: the scores, or with boosts the bound of what lies below.
        rows: where the first U*C come from.
        expansion: the children of those rows, None when U = 0.
    """

    scores_BX: Tensor
    keys_BX: Tensor
    rows: _Rows
    expansion: Expansion | None

    @property
    def num_columns(self) -> int:
        return 1 if self.expansion is None else self.expansion.valid_RC.shape[1]

    @property
    def num_expanded(self) -> int:
        return self.rows.slots_BU.shape[1] * self.num_columns


class Search:
    """A beam search over an index under given rules and scoring; see `beam_search`.

    `run` may be called several times on one prefill, for example with growing widths.
    """

    def __init__(
        self,
        constraint: CSRIndex,
        *,
        rules: NodeFilter | None = None,
        scoring: Scoring = "renormalized",
        boosts: Boosts | None = None,
        static_shapes: bool | None = None,
    ) -> None:
        self.constraint = constraint
        self.rules = rules
        self.scoring = scoring
        self.boosts = boosts
        self.static_shapes = (
            constraint.device.type != "cpu" if static_shapes is None else static_shapes
        )
        # What lies below a settled node costs nothing, whatever the model says (one item is left,
        # or its semantic ID has ended): the model need not see the beam again.
        self.settles = scoring == "renormalized" or constraint.shared_vocabulary
        levels = range(constraint.depth)
        running = (n for n in levels if constraint.num_unsettled(n + 1, scoring) == 0)
        self.last = next(running, levels[-1])

    def run(self, model: StepModel, logits_BK: Tensor, state: Any, *, width: int, k: int) -> Beams:
        """Search on from a prefill: what `begin` returned, of `speaker(model, scoring)`."""
        # Not a decorator: torch.compile cannot look through one on a method.
        with torch.no_grad():
            return self._run(model, logits_BK, state, width, k)

    def _run(self, model: StepModel, logits_BK: Tensor, state: Any, width: int, k: int) -> Beams:
        front = self._root(len(logits_BK), logits_BK.device)
        pruned_B = torch.full((len(logits_BK),), -torch.inf, device=logits_BK.device)
        for level in range(self.last + 1):
            rows = self._rows_to_run(front, level)
            if level and rows.slots_BU.shape[1]:
                codes_R = front.codes_BW.gather(1, rows.slots_BU).reshape(-1)
                parents_R = front.parents_BW.gather(1, rows.slots_BU).reshape(-1)
                logits_BK, state = model.step(codes_R, state, parents_R)
            candidates = self._extend(front, rows, logits_BK, level)
            if level < self.last:
                keep = min(width, self.constraint.num_nodes[level + 1])
                front, best_pruned_B = self._prune(front, candidates, level, keep)
                pruned_B = torch.maximum(pruned_B, best_pruned_B)
        return self._finish(front, candidates, k, pruned_B)

    def _root(self, num_requests: int, device: torch.device) -> _Front:
        zeros_B1 = torch.zeros(num_requests, 1, dtype=torch.int64, device=device)
        requests_B1 = torch.arange(num_requests, device=device)[:, None]
        return _Front(zeros_B1.float(), zeros_B1, zeros_B1, requests_B1)

    def _rows_to_run(self, front: _Front, level: int) -> _Rows:
        """Choose the beams that still have several items below them, and count them."""
        width = front.scores_BW.shape[1]
        live_BW = front.scores_BW != -torch.inf  # NaN goes on and shows in the end
        if not self.settles or level == 0:
            slots_BW = torch.arange(width, device=live_BW.device).expand_as(live_BW)
            return _Rows(slots_BW, live_BW, None)
        open_BW = live_BW & ~self.constraint.is_settled(front.nodes_BW, level, self.scoring)
        num_unsettled = self.constraint.num_unsettled(level, self.scoring)
        num_rows = min(width, num_unsettled)
        if not self.static_shapes:
            num_rows = min(num_rows, int(open_BW.sum(1).max()))
        # A stable sort keeps the order of the beams, which is the order of their scores.
        slots_BU = (~open_BW).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_rows]
        rest_BW = None
        if num_rows == 0 or num_unsettled < self.constraint.num_nodes[level]:
            rest_BW = front.scores_BW.masked_fill(open_BW, -torch.inf)
        return _Rows(slots_BU, open_BW.gather(1, slots_BU), rest_BW)

    def _extend(self, front: _Front, rows: _Rows, logits_RK: Tensor, level: int) -> _Candidates:
        """Score all children of the evaluated rows; settled beams keep their scores."""
        parts, bounds, expansion = [], [], None
        if rows.slots_BU.shape[1]:
            nodes_BU = front.nodes_BW.gather(1, rows.slots_BU)
            expansion = self.constraint.levels[level].expand(nodes_BU.reshape(-1))
            valid_RC = expansion.valid_RC
            if self.rules is not None:
                valid_RC = self.rules.apply(
                    expansion, nodes_BU, rows.live_BU, level, static_shapes=self.static_shapes
                )
            steps_RC = step_logprobs(expansion, logits_RK, self.scoring)
            scores_BU = front.scores_BW.gather(1, rows.slots_BU)
            valid_RC = valid_RC & rows.live_BU.reshape(-1, 1)
            scores_RC = torch.where(valid_RC, scores_BU.reshape(-1, 1) + steps_RC, -torch.inf)
            parts.append(scores_RC.view(len(nodes_BU), -1))
            if self.boosts is not None:
                bounds_RC = self.boosts.bound(expansion.states(), level + 1)
                bounds.append(bounds_RC.view(len(nodes_BU), -1))
        if rows.rest_BW is not None:
            parts.append(rows.rest_BW)
            if self.boosts is not None:
                bounds.append(self.boosts.bound(front.nodes_BW, level))
        scores_BX = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        keys_BX = scores_BX + torch.cat(bounds, 1) if bounds else scores_BX
        return _Candidates(scores_BX, keys_BX, rows, expansion)

    def _prune(
        self, front: _Front, candidates: _Candidates, level: int, keep: int
    ) -> tuple[_Front, Tensor]:
        """Return the best `keep` candidates and the key (B,) of the best one left out."""
        chosen_BY, keys_BY = self._best(candidates, _places(candidates), keep + 1)
        pruned_B = torch.full_like(keys_BY[:, 0], -torch.inf)
        if keys_BY.shape[1] > keep:
            pruned_B, chosen_BY = keys_BY[:, keep], chosen_BY[:, :keep]
        return self._front_of(front, candidates, chosen_BY, level), pruned_B

    def _best(self, candidates: _Candidates, ties_BX: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return (places, keys) of the best candidates."""
        chosen_BY = best_places(candidates.keys_BX, ties_BX, count, signed=self.boosts is not None)
        return chosen_BY, candidates.keys_BX.gather(1, chosen_BY)

    def _front_of(
        self,
        front: _Front,
        candidates: _Candidates,
        chosen_BY: Tensor,
        level: int,
    ) -> _Front:
        num_rows, expanded = candidates.rows.slots_BU.shape[1], candidates.num_expanded
        codes_BY = parents_BY = torch.zeros_like(chosen_BY)
        if candidates.expansion is not None:
            cells_BY = chosen_BY.clamp(max=expanded - 1)
            first_B1 = torch.arange(len(cells_BY), device=cells_BY.device)[:, None] * num_rows
            parents_BY = first_B1 + cells_BY // candidates.num_columns
            codes_BY, nodes_BY = candidates.expansion.select(
                parents_BY, cells_BY % candidates.num_columns
            )
        if candidates.rows.rest_BW is not None:
            beams_BY = (chosen_BY - expanded).clamp(min=0)
            only_BY = self.constraint.only_child(front.nodes_BW.gather(1, beams_BY), level)
            nodes_BY = torch.where(chosen_BY < expanded, nodes_BY, only_BY) if expanded else only_BY
        return _Front(candidates.scores_BX.gather(1, chosen_BY), nodes_BY, codes_BY, parents_BY)

    def _finish(self, front: _Front, candidates: _Candidates, k: int, pruned_B: Tensor) -> Beams:
        """Rank the complete items by (score, row), pad to k, and judge the certificate."""
        constraint, depth = self.constraint, self.last + 1
        parts = []
        if candidates.expansion is not None:
            nodes_RC = candidates.expansion.states()
            positions_RC = constraint.first_position(nodes_RC, depth)
            parts.append(positions_RC.view(len(pruned_B), -1))
        if candidates.rows.rest_BW is not None:
            parts.append(constraint.first_position(front.nodes_BW, self.last))
        positions_BX = torch.cat(parts, 1)
        rows_BX = constraint.row(positions_BX)
        chosen_BY, keys_BY = self._best(candidates, rows_BX, k)
        scores_BY = candidates.scores_BX.gather(1, chosen_BY)
        codes_BYL = constraint.codes(positions_BX.gather(1, chosen_BY))
        empty_BY = scores_BY == -torch.inf
        rows_BY = rows_BX.gather(1, chosen_BY).masked_fill(empty_BY, NO_ROW)
        codes_BYL = codes_BYL.masked_fill(empty_BY[..., None], NO_ROW)
        missing = k - rows_BY.shape[1]
        rows_Bk = pad(rows_BY, (0, missing), value=NO_ROW)
        # Strictly: below a prefix that ties with the k-th item may lie an item with a smaller row.
        worst_B = keys_BY[:, -1] if missing <= 0 else torch.full_like(pruned_B, -torch.inf)
        certified_B = (worst_B > pruned_B) | (pruned_B == -torch.inf)
        return Beams(
            rows_Bk,
            pad(scores_BY, (0, missing), value=-torch.inf),
            pad(codes_BYL, (0, 0, 0, missing), value=NO_ROW),
            certified_B,
            None if self.boosts is None else self.boosts.of_rows(rows_Bk),
            pruned_B,
        )


def step_logprobs(expansion: Expansion, logits_RK: Tensor, scoring: Scoring) -> Tensor:
    """Return the log-probability of each child, (R, C) float32; undefined where there is none.

    Under "renormalized" it is among all children in the catalogue, whether or not a rule or a
    filter closes some.
    """
    logits_RK = logits_RK.float()
    if scoring == "raw":  # normalised by the model; rounding may leave them above 0
        return expansion.at_columns(logits_RK.clamp(max=0))
    if scoring == "level":
        return expansion.at_columns(logits_RK.log_softmax(1))
    logits_RC = expansion.at_columns(logits_RK)
    return logits_RC.masked_fill(~expansion.present_RC, -torch.inf).log_softmax(1)


def _places(candidates: _Candidates) -> Tensor:
    """Return the order of equal scores at inner levels: by parent beam, then by code."""
    columns = candidates.num_columns
    slots_BU = candidates.rows.slots_BU
    columns_C = torch.arange(columns, device=slots_BU.device)
    places_BX = (slots_BU[..., None] * columns + columns_C).view(len(slots_BU), -1)
    rest_BW = candidates.rows.rest_BW
    if rest_BW is None:
        return places_BX
    beams_BW = torch.arange(rest_BW.shape[1], device=slots_BU.device).expand_as(rest_BW)
    return torch.cat([places_BX, beams_BW * columns], 1)


def best_places(keys_BX: Tensor, ties_BX: Tensor, count: int, *, signed: bool = False) -> Tensor:
    """Return the places of the best candidates, by (key descending, tie ascending), NaN first.

    `topk` leaves the order of equal values open. So a key's bits and the tie are packed into one
    integer, in which no two are equal.

    Args:
        keys_BX: float32; all <= 0 unless `signed`.
        ties_BX: int64, 0 <= tie < 2**32, different within a row.
        count: how many places (fewer where X is smaller).
        signed: keys may be above 0.
    """
    if signed:
        bits_BX = (keys_BX + 0.0).view(torch.int32)  # one zero instead of two
        bits_BX = ~(bits_BX ^ ((bits_BX >> 31) & 0x7FFF_FFFF))
        bits_BX = bits_BX.masked_fill(keys_BX.isnan(), torch.iinfo(torch.int32).min)
        packed_BX = (bits_BX.long() << 32) + ties_BX
    else:
        # The bits of a magnitude grow as a key falls; those of NaN are beyond infinity's.
        packed_BX = (keys_BX.abs().view(torch.int32).long() << 32) + (ties_BX + _NAN_FIRST)
    return packed_BX.topk(min(count, packed_BX.shape[1]), dim=1, largest=False).indices
