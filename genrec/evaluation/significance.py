"""How sure are we of a mean, or of a difference? Bootstrap over users, paired where it can be.

It resamples users and nothing else: values of several training seeds are averaged per user first,
so an interval speaks about other users of the same kind, not about other seeds (print the spread
over seeds beside it).

Resampling U users with replacement and averaging depends only on how often each *distinct* value
is drawn, so the draws are multinomial over distinct values: the same distribution as drawing users
one by one, and for hits (two values) thousands of times cheaper. Where many values are distinct,
users are drawn one by one.

Shapes: S seeds, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from genrec.errors import UserError

_CHUNK_CELLS = 1_000_000
# Above this share of distinct values, drawing users one by one is the faster of the two.
_FEW_DISTINCT = 0.1


class MeanCI(NamedTuple):
    """A mean over users and its percentile interval."""

    mean: float
    low: float
    high: float


class Comparison(TypedDict):
    """A paired difference a - b over users.

    `p` is two-sided: twice the share of resamples on the far side of zero, never below
    2 / (num_samples + 1).
    """

    difference: float
    ci: list[float]
    p: float


def per_user(values: np.ndarray, *, what: str = "values") -> np.ndarray:
    """Return one float64 value per user: (U,) as it is, (S, U) averaged over seeds.

    Raises:
        UserError: no users, another shape, or values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 2 and array.shape[0]:
        array = array.mean(axis=0)
    if array.ndim != 1 or not len(array):
        raise UserError(
            f"{what}: got shape {np.shape(values)}, expected (users,) or (seeds, users) with at "
            "least one user."
        )
    if not np.isfinite(array).all():
        raise UserError(f"{what}: got NaN or infinite values, expected one number per user.")
    return array


def mean_ci(
    values_U: np.ndarray, seed: int = 0, num_samples: int = 2000, level: float = 0.95
) -> MeanCI:
    """Return the mean over users with a percentile bootstrap interval.

    Args:
        values_U: (U,) or (S, U); several seeds are averaged per user first.
        seed: of the resampling; the same seed gives the same interval.
        num_samples: resamples.
        level: coverage, between 0 and 1.

    Raises:
        UserError: no users, values that are not finite, or a level outside (0, 1).
    """
    array_U = per_user(values_U)
    means = _resampled_means(array_U, seed, num_samples)
    low, high = np.quantile(means, _tails(level))
    return MeanCI(float(array_U.mean()), float(low), float(high))


def paired_bootstrap(
    a_U: np.ndarray,
    b_U: np.ndarray,
    seed: int = 0,
    num_samples: int = 2000,
    level: float = 0.95,
) -> Comparison:
    """Return the mean of a - b over the same users, with its interval and two-sided p.

    Args:
        a_U: (U,) or (S, U), of one system.
        b_U: (U,) or (S', U), of the other, the same users in the same order.
        seed: of the resampling.
        num_samples: resamples.
        level: coverage, between 0 and 1.

    Raises:
        UserError: a different number of users, or values that are not finite.
    """
    a_U, b_U = per_user(a_U, what="a"), per_user(b_U, what="b")
    if len(a_U) != len(b_U):
        raise UserError(
            f"paired comparison: got {len(a_U)} and {len(b_U)} users. Expected the same users in "
            "the same order; evaluate both on one split of one data set."
        )
    # Rounding: 0.1 + 0.2 - 0.3 must count as "no difference", and as one distinct value.
    difference_U = np.round(a_U - b_U, 12)
    means = _resampled_means(difference_U, seed, num_samples)
    low, high = np.quantile(means, _tails(level))
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Comparison(
        difference=float(difference_U.mean()),
        ci=[float(low), float(high)],
        p=float(min(1.0, 2 * (tail + 1) / (num_samples + 1))),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for testing them together (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for place, which in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * float(p_values[which])))
        corrected[which] = highest
    return corrected.tolist()


def _resampled_means(values_U: np.ndarray, seed: int, num_samples: int) -> np.ndarray:
    """Return (num_samples,) means of U values drawn with replacement."""
    if num_samples < 1:
        raise UserError(f"num_samples: got {num_samples}, expected an integer >= 1.")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values_U, return_counts=True)
    num_users = len(values_U)
    few = len(distinct) <= num_users * _FEW_DISTINCT
    chunk = max(1, _CHUNK_CELLS // (len(distinct) if few else num_users))
    means = np.empty(num_samples)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        if few:
            sums = rng.multinomial(num_users, counts / num_users, size=size) @ distinct
        else:
            sums = values_U[rng.integers(num_users, size=(size, num_users))].sum(axis=1)
        means[start : start + size] = sums / num_users
    return means


def _tails(level: float) -> list[float]:
    if not 0 < level < 1:
        raise UserError(f"level: got {level}, expected a number between 0 and 1, e.g. 0.95.")
    return [(1 - level) / 2, (1 + level) / 2]
