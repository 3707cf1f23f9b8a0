"""What raw events say: strings become integer codes and times. It does not order or filter them.

The one place where timestamps and ratings are parsed and where the bad-rows policy acts. Ids are
coded as integers as they come, so that ten million events stay a few hundred megabytes.

Shapes: M events, U users, N items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec.data.formats import ROW, BadRow, Chunk
from genrec.data.source import ITEM, RATING, TIMESTAMP, USER, Source, TimeFormat
from genrec.errors import DataError

_MILLISECONDS = {"s": 1000.0, "ms": 1.0, "us": 0.001}
_MAX_MS = 1e14  # the year 5138: larger numbers are written in a finer unit
_SHOWN = 5


@dataclass
class Events:
    """Coded events in file order.

    Args:
        user_codes: (M,) int32 into `user_ids`, numbered by first appearance.
        item_codes: (M,) int32 into `item_ids`, numbered by first appearance.
        times_ms: (M,) int64 milliseconds since 1970; 0 = no time.
        user_ids: raw ids by code; they never reach a dataset folder.
        item_ids: raw ids by code.
        facts: counts of rows read, skipped and below the rating threshold, time format (JSON).
        ratings: (M,) float64; None where they were not asked for.
    """

    user_codes: np.ndarray
    item_codes: np.ndarray
    times_ms: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    ratings: np.ndarray | None = None

    def select(self, keep: np.ndarray) -> Events:
        """Return the events where `keep` (mask or positions) says so; codes do not change."""
        return Events(
            self.user_codes[keep],
            self.item_codes[keep],
            self.times_ms[keep],
            self.user_ids,
            self.item_ids,
            self.facts,
            None if self.ratings is None else self.ratings[keep],
        )

    def __len__(self) -> int:
        return len(self.user_codes)


def read_events(
    source: Source,
    *,
    rating_threshold: float | None = None,
    keep_ratings: bool = False,
    bad_rows: Literal["error", "skip"] = "error",
    advance: Callable[[int], None] | None = None,
) -> Events:
    """Read all events of a source.

    Args:
        source: where they come from.
        rating_threshold: events rated lower are left out; None keeps all.
        keep_ratings: return them. Neither this nor a threshold: no ratings are read.
        bad_rows: "error" stops at the first bad row, "skip" counts them.
        advance: told after each chunk how many rows it had.

    Raises:
        DataError: unreadable input (see `Source.events`), a bad row, or no event left.
    """
    reader = _Reader(source, rating_threshold, keep_ratings, bad_rows)
    for chunk in source.events(with_rating=keep_ratings or rating_threshold is not None):
        reader.add(chunk)
        if advance is not None:
            advance(len(chunk.frame) + len(chunk.broken))
    return reader.finish()


class _Coder:
    """Numbers strings by first appearance."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def __call__(self, values: pl.Series) -> np.ndarray:
        codes = self.codes
        coded = (codes.setdefault(value, len(codes)) for value in values.to_list())
        return np.fromiter(coded, np.int32, len(values))


class _Reader:
    def __init__(
        self, source: Source, threshold: float | None, keep_ratings: bool, policy: str
    ) -> None:
        self.name = source.files()[0].name
        self.threshold, self.keep_ratings = threshold, keep_ratings
        self.rated: list[np.ndarray] = []
        self.policy = policy
        self.format: TimeFormat | None = None
        self.asked_format = source.time_format
        self.users, self.items = _Coder(), _Coder()
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.num_read = self.num_below = 0
        self.bad: Counter[str] = Counter()
        self.bad_examples: list[dict[str, Any]] = []

    def add(self, chunk: Chunk) -> None:
        frame = chunk.frame
        self.num_read += len(frame) + len(chunk.broken)
        times, odd_times = self._times(frame)
        ratings = self._ratings(frame)
        bad = (frame[USER].fill_null("") == "") | (frame[ITEM].fill_null("") == "")
        keep = ~bad.to_numpy() & ~odd_times
        if ratings is not None:
            keep &= ~np.isnan(ratings)
        if chunk.broken or not keep.all():
            self._report(frame, keep, odd_times, chunk.broken)
        if ratings is not None and self.threshold is not None:
            below = keep & (ratings < self.threshold)
            self.num_below += int(below.sum())
            keep &= ~below
        if self.keep_ratings and ratings is not None:
            self.rated.append(ratings[keep])
        if not keep.all():
            frame, times = frame.filter(pl.Series(keep)), times[keep]
        self.parts.append((self.users(frame[USER]), self.items(frame[ITEM]), times))

    def finish(self) -> Events:
        if not sum(len(part[0]) for part in self.parts):
            raise DataError(
                f"{self.name}: no usable event. Read {self.num_read} rows: "
                f"{sum(self.bad.values())} bad, {self.num_below} rated below the threshold "
                f"{self.threshold}. Check the columns and the threshold."
            )
        facts = {
            "read": self.num_read,
            "below_rating": self.num_below,
            "bad_rows": dict(sorted(self.bad.items())),
            "bad_row_examples": self.bad_examples,
            "time_format": self.format or "none",
        }
        users, items, times = (
            np.concatenate([part[place] for part in self.parts]) for place in range(3)
        )
        self.parts.clear()
        ratings = np.concatenate(self.rated) if self.keep_ratings else None
        ids = list(self.users.codes), list(self.items.codes)
        return Events(users, items, times, *ids, facts, ratings)

    def _times(self, frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        if TIMESTAMP not in frame.columns:
            return np.zeros(len(frame), np.int64), np.zeros(len(frame), bool)
        texts = frame[TIMESTAMP].str.strip_chars()
        if self.format is None:
            self.format = _detect(texts) if self.asked_format == "auto" else self.asked_format
        if self.format is None:
            return np.zeros(len(frame), np.int64), np.ones(len(frame), bool)
        return _milliseconds(texts, self.format)

    def _ratings(self, frame: pl.DataFrame) -> np.ndarray | None:
        if self.threshold is None and not self.keep_ratings:
            return None
        values = frame[RATING].str.strip_chars().cast(pl.Float64, strict=False)
        return values.fill_null(float("nan")).to_numpy()

    def _report(
        self, frame: pl.DataFrame, keep: np.ndarray, odd_times: np.ndarray, broken: list[BadRow]
    ) -> None:
        found = [*broken]
        for place in np.flatnonzero(~keep).tolist():
            found.append(self._bad_row(frame.row(place, named=True), bool(odd_times[place])))
        found.sort(key=lambda bad: bad.row)
        if self.policy == "error":
            raise DataError(
                f"{self.name}: row {found[0].row}: {found[0].reason}. Correct the row, or leave "
                "such rows out with bad_rows=skip (--bad-rows skip)."
            )
        self.bad.update(bad.kind for bad in found)
        free = _SHOWN - len(self.bad_examples)  # row and kind only: a value could be a user id
        self.bad_examples += [{"row": bad.row, "kind": bad.kind} for bad in found[: max(0, free)]]

    def _bad_row(self, row: dict[str, Any], odd_time: bool) -> BadRow:
        number = int(row[ROW])
        if not row[USER] or not row[ITEM]:
            which = USER if not row[USER] else ITEM
            return BadRow(number, which, f"it has no {which} id")
        if odd_time:
            expected = {
                "iso": "an ISO date or time such as 2014-07-23T18:25:43Z",
                None: "epoch seconds, epoch milliseconds or an ISO date",
            }.get(self.format, f"a number of {self.format} since 1970 (below the year 5138)")
            value = row[TIMESTAMP]
            got = "is missing" if value in (None, "") else f"{value!r} is not a time"
            return BadRow(number, TIMESTAMP, f"timestamp {got}; expected {expected}")
        return BadRow(number, RATING, f"rating {row[RATING]!r} is not a number")


def _detect(texts: pl.Series) -> TimeFormat | None:
    """Choose the format that the first chunk is written in (None: nothing in it looks like a time).

    Numbers: the median decides, as 1e11 seconds would be the year 5138.
    """
    present = texts.filter(texts.is_not_null() & (texts != ""))
    numbers = present.cast(pl.Float64, strict=False)
    if 2 * numbers.null_count() > len(present):
        parsed = _iso_milliseconds(present)
        return "iso" if np.isfinite(parsed).any() else None
    typical = numbers.filter(numbers > 0).median() or 0.0
    if not len(present) or not isinstance(typical, float):
        return None
    return "s" if typical < _MAX_MS / 1e3 else "ms" if typical < _MAX_MS else "us"


def _milliseconds(texts: pl.Series, form: TimeFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return times (M,) int64 in milliseconds and the mask of those that are no times."""
    if form == "iso":
        times = _iso_milliseconds(texts)
    else:
        numbers = texts.cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()
        times = numbers * _MILLISECONDS[form]
    odd = ~((times >= 0) & (times < _MAX_MS))
    return np.where(odd, 0, times).astype(np.int64), odd


def _iso_milliseconds(texts: pl.Series) -> np.ndarray:
    plain = texts.str.strip_suffix("Z")
    forms = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f")
    tries = [plain.str.to_datetime(f, time_unit="ms", strict=False) for f in forms]
    tries.append(plain.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("ms")))
    parsed = pl.select(pl.coalesce(tries).alias("t")).to_series().cast(pl.Int64)
    times = parsed.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy()
    for place in np.flatnonzero(np.isnan(times)).tolist():  # offsets and the rarer ISO forms
        times[place] = _iso_one(texts[place])
    return times


def _iso_one(text: str | None) -> float:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return float("nan")
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return float(round(moment.timestamp() * 1000))
