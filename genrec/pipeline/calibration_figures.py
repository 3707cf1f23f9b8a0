"""Do the probabilities hold on test lists? What a result says about calibration.

It searches and fits nothing: lists and calibrators come as artifacts. A calibrator is never
measured on the lists that it was fitted on.

Shapes: U users with a target, W list length (the beam width), k cut-off, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrec.artifacts import Artifact
from genrec.bundle import load_calibration
from genrec.calibration.scores import IdentityCalibrator
from genrec.calibration.strength import preference_strength
from genrec.data import Dataset
from genrec.errors import MismatchError
from genrec.evaluation.exposure import in_head
from genrec.evaluation.groups import Groups, by_history_length, by_target_popularity
from genrec.evaluation.reliability import compare_reliability
from genrec.evaluation.reliability_detail import compare_paired, reliability_by_group
from genrec.pipeline.scored_lists import RELIABILITY_K, Scored, period, read_scored

HEAD, TAIL = 0, 1


def measure_calibration(
    calibration: Artifact,
    mode: str,
    test_lists: Artifact,
    dataset: Dataset,
    levels: Artifact | None = None,
) -> dict[str, Any]:
    """Compare probabilities before and after calibration on test lists, cut to the top 10.

    Args:
        calibration: artifact of `calibrate`.
        mode: "masked" or "unmasked".
        test_lists: artifact of the lists to measure on.
        dataset: what they were made from.
        levels: artifact of `score_levels` on them, where the calibrator needs it.

    Returns:
        JSON types: `compare_reliability` and `compare_paired` of
        `genrec.evaluation`, with `mode`, `k`, `name`, `state`, `fitted` (on whom and when),
        `period` (of the targets measured on), `rising` (share of lists whose probabilities rise
        somewhere), `groups` (name -> lines) and `strength` (mean, and correlation with hits).

    Raises:
        MismatchError: measured on what it was fitted on.
    """
    calibrator = load_calibration(calibration.path)[0][mode]
    fitted = calibration.extra.get("fitted", {}).get(mode, {})
    _check_apart(fitted, test_lists, dataset)
    scored = read_scored(test_lists, dataset, levels)
    everyone, k = np.arange(len(scored)), min(RELIABILITY_K, scored.lists.rows.shape[1])
    before = scored.probabilities(IdentityCalibrator(), everyone, k)
    whole = scored.probabilities(calibrator, everyone, scored.lists.rows.shape[1])
    after, rank_U = whole[:, :k], np.where(scored.rank_U < k, scored.rank_U, -1)
    strength_U = preference_strength(whole, scored.lists.num_rest)
    return {
        "mode": mode,
        "k": k,
        "name": calibrator.config.name,
        "state": calibrator.state(),
        "fitted": fitted,
        "period": period(scored.time_U),
        "rising": float((np.diff(after, axis=1) > 1e-12).any(axis=1).mean()),
        "groups": _groups(scored, dataset, after, rank_U),
        "strength": _strength(strength_U, rank_U),
        **compare_reliability(before, after, rank_U),
        **compare_paired(before, after, rank_U),
    }


def _check_apart(fitted: Mapping[str, Any], lists: Artifact, dataset: Dataset) -> None:
    """Refuse to measure on what was fitted on, where the artifacts tell."""
    same_split = fitted.get("dataset") == dataset.fingerprint and (
        fitted.get("split") == lists.extra["split"]
    )
    if same_split or fitted.get("lists") == lists.fingerprint:
        raise MismatchError(
            f"calibration was fitted on the {lists.extra['split']} split of data set "
            f"{dataset.name!r} (lists {fitted.get('lists')}) and cannot be measured on it (lists "
            f"{lists.fingerprint}). Measure it on another split or data set."
        )


def _groups(
    scored: Scored, dataset: Dataset, p_Uk: np.ndarray, rank_U: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    counts_N = dataset.interactions.training().counts()
    lengths_U = scored.context.history_lengths
    assert lengths_U is not None
    rows_Uk = scored.lists.rows[:, : p_Uk.shape[1]]
    item_Uk = np.where(in_head(counts_N)[rows_Uk], HEAD, TAIL)
    labels = ("head (most popular fifth)", "tail")
    kinds = [
        by_history_length(lengths_U),
        by_target_popularity(scored.target_U, counts_N),
        Groups("item_popularity", labels, np.where(rows_Uk >= 0, item_Uk, -1)),
    ]
    return {kind.name: reliability_by_group(p_Uk, rank_U, kind) for kind in kinds}


def _strength(strength_U: np.ndarray, rank_U: np.ndarray) -> dict[str, Any]:
    """Return the hit rate of the strongest and of the weakest third of users, and the mean."""
    order = np.argsort(strength_U, kind="stable")
    thirds = np.array_split(order, 3)
    return {
        "mean": float(strength_U.mean()),
        "thirds": [
            {
                "mean": float(strength_U[third].mean()) if len(third) else None,
                "hit_rate": float((rank_U[third] >= 0).mean()) if len(third) else None,
            }
            for third in thirds
        ],
    }
