"""What is wrong or risky about a dataset, in plain words with counts. It changes nothing.

Levels: an *error* makes results meaningless, a *warning* changes what they mean, *info* is a fact
to know when reading them. Examples name items (ids, titles) and user rows, never user ids.

Shapes: M interactions, U users, N items, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec import runtime
from genrec.data.catalog import ITEM_ID
from genrec.data.dataset import Dataset
from genrec.data.interactions import TEST, TRAIN, Interactions
from genrec.data.splits import MIN_HELD_OUT_LENGTH
from genrec.errors import DataError

log = runtime.get_logger(__name__)

Level = Literal["error", "warning", "info"]
_SHOWN = 5
_SORTED_SHARE = 0.95  # chance gives about one half
_SORTED_PAIRS = 20  # fewer neighbours prove nothing


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor found.

    Args:
        level: "error", "warning" or "info".
        code: stable name for programs.
        message: what it is, how much of it, and what to do.
        count: how many.
        examples: a few items ("id (title)") or user rows.
    """

    level: Level
    code: str
    message: str
    count: int
    examples: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "examples": list(self.examples)}


def examine(dataset: Dataset, vectors: np.ndarray | None = None) -> list[Finding]:
    """Examine a dataset and, if given, the vectors of its items.

    Args:
        dataset: prepared data.
        vectors: (N, E) floats; default those of the catalogue, if it has any.

    Returns:
        findings, errors first.
    """
    if vectors is None:
        vectors = dataset.catalog.vectors
    found: list[Finding] = []
    for check in _CHECKS:
        found.extend(check(dataset))
    if vectors is not None:
        found.extend(_vectors(dataset, np.asarray(vectors)))
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def require_sound(dataset: Dataset) -> list[Finding]:
    """Examine a dataset before anything is measured on it; log what it warns of.

    Returns:
        what `examine` found.

    Raises:
        DataError: it has an error, with which figures would mean nothing.
    """
    findings = examine(dataset)
    for finding in findings:
        if finding.level != "info":
            log.warning("doctor: %s", finding.message)
    errors = [finding.message for finding in findings if finding.level == "error"]
    if errors:
        raise DataError("the data set has errors (see `genrec doctor`):\n" + "\n".join(errors))
    return findings


def _bad_rows(dataset: Dataset) -> Iterator[Finding]:
    facts = dataset.info.get("bad_rows") or {}
    kinds = facts.get("kinds") or {}
    count = sum(kinds.values())
    if count:
        read = dataset.info["counts"]["read"]
        what = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        yield Finding(
            "warning",
            "bad_rows",
            f"{count:,} of {read:,} rows of the raw data could not be parsed and were left out "
            f"({what}). Look at them before trusting the rest.",
            count,
            tuple(f"row {bad['row']} ({bad['kind']})" for bad in facts.get("examples", [])),
        )


def _duplicates(dataset: Dataset) -> Iterator[Finding]:
    events = dataset.interactions
    order, repeat = _repeats(events)
    count = int(repeat.sum())
    if count:
        rows = events.item_rows[order[1:][repeat]]
        yield Finding(
            "warning",
            "duplicate_events",
            f"{count:,} of {len(events):,} interactions repeat an item that the same user has "
            "already. Prepare with duplicates=first unless repeated consumption is what you model.",
            count,
            _items(dataset, np.unique(rows)),
        )


def _target_seen(dataset: Dataset) -> Iterator[Finding]:
    """A held-out item that stands earlier in its user's sequence."""
    events = dataset.interactions
    order, repeat = _repeats(events)
    later = order[1:][repeat]  # places within a pair ascend, so each is preceded by its twin
    held_out = later[events.splits[later] != TRAIN]
    if len(held_out):
        users = events.user_rows[held_out]
        yield Finding(
            "warning",
            "target_in_history",
            f"{len(held_out):,} validation or test items of {len(np.unique(users)):,} users stand "
            "in the same user's history already: they are hits for a copy of the history, and "
            "impossible ones where seen items are masked.",
            len(held_out),
            _users(users),
        )


def _ties(dataset: Dataset) -> Iterator[Finding]:
    pairs, ends = _neighbours(dataset.interactions)
    times = dataset.interactions.timestamps
    timed = (times[pairs] > 0) & (times[pairs + 1] > 0)
    tied = timed & (times[pairs] == times[pairs + 1])
    count = int(tied.sum())
    if not count:
        return
    last = np.isin(ends - 2, pairs[tied])
    policy = dataset.info.get("ties", "unknown")
    yield Finding(
        "info" if policy == "hash" else "warning",
        "ties",
        f"{count:,} of {int(timed.sum()):,} neighbouring interactions have equal timestamps; for "
        f"{int(last.sum()):,} users they are the last two, so that the tie-break ({policy}) "
        "decides which one is tested. Name it with every result.",
        count,
        _users(np.flatnonzero(last)),
    )


def _backwards(dataset: Dataset) -> Iterator[Finding]:
    events = dataset.interactions
    pairs, _ = _neighbours(events)
    times = events.timestamps
    back = pairs[(times[pairs] > times[pairs + 1]) & (times[pairs + 1] > 0)]
    if len(back):
        users = events.user_rows[back]
        yield Finding(
            "error",
            "backward_timestamps",
            f"timestamps go backwards {len(back):,} times, in the sequences of "
            f"{len(np.unique(users)):,} users: histories hold what came later. Sort the sequences "
            "by time, or drop the timestamps if they are wrong.",
            len(back),
            _users(users),
        )


def _untimed(dataset: Dataset) -> Iterator[Finding]:
    events = dataset.interactions
    users = np.unique(events.user_rows[events.timestamps == 0])
    if len(users):
        yield Finding(
            "info",
            "no_timestamps",
            f"{len(users):,} of {events.num_users:,} users have interactions without a timestamp; "
            "their order is the file's and cannot be checked. The split global_time is impossible.",
            len(users),
            _users(users),
        )


def _sorted_by_item(dataset: Dataset) -> Iterator[Finding]:
    """Sequences, or ties inside them, that stand in the order of an item key instead of time."""
    events = dataset.interactions
    pairs, _ = _neighbours(events)
    times = events.timestamps
    proven = times[pairs] < times[pairs + 1]  # time itself says that this order is right
    for name, rank in _item_orders(dataset):
        first, second = rank[events.item_rows[pairs]], rank[events.item_rows[pairs + 1]]
        share, count = _sorted(first, second, np.ones(len(pairs), dtype=bool))
        if share >= _SORTED_SHARE:
            sure = 2 * int(proven.sum()) <= len(pairs)
            yield Finding(
                "error" if sure else "warning",
                "sorted_by_item",
                f"{share:.0%} of {count:,} neighbouring interactions stand in the order of the "
                f"items' {name}"
                + (", and no time says otherwise" if sure else ", though timestamps agree with it")
                + ": the last item would be known from its name. Sort the sequences by time.",
                count,
            )
            return
        share, count = _sorted(first, second, ~proven)
        if share >= _SORTED_SHARE:
            yield Finding(
                "warning",
                "ties_sorted_by_item",
                f"{share:.0%} of {count:,} neighbours without increasing timestamps stand in the "
                f"order of the items' {name}: ties were broken by it, which a model can learn. "
                "Prepare from data with times and ties=hash, or name this with every result.",
                count,
            )
            return


def _sorted(first: np.ndarray, second: np.ndarray, where: np.ndarray) -> tuple[float, int]:
    where = where & (first != second)
    count = int(where.sum())
    if count < _SORTED_PAIRS:
        return 0.0, count
    up = float((first[where] < second[where]).mean())
    return max(up, 1.0 - up), count


def _item_orders(dataset: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Keys that sequences could have been sorted by, as ranks (N,): ids and code-like columns."""
    table = dataset.catalog.table
    yield "id", np.arange(len(table))
    for name in table.columns:
        column = table[name]
        if column.dtype != pl.String or column.null_count() or column.n_unique() != len(column):
            continue
        if name != ITEM_ID and column.str.contains(r"\s").any():
            continue  # texts, not codes
        rank = column.rank("ordinal").to_numpy().astype(np.int64)
        yield ("id as text" if name == ITEM_ID else name), rank


def _short_users(dataset: Dataset) -> Iterator[Finding]:
    lengths = np.diff(dataset.interactions.offsets)
    short = np.flatnonzero(lengths < MIN_HELD_OUT_LENGTH)
    if len(short):
        yield Finding(
            "warning",
            "short_users",
            f"{len(short):,} of {len(lengths):,} users have fewer than {MIN_HELD_OUT_LENGTH} "
            "interactions: too few for a history, a validation and a test item. Under "
            "leave_one_out they only train.",
            len(short),
            _users(short),
        )


def _no_text(dataset: Dataset) -> Iterator[Finding]:
    texts = dataset.catalog.texts()
    rows = np.array([row for row, text in enumerate(texts) if not text.strip()], dtype=np.int64)
    if len(rows):
        remedy = "Give an items table that covers them, or use collaborative vectors."
        if len(rows) == len(texts):
            remedy = "`features: auto` takes co-occurrence then; an items table says more."
        yield Finding(
            "warning",
            "items_without_text",
            f"{len(rows):,} of {len(texts):,} items have no text at all: text vectors cannot tell "
            f"them apart. {remedy}",
            len(rows),
            _items(dataset, rows),
        )


def _shared_titles(dataset: Dataset) -> Iterator[Finding]:
    titles = pl.Series("title", dataset.catalog.titles, pl.String)
    rows = np.flatnonzero((titles.is_not_null() & titles.is_duplicated()).to_numpy())
    if len(rows):
        groups = titles[rows.tolist()].n_unique()
        yield Finding(
            "info",
            "shared_titles",
            f"{len(rows):,} items share {groups:,} titles: a title alone does not name one of "
            "them, and vectors of titles alone collide.",
            len(rows),
            _items(dataset, rows),
        )


def _unseen(dataset: Dataset) -> Iterator[Finding]:
    events = dataset.interactions
    trained = events.training().counts()
    tested = np.bincount(events.item_rows[events.splits == TEST], minlength=events.num_items)
    rows = np.flatnonzero((trained == 0) & (tested > 0))
    if len(rows):
        yield Finding(
            "warning",
            "items_only_in_test",
            f"{len(rows):,} items ({int(tested[rows].sum()):,} test interactions) are tested but "
            "never seen in training: only content can recommend them.",
            len(rows),
            _items(dataset, rows),
        )


def _vectors(dataset: Dataset, vectors: np.ndarray) -> Iterator[Finding]:
    num_items = len(dataset.catalog)
    if vectors.ndim != 2 or len(vectors) != num_items:
        yield Finding(
            "error",
            "vectors_count",
            f"got vectors of shape {vectors.shape} for {num_items:,} items: they belong to another "
            "catalogue. Embed this one again.",
            len(vectors) if vectors.ndim else 0,
        )
        return
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        yield Finding(
            "error",
            "vectors_not_finite",
            f"{len(broken):,} vectors hold NaN or infinity. Embed these items again.",
            len(broken),
            _items(dataset, broken),
        )
    zero = np.flatnonzero(~vectors.any(axis=1))
    if num_items > 1 and bool((vectors == vectors[0]).all()):
        yield Finding(
            "error",
            "vectors_constant",
            f"all {num_items:,} vectors are equal: they say nothing about the items. Check the "
            "texts that were embedded.",
            num_items,
        )
    elif len(zero):
        yield Finding(
            "warning",
            "vectors_zero",
            f"{len(zero):,} vectors are all zero, as those of empty texts are.",
            len(zero),
            _items(dataset, zero),
        )


def _repeats(events: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """Return places sorted by (user, item, place), and whether each next one repeats the pair."""
    keys = events.user_rows * max(1, events.num_items) + events.item_rows
    order = np.argsort(keys, kind="stable")
    return order, np.diff(keys[order]) == 0


def _neighbours(events: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """Return the places that have a successor of the same user, and the ends of users with two."""
    has_next = np.ones(len(events), dtype=bool)
    has_next[events.offsets[1:][np.diff(events.offsets) > 0] - 1] = False
    return np.flatnonzero(has_next), events.offsets[1:]


def _items(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    ids, titles = dataset.catalog.item_ids, dataset.catalog.titles
    shown = rows[:_SHOWN].tolist()
    return tuple(f"{ids[row]} ({titles[row]})" if titles[row] else ids[row] for row in shown)


def _users(rows: np.ndarray) -> tuple[str, ...]:
    return tuple(f"user row {row}" for row in np.unique(rows)[:_SHOWN].tolist())


_CHECKS: tuple[Callable[[Dataset], Iterator[Finding]], ...] = (
    _bad_rows,
    _duplicates,
    _target_seen,
    _ties,
    _backwards,
    _untimed,
    _sorted_by_item,
    _short_users,
    _no_text,
    _shared_titles,
    _unseen,
)
