"""Source `tabular`: one event per row of a csv, tsv, parquet or JSON-lines file, gzipped or not.

Which column means what is told by the options; nothing is guessed but the file format (from its
name) and the unit of the timestamps (see `genrec.data.events`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl

from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import (
    ROW,
    Chunk,
    as_text,
    delimited,
    json_lines,
    parquet,
    parquet_schema,
    records,
    require_columns,
)
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

_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".txt": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
FileFormat = Literal["csv", "tsv", "parquet", "jsonl"]


class Tabular(Source):
    """Events in a table, and optionally items in another one."""

    class Config(SourceConfig):
        """Where the columns are."""

        name: Literal["tabular"] = "tabular"
        user: str = "user_id"
        """Column with the user id."""
        item: str = "item_id"
        """Column with the item id."""
        timestamp: str | None = "timestamp"
        """Column with the time; null if there is none (then the file's order is the order)."""
        rating: str = "rating"
        """Column with the rating; read only for a rating threshold."""
        time_format: TimeFormat = "auto"
        """s, ms, us: a number since 1970; iso: dates or times (without offset: UTC); auto: look."""
        format: FileFormat | None = None
        """Format of the events file; null: from its name."""
        header: tuple[str, ...] | None = None
        """Column names of a csv or tsv file that has no header row."""
        separator: str | None = None
        """Between fields; null: comma for csv, tab for tsv."""
        quotes: bool | None = None
        """Whether double quotes enclose fields; null: for csv yes, for tsv no."""
        encoding: Literal["utf-8", "latin-1"] = "utf-8"
        """Of the text files."""
        items: Path | None = None
        """Items file (csv, tsv, parquet or jsonl by its name): one row per item."""
        items_id: str | None = None
        """Column with the item id in the items file; null: the same name as `item`."""
        title: str | None = "title"
        """Column of the items file that becomes the title, where it exists."""
        columns: tuple[str, ...] | None = None
        """Which other columns of the items file to keep; null: all."""

    config: Config

    def files(self) -> list[RawFile]:
        """Return the events file and the items file."""
        paths = [self.config.path, *([self.config.items] if self.config.items else [])]
        return [RawFile(path) for path in paths]

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        """Without a timestamp column the file's order is the order."""
        return self.config.timestamp is None

    @property
    def time_format(self) -> TimeFormat:
        """As told, but dates of a parquet file arrive as milliseconds."""
        config, file = self.config, RawFile(self.config.path)
        if config.timestamp and _format(file, config.format) == "parquet":
            dtype = parquet_schema(file).get(config.timestamp)
            if dtype is not None and dtype.is_temporal():
                return "ms"
        return config.time_format

    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """See `Source.events`."""
        config, file = self.config, RawFile(self.config.path)
        names = {USER: config.user, ITEM: config.item}
        if config.timestamp is not None:
            names[TIMESTAMP] = config.timestamp
        if with_rating:
            names[RATING] = config.rating
        kind = _format(file, config.format)
        wanted = list(dict.fromkeys(names.values()))
        if kind == "parquet":
            chunks = parquet(file, wanted)
        elif kind == "jsonl":
            chunks = json_lines(file, wanted, encoding=config.encoding)
        else:
            chunks = self._delimited(file, kind, wanted)
        for chunk in chunks:
            columns = [pl.col(column).alias(name) for name, column in names.items()]
            yield Chunk(chunk.frame.select(ROW, *columns), chunk.broken)

    def _delimited(
        self, file: RawFile, kind: str, wanted: list[str] | None, *, events: bool = True
    ) -> Iterator[Chunk]:
        config = self.config
        separator = config.separator if events else None
        quotes = config.quotes
        return delimited(
            file,
            separator=separator or ("," if kind == "csv" else "\t"),
            quotes=kind == "csv" if quotes is None else quotes,
            encoding=config.encoding,
            names=config.header if events else None,
            columns=wanted,
        )

    def items(self, wanted: Collection[str] | None) -> pl.DataFrame | None:
        """See `Source.items`; None wants every item."""
        config = self.config
        if config.items is None:
            return None
        key = config.items_id or config.item
        keep = None if wanted is None else set(wanted)
        seen, file = dict[str, None](), RawFile(config.items)
        rows = []
        for row, record in self._item_records(file):
            seen |= dict.fromkeys(record)
            if record.get(key) in (None, ""):
                require_columns(file, [key], list(record))
                raise DataError(f"{file.name}: row {row}: it has no {key!r}. Correct the row.")
            if keep is None or as_text(record[key]) in keep:
                rows.append(self._renamed(record, key))
        named = [config.title] if config.title not in (None, "title") else []
        require_columns(file, [*named, *(config.columns or ())], list(seen))
        return items_table(rows, columns=config.columns)

    def _item_records(self, file: RawFile) -> Iterator[tuple[int, dict[str, Any]]]:
        kind = _format(file, None)
        if kind == "jsonl":
            for row, record in records(file, encoding=self.config.encoding):
                if record is None:
                    raise DataError(f"{file.name}: row {row}: not a JSON object. Correct the line.")
                yield row, record
        elif kind == "parquet":
            parquet_schema(file)
            yield from enumerate(pl.read_parquet(file.path).iter_rows(named=True), start=1)
        else:
            for chunk in self._delimited(file, kind, None, events=False):
                for record in _whole(file, chunk).iter_rows(named=True):
                    yield record.pop(ROW), record

    def _renamed(self, record: Mapping[str, Any], key: str) -> dict[str, Any]:
        rest = {name: value for name, value in record.items() if name not in (key, ITEM_ID)}
        title = rest.pop(self.config.title, None) if self.config.title else None
        return {ITEM_ID: record[key], TITLE: title, **rest}


def _whole(file: RawFile, chunk: Chunk) -> pl.DataFrame:
    if chunk.broken:
        bad = chunk.broken[0]
        raise DataError(f"{file.name}: row {bad.row}: {bad.reason}. Correct the row.")
    return chunk.frame


def _format(file: RawFile, given: str | None) -> str:
    if given is not None:
        return given
    suffixes = [suffix.lower() for suffix in file.path.suffixes if suffix.lower() != ".gz"]
    if suffixes and suffixes[-1] in _FORMATS:
        return _FORMATS[suffixes[-1]]
    file.check()
    raise DataError(
        f"{file.path.name!r}: the name does not say which format this is. Expected a name that "
        f"ends in {', '.join(_FORMATS)} (and .gz), or set format (--format csv)."
    )
