"""Collision policies: how items that were given the same codes get semantic IDs of their own.

Each policy is a function from codes with duplicates to unique codes. It sees codes and item ids
(and, in `last_codes.py`, distances), never vectors or a model; the outcome depends on the item ids,
not on the order of the rows.

Shapes: N items, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genrec.errors import UserError
from genrec.item_index import END

IntArray = np.ndarray
Unique = tuple[IntArray, tuple[int, ...]]
"""Unique codes (N, L') and the sizes of their L' levels."""
MAX_NAMED = 5


def extra_level(
    codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str], *, reserve: int = 0
) -> Unique:
    """Append a level that numbers the items of each group 0, 1, 2, ... (TIGER).

    The level is always appended (0 for an item without collisions) and is as large as the largest
    group. Numbers follow the order of item ids as strings.

    Args:
        codes_NL: codes with duplicates.
        codebook_sizes: L sizes.
        item_ids: N ids.
        reserve: numbers beyond the largest group, kept free for items that are added later.

    Returns:
        codes (N, L + 1) int32 and their L + 1 sizes.
    """
    rank, sizes = _rank_and_group_size(codes_NL, item_ids)
    codes = np.concatenate([codes_NL, rank[:, None]], axis=1).astype(np.int32)
    return codes, (*map(int, codebook_sizes), int(sizes.max(initial=1)) + reserve)


def suffix(
    codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str], *, reserve: int = 0
) -> Unique:
    """Put a number before the end of each semantic ID that several items share.

    What `extra_level` means where all levels draw from one vocabulary of V codes: the numbers are
    new codes V, V + 1, ... of that vocabulary, in the order of item ids within a group. Items
    without collisions keep their codes. There is one level more only if a semantic ID that needs a
    number already fills all L, or if there is a reserve.

    Args:
        codes_NL: codes with duplicates, `END` after the last code of a shorter semantic ID.
        codebook_sizes: (V,) * L.
        item_ids: N ids.
        reserve: numbers (and room for one) beyond what is needed, for items that are added later.

    Returns:
        codes (N, L') int32 and (V',) * L'; L' is L or L + 1, V' is V plus the largest group.
    """
    assert len(set(codebook_sizes)) <= 1, "levels of a shared vocabulary have one size"
    num_levels, vocabulary = codes_NL.shape[1], max(codebook_sizes, default=1)
    rank, sizes = _rank_and_group_size(codes_NL, item_ids)
    lengths = (codes_NL != END).sum(axis=1)
    shared = sizes > 1
    num_levels += int(reserve > 0 or (lengths[shared] == num_levels).any())
    codes = np.full((len(codes_NL), num_levels), END, dtype=np.int32)
    codes[:, : codes_NL.shape[1]] = codes_NL
    codes[shared, lengths[shared]] = vocabulary + rank[shared]
    numbers = int(sizes[shared].max(initial=0)) + reserve
    return codes, (vocabulary + numbers,) * num_levels


def forbid(codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str]) -> Unique:
    """Return the codes unchanged if they are unique.

    Raises:
        UserError: some are not, naming the largest groups.
    """
    groups = collision_groups(codes_NL)
    if groups:
        groups = [np.array(sorted(rows, key=lambda row: item_ids[row])) for rows in groups]
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
    order, starts = grouped(codes_NL)
    return [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]


def grouped(codes_NL: IntArray) -> tuple[IntArray, IntArray]:
    """Return rows sorted by codes (stable), and where each group of equal codes starts."""
    if codes_NL.shape[1] == 0 or len(codes_NL) == 0:
        return np.arange(len(codes_NL)), np.zeros(min(1, len(codes_NL)), np.int64)
    order = np.lexsort(codes_NL.T[::-1])
    changes = (np.diff(codes_NL[order], axis=0) != 0).any(axis=1)
    return order, np.concatenate([[0], np.flatnonzero(changes) + 1])


def id_order(item_ids: Sequence[str]) -> IntArray:
    """Return the rows in the order of their ids as Python strings."""
    return np.array(sorted(range(len(item_ids)), key=lambda row: item_ids[row]), dtype=np.int64)


def _rank_and_group_size(codes_NL: IntArray, item_ids: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Return each item's place by id among the items with its codes, and how many they are."""
    by_id = id_order(item_ids)
    order, starts = grouped(np.asarray(codes_NL)[by_id])
    counts = np.diff(np.append(starts, len(order)))
    rank, sizes = np.empty((2, len(order)), np.int64)
    rank[by_id[order]] = np.arange(len(order)) - np.repeat(starts, counts)
    sizes[by_id[order]] = np.repeat(counts, counts)
    return rank, sizes


def _describe(codes_NL: IntArray, rows: IntArray, item_ids: Sequence[str]) -> str:
    ids = ", ".join(repr(item_ids[row]) for row in rows[:MAX_NAMED])
    more = " ..." if len(rows) > MAX_NAMED else ""
    return f"{tuple(codes_NL[rows[0]].tolist())}: {ids}{more} ({len(rows)} items)"
