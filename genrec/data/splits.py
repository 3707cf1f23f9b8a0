"""Which interactions are for training, validation and test. It does not order them.

Both functions expect interactions grouped by user and chronological within a user, and return what
`Interactions.splits` holds.

Shapes: M interactions, U users.
"""

from __future__ import annotations

import numpy as np

from genrec.data.interactions import TEST, TRAIN, VALID
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
