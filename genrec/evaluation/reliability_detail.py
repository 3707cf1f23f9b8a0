"""For whom do probabilities hold, and how sure is a difference between two sets of them?

By group of users or of listed items, and paired bootstrap intervals over users. It takes
probabilities and places of targets; which calibrator made them it does not know.

Shapes: U users, k list length, G groups, S bootstrap samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from genrec.errors import UserError
from genrec.evaluation.groups import Groups
from genrec.evaluation.reliability import (
    NUM_BINS,
    checked_lists,
    ece,
    expected_ece,
    hits_of,
    list_nll,
    reliability_bins,
    wilson_interval,
)

ENDS = (0.025, 0.975)

Parts = dict[str, tuple[np.ndarray, np.ndarray]]


def reliability_by_group(
    probabilities_Uk: np.ndarray, target_rank_U: np.ndarray, groups: Groups
) -> list[dict[str, Any]]:
    """Return predicted against actual hits of every group, empty ones too.

    Args:
        probabilities_Uk: (U, k) calibrated probabilities, 0 = padding.
        target_rank_U: (U,) place of the target, -1 = absent.
        groups: of users, (U,) numbers, or of listed items, (U, k) numbers; -1 = in none. User
            segments are given as such labels.

    Returns:
        A line per group, JSON types: `group`, `num_users` (with a listed item in it), `num_pairs`,
        `predicted_hits`, `actual_hits`, `actual_hits_ci` (95% Wilson over those users), `ece` and
        `ece_bound`; the last three are None for an empty group.

    Raises:
        UserError: shapes that do not fit, or a group without a label.
    """
    p_Uk, rank_U = checked_lists(probabilities_Uk, target_rank_U)
    group_Uk = np.asarray(groups.group_U)
    if group_Uk.shape not in ((len(p_Uk),), p_Uk.shape):
        raise UserError(
            f"groups {groups.name!r}: got numbers of shape {group_Uk.shape}, expected "
            f"({len(p_Uk)},) for users or {p_Uk.shape} for listed items."
        )
    if group_Uk.size and group_Uk.max() >= len(groups.labels):
        raise UserError(
            f"groups {groups.name!r}: got group {group_Uk.max()}, but {len(groups.labels)} labels."
        )
    if group_Uk.ndim == 1:
        group_Uk = np.broadcast_to(group_Uk[:, None], p_Uk.shape)
    hits_Uk = hits_of(rank_U, p_Uk.shape[1])
    lines = []
    for number, label in enumerate(groups.labels):
        inside_Uk = (group_Uk == number) & ((p_Uk > 0) | hits_Uk)
        lines.append({"group": label, **_group(p_Uk, hits_Uk, inside_Uk)})
    return lines


def _group(p_Uk: np.ndarray, hits_Uk: np.ndarray, inside_Uk: np.ndarray) -> dict[str, Any]:
    num_users, num_pairs = int(inside_Uk.any(axis=1).sum()), int(inside_Uk.sum())
    predicted, actual = float(p_Uk[inside_Uk].sum()), int(hits_Uk[inside_Uk].sum())
    line: dict[str, Any] = {
        "num_users": num_users,
        "num_pairs": num_pairs,
        "predicted_hits": predicted,
        "actual_hits": actual,
        "actual_hits_ci": None,
        "ece": None,
        "ece_bound": None,
    }
    if num_pairs:
        line["actual_hits_ci"] = [num_users * x for x in wilson_interval(actual, num_users)]
        line["ece"] = ece(reliability_bins(p_Uk[inside_Uk], hits_Uk[inside_Uk]))
        if predicted > 0:
            line["ece_bound"] = expected_ece(np.where(inside_Uk, p_Uk, 0.0))
    return line


def compare_paired(
    before_Uk: np.ndarray,
    after_Uk: np.ndarray,
    target_rank_U: np.ndarray,
    *,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return differences after minus before, with 95% intervals over resampled users.

    ECE is never negative, so its bootstrap lies above its value; the bias is alike on both sides
    and cancels in the difference, not in `ece_after_ci`. Bins are those of all users.

    Args:
        before_Uk: (U, k) probabilities of the same lists before calibration.
        after_Uk: (U, k) after it.
        target_rank_U: (U,) place of the target, -1 = absent.
        num_samples: resamples.
        seed: of the bootstrap.

    Returns:
        For each of `ece`, `nll`, `nll_list`, `brier` and `predicted_hits`: `<name>_difference`,
        `<name>_difference_ci`, `<name>_after_ci`.

    Raises:
        UserError: no users, or shapes that do not fit.
    """
    before_Uk, rank_U = checked_lists(before_Uk, target_rank_U)
    after_Uk, _ = checked_lists(after_Uk, rank_U)
    if before_Uk.shape != after_Uk.shape or not len(rank_U):
        raise UserError(
            f"reliability: got probabilities {before_Uk.shape} before and {after_Uk.shape} after, "
            "expected the same lists of at least one user."
        )
    sides = [_parts(before_Uk, rank_U), _parts(after_Uk, rank_U)]
    everyone = np.ones((1, len(rank_U)))
    rng = np.random.default_rng(seed)
    drawn = {name: np.empty((2, num_samples)) for name in sides[0]}
    for sample in range(num_samples):
        chosen_U = rng.integers(0, len(rank_U), len(rank_U))
        weights_U = np.bincount(chosen_U, minlength=len(rank_U))[None].astype(np.float64)
        for side, parts in enumerate(sides):
            for name in parts:
                drawn[name][side, sample] = _value(parts, name, weights_U)
    result: dict[str, Any] = {}
    for name, values in drawn.items():
        whole = [_value(parts, name, everyone) for parts in sides]
        result[f"{name}_difference"] = whole[1] - whole[0]
        result[f"{name}_difference_ci"] = np.quantile(values[1] - values[0], ENDS).tolist()
        result[f"{name}_after_ci"] = np.quantile(values[1], ENDS).tolist()
    return result


def _parts(p_Uk: np.ndarray, rank_U: np.ndarray) -> Parts:
    """Return each figure as per-user numerators (U, columns) and denominators (U,)."""
    hits_Uk = hits_of(rank_U, p_Uk.shape[1])
    real_Uk = (p_Uk > 0) | hits_Uk
    kept_Uk = np.clip(p_Uk, 1e-12, 1 - 1e-12)
    surprise_Uk = -np.where(hits_Uk, np.log(kept_Uk), np.log1p(-kept_Uk)) * real_Uk
    pairs_U = real_Uk.sum(axis=1).astype(np.float64)
    one_U = np.ones(len(p_Uk))
    return {
        "ece": (_gaps(p_Uk, hits_Uk, real_Uk), pairs_U),
        "nll": (surprise_Uk.sum(axis=1)[:, None], pairs_U),
        "nll_list": (list_nll(p_Uk, rank_U)[:, None], one_U),
        "brier": ((((p_Uk - hits_Uk) ** 2) * real_Uk).sum(axis=1)[:, None], pairs_U),
        "predicted_hits": (p_Uk.sum(axis=1)[:, None], one_U / len(p_Uk)),
    }


def _gaps(p_Uk: np.ndarray, hits_Uk: np.ndarray, real_Uk: np.ndarray) -> np.ndarray:
    """Return each user's predicted minus actual hits in every equal-mass bin, (U, bins)."""
    p_M = p_Uk[real_Uk]
    bins = reliability_bins(p_M, hits_Uk[real_Uk])
    bin_M = np.searchsorted([b.high for b in bins], p_M, side="left")
    users_M = np.nonzero(real_Uk)[0]
    cells_M = users_M * NUM_BINS + bin_M
    gaps_X = np.bincount(cells_M, p_M - hits_Uk[real_Uk], minlength=len(p_Uk) * NUM_BINS)
    return gaps_X.reshape(len(p_Uk), NUM_BINS)


def _value(parts: Parts, name: str, weights_U: np.ndarray) -> float:
    numerator_UX, denominator_U = parts[name]
    return float(np.abs(weights_U @ numerator_UX).sum() / (weights_U @ denominator_U).sum())
