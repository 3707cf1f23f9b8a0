"""Does the split of a data set keep the future out of training and of histories? Nothing is fitted.

Each check recomputes from the bare arrays what the rest of genrec relies on, and says what it
found. Checks that fit something are in `audit.py`.

Shapes: M interactions, U users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from genrec.data import Dataset, Interactions
from genrec.data.interactions import TEST, TRAIN, VALID, SplitName

Verdict = Literal["ok", "leak", "unstable", "note", "left out"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Args:
        name: what was checked.
        verdict: "ok"; "leak"; "unstable" (a stage gives another result every time, so nothing can
            be said); "note" (worth knowing, no leak); "left out" (there is nothing to check).
        detail: a sentence with the figures.
    """

    name: str
    verdict: Verdict
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def split_checks(dataset: Dataset) -> list[Check]:
    """Return what can be said about a split without fitting anything."""
    events = dataset.interactions
    checks = [_training_rows(events), _repeated_events(events)]
    checks += [_histories(events, split) for split in ("valid", "test")]
    checks.append(_time_order(events))
    checks += _global_time(dataset)
    return checks


def _training_rows(events: Interactions) -> Check:
    """Compare the view for fitting with each user's interactions before the first held-out one."""
    name = "training rows"
    held_out = events.splits != TRAIN
    before = np.concatenate([[0], np.cumsum(held_out)])  # held-out interactions before each place
    earlier = before[np.arange(len(events))] - before[events.offsets[:-1]][events.user_rows]
    late = int(np.count_nonzero(~held_out & (earlier > 0)))
    if late:
        return Check(
            name, "leak", f"{late:,} training interactions come after a held-out one of their user."
        )
    training = events.training()
    expected = events.item_rows[earlier + held_out == 0]
    if not np.array_equal(training.item_rows, expected):
        return Check(
            name,
            "leak",
            f"training() returns {len(training):,} interactions, expected the "
            f"{len(expected):,} before each user's first held-out one.",
        )
    return Check(name, "ok", f"{len(training):,} training interactions, none held out, none later.")


def _repeated_events(events: Interactions) -> Check:
    """Look for one event in two splits: the same user, item and time."""
    name = "events in two splits"
    timed = events.timestamps > 0
    keys = np.stack([events.user_rows, events.item_rows, events.timestamps])[:, timed]
    held_out = events.splits[timed] != TRAIN
    order = np.lexsort(keys)
    same = (keys[:, order[1:]] == keys[:, order[:-1]]).all(axis=0)
    twice = int(np.count_nonzero(same & (held_out[order[1:]] != held_out[order[:-1]])))
    if twice:
        return Check(
            name,
            "leak",
            f"{twice:,} held-out interactions are training interactions too: same user, item and "
            "time. Prepare with duplicates=first.",
        )
    if not timed.any():
        return Check(name, "left out", "no timestamps to tell events apart by.")
    return Check(name, "ok", f"{int(timed.sum()):,} timed interactions.")


def _histories(events: Interactions, split: SplitName) -> Check:
    """Hold each example against its user's sequence."""
    name = f"{split} histories"
    examples = events.examples(split)
    if not len(examples):
        return Check(name, "left out", f"no {split} targets.")
    starts = events.offsets[examples.user_rows]
    places = starts + examples.lengths
    wrong = int(np.count_nonzero(events.item_rows[places] != examples.target_rows))
    code = VALID if split == "valid" else TEST
    wrong += int(np.count_nonzero(events.splits[places] != code))
    inside = np.repeat(starts - examples.offsets[:-1], examples.lengths) + np.arange(
        len(examples.flat)
    )
    wrong += int(np.count_nonzero(events.item_rows[inside] != examples.flat))
    wrong += int(np.count_nonzero(events.splits[inside] > code))
    if wrong:
        return Check(
            name, "leak", f"{wrong:,} places differ from what the user did before the target."
        )
    owner = np.repeat(examples.target_rows, examples.lengths)
    repeats = len(
        np.unique(np.repeat(np.arange(len(examples)), examples.lengths)[examples.flat == owner])
    )
    detail = f"{len(examples):,} histories end right before their target."
    if repeats:
        detail += f" For {repeats:,} the item was consumed earlier too."
    return Check(name, "ok", detail)


def _time_order(events: Interactions) -> Check:
    name = "time within users"
    pair = np.flatnonzero(events.user_rows[1:] == events.user_rows[:-1])
    first, second = events.timestamps[pair], events.timestamps[pair + 1]
    timed = (first > 0) & (second > 0)
    back = timed & (first > second)
    if not timed.any():
        return Check(name, "left out", "no timestamps; the order is the file's.")
    if back.any():
        users = len(np.unique(events.user_rows[pair[back]]))
        return Check(
            name, "leak", f"time goes backwards {int(back.sum()):,} times, for {users:,} users."
        )
    return Check(name, "ok", f"{int(timed.sum()):,} pairs of neighbours, none backwards.")


def _global_time(dataset: Dataset) -> Iterator[Check]:
    """Compare the times of the splits: an error under global_time, a fact under leave-one-out."""
    events, split = dataset.interactions, dataset.info.get("split")
    kind = split.get("name") if isinstance(split, dict) else split
    times = {part: events.timestamps[events.splits == part] for part in (TRAIN, VALID, TEST)}
    if any(not len(part) or not part.min() for part in times.values()):
        yield Check("time across users", "left out", "not every interaction has a timestamp.")
        return
    if kind == "global_time":
        future = int(np.count_nonzero(times[TRAIN] >= times[VALID].min()))
        future += int(np.count_nonzero(times[VALID] >= times[TEST].min()))
        yield Check(
            "time across users",
            "leak" if future else "ok",
            f"{future:,} interactions are not before the split that follows theirs.",
        )
        return
    ordered = np.sort(times[TRAIN])
    later = len(ordered) - np.searchsorted(ordered, times[TEST], side="right")
    share = float(np.mean(later / len(ordered)))
    yield Check(
        "time across users",
        "note",
        f"leave-one-out has no common clock: on average {share:.0%} of the training interactions "
        "(of other users) come after a user's test interaction. split=global_time has none.",
    )
