"""Collision policies that keep the levels: which last code does each colliding item get instead?

They weigh distances to the codes of the last level, which the tokenizer supplies, and see neither
vectors nor a model; the outcome depends on the item ids, not on the order of the rows.

Shapes: N items, L levels, R rows under one prefix, C of them colliding, K codes of the last level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from genrec.errors import UserError
from genrec.runtime import get_logger
from genrec.tokenizers.collisions.numbering import (
    IntArray,
    Unique,
    collision_groups,
    extra_level,
    grouped,
    id_order,
)

log = get_logger(__name__)

Distances = Callable[[IntArray], np.ndarray]
"""From rows (R,) to the squared distances (R, K) of these items to every last code."""
BATCH_ENTRIES = 1 << 23
"""Distances asked for at once (32 to 64 MB)."""
EPSILON, NUM_ITERATIONS, NUM_ROUNDS = 0.003, 50, 20
"""Sinkhorn temperature, normalisations of a plan, and rounds, as in LC-Rec's export."""


def assign_last(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    item_ids: Sequence[str],
    *,
    distances: Distances | None = None,
) -> Unique:
    """Give all items under a colliding prefix distinct last codes at the least total distance.

    Solved exactly, as a linear assignment, for each prefix (first L - 1 codes) with a collision;
    all other items keep their codes. The number of levels does not change.

    Args:
        codes_NL: codes with duplicates.
        codebook_sizes: L sizes.
        item_ids: N ids; they order the items, so that equal distances are settled the same way
            whatever the order of the rows.
        distances: returns the squared distances (R, K) of the items at given rows to every last
            code; `ItemTokenizer.collision_policy(name, catalog)` supplies it.

    Raises:
        UserError: a prefix holds more items than the last level has codes, or no distances.
    """
    ask = _supplied("assign_last", distances)
    codes = np.array(codes_NL, dtype=np.int32)
    prefixes = _colliding_prefixes(codes, item_ids)
    _require_room("assign_last", codes, prefixes, codebook_sizes)
    for rows, distances_RK in _weighed(prefixes, codebook_sizes, ask):
        places, last = linear_sum_assignment(distances_RK)
        codes[rows[places], -1] = last
    return codes, tuple(map(int, codebook_sizes))


def nearest_free(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    item_ids: Sequence[str],
    *,
    distances: Distances | None = None,
) -> Unique:
    """Give colliding items the nearest last codes that are free, one after the other.

    Under each colliding prefix, (item, code) pairs are taken in the order of their distance (equal
    ones by item id, then by code), skipping items that have a code and codes that are taken. Items
    that collide with nobody keep theirs, so fewer items move than by `assign_last`, at a total
    distance that is at least as large.

    Args:
        codes_NL: codes with duplicates.
        codebook_sizes: L sizes.
        item_ids: N ids.
        distances: as of `assign_last`.

    Raises:
        UserError: a prefix holds more items than the last level has codes, or no distances.
    """
    ask = _supplied("nearest_free", distances)
    codes = np.array(codes_NL, dtype=np.int32)
    prefixes = _colliding_prefixes(codes, item_ids)
    _require_room("nearest_free", codes, prefixes, codebook_sizes)
    for rows, distances_RK in _weighed(prefixes, codebook_sizes, ask):
        colliding, free = _colliding_and_free(codes[rows, -1], distances_RK.shape[1])
        chosen = match_nearest(distances_RK[np.ix_(colliding, free)])
        codes[rows[colliding], -1] = free[chosen]
    return codes, tuple(map(int, codebook_sizes))


def sinkhorn(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    item_ids: Sequence[str],
    *,
    distances: Distances | None = None,
    reserve: int = 0,
) -> Unique:
    """Spread colliding items over the last level by rounds of a balanced plan (LC-Rec).

    Uniform semantic mapping: in each round the items that still collide under a prefix get the last
    code with the largest share of their row of a Sinkhorn plan over the codes that no other item
    holds. A round that does not leave fewer collisions under its prefix is taken back and ends the
    rounds, so there are never more collisions than before. LC-Rec releases what is left over as
    duplicates; here an extra level numbers them (and is appended only if there are any, or
    `reserve` asks for it), and a warning says how many.

    Args:
        codes_NL: codes with duplicates.
        codebook_sizes: L sizes.
        item_ids: N ids.
        distances: as of `assign_last`.
        reserve: as of `extra_level`.

    Returns:
        codes (N, L) and L sizes, or (N, L + 1) and L + 1 sizes if some items still collide.

    Raises:
        UserError: no distances.
    """
    ask = _supplied("sinkhorn", distances)
    codes = np.array(codes_NL, dtype=np.int32)
    prefixes = _colliding_prefixes(codes, item_ids)
    for rows, distances_RK in _weighed(prefixes, codebook_sizes, ask):
        codes[rows, -1] = _sinkhorn_rounds(codes[rows, -1], distances_RK)
    left = collision_groups(codes)
    if not left and not reserve:
        return codes, tuple(map(int, codebook_sizes))
    if left:
        log.warning(
            "collisions 'sinkhorn': %d item(s) in %d group(s) still share their codes after up to "
            "%d rounds; an extra level numbers them. 'assign_last' needs none while no prefix "
            "holds more than %d items.",
            sum(map(len, left)), len(left), NUM_ROUNDS, codebook_sizes[-1],
        )  # fmt: skip
    return extra_level(codes, codebook_sizes, item_ids, reserve=reserve)


def match_nearest(distances_CK: np.ndarray) -> IntArray:
    """Return a different column (C,) for each row, taking the smallest entries first.

    Of equal entries the lowest row, then the lowest column comes first. Rows for which no column is
    left get -1.
    """
    num_rows, num_columns = distances_CK.shape
    chosen = np.full(num_rows, -1, dtype=np.int64)
    taken = np.zeros(num_columns, dtype=bool)
    left = min(num_rows, num_columns)
    for place in np.argsort(distances_CK, axis=None, kind="stable"):
        if not left:
            break
        row, column = divmod(int(place), num_columns)
        if chosen[row] < 0 and not taken[column]:
            chosen[row], taken[column] = column, True
            left -= 1
    return chosen


def _sinkhorn_rounds(last_R: IntArray, distances_RK: np.ndarray) -> IntArray:
    """Return last codes with at least as many different ones among them."""
    import torch

    from genrec.tokenizers.quantization.residual import sinkhorn as plan

    for _ in range(NUM_ROUNDS):
        colliding, free = _colliding_and_free(last_R, distances_RK.shape[1])
        if not len(colliding):
            break
        costs = torch.from_numpy(distances_RK[np.ix_(colliding, free)].astype(np.float64))
        shares = plan(costs, epsilon=EPSILON, num_iterations=NUM_ITERATIONS)
        trial_R = last_R.copy()
        trial_R[colliding] = free[shares.argmax(dim=1).numpy()]
        if len(np.unique(trial_R)) <= len(np.unique(last_R)):
            break  # the plan is a function of these items: the next round would be the same
        last_R = trial_R
    return last_R


def _colliding_and_free(last_R: IntArray, num_codes: int) -> tuple[IntArray, IntArray]:
    """Return the rows that share their last code, and the codes that no other row holds."""
    counts_K = np.bincount(last_R, minlength=num_codes)
    return np.flatnonzero(counts_K[last_R] > 1), np.flatnonzero(counts_K != 1)


def _supplied(policy: str, distances: Distances | None) -> Distances:
    if distances is None:
        raise UserError(
            f"collisions '{policy}': got no distances to the last codes. Build the index with "
            f"ItemIndex.build(tokenizer, catalog, collisions='{policy}')."
        )
    return distances


def _weighed(
    prefixes: Sequence[IntArray], codebook_sizes: Sequence[int], distances: Distances
) -> Iterator[tuple[IntArray, np.ndarray]]:
    """Yield the rows of each prefix with their distances (R, K), asking for many at once."""
    most = max(1, BATCH_ENTRIES // max(1, codebook_sizes[-1]))
    ends = np.cumsum([len(rows) for rows in prefixes])
    start = 0
    while start < len(prefixes):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + most, side="right")))
        batch = prefixes[start:stop]
        found = np.asarray(distances(np.concatenate(batch)))
        parts = np.split(found, np.cumsum([len(rows) for rows in batch])[:-1])
        yield from zip(batch, parts, strict=True)
        start = stop


def _require_room(
    policy: str, codes_NL: IntArray, prefixes: Sequence[IntArray], codebook_sizes: Sequence[int]
) -> None:
    full = [rows for rows in prefixes if len(rows) > codebook_sizes[-1]]
    if full:
        rows = max(full, key=len)
        prefix = tuple(codes_NL[rows[0], :-1].tolist())
        more = f" (and {len(full) - 1} more such prefixes)" if len(full) > 1 else ""
        raise UserError(
            f"collisions '{policy}': {len(rows)} items share the prefix {prefix}{more}, but the "
            f"last level has {codebook_sizes[-1]} codes. Use collisions='extra_level', or a "
            "larger tokenizer.codebook_size."
        )


def _colliding_prefixes(codes_NL: IntArray, item_ids: Sequence[str]) -> list[IntArray]:
    """Return, for each prefix with a collision below it, its rows in the order of their ids."""
    by_id = id_order(item_ids)
    order, starts = grouped(codes_NL[by_id][:, :-1])
    groups = []
    for rows in np.split(by_id[order], starts[1:]):
        last = codes_NL[rows, -1]
        if len(np.unique(last)) < len(last):
            groups.append(rows)
    return groups
