"""Collision policies: how items that were given the same codes get semantic IDs of their own.

Each policy is a function from codes with duplicates to unique codes. It sees codes and item ids
(and, if it asks for them, distances), never vectors or a model; the outcome depends on the item
ids, not on the order of the rows.

Shapes: N items, L levels, R rows asked for, K codes of the last level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from genrec.errors import UserError

IntArray = np.ndarray
Distances = Callable[[IntArray], np.ndarray]
MAX_NAMED = 5


def extra_level(
    codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str]
) -> tuple[IntArray, tuple[int, ...]]:
    """Append a level that numbers the items of each group 0, 1, 2, ... (TIGER).

    The level is always appended (0 for an item without collisions) and is as large as the largest
    group. Numbers follow the order of item ids as strings.

    Returns:
        codes (N, L + 1) int32 and their L + 1 sizes.
    """
    rank = _rank_in_group(codes_NL, item_ids)
    size = int(rank.max()) + 1 if len(rank) else 1
    codes = np.concatenate([codes_NL, rank[:, None]], axis=1).astype(np.int32)
    return codes, (*map(int, codebook_sizes), size)


def assign_last(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    item_ids: Sequence[str],
    *,
    distances: Distances | None = None,
) -> tuple[IntArray, tuple[int, ...]]:
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
    if distances is None:
        raise UserError(
            "collisions 'assign_last': got no distances to the last codes. Build the index with "
            "ItemIndex.build(tokenizer, catalog, collisions='assign_last')."
        )
    codes = np.array(codes_NL, dtype=np.int32)
    for rows in _colliding_prefixes(codes, item_ids):
        if len(rows) > codebook_sizes[-1]:
            prefix = tuple(codes[rows[0], :-1].tolist())
            raise UserError(
                f"collisions 'assign_last': {len(rows)} items share the prefix {prefix}, but the "
                f"last level has {codebook_sizes[-1]} codes. Use collisions='extra_level', or a "
                "larger tokenizer.codebook_size."
            )
        places, last = linear_sum_assignment(distances(rows))
        codes[rows[places], -1] = last
    return codes, tuple(map(int, codebook_sizes))


def forbid(
    codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str]
) -> tuple[IntArray, tuple[int, ...]]:
    """Return the codes unchanged if they are unique.

    Raises:
        UserError: some are not, naming the largest groups.
    """
    groups = collision_groups(codes_NL)
    if groups:
        groups.sort(key=lambda rows: (-len(rows), item_ids[rows[0]]))
        shown = "; ".join(_describe(codes_NL, rows, item_ids) for rows in groups[:MAX_NAMED])
        count = sum(len(rows) for rows in groups)
        raise UserError(
            f"collisions 'forbid': {count} items in {len(groups)} group(s) share a semantic ID: "
            f"{shown}{'; ...' if len(groups) > MAX_NAMED else ''}. Use collisions='extra_level' or "
            "'assign_last', or a larger tokenizer.codebook_size or num_levels."
        )
    return np.asarray(codes_NL, dtype=np.int32), tuple(map(int, codebook_sizes))


def collision_groups(codes_NL: IntArray) -> list[IntArray]:
    """Return the rows of each group of two or more items with equal codes."""
    order, starts = _grouped(codes_NL)
    return [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]


def _grouped(codes_NL: IntArray) -> tuple[IntArray, IntArray]:
    """Return rows sorted by codes (stable), and where each group of equal codes starts."""
    if codes_NL.shape[1] == 0:
        return np.arange(len(codes_NL)), np.zeros(1, np.int64)
    order = np.lexsort(codes_NL.T[::-1])
    changes = (np.diff(codes_NL[order], axis=0) != 0).any(axis=1)
    return order, np.concatenate([[0], np.flatnonzero(changes) + 1])


def _id_order(item_ids: Sequence[str]) -> IntArray:
    """Return the rows in the order of their ids as Python strings."""
    return np.array(sorted(range(len(item_ids)), key=lambda row: item_ids[row]), dtype=np.int64)


def _rank_in_group(codes_NL: IntArray, item_ids: Sequence[str]) -> IntArray:
    by_id = _id_order(item_ids)
    order, starts = _grouped(np.asarray(codes_NL)[by_id])
    sizes = np.diff(np.append(starts, len(order)))
    rank = np.empty(len(order), np.int64)
    rank[by_id[order]] = np.arange(len(order)) - np.repeat(starts, sizes)
    return rank


def _colliding_prefixes(codes_NL: IntArray, item_ids: Sequence[str]) -> list[IntArray]:
    """Return, for each prefix with a collision below it, its rows in the order of their ids."""
    by_id = _id_order(item_ids)
    order, starts = _grouped(codes_NL[by_id][:, :-1])
    groups = []
    for rows in np.split(by_id[order], starts[1:]):
        last = codes_NL[rows, -1]
        if len(np.unique(last)) < len(last):
            groups.append(rows)
    return groups


def _describe(codes_NL: IntArray, rows: IntArray, item_ids: Sequence[str]) -> str:
    ids = ", ".join(repr(item_ids[row]) for row in rows[:MAX_NAMED])
    more = " ..." if len(rows) > MAX_NAMED else ""
    return f"{tuple(codes_NL[rows[0]].tolist())}: {ids}{more} ({len(rows)} items)"
