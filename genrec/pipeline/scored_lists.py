"""What happened to lists, and when? Reads lists with all that a calibrator may read.

It fits nothing and measures nothing; it also knows how to cut users into periods of time.

Shapes: U users with a target, W list length (the beam width), k cut-off, L levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from genrec.artifacts import Artifact
from genrec.calibration.base import Calibrator, ListContext
from genrec.data import Dataset, Interactions
from genrec.data.interactions import SPLITS
from genrec.evaluation import metrics
from genrec.inference import RankedLists
from genrec.pipeline.listing import read_lists

RELIABILITY_K = 10

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
