"""What a source of raw data has to offer, and how item records become a table. It filters nothing.

A source is one file beside this one: it knows the layout of one kind of raw data and hands out
events as chunks of strings. Their meaning (times, ratings, ids) is parsed in `genrec.data.events`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from genrec.config import StrictConfig
from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import Chunk, as_text
from genrec.data.reading import RawFile
from genrec.errors import DataError

USER, ITEM, TIMESTAMP, RATING = "user", "item", "timestamp", "rating"
TimeFormat = Literal["auto", "s", "ms", "us", "iso"]


class SourceConfig(StrictConfig):
    """What every source can be told."""

    path: Path
    """File, folder or archive to read."""


class Source(ABC):
    """Raw events and items of one data set.

    Args:
        config: the `Config` of the subclass.
    """

    Config: ClassVar[type[SourceConfig]]
    ordered: ClassVar[bool] = False
    """The file's order is the order of each user's events; timestamps are only carried along."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def files(self) -> list[RawFile]:
        """Return every file that is read; what they hold determines the result.

        Raises:
            DataError: the path is not laid out as this source expects.
        """

    @abstractmethod
    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """Yield chunks in file order with string columns user, item and, where there is one,
        timestamp; rating only if asked for.

        Raises:
            DataError: a file is missing, empty, not UTF-8, or lacks a column.
        """

    def items(self, wanted: Collection[str]) -> pl.DataFrame | None:
        """Return the rows of the items table whose id is in `wanted`, or None without a table.

        Columns: `item_id`, `title` where there is one, and attributes.
        """
        return None

    @property
    def time_format(self) -> TimeFormat:
        """How the timestamp column is written."""
        return "auto"

    @property
    def timed(self) -> bool:
        """Whether there are timestamps to order by; ordered sources may have some too."""
        return not self.ordered

    @property
    def default_ties(self) -> Literal["file", "hash"]:
        """Which tie-break of equal timestamps this source uses when nobody says."""
        return "file" if self.ordered else "hash"

    @property
    def default_name(self) -> str:
        """Name of the data set when nobody gives one."""
        path = self.config.path
        name = path.name if path.name not in ("", ".", "..") else path.resolve().name
        while Path(name).suffix in (
            ".gz",
            ".zip",
            ".csv",
            ".tsv",
            ".txt",
            ".json",
            ".jsonl",
            ".ndjson",
            ".parquet",
            ".inter",
            ".dat",
            ".data",
        ):
            name = Path(name).stem
        return name or "dataset"

    def options(self) -> dict[str, Any]:
        """Return the configuration for the manifest: paths are cut to their last part."""
        return {
            key: Path(value).name if isinstance(getattr(self.config, key), Path) else value
            for key, value in self.config.to_dict().items()
            if key != "name"
        }

    def facts(self) -> dict[str, Any]:
        """Return what was noticed while reading (JSON); complete once the events were read."""
        return {}


def find_file(folder: Path, names: Sequence[str], *, what: str) -> Path:
    """Return the first of `names` that exists in a folder, or raise `DataError` listing them."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else []
    raise DataError(
        f"{str(folder)!r}: no {what} here. Expected {' or '.join(names)}; "
        f"found {', '.join(there) or 'nothing'}."
    )


def items_table(
    rows: Iterable[Mapping[str, Any]], *, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """Make a table of item records that hold `item_id`, perhaps `title`, and attributes.

    Values become text, lists of text (nested lists are flattened, repeats dropped) or numbers; the
    widest kind of a column wins; empty ones become null. Dictionaries are left out.

    Args:
        rows: records as read.
        columns: which attributes to keep, in this order; default all.
    """
    found: dict[str, list[Any]] = {ITEM_ID: [], TITLE: []}
    count = 0
    for record in rows:
        for name, raw in record.items():
            if columns is not None and name not in (ITEM_ID, TITLE, *columns):
                continue
            value = as_text(raw) if name in (ITEM_ID, TITLE) else _value(raw)
            if value is None or value == "":
                continue
            values = found.setdefault(name, [])
            values.extend([None] * (count - len(values)))
            values.append(value)
        count += 1
    series = [pl.Series(ITEM_ID, found.pop(ITEM_ID), pl.String)]
    order = found if columns is None else [TITLE, *(c for c in columns if c != TITLE)]
    for name in order:
        values = found.get(name, [])
        if values:
            series.append(_column(name, values + [None] * (count - len(values))))
    return pl.DataFrame(series)


def _value(raw: Any) -> Any:
    if raw is None or isinstance(raw, dict):
        return None
    if isinstance(raw, bool):
        return as_text(raw)
    if isinstance(raw, str):
        return raw.strip()
    if isinstance(raw, list | tuple):
        flat: list[str] = []
        for part in raw:
            inner = _value(part)
            flat.extend(inner if isinstance(inner, list) else [str(inner)] if inner else [])
        return list(dict.fromkeys(flat)) or None
    return None if raw != raw else raw  # NaN is nothing


def _column(name: str, values: list[Any]) -> pl.Series:
    present = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in present):
        lists = [v if isinstance(v, list) or v is None else [str(v)] for v in values]
        return pl.Series(name, lists, pl.List(pl.String))
    if all(isinstance(value, int) and abs(value) < 2**63 for value in present):
        return pl.Series(name, values, pl.Int64)
    if all(isinstance(value, int | float) for value in present):
        return pl.Series(name, [None if v is None else float(v) for v in values], pl.Float64)
    texts = [None if v is None else v if isinstance(v, str) else str(v) for v in values]
    return pl.Series(name, texts, pl.String)
