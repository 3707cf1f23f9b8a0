"""What is the exact log-probability of given items, and which list is provably the best?

Scores are evaluated over distinct prefixes, each once; a search widens until its certificate holds
or it is exhaustive. `score_*` know no filters, which change no score: items are rated against the
whole catalogue. What a restricted view denies scores -inf.

Shapes: B requests, C candidates, S slots (distinct prefixes of a request), N items, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genrec.decoding.beam import Search, step_logprobs
from genrec.decoding.boosts import Boosts
from genrec.decoding.csr import CSRIndex
from genrec.decoding.filters import NodeFilter
from genrec.decoding.protocol import (
    Beams,
    Filters,
    Scoring,
    StepModel,
    check_numbers,
    check_search,
    speaker,
)
from genrec.errors import UserError

_FREE = torch.iinfo(torch.int64).max  # sorts behind every node


@torch.no_grad()
def score_candidates(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    rows_BC: Tensor,
    *,
    scoring: Scoring = "renormalized",
) -> Tensor:
    """Return the exact natural log-probabilities of given items.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue.
        rows_BC: int64 catalogue rows, any order, repeats allowed, -1 for none.
        scoring: as in `beam_search`; under "renormalized" the whole catalogue sums to 1.

    Returns:
        (B, C) float32; -inf where the row is -1 or a rule of the constraint denies it.

    Raises:
        UserError: rows outside the catalogue, or not one list per request.
    """
    model = speaker(model, scoring)
    logits_BK, state = model.begin(batch)
    rows_BC = _checked_rows(rows_BC, logits_BK, constraint)
    positions_BC = constraint.positions(rows_BC.clamp(min=0))
    scores_BC = _score(model, logits_BK, state, constraint, positions_BC, scoring)
    scores_BC = scores_BC.masked_fill(rows_BC < 0, -torch.inf)
    check_numbers(scores_BC)
    return scores_BC


@torch.no_grad()
def score_levels(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    rows_BC: Tensor,
    *,
    scoring: Scoring = "renormalized",
) -> Tensor:
    """Return the exact log-probability of each code of given items, given the codes before it.

    With the scoring of a search, the levels add up to its log-probabilities, filtered or not.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue.
        rows_BC: int64 catalogue rows, -1 for none.
        scoring: as in `beam_search`.

    Returns:
        (B, C, L) float32, L the levels of the constraint; 0 where the row is -1 and where what
        follows is certain.

    Raises:
        UserError: rows outside the catalogue, or not one list per request.
    """
    model = speaker(model, scoring)
    logits_BK, state = model.begin(batch)
    rows_BC = _checked_rows(rows_BC, logits_BK, constraint)
    positions_BC = constraint.positions(rows_BC.clamp(min=0))
    parts: list[Tensor] = []
    _score(model, logits_BK, state, constraint, positions_BC, scoring, parts)
    settled = [torch.zeros_like(parts[0])] * (constraint.depth - len(parts))
    levels_BCL = torch.stack([*parts, *settled], dim=2)
    levels_BCL = levels_BCL.masked_fill((rows_BC < 0)[..., None], 0.0)
    check_numbers(levels_BCL.flatten(1))
    return levels_BCL


def _checked_rows(rows_BC: Tensor, logits_BK: Tensor, constraint: CSRIndex) -> Tensor:
    rows_BC = torch.as_tensor(rows_BC, dtype=torch.int64, device=logits_BK.device)
    if rows_BC.ndim != 2 or len(rows_BC) != len(logits_BK):
        raise UserError(
            f"rows: got shape {tuple(rows_BC.shape)}, expected ({len(logits_BK)}, candidates): one "
            "list per request."
        )
    outside = (rows_BC < -1) | (rows_BC >= constraint.num_items)
    if outside.any():
        raise UserError(
            f"rows: got row {int(rows_BC[outside][0])}, expected -1 (none) or 0 <= row < "
            f"{constraint.num_items}. Take rows from the ItemIndex of this constraint (rows_of)."
        )
    return rows_BC


@torch.no_grad()
def score_catalogue(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    scoring: Scoring = "renormalized",
    max_rows: int = 16_384,
) -> Tensor:
    """Return the exact log-probabilities of all items, (B, N) float32, column = catalogue row.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue.
        scoring: as in `beam_search`.
        max_rows: most prefixes (over all requests) that the model sees in one call; bounds memory.
            Items are taken in chunks along the sorted catalogue, so only the prefixes at the edges
            of chunks are evaluated twice.
    """
    model = speaker(model, scoring)
    logits_BK, state = model.begin(batch)
    num_requests, num_items = len(logits_BK), constraint.num_items
    chunk = max(1, max_rows // num_requests)
    scores_BN = torch.empty(num_requests, num_items, device=logits_BK.device)
    for start in range(0, num_items, chunk):
        stop = min(start + chunk, num_items)
        positions_C = torch.arange(start, stop, device=logits_BK.device)
        positions_BC = positions_C.expand(num_requests, -1)
        scores_BC = _score(model, logits_BK, state, constraint, positions_BC, scoring)
        scores_BN[:, constraint.row(positions_C)] = scores_BC
    check_numbers(scores_BN)
    return scores_BN


@torch.no_grad()
def invalid_mass(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    scoring: Scoring = "level",
    max_rows: int = 16_384,
) -> Tensor:
    """Return the probability that the model spends on what is not in the catalogue, (B,) float64.

    One minus the probability of all items: under "level" that of code combinations which no item
    has, under "raw" also that of codes at the wrong place. A diagnostic of the model and exact, at
    the price of `score_catalogue`; 0 up to rounding under "renormalized".

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue.
        scoring: as in `beam_search`.
        max_rows: as in `score_catalogue`.
    """
    scores_BN = score_catalogue(model, batch, constraint, scoring=scoring, max_rows=max_rows)
    return 1.0 - scores_BN.double().exp().sum(1)


def _score(
    model: StepModel,
    logits_RK: Tensor,
    state: Any,
    constraint: CSRIndex,
    positions_BC: Tensor,
    scoring: Scoring,
    parts: list[Tensor] | None = None,
) -> Tensor:
    """Add up the steps of the paths to given leaves; one model row per distinct open prefix.

    `parts` gets the steps themselves, (B, C) for each level that had an open prefix.
    """
    num_requests = len(positions_BC)
    first_B1 = torch.arange(num_requests, device=positions_BC.device)[:, None]
    path = constraint.ancestors(positions_BC)
    scores_BC = torch.zeros(positions_BC.shape, device=positions_BC.device)
    slots_BC = torch.zeros_like(positions_BC)
    nodes_BS = torch.zeros_like(first_B1)
    for depth, level in enumerate(constraint.levels):
        if depth:
            open_BC = ~constraint.is_settled(path[depth], depth, scoring)
            last_slot = nodes_BS.shape[1] - 1
            parents_BC = first_B1 * nodes_BS.shape[1] + slots_BC.clamp(max=last_slot)
            slots_BC, (nodes_BS, parents_BS) = distinct(path[depth], open_BC, parents_BC)
            if nodes_BS.shape[1] == 0:
                break
            codes_BS = constraint.levels[depth - 1].codes[nodes_BS].long()
            logits_RK, state = model.step(codes_BS.reshape(-1), state, parents_BS.reshape(-1))
        expansion = level.expand(nodes_BS.reshape(-1))
        steps_RC = step_logprobs(expansion, logits_RK, scoring)
        columns_BC = level.columns(path[depth], path[depth + 1])
        # Complete candidates have no row (slot S): they read any cell and add nothing.
        rows_BC = first_B1 * nodes_BS.shape[1] + slots_BC.clamp(max=nodes_BS.shape[1] - 1)
        found_BC = steps_RC[rows_BC, columns_BC.clamp(max=steps_RC.shape[1] - 1)]
        step_BC = torch.where(slots_BC < nodes_BS.shape[1], found_BC, 0.0)
        scores_BC += step_BC
        if parts is not None:
            parts.append(step_BC)
    if constraint.allowed_before is not None:
        allowed_BC = constraint.rank(positions_BC + 1) > constraint.rank(positions_BC)
        scores_BC = scores_BC.masked_fill(~allowed_BC, -torch.inf)
    return scores_BC


def distinct(
    nodes_BC: Tensor, open_BC: Tensor, parents_BC: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Number each request's distinct open nodes.

    Returns:
        The number (slot) of each candidate's node, S for those that are not open; and, (B, S) each,
        the slots' nodes and parent rows. Short requests repeat a slot of theirs, or hold node 0.
    """
    num_requests, count = nodes_BC.shape
    keys_BC, order_BC = nodes_BC.masked_fill(~open_BC, _FREE).sort(dim=1)
    new_BC = torch.ones_like(open_BC)
    new_BC[:, 1:] = keys_BC[:, 1:] != keys_BC[:, :-1]
    rank_BC = new_BC.cumsum(1) - 1
    taken_BC = keys_BC != _FREE
    size = int(torch.where(taken_BC, rank_BC + 1, 0).max()) if count else 0
    rank_BC = torch.where(taken_BC, rank_BC, size)
    slots_BC = torch.empty_like(rank_BC).scatter_(1, order_BC, rank_BC)
    # One spare slot takes whatever is not open and is cut off.
    places_BS = torch.zeros(num_requests, size + 1, dtype=torch.int64, device=nodes_BC.device)
    places_BS.scatter_(1, slots_BC, torch.arange(count, device=nodes_BC.device).expand_as(slots_BC))
    places_BS = places_BS[:, :size]
    return slots_BC, (nodes_BC.gather(1, places_BS), parents_BC.gather(1, places_BS))


@torch.no_grad()
def exact_search(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    k: int,
    width: int | None = None,
    max_width: int | None = None,
    filters: Filters | None = None,
    boosts: Boosts | None = None,
    scoring: Scoring = "renormalized",
) -> Beams:
    """Return the provably best k items: the beam doubles until every list is certified.

    Histories are read once. Without `max_width` the search ends at the latest when the beam holds
    every prefix of the catalogue, which is exact.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue.
        k: list length, >= 1.
        width: the first width (default: k).
        max_width: stop widening there; `certified_B` then says which lists are proven.
        filters: as in `beam_search`.
        boosts: as in `beam_search`.
        scoring: as in `beam_search`.

    Raises:
        UserError: as `beam_search`, or `max_width` below `width`.
    """
    exhaustive = max(constraint.num_nodes[:-1])
    width = min(k, constraint.num_items) if width is None else width
    check_search(width, k, constraint.num_items, scoring)
    limit = max(exhaustive, width) if max_width is None else max_width
    if limit < width:
        raise UserError(
            f"max_width: got {max_width}, expected at least the first width {width}. Raise it, or "
            "leave it out to search until proven."
        )
    model = speaker(model, scoring)
    logits_BK, state = model.begin(batch)
    rules = None if filters is None else NodeFilter(constraint, filters, len(logits_BK))
    search = Search(constraint, rules=rules, scoring=scoring, boosts=boosts)
    while True:
        beams = search.run(model, logits_BK, state, width=width, k=k)
        check_numbers(beams.logprobs_Bk)
        if width >= limit or bool(beams.certified_B.all()):
            return beams
        width = min(2 * width, limit)
