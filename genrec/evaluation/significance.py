"""How sure are we of a mean, or of a difference? Tests over users, and what they could find at all.

Bootstrap intervals, paired where they can be; sign-flip tests; Holm's correction; the smallest
difference that is worth talking about. It resamples users and nothing else: values of several
training seeds are averaged per user first, so an interval speaks about other users of the same
kind, not about other seeds (print the spread over seeds beside it).

Resampling U users with replacement and averaging depends only on how often each *distinct* value
is drawn, so the draws are multinomial over distinct values: the same distribution as drawing users
one by one, and for hits (two values) thousands of times cheaper. Where many values are distinct,
users are drawn one by one.

Shapes: S seeds, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple, NotRequired, TypedDict

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
    2 / (num_samples + 1). `paired_test` adds `p_permutation`, of the sign-flip test, and
    `detectable`, the smallest true difference that such a test finds in four cases of five.
    """

    difference: float
    ci: list[float]
    p: float
    p_permutation: NotRequired[float]
    detectable: NotRequired[float]


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
    difference_U = _differences(a_U, b_U)
    means = _resampled_means(difference_U, seed, num_samples)
    low, high = np.quantile(means, _tails(level))
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Comparison(
        difference=float(difference_U.mean()),
        ci=[float(low), float(high)],
        p=float(min(1.0, 2 * (tail + 1) / (num_samples + 1))),
    )


def paired_permutation(
    a_U: np.ndarray, b_U: np.ndarray, seed: int = 0, num_samples: int = 10_000
) -> float:
    """Return the two-sided p of the sign-flip test of no difference between two systems.

    If the systems are exchangeable, each user's difference is as likely to have the other sign. p
    is the share of sign assignments whose mean is at least as far from zero as the observed one:
    of all of them where they are few, otherwise of `num_samples` draws, the observed one counted
    in (Phipson & Smyth 2010), so never below 1 / (num_samples + 1).

    Users whose values are equal drop out; of c users with the same absolute difference only the
    number of plus signs matters, which is binomial.

    Args:
        a_U: (U,) or (S, U), of one system.
        b_U: (U,) or (S', U), of the other, the same users in the same order.
        seed: of the signs.
        num_samples: draws.

    Raises:
        UserError: a different number of users, or values that are not finite.
    """
    if num_samples < 1:
        raise UserError(f"num_samples: got {num_samples}, expected an integer >= 1.")
    difference_U = _differences(a_U, b_U)
    difference_U = difference_U[difference_U != 0]
    if not len(difference_U):
        return 1.0
    observed = abs(difference_U.sum())
    tolerance = 1e-9 * np.abs(difference_U).sum()  # sums in another order differ by rounding
    if len(difference_U) < 60 and 2 ** len(difference_U) <= num_samples:
        size = len(difference_U)
        signs = 2 * (np.arange(2**size)[:, None] >> np.arange(size) & 1) - 1
        return float(np.mean(np.abs(signs @ difference_U) >= observed - tolerance))
    sums = _flipped_sums(np.abs(difference_U), np.random.default_rng(seed), num_samples)
    extreme = np.count_nonzero(np.abs(sums) >= observed - tolerance)
    return float((extreme + 1) / (num_samples + 1))


def paired_test(
    a_U: np.ndarray, b_U: np.ndarray, seed: int = 0, num_samples: int = 2000
) -> Comparison:
    """Return everything that is said about a difference: bootstrap, sign-flip test, detectability.

    Args:
        a_U: (U,) or (S, U), of one system.
        b_U: (U,) or (S', U), of the other, the same users in the same order.
        seed: of the resampling.
        num_samples: resamples, and draws of signs.
    """
    found = paired_bootstrap(a_U, b_U, seed, num_samples)
    found["p_permutation"] = paired_permutation(a_U, b_U, seed, num_samples)
    found["detectable"] = detectable_difference(a_U, b_U)
    return found


def detectable_difference(
    a_U: np.ndarray, b_U: np.ndarray, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Return the smallest true difference that a two-sided paired test of these users would find.

    (z(1 - alpha / 2) + z(power)) x standard deviation of the paired differences / sqrt(U): with a
    true difference that large, a test at level `alpha` finds it with probability `power`. Anything
    smaller that is observed may well be noise.

    Args:
        a_U: (U,) or (S, U), of one system.
        b_U: (U,) or (S', U), of the other, the same users in the same order.
        power: probability of finding it.
        alpha: level of the test.
    """
    return _detectable(np.std(_differences(a_U, b_U)), len(per_user(a_U)), power, alpha)


def detectable_prior(
    values_U: np.ndarray, *, correlation: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Return what `detectable_difference` would be against a system that is not there yet.

    The other system is taken to spread as this one does, and to agree with it over users by
    `correlation`: the standard deviation of the difference is sd x sqrt(2 (1 - correlation)). 0 is
    cautious: systems that learn from the same data hit the same users.

    Args:
        values_U: (U,) or (S, U).
        correlation: between the two systems' values over users, at most 1.
        power: probability of finding it.
        alpha: level of the test.
    """
    if not -1 <= correlation <= 1:
        raise UserError(f"correlation: got {correlation}, expected a number from -1 to 1.")
    array_U = per_user(values_U)
    spread = float(np.std(array_U)) * np.sqrt(2 * (1 - correlation))
    return _detectable(spread, len(array_U), power, alpha)


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


def _flipped_sums(sizes_U: np.ndarray, rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Return (num_samples,) sums of U positive numbers with signs drawn at random."""
    distinct, counts = np.unique(sizes_U, return_counts=True)
    few = len(distinct) <= len(sizes_U) * _FEW_DISTINCT
    chunk = max(1, _CHUNK_CELLS // (len(distinct) if few else len(sizes_U)))
    sums = np.empty(num_samples)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        if few:
            plus = rng.binomial(counts, 0.5, size=(size, len(counts)))
            sums[start : start + size] = (2 * plus - counts) @ distinct
        else:
            plus = rng.integers(0, 2, size=(size, len(sizes_U)), dtype=np.int8)
            sums[start : start + size] = 2 * (plus @ sizes_U) - sizes_U.sum()
    return sums


def _differences(a_U: np.ndarray, b_U: np.ndarray) -> np.ndarray:
    """Return a - b per user, rounded so that equal values computed differently are equal."""
    a_U, b_U = per_user(a_U, what="a"), per_user(b_U, what="b")
    if len(a_U) != len(b_U):
        raise UserError(
            f"paired comparison: got {len(a_U)} and {len(b_U)} users. Expected the same users in "
            "the same order; evaluate both on one split of one data set."
        )
    # Rounding: 0.1 + 0.2 - 0.3 must count as "no difference", and as one distinct value.
    return np.round(a_U - b_U, 12)


def _detectable(spread: float, num_users: int, power: float, alpha: float) -> float:
    if not (0 < power < 1 and 0 < alpha < 1):
        raise UserError(f"power and alpha: got {power} and {alpha}, expected between 0 and 1.")
    normal = NormalDist()
    factor = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return float(factor * spread / np.sqrt(num_users))


def _tails(level: float) -> list[float]:
    if not 0 < level < 1:
        raise UserError(f"level: got {level}, expected a number between 0 and 1, e.g. 0.95.")
    return [(1 - level) / 2, (1 + level) / 2]
