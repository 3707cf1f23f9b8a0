"""Insertion: which free semantic ID does an item get that comes after the index was built?

By the collision policy that the index was built with, but no code of an item that is there ever
changes and no level grows, so that a model trained on the index goes on working. What finds no
place is refused with the reason. It sees codes, ids and distances, never vectors.

Shapes: M new items, L levels of the tokenizer, L' levels of the index, K codes of the last level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.errors import UserError
from genrec.item_index import END, ItemIndex
from genrec.tokenizers import COLLISIONS, SHARED_COLLISIONS
from genrec.tokenizers.base import IntArray
from genrec.tokenizers.collisions.last_codes import Distances, match_nearest

LAST_CODE_POLICIES = ("assign_last", "sinkhorn", "nearest_free")
Codes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Placed:
    """Where new items go.

    Args:
        codes: (M, L') int32; rows of refused items mean nothing.
        reasons: M entries, None for a placed item, else why it was refused.
    """

    codes: IntArray
    reasons: tuple[str | None, ...]

    @property
    def rows(self) -> IntArray:
        """Rows of the placed items."""
        return np.array([i for i, reason in enumerate(self.reasons) if reason is None], np.int64)


def place(
    index: ItemIndex,
    policy: str,
    item_ids: Sequence[str],
    codes_ML: IntArray,
    codebook_sizes: Sequence[int],
    *,
    distances: Distances | None = None,
) -> Placed:
    """Give new items semantic IDs that are free in the index.

    `extra_level` gives the lowest free number of the group (in a shared vocabulary, as does
    `first_unused`: the bare codes if nobody has them, else the lowest free number). `assign_last`,
    `nearest_free` and `sinkhorn` give the tokenizer's last code if it is free and wanted by one new
    item only, else the nearest free one, the smallest distances first. `forbid` gives the
    tokenizer's codes or nothing. Where several new items want one place, the order of item ids
    decides.

    Args:
        index: what they are added to.
        policy: the collision policy that the index was built with.
        item_ids: M ids, none of them in the index.
        codes_ML: the frozen tokenizer's codes.
        codebook_sizes: of the tokenizer's levels.
        distances: as of `assign_last`, for new rows; policies that weigh distances need it.

    Raises:
        UserError: the index was not built by this policy from such a tokenizer.
    """
    num_levels = len(codebook_sizes)
    numbers = index.num_levels == num_levels + 1 and not index.shared_vocabulary
    order = sorted(range(len(item_ids)), key=lambda row: item_ids[row])
    if index.shared_vocabulary and policy in SHARED_COLLISIONS:
        room = 0 if policy == "forbid" else max(index.codebook_sizes) - max(codebook_sizes)
        options = _spelled(index, max(codebook_sizes), room)
        return _in_order(index, order, codes_ML, options, forbidden=policy == "forbid")
    if policy in ("extra_level", "sinkhorn") and numbers:
        return _in_order(index, order, codes_ML, _numbered(index))
    if policy in LAST_CODE_POLICIES and index.num_levels == num_levels:
        return _nearest_free(index, order, np.asarray(codes_ML), distances)
    if policy == "forbid" and index.num_levels == num_levels:
        return _in_order(index, order, codes_ML, lambda codes: [codes], forbidden=True)
    raise UserError(
        f"collisions {policy!r}: an index of {index.num_levels} levels does not come from it and a "
        f"tokenizer of {num_levels}. Expected one of {', '.join(COLLISIONS)} and the tokenizer "
        "that the index was built with."
    )


def _in_order(
    index: ItemIndex,
    order: Sequence[int],
    codes_ML: IntArray,
    candidates: Callable[[Codes], Sequence[Codes] | str],
    *,
    forbidden: bool = False,
) -> Placed:
    """Give each item in turn the first of its candidates that is free, or a reason if none is."""
    taken = {tuple(codes): row for row, codes in enumerate(index.codes.tolist())}
    placed = np.zeros((len(order), index.num_levels), dtype=np.int32)
    reasons: list[str | None] = [None] * len(order)
    for row in order:
        codes = tuple(np.asarray(codes_ML[row]).tolist())
        options = candidates(codes)
        if isinstance(options, str):
            reasons[row] = options
            continue
        free = next((option for option in options if option not in taken), None)
        if free is None:
            reasons[row] = f"all {len(options)} semantic IDs with its codes {codes} are taken"
            if forbidden:
                reasons[row] = f"an item with its codes {codes} is there already"
            continue
        taken[free] = -1
        placed[row] = free
    return Placed(placed, tuple(reasons))


def _numbered(index: ItemIndex) -> Callable[[Codes], Sequence[Codes]]:
    return lambda codes: [(*codes, number) for number in range(index.codebook_sizes[-1])]


def _spelled(
    index: ItemIndex, vocabulary: int, room: int
) -> Callable[[Codes], Sequence[Codes] | str]:
    """Candidates of a shared vocabulary: the bare codes, then each number before the end."""

    def candidates(codes: Codes) -> Sequence[Codes] | str:
        bare = tuple(code for code in codes if code != END)
        if len(bare) > index.num_levels:
            return f"it needs {len(bare)} levels, the index has {index.num_levels}"
        options = [bare]
        if len(bare) < index.num_levels:
            options += [(*bare, vocabulary + number) for number in range(room)]
        return [option + (END,) * (index.num_levels - len(option)) for option in options]

    return candidates


def _nearest_free(
    index: ItemIndex, order: Sequence[int], codes_ML: IntArray, distances: Distances | None
) -> Placed:
    size = index.codebook_sizes[-1]
    taken: dict[Codes, IntArray] = defaultdict(lambda: np.zeros(size, dtype=bool))
    for codes in index.codes.tolist():
        taken[tuple(codes[:-1])][codes[-1]] = True
    prefixes: dict[Codes, list[int]] = defaultdict(list)
    for row in order:
        prefixes[tuple(codes_ML[row, :-1].tolist())].append(row)
    placed = np.array(codes_ML, dtype=np.int32)
    reasons: list[str | None] = [None] * len(order)
    for prefix, rows in prefixes.items():
        there, wanted = taken[prefix], codes_ML[rows, -1]
        contested = np.bincount(wanted, minlength=size) > 1
        rest = np.array(rows)[there[wanted] | contested[wanted]]
        if not len(rest):
            continue
        blocked = there.copy()
        blocked[np.setdiff1d(wanted, codes_ML[rest, -1])] = True  # kept by those who want it alone
        free = np.flatnonzero(~blocked)
        if distances is None:
            raise UserError(
                "insertion: got no distances to the last codes. Pass distances=lambda rows: "
                "tokenizer.last_level_distances(catalog.select(rows))."
            )
        chosen = match_nearest(np.asarray(distances(rest))[:, free])
        for row, column in zip(rest.tolist(), chosen.tolist(), strict=True):
            if column < 0:
                reasons[row] = f"no last code is free under its prefix {prefix} ({size} codes)"
            else:
                placed[row, -1] = free[column]
    return Placed(placed, tuple(reasons))
