"""Source `recbole`: atomic files (`NAME.inter`, `NAME.item`), tab-separated with typed headers.

A header field is `user_id:token`; the types are token, token_seq, float and float_seq.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import polars as pl

from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import ROW, Chunk, delimited, require_columns
from genrec.data.reading import RawFile
from genrec.data.source import (
    ITEM,
    RATING,
    TIMESTAMP,
    USER,
    Source,
    SourceConfig,
    TimeFormat,
    items_table,
)
from genrec.errors import DataError

_TYPES = ("token", "token_seq", "float", "float_seq")


class RecBole(Source):
    """A folder of atomic files, or the path of its `.inter` file."""

    class Config(SourceConfig):
        """Names of the fields."""

        name: Literal["recbole"] = "recbole"
        user: str = "user_id"
        """Field with the user id."""
        item: str = "item_id"
        """Field with the item id, in both files."""
        timestamp: str | None = "timestamp"
        """Field with the time; null if there is none (then the file's order is the order)."""
        rating: str = "rating"
        """Field with the rating; read only for a rating threshold."""
        time_format: TimeFormat = "auto"
        """s, ms, us: a number since 1970; iso: dates or times; auto: look."""
        title: str | None = None
        """Field of the items file that is the title; null: the first whose name ends in title or
        name."""
        columns: tuple[str, ...] | None = None
        """Which other fields of the items file to keep; null: all but sequences of numbers."""

    config: Config

    def files(self) -> list[RawFile]:
        """Return the `.inter` file and, where there is one, the `.item` file."""
        inter = self._inter()
        item = inter.path.with_suffix(".item")
        return [inter, *([RawFile(item)] if item.is_file() else [])]

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        """Without a timestamp field the file's order is the order."""
        return self.config.timestamp is None

    @property
    def time_format(self) -> TimeFormat:
        """As told."""
        return self.config.time_format

    def _inter(self) -> RawFile:
        path = self.config.path
        if not path.is_dir():
            file = RawFile(path)
            file.check()
            return file
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"{str(path)!r}: expected one .inter file, found {names}. Give the path of the "
                ".inter file itself."
            )
        return RawFile(found[0])

    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """See `Source.events`."""
        config, file = self.config, self._inter()
        names = {USER: config.user, ITEM: config.item}
        if config.timestamp is not None:
            names[TIMESTAMP] = config.timestamp
        if with_rating:
            names[RATING] = config.rating
        typed: dict[str, str] = {}

        def wanted(header: list[str]) -> list[str]:
            fields = _fields(file, header)
            require_columns(file, list(names.values()), list(fields))
            typed.update({name: fields[field][0] for name, field in names.items()})
            return list(dict.fromkeys(typed.values()))

        for chunk in delimited(file, separator="\t", quotes=False, columns=wanted):
            columns = [pl.col(column).alias(name) for name, column in typed.items()]
            yield Chunk(chunk.frame.select(ROW, *columns), chunk.broken)

    def items(self, wanted: Collection[str]) -> pl.DataFrame | None:
        """See `Source.items`."""
        files = self.files()
        if len(files) < 2:
            return None
        keep = set(wanted)
        rows = (row for row in self._item_rows(files[1]) if row[ITEM_ID] in keep)
        return items_table(rows, columns=self.config.columns)

    def _item_rows(self, file: RawFile) -> Iterator[dict[str, Any]]:
        config = self.config
        fields: dict[str, tuple[str, str]] = {}

        def remember(header: list[str]) -> list[str]:
            fields.update(_fields(file, header))
            named = [config.title] if config.title else []
            require_columns(file, [config.item, *named, *(config.columns or ())], list(fields))
            return header

        for chunk in delimited(file, separator="\t", quotes=False, columns=remember):
            if chunk.broken:
                bad = chunk.broken[0]
                raise DataError(f"{file.name}: row {bad.row}: {bad.reason}. Correct the row.")
            title = config.title or _title(fields)
            for row in chunk.frame.iter_rows(named=True):
                record = {ITEM_ID: row[fields[config.item][0]]}
                if title is not None:
                    record[TITLE] = row[fields[title][0]]
                for name, (column, kind) in fields.items():
                    if name not in (config.item, title):
                        record[name] = _value(row[column], kind)
                yield record


def _fields(file: RawFile, header: list[str]) -> dict[str, tuple[str, str]]:
    """Map field name -> (column as written, type)."""
    fields = {}
    for column in header:
        name, _, kind = column.rpartition(":")
        if not name or kind not in _TYPES:
            raise DataError(
                f"{file.name}: header field {column!r} has no type. Expected fields such as "
                f"user_id:token with a type of {', '.join(_TYPES)}, separated by tabs."
            )
        fields[name] = (column, kind)
    return fields


def _title(fields: dict[str, tuple[str, str]]) -> str | None:
    return next((name for name in fields if name.endswith(("title", "name"))), None)


def _value(text: str | None, kind: str) -> Any:
    if text is None or kind == "float_seq":
        return None
    if kind == "token_seq":
        return text.split(" ")
    if kind == "float":
        try:
            return float(text)
        except ValueError:
            return None
    return text
