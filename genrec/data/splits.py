"""Which interactions are for training, validation and test. It does not order them.

`leave_one_out` and `global_time` expect interactions grouped by user and chronological within a
user, and return what `Interactions.splits` holds.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from genrec.data.interactions import TEST, TRAIN, VALID, Interactions
from genrec.errors import DataError

MIN_HELD_OUT_LENGTH = 3


def leave_one_out(offsets: np.ndarray) -> np.ndarray:
    """Last interaction of each user = test, the one before = validation, the rest = training.

    Users with fewer than three interactions keep all of them for training.

    Args:
        offsets: (U + 1,) int64 boundaries of the users.

    Returns:
        (M,) uint8.
    """
    splits = np.full(int(offsets[-1]), TRAIN, dtype=np.uint8)
    ends = offsets[1:][np.diff(offsets) >= MIN_HELD_OUT_LENGTH]
    splits[ends - 1] = TEST
    splits[ends - 2] = VALID
    return splits


def time_cuts(
    timestamps: np.ndarray, valid_fraction: float, test_fraction: float
) -> tuple[int, int]:
    """Return the times at which validation and test begin: order statistics, no interpolation.

    Raises:
        DataError: the cuts leave a split without interactions (too few distinct times).
    """
    num = len(timestamps)
    places = [
        min(num - 1, int(num * (1.0 - valid_fraction - test_fraction))),
        min(num - 1, int(num * (1.0 - test_fraction))),
    ]
    ordered = np.partition(timestamps, places)
    valid_from, test_from = (int(ordered[place]) for place in places)
    if not int(ordered[: places[0] + 1].min()) < valid_from < test_from:
        raise DataError(
            f"split global_time: validation would begin at time {valid_from} and test at "
            f"{test_from}, which leaves a split empty: too many interactions share one time. "
            "Expected timestamps that differ; use split=leave_one_out or other fractions."
        )
    return valid_from, test_from


def global_time(timestamps: np.ndarray, valid_from: int, test_from: int) -> np.ndarray:
    """Interactions at or after `valid_from` = validation, at or after `test_from` = test.

    Returns:
        (M,) uint8.
    """
    late = (timestamps >= valid_from).astype(np.uint8)
    return np.where(timestamps >= test_from, np.uint8(TEST), late * np.uint8(VALID)).astype(
        np.uint8
    )


def hidden_items(item_ids: Sequence[str], share: float) -> np.ndarray:
    """Return the rows of the items that training shall not know: those of the smallest MD5.

    The choice depends on the ids alone; a larger share holds the smaller one.

    Returns:
        int64 rows, sorted; at least one.
    """
    digests = [hashlib.md5(i.encode(), usedforsecurity=False).digest() for i in item_ids]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    return np.sort(np.array(order[: max(1, round(share * len(order)))], dtype=np.int64))


def without_training(interactions: Interactions, rows: np.ndarray) -> tuple[Interactions, int]:
    """Drop the training interactions of items; return the others, and how many went.

    Raises:
        DataError: no training interaction is left.
    """
    drop = np.isin(interactions.item_rows, rows) & (interactions.splits == TRAIN)
    keep = ~drop
    if not (interactions.splits[keep] == TRAIN).any():
        raise DataError(
            f"hidden_items: no training interaction is left without the {len(rows)} hidden items. "
            "Hide a smaller share."
        )
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    ratings = interactions.ratings
    left = replace(
        interactions,
        item_rows=interactions.item_rows[keep],
        offsets=kept_before[interactions.offsets],
        timestamps=interactions.timestamps[keep],
        splits=interactions.splits[keep],
        ratings=None if ratings is None else ratings[keep],
    )
    return left, int(drop.sum())
