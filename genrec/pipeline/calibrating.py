"""When do probabilities hold? Fits calibrators on one period of lists, measures on the next.

The stages "levels" and "calibration", and what a result says about calibration. It searches
nothing: lists come as artifacts. A calibrator is never measured on the lists that it was fitted on.

Shapes: U users with a target, W list length (the beam width), k cut-off, L levels, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.artifacts import Artifact, save_artifact
from genrec.bundle import load_calibration, load_model, save_calibration
from genrec.calibration import CALIBRATORS
from genrec.calibration.base import FEW_HITS, Calibrator, ListContext
from genrec.calibration.scores import IdentityCalibrator
from genrec.calibration.strength import preference_strength
from genrec.data import Dataset, Interactions
from genrec.data.interactions import SPLITS
from genrec.decoding import CSRIndex
from genrec.errors import DataError, MismatchError, UserError
from genrec.evaluation import metrics
from genrec.evaluation.exposure import in_head
from genrec.evaluation.groups import Groups, by_history_length, by_target_popularity
from genrec.evaluation.reliability import compare_reliability, reliability
from genrec.evaluation.reliability_detail import compare_paired, reliability_by_group
from genrec.inference import RankedLists, level_logprobs
from genrec.item_index import ItemIndex
from genrec.pipeline.stages import read_lists

log = runtime.get_logger(__name__)

RELIABILITY_K = 10
QUARTERS = 4
HEAD, TAIL = 0, 1

Make = Callable[[], Calibrator]


@dataclass(frozen=True, eq=False)
class Scored:
    """Lists with everything that a calibrator may read, and what happened.

    Args:
        lists: U lists of length W.
        rank_U: (U,) place of the target, -1 = not in the list.
        time_U: (U,) seconds, when the target was consumed.
        context: history lengths, and level log-probabilities where they are needed.
        target_U: (U,) item rows.
    """

    lists: RankedLists
    rank_U: np.ndarray
    time_U: np.ndarray
    context: ListContext
    target_U: np.ndarray

    def __len__(self) -> int:
        return len(self.rank_U)

    def fit(self, make: Make, users: np.ndarray) -> Calibrator:
        """Return a calibrator fitted on some of the users (positions)."""
        calibrator: Calibrator = make().fit(
            self.lists.logprobs[users],
            self.rank_U[users],
            self.lists.num_rest[users],
            self.context.select(users),
        )
        return calibrator

    def probabilities(self, calibrator: Calibrator, users: np.ndarray, k: int) -> np.ndarray:
        """Return (users, k) probabilities of the top k; they are those of the whole list."""
        found = calibrator.probabilities(
            self.lists.logprobs[users], self.lists.num_rest[users], self.context.select(users)
        )
        return found[:, :k]


def read_scored(artifact: Artifact, dataset: Dataset, levels: Artifact | None = None) -> Scored:
    """Return the content of a "lists" artifact with times, history lengths and levels.

    Args:
        artifact: lists of one split.
        dataset: what they were made from.
        levels: artifact of `score_levels` on these lists, where a calibrator needs it.

    Raises:
        MismatchError: lists of another data set, or levels of other lists.
    """
    artifact.require_upstream("dataset", dataset.fingerprint)
    if levels is not None:
        levels.require_upstream("lists", artifact.fingerprint)
    split = artifact.extra["split"]
    lists, targets = read_lists(artifact)
    users = artifact.arrays["user_rows"]
    times, lengths = target_times(dataset.interactions, split)
    parts = None if levels is None else levels.arrays["levels"].astype(np.float64)
    context = ListContext(lengths[users], parts)
    ranks = metrics.ranks_in_lists(lists.rows, targets)
    return Scored(lists, ranks, times[users], context, targets)


def target_times(interactions: Interactions, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return when each user's target of a split was consumed, and how long the history before is.

    Returns:
        (users,) int64 seconds and (users,) int64; both 0 for users without such a target.
    """
    places = np.flatnonzero(interactions.splits == SPLITS[split])
    users, first = np.unique(interactions.user_rows[places], return_index=True)
    times = np.zeros(interactions.num_users, np.int64)
    lengths = np.zeros(interactions.num_users, np.int64)
    times[users] = interactions.timestamps[places[first]]
    lengths[users] = places[first] - interactions.offsets[users]
    return times, lengths


# -- stages -----------------------------------------------------------------------------------


def score_levels(
    path: Path, dataset: Dataset, index: ItemIndex, model: Artifact, lists: Artifact
) -> None:
    """Write the parts of the log-probabilities of listed items, (U, W, L) (artifact "levels")."""
    lists.require_upstream("model", model.fingerprint)
    found, _ = read_lists(lists)
    examples = dataset.interactions.examples(lists.extra["split"])
    histories = examples.histories()
    device = runtime.choose_device(None)
    parts = level_logprobs(
        load_model(model.path, index).to(device),
        CSRIndex.from_index(index).to(device),
        histories,
        found.rows,
        exclude=histories if lists.extra["masked"] else None,
        scoring=lists.extra.get("scoring", "renormalized"),
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


def equal_periods(time_U: np.ndarray, count: int) -> np.ndarray:
    """Return which of `count` periods of about equally many users each time falls in, (U,) int64.

    Equal times share a period, so there may be fewer.
    """
    edges = np.quantile(time_U, np.arange(1, count) / count, method="inverted_cdf")
    return np.searchsorted(np.unique(edges), time_U, side="left")


def period(time_U: np.ndarray) -> dict[str, str] | None:
    """Return the first, median and last day of some times, None where there are none."""
    if not len(time_U) or not np.any(time_U):
        return None
    names = {"first": 0.0, "median": 0.5, "last": 1.0}
    values = np.quantile(time_U, list(names.values()), method="inverted_cdf")
    return {
        name: datetime.fromtimestamp(int(value), UTC).date().isoformat()
        for name, value in zip(names, values, strict=True)
    }


# -- results ----------------------------------------------------------------------------------


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


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if not name.startswith("bins")}
