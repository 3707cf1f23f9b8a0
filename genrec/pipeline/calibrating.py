"""When do probabilities hold? Fits calibrators on one period of lists, measures on the next.

The stages "levels" and "calibration". It searches nothing: lists come as artifacts. What a result
says about calibration is in `genrec.pipeline.calibration_figures`.

Shapes: U users with a target, W list length (the beam width), k cut-off, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.artifacts import Artifact, save_artifact
from genrec.bundle import load_model, save_calibration
from genrec.calibration import CALIBRATORS
from genrec.calibration.base import FEW_HITS
from genrec.data import Dataset
from genrec.decoding import CSRIndex
from genrec.errors import DataError, UserError
from genrec.evaluation.reliability import reliability
from genrec.inference import context_of, level_logprobs
from genrec.item_index import ItemIndex
from genrec.pipeline.listing import read_lists
from genrec.pipeline.scored_lists import (
    RELIABILITY_K,
    Make,
    Scored,
    equal_periods,
    period,
    read_scored,
)

log = runtime.get_logger(__name__)

QUARTERS = 4


def score_levels(
    path: Path, dataset: Dataset, index: ItemIndex, model: Artifact, lists: Artifact
) -> None:
    """Write the parts of the log-probabilities of listed items, (U, W, L) (artifact "levels")."""
    lists.require_upstream("model", model.fingerprint)
    found, _ = read_lists(lists)
    examples = dataset.interactions.examples(lists.extra["split"])
    histories = examples.histories()
    device = runtime.choose_device(None)
    network = load_model(model.path, index).to(device)
    parts = level_logprobs(
        network,
        CSRIndex.from_index(index).to(device),
        histories,
        found.rows,
        scoring=lists.extra.get("scoring", "renormalized"),
        context=context_of(network, examples),
        description=f"levels {lists.extra['split']}",
    )
    save_artifact(
        path,
        kind="levels",
        arrays={"levels": parts.astype(np.float32)},
        upstream={"lists": lists.fingerprint},
    )


def calibrate(
    path: Path,
    valid_lists: Mapping[str, Artifact],
    config: Any,
    width: int,
    scoring: Any,
    *,
    dataset: Dataset,
    levels: Mapping[str, Artifact] | None = None,
) -> None:
    """Fit a calibrator on each kind of validation lists (artifact "calibration").

    Args:
        path: where to.
        valid_lists: mode ("masked", "unmasked") -> "lists" artifact of the validation split.
        config: the `calibration` section.
        width: beam width of the lists.
        scoring: what their log-probabilities are among.
        dataset: what the lists were made from.
        levels: mode -> artifact of `score_levels`, where the calibrator needs it.
    """
    cls = runtime.lookup(CALIBRATORS, config.name, what="name")
    calibrators, fitted = {}, {}
    for mode, artifact in valid_lists.items():
        scored = read_scored(artifact, dataset, (levels or {}).get(mode))
        share, recency = choose_share(lambda: cls(config), scored, config.recent_share)
        users = most_recent(scored.time_U, share)
        calibrators[mode] = scored.fit(lambda: cls(config), users)
        fitted[mode] = {
            "lists": artifact.fingerprint,
            "dataset": dataset.fingerprint,
            "split": artifact.extra["split"],
            "num_users": len(users),
            "num_hits": int((scored.rank_U[users] >= 0).sum()),
            "period": period(scored.time_U[users]),
            "recent_share": share,
            "recency": recency,
            "other_users": other_users(lambda: cls(config), scored, users),
        }
    save_calibration(
        path,
        calibrators,
        config=config.to_dict(),
        width=width,
        scoring=scoring,
        fitted=fitted,
    )


def choose_share(
    make: Make, scored: Scored, wanted: float | str
) -> tuple[float, list[dict[str, Any]]]:
    """Return the share of the most recent users to fit on, and what speaks for it.

    "auto" fits on the latest of the first three quarters of the users (by time), on the latest two
    and on all three, and measures each on the last quarter. The lowest NLL of lists decides for the
    share that stands for it: a quarter, half or all. It looks at validation users only. Without
    times, or with fewer than `FEW_HITS` hits in a quarter, the share is 1.

    Returns:
        the share, and for "auto" a line per candidate: `share`, `num_fitted`, and the flat figures
        of `genrec.evaluation.reliability.reliability` on the last quarter.
    """
    if wanted != "auto":
        return float(wanted), []
    quarter_U = equal_periods(scored.time_U, QUARTERS)
    hits = np.bincount(quarter_U[scored.rank_U >= 0], minlength=QUARTERS)
    if quarter_U.max(initial=0) != QUARTERS - 1 or hits.min() < FEW_HITS:
        return 1.0, []
    k = min(RELIABILITY_K, scored.lists.rows.shape[1])
    last, lines = np.flatnonzero(quarter_U == QUARTERS - 1), []
    with _without_warnings():
        for share, earliest in ((1.0, 0), (0.5, 1), (0.25, 2)):
            users = np.flatnonzero((quarter_U >= earliest) & (quarter_U < QUARTERS - 1))
            p_Uk = scored.probabilities(scored.fit(make, users), last, k)
            figures = _flat(reliability(p_Uk, scored.rank_U[last]))
            lines.append({"share": share, "num_fitted": len(users), **figures})
    best = min(lines, key=lambda line: float(line["nll_list"]))
    log.info(
        "calibration: fitted on the latest %g of the validation users (lowest NLL on their last "
        "quarter)",
        best["share"],
    )
    return float(best["share"]), lines


def most_recent(time_U: np.ndarray, share: float) -> np.ndarray:
    """Return the positions of the given share of users, those with the latest times.

    Users with the time of the last one that fits are all taken, so that row order decides nothing.

    Raises:
        DataError: a share below 1 and no times to choose by.
    """
    if share >= 1 or not len(time_U):
        return np.arange(len(time_U))
    if time_U.min() == time_U.max():
        raise DataError(
            f"calibration.recent_share: got {share}, but all validation targets have the same "
            "time. Prepare the data set with timestamps, or set calibration.recent_share=1."
        )
    cut = np.sort(time_U)[::-1][max(1, round(share * len(time_U))) - 1]
    return np.flatnonzero(time_U >= cut)


def other_users(make: Make, scored: Scored, users: np.ndarray) -> dict[str, Any] | None:
    """Return how a calibrator fitted on half of the users does on the other half, both ways.

    The same period on both sides: what is wrong here is wrong with the map or with too few users;
    what is wrong on test only is the time in between. None with fewer than four users.
    """
    if len(users) < 4:
        return None
    k = min(RELIABILITY_K, scored.lists.rows.shape[1])
    in_first = np.random.default_rng(0).permutation(len(users)) % 2 == 0
    p_Uk = np.zeros((len(users), k))
    with _without_warnings():  # the fit on all users has said what there is to say
        for half in (in_first, ~in_first):
            p_Uk[~half] = scored.probabilities(scored.fit(make, users[half]), users[~half], k)
    return _flat(reliability(p_Uk, scored.rank_U[users]))


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = runtime.get_logger("genrec.calibration")
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def over_periods(make: Make, scored: Scored, period_U: np.ndarray) -> list[dict[str, Any]]:
    """Fit on each period and measure on the next.

    Args:
        make: returns a fresh calibrator.
        scored: lists of all periods.
        period_U: (U,) int, the period of each user, ascending with time; -1 = in none.

    Returns:
        A line per pair of neighbouring periods: `fitted_on`, `measured_on` (their spans), and the
        flat figures of `genrec.evaluation.reliability.reliability` on the later one.

    Raises:
        UserError: fewer than two periods with users.
    """
    numbers = [int(n) for n in np.unique(period_U[period_U >= 0])]
    if len(numbers) < 2:
        raise UserError(
            f"periods: got {len(numbers)} with users, expected at least 2 to fit on one and "
            "measure on the next."
        )
    k = min(RELIABILITY_K, scored.lists.rows.shape[1])
    lines = []
    for earlier, later in pairwise(numbers):
        before, after = np.flatnonzero(period_U == earlier), np.flatnonzero(period_U == later)
        calibrator = scored.fit(make, before)
        p_Uk = scored.probabilities(calibrator, after, k)
        lines.append(
            {
                "fitted_on": period(scored.time_U[before]),
                "measured_on": period(scored.time_U[after]),
                "num_fitted": len(before),
                **_flat(reliability(p_Uk, scored.rank_U[after])),
            }
        )
    return lines


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if not name.startswith("bins")}
