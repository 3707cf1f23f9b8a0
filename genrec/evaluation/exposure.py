"""What do all lists together put before users: how much of the catalogue, and how popular is it?

It counts how often each item stands in a list and knows no users and no targets. Every figure is a
function of those counts, so 10^8 places cost one pass. Nothing recommended gives NaN.

Shapes: U users, k list length, N items.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import entr

from genrec.errors import UserError

HEAD_SHARE = 0.2
_CHUNK_CELLS = 4_000_000


def exposure(rows_Uk: np.ndarray, num_items: int) -> np.ndarray:
    """Return how often each item stands in a list, (N,) int64.

    Args:
        rows_Uk: (U, k) int item rows, -1 = padding.
        num_items: size of the catalogue (N).

    Raises:
        UserError: a row outside the catalogue.
    """
    rows_Uk = np.asarray(rows_Uk)
    if num_items < 1 or (rows_Uk.size and rows_Uk.max() >= num_items):
        raise UserError(
            f"num_items: got {num_items}, but the lists hold row {rows_Uk.max(initial=0)}. "
            "Give the size of the catalogue that the lists were made from."
        )
    counts_N = np.zeros(num_items, np.int64)
    for part in chunks(rows_Uk):
        flat = part.reshape(-1)
        counts_N += np.bincount(flat[flat >= 0], minlength=num_items)
    return counts_N


def chunks(rows_Uk: np.ndarray, cells_per_place: int = 1) -> Iterator[np.ndarray]:
    """Yield the users of `rows_Uk` in parts that keep temporary arrays small."""
    width = max(1, int(np.prod(rows_Uk.shape[1:])) * cells_per_place)
    step = max(1, _CHUNK_CELLS // width)
    for start in range(0, len(rows_Uk), step):
        yield rows_Uk[start : start + step]


def coverage(exposure_N: np.ndarray) -> float:
    """Return the share of the catalogue that stands in at least one list (0 to 1)."""
    return float(np.count_nonzero(exposure_N) / len(exposure_N))


def gini(exposure_N: np.ndarray) -> float:
    """Return the Gini index of exposure: 0 = all items equally often, (N - 1) / N = one item."""
    ordered_N, total, num_items = np.sort(exposure_N), np.sum(exposure_N), len(exposure_N)
    if not total:
        return float("nan")
    weights_N = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float(weights_N @ ordered_N / (num_items * total))


def entropy(exposure_N: np.ndarray) -> float:
    """Return Shannon's entropy of exposure in bits: log2 N = all equally often, 0 = one item."""
    total = np.sum(exposure_N)
    return float(entr(exposure_N / total).sum() / np.log(2)) if total else float("nan")


def mean_over_places(exposure_N: np.ndarray, values_N: np.ndarray) -> float:
    """Return the mean over all places of all lists of a value that each item has."""
    total = np.sum(exposure_N)
    return float(exposure_N @ np.asarray(values_N, np.float64) / total) if total else float("nan")


def average_popularity(exposure_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Return the mean training count of a recommended item.

    Args:
        exposure_N: (N,) how often each item is recommended.
        counts_N: (N,) training interactions of each item.
    """
    return mean_over_places(exposure_N, counts_N)


def popularity_lift(exposure_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Return how much more popular a recommended item is than a consumed one, minus 1.

    The mean training count of a recommended item over that of the item of a training interaction:
    0 = lists are as popular as what users consume, 1 = twice as popular. NaN without training.
    """
    consumed = mean_over_places(counts_N, counts_N)
    return average_popularity(exposure_N, counts_N) / consumed - 1


def self_information(counts_N: np.ndarray) -> np.ndarray:
    """Return -log2 of each item's share of the training interactions, (N,) bits.

    One interaction is added to every item, so that items without any have a finite value.
    """
    smoothed_N = np.asarray(counts_N, np.float64) + 1.0
    return -np.log2(smoothed_N / smoothed_N.sum())


def novelty(exposure_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Return the mean self-information of a recommended item in bits (Zhou et al. 2010)."""
    return mean_over_places(exposure_N, self_information(counts_N))


def in_head(counts_N: np.ndarray, share: float = HEAD_SHARE) -> np.ndarray:
    """Return which items are the most popular `share` of the catalogue, (N,) bool.

    Items that tie with the last one belong to the head, so that row order does not matter.
    """
    counts_N = np.asarray(counts_N)
    size = int(np.ceil(share * len(counts_N)))
    if not size:
        return np.zeros(len(counts_N), bool)
    return counts_N >= np.sort(counts_N)[-size]


def long_tail_share(exposure_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Return the share of recommended items outside the head (`in_head`)."""
    return mean_over_places(exposure_N, ~in_head(counts_N))
