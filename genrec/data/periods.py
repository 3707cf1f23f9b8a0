"""What was known earlier? A data set as it would have been split at an earlier time.

For data that is split by time. It does not train on anything; what a model makes of two such views
is in `genrec.pipeline.incremental`.
"""

from __future__ import annotations

import numpy as np

from genrec.artifacts import fingerprint
from genrec.data.dataset import Dataset
from genrec.data.interactions import TRAIN, VALID, Interactions
from genrec.errors import ConfigError, DataError


def earlier_times(dataset: Dataset, share: float, valid_fraction: float) -> tuple[int, int]:
    """Return when an earlier data set ends, and when its validation begins.

    Args:
        dataset: split by global time.
        share: of the training interactions, the oldest, that are in the earlier one.
        valid_fraction: share of those, the latest, that validate.

    Returns:
        (valid_from, ends): training is before `valid_from`, validation before `ends`; seconds.

    Raises:
        ConfigError: a data set that is not split by time.
        DataError: a part would be empty.
    """
    split = (dataset.info.get("split") or {}).get("name")
    if split != "global_time":
        raise ConfigError(
            f"data set {dataset.name!r}: got split {split!r}, expected 'global_time': an earlier "
            "data set is what came before a point in time. Prepare it with --split global_time."
        )
    times = np.sort(dataset.interactions.training().timestamps)
    ends = int(times[min(len(times) - 1, int(len(times) * share))])
    before = times[times < ends]
    first = int(before[int(len(before) * (1 - valid_fraction))]) if len(before) else ends
    if not len(before) or not before[0] < first < ends:
        raise DataError(
            f"data set {dataset.name!r}: the oldest {share:.0%} of its training interactions leave "
            "nothing to train on or to validate by. Expected times that differ; choose another "
            "share."
        )
    return first, ends


def as_of(dataset: Dataset, valid_from: int, ends: int) -> Dataset:
    """Return the data set as it was at the time `ends`: the same users and items, fewer events.

    Args:
        dataset: split by global time.
        valid_from: events at or after this time validate.
        ends: events at or after this time are not there; nothing tests.
    """
    events = dataset.interactions
    keep = events.timestamps < ends
    counts = np.bincount(events.user_rows[keep], minlength=events.num_users)
    earlier = Interactions(
        events.item_rows[keep],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        events.timestamps[keep],
        np.where(events.timestamps[keep] < valid_from, TRAIN, VALID).astype(np.uint8),
        events.num_items,
        None if events.ratings is None else events.ratings[keep],
    )
    digest = fingerprint("as of", dataset.fingerprint, valid_from, ends)
    return Dataset(dataset.catalog, earlier, dataset.info, digest)
