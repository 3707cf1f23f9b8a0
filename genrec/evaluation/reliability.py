"""Do probabilities hold? Compares what was predicted with what happened, and knows no model.

Recommendation has one relevant item among thousands: base rates are tiny, nearly all probabilities
fall into the first equal-width bin, and a small ECE alone proves little. So equal-mass bins stand
beside equal-width ones, the base rate is always reported, and `expected_ece` says how large an ECE
perfectly calibrated probabilities would show on the same data by chance alone.

Shapes: U users, k list length, M (user, recommended item) pairs; most functions take any shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from genrec.errors import UserError

NUM_BINS = 15
Binning = Literal["equal_width", "equal_mass"]
Interval = Literal["wilson", "clopper_pearson"]


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram.

    Args:
        low: smallest probability that belongs to it.
        high: largest.
        count: pairs in it.
        hits: how many were hits.
        predicted: mean probability.
        actual: hits / count.
        ci: 95% interval of `actual`, Wilson's unless asked otherwise.
    """

    low: float
    high: float
    count: int
    hits: int
    predicted: float
    actual: float
    ci: tuple[float, float]


def hits_of(target_rank_U: np.ndarray, k: int) -> np.ndarray:
    """Return (U, k) bool: True where the target stands (rank -1, or >= k, gives an empty row)."""
    return np.asarray(target_rank_U)[:, None] == np.arange(k)


def wilson_interval(hits: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share; (0, 1) when there is nothing to count."""
    if count <= 0:
        return 0.0, 1.0
    share = hits / count
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def clopper_pearson_interval(hits: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Return the exact (never too narrow) interval of a share; (0, 1) with nothing to count."""
    if count <= 0:
        return 0.0, 1.0
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits >= count else float(beta.ppf(1 - tail, hits + 1, count - hits))
    return low, high


def reliability_bins(
    probabilities: np.ndarray,
    hits: np.ndarray,
    *,
    num_bins: int = NUM_BINS,
    binning: Binning = "equal_mass",
    interval: Interval = "wilson",
) -> list[Bin]:
    """Return the non-empty bins of a reliability diagram, lowest probabilities first.

    Args:
        probabilities: any shape, in [0, 1].
        hits: same shape, bool or 0/1.
        num_bins: at most this many; equal probabilities always share a bin, so constant
            probabilities give one.
        binning: "equal_width" over [0, 1], or "equal_mass" (about as many pairs in each).
        interval: "wilson", or "clopper_pearson" (exact, wider).

    Raises:
        UserError: shapes that differ, no pairs, or values outside [0, 1].
    """
    p_M, hit_M = _checked(probabilities, hits)
    bin_M = _bin_of(p_M, num_bins, binning)
    if interval not in ("wilson", "clopper_pearson"):
        raise UserError(f"interval: got {interval!r}, expected 'wilson' or 'clopper_pearson'.")
    around = wilson_interval if interval == "wilson" else clopper_pearson_interval
    bins = []
    for b in np.unique(bin_M):
        inside = bin_M == b
        count, total = int(inside.sum()), int(hit_M[inside].sum())
        p = p_M[inside]
        ci = around(total, count)
        bins.append(
            Bin(float(p.min()), float(p.max()), count, total, float(p.mean()), total / count, ci)
        )
    return bins


def ece(bins: list[Bin]) -> float:
    """Return the expected calibration error: the count-weighted mean of |predicted - actual|."""
    counts = np.array([b.count for b in bins])
    gaps = np.array([abs(b.predicted - b.actual) for b in bins])
    return float(counts @ gaps / counts.sum())


def mce(bins: list[Bin]) -> float:
    """Return the maximum calibration error: the largest |predicted - actual| of any bin."""
    return max(abs(b.predicted - b.actual) for b in bins)


def brier(probabilities: np.ndarray, hits: np.ndarray) -> float:
    """Return the mean squared difference between probability and outcome."""
    p_M, hit_M = _checked(probabilities, hits)
    return float(np.mean((p_M - hit_M) ** 2))


def binary_nll(probabilities: np.ndarray, hits: np.ndarray, eps: float = 1e-12) -> float:
    """Return the mean of -log p(outcome) in nats; probabilities are kept eps away from 0 and 1."""
    p_M, hit_M = _checked(probabilities, hits)
    p_M = np.clip(p_M, eps, 1 - eps)
    return float(-np.mean(np.where(hit_M, np.log(p_M), np.log1p(-p_M))))


def list_nll(
    probabilities_Uk: np.ndarray, target_rank_U: np.ndarray, eps: float = 1e-12
) -> np.ndarray:
    """Return -log of the probability that a list gave to what happened, (U,) nats.

    What can happen is that one of the listed items is next, or none of them (1 minus their sum).
    Unlike the NLL of pairs, every user counts once.

    Args:
        probabilities_Uk: (U, k), each row summing to at most 1; 0 = padding.
        target_rank_U: (U,) place of the target, -1 = not in the list.
        eps: probabilities are kept this far away from 0.
    """
    p_Uk, rank_U = checked_lists(probabilities_Uk, target_rank_U)
    none_U = 1.0 - p_Uk.sum(axis=1)
    if not p_Uk.shape[1]:
        return -np.log(np.maximum(none_U, eps))
    found_U = p_Uk[np.arange(len(p_Uk)), np.maximum(rank_U, 0)]
    return -np.log(np.maximum(np.where(rank_U >= 0, found_U, none_U), eps))


def expected_ece(
    probabilities_Uk: np.ndarray,
    *,
    num_bins: int = NUM_BINS,
    binning: Binning = "equal_mass",
    seed: int = 0,
    num_samples: int = 200,
    quantile: float = 0.95,
) -> float:
    """Return the ECE below which perfectly calibrated probabilities stay in `quantile` of draws.

    Each draw gives every user at most one hit: item j with probability p_uj, none otherwise. An
    ECE above this bound is miscalibration; one below it cannot be told from chance.

    Args:
        probabilities_Uk: (U, k), each row summing to at most 1 (a little more is tolerated);
            zeros are padding and left out.
        num_bins: as for `reliability_bins`.
        binning: as for `reliability_bins`.
        seed: of the draws.
        num_samples: draws.
        quantile: of the simulated ECEs.
    """
    p_Uk = np.asarray(probabilities_Uk, dtype=np.float64)
    real_Uk = p_Uk > 0
    p_M, _ = _checked(p_Uk[real_Uk], np.zeros(np.count_nonzero(real_Uk)))
    _, bin_M = np.unique(_bin_of(p_M, num_bins, binning), return_inverse=True)
    predicted = np.bincount(bin_M, weights=p_M)
    bin_Uk, total_Uk = np.zeros(p_Uk.shape, np.int64), np.cumsum(p_Uk, axis=1)
    bin_Uk[real_Uk] = bin_M
    rng, simulated = np.random.default_rng(seed), np.empty(num_samples)
    users = np.arange(len(p_Uk))
    for sample in range(num_samples):
        place_U = np.count_nonzero(total_Uk <= rng.random(len(p_Uk))[:, None], axis=1)
        hit = place_U < p_Uk.shape[1]
        hits = np.bincount(bin_Uk[users[hit], place_U[hit]], minlength=len(predicted))
        simulated[sample] = np.abs(predicted - hits).sum() / len(p_M)
    return float(np.quantile(simulated, quantile))


def reliability(probabilities_Uk: np.ndarray, target_rank_U: np.ndarray) -> dict[str, Any]:
    """Return everything that a report says about one set of probabilities.

    Args:
        probabilities_Uk: (U, k) probability of each listed item; zeros are padding and no pairs.
        target_rank_U: (U,) place of the target in the list; -1 (or a place beyond it) = absent.

    Returns:
        JSON types: `ece`, `mce` (equal mass), `ece_equal_width`, `ece_bound` (see
        `expected_ece`), `brier`, `nll` (binary, per pair), `nll_list` (per user, see `list_nll`),
        `base_rate`, `num_pairs`, `predicted_hits`, `actual_hits`, `actual_hits_ci` (Wilson over
        users: a user has at most one hit), `bins` and `bins_equal_width`.

    Raises:
        UserError: shapes that do not fit, no pairs, values that are no probabilities, or users
            without a target.
    """
    p_Uk, target_rank_U = checked_lists(probabilities_Uk, target_rank_U)
    hits_Uk = hits_of(target_rank_U, p_Uk.shape[1])
    pairs = (p_Uk > 0) | hits_Uk
    p_M, hit_M = p_Uk[pairs], hits_Uk[pairs]
    mass = reliability_bins(p_M, hit_M, binning="equal_mass")
    width = reliability_bins(p_M, hit_M, binning="equal_width")
    num_hits, num_users = int(hit_M.sum()), len(p_Uk)
    return {
        "ece": ece(mass),
        "ece_equal_width": ece(width),
        "ece_bound": expected_ece(p_Uk),
        "mce": mce(mass),
        "brier": brier(p_M, hit_M),
        "nll": binary_nll(p_M, hit_M),
        "nll_list": float(list_nll(p_Uk, target_rank_U).mean()),
        "base_rate": num_hits / len(p_M),
        "num_pairs": len(p_M),
        "num_users": num_users,
        "predicted_hits": float(p_M.sum()),
        "actual_hits": num_hits,
        "actual_hits_ci": [num_users * x for x in wilson_interval(num_hits, num_users)],
        "bins": [asdict(b) for b in mass],
        "bins_equal_width": [asdict(b) for b in width],
    }


def compare_reliability(
    before_Uk: np.ndarray, after_Uk: np.ndarray, target_rank_U: np.ndarray
) -> dict[str, Any]:
    """Return the "calibration" section of results.json.

    Args:
        before_Uk: (U, k) probabilities before calibration.
        after_Uk: (U, k) probabilities after it, of the same lists.
        target_rank_U: (U,) place of the target, -1 = absent. Users other than those that the
            calibrator was fitted on, or the comparison means nothing.

    Returns:
        flat `<metric>_before` and `<metric>_after` numbers for `ece`, `ece_equal_width`,
        `ece_bound`, `mce`, `brier`, `nll`, `nll_list`, `predicted_hits`; `base_rate`, `num_pairs`,
        `num_users`, `actual_hits`, `actual_hits_ci`; and `before` / `after` with the bins.
    """
    before, after = reliability(before_Uk, target_rank_U), reliability(after_Uk, target_rank_U)
    changing = ("ece", "ece_equal_width", "ece_bound", "mce", "brier", "nll", "nll_list",
                "predicted_hits")  # fmt: skip
    shared = ("base_rate", "num_pairs", "num_users", "actual_hits", "actual_hits_ci")
    result: dict[str, Any] = {}
    for name in changing:
        result[f"{name}_before"], result[f"{name}_after"] = before[name], after[name]
    result.update({name: after[name] for name in shared})
    for side, values in (("before", before), ("after", after)):
        result[side] = {key: values[key] for key in ("bins", "bins_equal_width")}
    return result


def checked_lists(
    probabilities_Uk: np.ndarray, target_rank_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (U, k) float64 and (U,) int64, places beyond the list as -1.

    Raises:
        UserError: shapes that do not fit, or users without a target (places below -1).
    """
    p_Uk, rank_U = np.asarray(probabilities_Uk, np.float64), np.asarray(target_rank_U)
    if p_Uk.ndim != 2 or rank_U.shape != (len(p_Uk),):
        raise UserError(
            f"reliability: got probabilities {p_Uk.shape} and target ranks {rank_U.shape}, "
            "expected (users, k) and (users,)."
        )
    if len(rank_U) and rank_U.min() < -1:
        raise UserError(
            f"reliability: got a target rank of {rank_U.min()}, expected -1 (not in the list) or a "
            "place. Leave out users without a target: nothing can be said about them."
        )
    return p_Uk, np.where(rank_U < p_Uk.shape[1], rank_U, -1).astype(np.int64)


def _bin_of(p_M: np.ndarray, num_bins: int, binning: Binning) -> np.ndarray:
    if num_bins < 1:
        raise UserError(f"num_bins: got {num_bins}, expected an integer >= 1.")
    if binning == "equal_width":
        return np.minimum((p_M * num_bins).astype(np.int64), num_bins - 1)
    if binning != "equal_mass":
        raise UserError(f"binning: got {binning!r}, expected 'equal_width' or 'equal_mass'.")
    # Edges are values of the data, so equal probabilities never fall into two bins.
    edges = np.quantile(p_M, np.arange(1, num_bins) / num_bins, method="inverted_cdf")
    return np.searchsorted(np.unique(edges), p_M, side="left")


def _checked(probabilities: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, hit = np.asarray(probabilities, dtype=np.float64), np.asarray(hits)
    if p.shape != hit.shape or not p.size:
        raise UserError(
            f"reliability: got probabilities {p.shape} and hits {hit.shape}, expected the same "
            "shape with at least one pair."
        )
    if not ((p >= 0) & (p <= 1 + 1e-6)).all():
        raise UserError(
            "reliability: got probabilities outside [0, 1] (or NaN). Pass probabilities, not "
            "scores or log-probabilities."
        )
    return np.minimum(p, 1.0).reshape(-1), hit.astype(bool).reshape(-1)
