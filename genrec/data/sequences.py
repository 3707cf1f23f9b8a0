"""Source `sequences`: the S3-Rec text format, one line per user: "user item item ...", in order.

Beside it, optionally, `items.jsonl` (one object per item with `item_id`) and `timestamps.jsonl`
(one object per user: `{"user": 1, "ts": [...]}`). The file's order is the order and timestamps are
carried along, unless ties are broken by hash (`genrec.data.prepare`): then time orders. A user
whose timestamps are missing, or not as many as the items, keeps the sequence and has none; `facts`
says how many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import ROW, BadRow, Chunk, as_text, records
from genrec.data.reading import RawFile, blocks
from genrec.data.source import (
    ITEM,
    TIMESTAMP,
    USER,
    Source,
    SourceConfig,
    TimeFormat,
    find_file,
    items_table,
)
from genrec.errors import DataError

_NO_TIME = "0"


class Sequences(Source):
    """A folder with `sequences.txt`, or the path of the text file."""

    class Config(SourceConfig):
        """The files beside the sequences."""

        name: Literal["sequences"] = "sequences"
        items: Path | None = None
        """Items file (JSON lines); null: `items.jsonl` beside the sequences, if there is one."""
        timestamps: Path | None = None
        """Timestamps file; null: `timestamps.jsonl` beside the sequences, if there is one."""
        title: str = "title"
        """Key of the items file that becomes the title, where it exists."""
        columns: tuple[str, ...] | None = None
        """Which other keys of the items file to keep; null: all."""

    config: Config
    ordered: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._facts: dict[str, Any] = {}

    def files(self) -> list[RawFile]:
        """Return the sequences and, where there are any, the items and timestamps."""
        beside = [self._beside("items"), self._beside("timestamps")]
        return [self._sequences(), *(file for file in beside if file is not None)]

    @property
    def timed(self) -> bool:
        """With a timestamps file."""
        return self._beside("timestamps") is not None

    @property
    def time_format(self) -> TimeFormat:
        """Seconds."""
        return "s"

    def facts(self) -> dict[str, Any]:
        """Return how many users have no timestamps, or not as many as items."""
        return dict(self._facts)

    def _sequences(self) -> RawFile:
        path = self.config.path
        if path.is_dir():
            path = find_file(path, ["sequences.txt"], what="sequences file")
        return RawFile(path)

    def _beside(self, what: str) -> RawFile | None:
        given = getattr(self.config, what)
        if given is not None:
            return RawFile(given)
        path = self._sequences().path.with_name(f"{what}.jsonl")
        return RawFile(path) if path.is_file() else None

    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """See `Source.events`."""
        if with_rating:
            raise DataError(
                "sequences hold no ratings, so they can neither be kept nor have a threshold. "
                "Leave rating_threshold and keep_ratings out."
            )
        times = self._timestamps()
        facts = self._facts = {"users_without_timestamps": 0, "users_with_misaligned_timestamps": 0}
        file, seen = self._sequences(), set[str]()
        for block in blocks(file):
            rows: dict[str, list[Any]] = {ROW: [], USER: [], ITEM: [], TIMESTAMP: []}
            broken = []
            for row, line in enumerate(block.data.decode("utf-8").split("\n"), block.first_line):
                user, *items = line.split() or [""]
                if not user:
                    continue
                if not items:
                    broken.append(BadRow(row, "fields", "a user without items"))
                    continue
                if user in seen:
                    raise DataError(
                        f"{file.name}: row {row}: this user has a line already. Expected one line "
                        "per user: user item item ..."
                    )
                seen.add(user)
                moments = [] if times is None else times.get(user, [])
                if not moments:
                    facts["users_without_timestamps"] += 1
                elif len(moments) != len(items):
                    facts["users_with_misaligned_timestamps"] += 1
                    moments = []
                rows[ROW] += [row] * len(items)
                rows[USER] += [user] * len(items)
                rows[ITEM] += items
                rows[TIMESTAMP] += moments or [_NO_TIME] * len(items)
            types = {ROW: pl.Int64, USER: pl.String, ITEM: pl.String, TIMESTAMP: pl.String}
            yield Chunk(pl.DataFrame(rows, schema=types), broken)

    def _timestamps(self) -> dict[str, list[str]] | None:
        file = self._beside("timestamps")
        if file is None:
            return None
        found = {}
        for row, record in records(file):
            user, moments = (record or {}).get("user"), (record or {}).get("ts")
            if user is None or not isinstance(moments, list):
                raise DataError(
                    f"{file.name}: row {row}: expected an object with user and ts (a list of "
                    "epoch seconds). Correct the line, or take the file away."
                )
            found[str(as_text(user))] = [as_text(moment) or "" for moment in moments]
        return found

    def items(self, wanted: Collection[str]) -> pl.DataFrame | None:
        """See `Source.items`."""
        file = self._beside("items")
        if file is None:
            return None
        keep, title = set(wanted), self.config.title

        def rows() -> Iterator[dict[str, Any]]:
            for row, record in records(file):
                if record is None or record.get(ITEM_ID) is None:
                    raise DataError(
                        f"{file.name}: row {row}: expected an object with item_id. Correct it."
                    )
                if as_text(record[ITEM_ID]) in keep:
                    rest = {k: v for k, v in record.items() if k not in (ITEM_ID, title)}
                    yield {ITEM_ID: record[ITEM_ID], TITLE: record.get(title), **rest}

        return items_table(rows(), columns=self.config.columns)
