"""Source `amazon`: review and metadata files of the 2014, 2018 and 2023 releases, gzipped or not.

One record per line: JSON, or for 2014 also Python literals (single quotes), which are read with
`ast.literal_eval` and never executed. The release is recognised by the keys of the first review.
"""

from __future__ import annotations

import ast
import html
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import polars as pl

from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import ROW, Chunk, json_lines, records
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

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_OLD = {USER: "reviewerID", ITEM: "asin", TIMESTAMP: "unixReviewTime", RATING: "overall"}
_NEW = {USER: "user_id", ITEM: "parent_asin", TIMESTAMP: "timestamp", RATING: "rating"}


class Amazon(Source):
    """Reviews as events; metadata as items."""

    class Config(SourceConfig):
        """Where the metadata is, and how much of it to keep."""

        name: Literal["amazon"] = "amazon"
        release: Literal["auto", "2014", "2018", "2023"] = "auto"
        """Which release; auto: by the keys of the first review."""
        metadata: Path | None = None
        """Metadata file; null: the `meta_*` file beside the reviews, if there is one."""
        description: bool = False
        """Keep the description and the feature list too (long texts)."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._release: str | None = None

    def files(self) -> list[RawFile]:
        """Return the reviews file and, where there is one, the metadata file."""
        reviews = self._reviews()
        metadata = self.config.metadata or _metadata_of(reviews)
        return [RawFile(reviews), *([RawFile(metadata)] if metadata else [])]

    @property
    def time_format(self) -> TimeFormat:
        """2023 counts milliseconds, the others seconds."""
        return "ms" if self._find_release() == "2023" else "s"

    def facts(self) -> dict[str, Any]:
        """Return which release was found."""
        return {"release": self._find_release()}

    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """See `Source.events`."""
        raw = _NEW if self._find_release() == "2023" else _OLD
        names = [USER, ITEM, TIMESTAMP, *([RATING] if with_rating else [])]
        wanted = [raw[name] for name in names]
        for chunk in json_lines(RawFile(self._reviews()), wanted, parse=_parse):
            columns = [pl.col(raw[name]).alias(name) for name in names]
            yield Chunk(chunk.frame.select(ROW, *columns), chunk.broken)

    def items(self, wanted: Collection[str]) -> pl.DataFrame | None:
        """See `Source.items`."""
        files = self.files()
        if len(files) < 2:
            return None
        keep, file = set(wanted), files[1]
        key = "parent_asin" if self._find_release() == "2023" else "asin"

        def rows() -> Iterator[dict[str, Any]]:
            for row, record in records(file, parse=_parse):
                if record is None or key not in record:
                    raise DataError(
                        f"{file.name}: row {row}: expected a record with {key!r}. Is this the "
                        f"metadata of the {self._find_release()} release?"
                    )
                if record[key] in keep:
                    yield self._item(record, key)

        return items_table(rows())

    def _item(self, record: dict[str, Any], key: str) -> dict[str, Any]:
        item = {
            ITEM_ID: record[key],
            TITLE: _clean(record.get("title")),
            "brand": _clean(record.get("brand") or record.get("store")),
            "categories": _clean(record.get("categories") or record.get("category")),
        }
        if self.config.description:
            item["features"] = _clean(record.get("features") or record.get("feature"))
            item["description"] = _joined(_clean(record.get("description")))
        return item

    def _find_release(self) -> str:
        if self._release is None:
            self._release = self._look_at_first()
        return self._release

    def _look_at_first(self) -> str:
        file = RawFile(self._reviews())
        first = next((value for _, value in records(file, parse=_parse) if value), None)
        keys = set(first or {})
        if _NEW[USER] in keys and _NEW[ITEM] in keys:
            found = "2023"
        elif _OLD[USER] in keys and _OLD[ITEM] in keys:
            found = "2018" if "verified" in keys else "2014"  # 2014 has no such key
        else:
            raise DataError(
                f"{file.name}: not Amazon reviews: the first record has "
                f"{', '.join(sorted(keys)) or 'no keys'}. Expected reviewerID and asin (2014, "
                "2018) or user_id and parent_asin (2023), one record per line."
            )
        asked = self.config.release
        if asked != "auto" and (asked == "2023") != (found == "2023"):
            raise DataError(
                f"{file.name}: got release={asked}, but the keys are those of {found}. Set "
                f"release={found}, or leave it out."
            )
        return found if asked == "auto" else asked

    def _reviews(self) -> Path:
        path = self.config.path
        if not path.is_dir():
            return path
        found = [
            p
            for p in sorted(path.iterdir())
            if p.name.lower().endswith(_SUFFIXES) and not p.name.startswith("meta_")
        ]
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise DataError(
                f"{str(path)!r}: expected one reviews file here, found {names}. Give the path of "
                "the file itself, and of the metadata with metadata (--metadata)."
            )
        return found[0]


def _metadata_of(reviews: Path) -> Path | None:
    """Look for meta_X beside reviews_X_5, reviews_X, X_5 or X (the releases' own names)."""
    stem = reviews.name.split(".")[0].removeprefix("reviews_").removesuffix("_5")
    for suffix in _SUFFIXES:
        path = reviews.with_name(f"meta_{stem}{suffix}")
        if path.is_file():
            return path
    return None


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return ast.literal_eval(line)  # literals only: the 2014 files write Python dictionaries


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return html.unescape(value).strip()
    if isinstance(value, list):
        return [_clean(part) for part in value]
    return None


def _joined(value: Any) -> str | None:
    return " ".join(str(part) for part in value if part) if isinstance(value, list) else value
