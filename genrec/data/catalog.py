"""Catalog: the items, their texts and attributes, and (once embedded) their vectors.

It does not know where items came from (see the sources beside this file) nor how vectors were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import fingerprint
from genrec.errors import DataError, nearest

ITEM_ID = "item_id"
TITLE = "title"


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items in row order.

    Args:
        table: one line per item; `item_id` (unique strings), optionally `title`, and any text
            (str) or attribute (str, list of str, number) columns.
        vectors: (N, E) float32 aligned with the rows, or None before embedding.
        content_columns: those of `vectors` that describe an item by itself, made without
            interactions; None: all.
    """

    table: pl.DataFrame
    vectors: np.ndarray | None = field(default=None)
    content_columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if ITEM_ID not in self.table.columns:
            raise DataError(
                f"catalogue: no column {ITEM_ID!r}; it has {', '.join(self.table.columns)}."
            )
        if self.table[ITEM_ID].dtype != pl.String:
            object.__setattr__(
                self, "table", self.table.with_columns(pl.col(ITEM_ID).cast(pl.String))
            )
        if self.table[ITEM_ID].n_unique() != len(self.table):
            repeated = self.table[ITEM_ID].filter(self.table[ITEM_ID].is_duplicated())
            raise DataError(
                f"catalogue: item ids repeat, e.g. {repeated[0]!r}. Expected one line per item."
            )
        if self.vectors is not None and len(self.vectors) != len(self.table):
            raise DataError(
                f"catalogue: got {len(self.vectors)} vectors for {len(self.table)} items. "
                "Embed this catalogue again."
            )

    @classmethod
    def from_vectors(cls, vectors: np.ndarray, item_ids: Sequence[str] | None = None) -> Catalog:
        """Return a catalogue of bare vectors (N, E); ids default to "0".."N-1"."""
        ids = [str(i) for i in (item_ids if item_ids is not None else range(len(vectors)))]
        return cls(pl.DataFrame({ITEM_ID: ids}), np.asarray(vectors, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def item_ids(self) -> list[str]:
        """External ids in row order."""
        return self.table[ITEM_ID].to_list()

    @cached_property
    def titles(self) -> list[str | None]:
        """Titles in row order (None where an item has none)."""
        if TITLE not in self.table.columns:
            return [None] * len(self)
        return self.table[TITLE].to_list()

    @property
    def columns(self) -> list[str]:
        """All columns but the id."""
        return [name for name in self.table.columns if name != ITEM_ID]

    def texts(self, columns: Sequence[str] | None = None) -> list[str]:
        """Return one text per item: "title. column: value; ..." over the columns that have values.

        Args:
            columns: which columns, in order; default every column.

        Raises:
            DataError: an unknown column, with the nearest name.
        """
        wanted = list(columns) if columns else self.columns
        for name in wanted:
            if name not in self.table.columns:
                raise DataError(
                    f"catalogue: no column {name!r}; it has {', '.join(self.columns)}."
                    f"{nearest(name, self.columns)}"
                )
        rows = self.table.select(wanted).iter_rows(named=True)
        return [_one_text(row) for row in rows] if wanted else [""] * len(self)

    @property
    def content_vectors(self) -> np.ndarray | None:
        """The part of `vectors` that was made without interactions, (N, C); None where none was."""
        if self.vectors is None or self.content_columns is None:
            return self.vectors
        return self.vectors[:, list(self.content_columns)] if self.content_columns else None

    def with_vectors(
        self, vectors: np.ndarray, content_columns: Sequence[int] | None = None
    ) -> Catalog:
        """Return the same items with vectors (N, E); see `Catalog` for the columns."""
        columns = None if content_columns is None else tuple(content_columns)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        return replace(self, vectors=vectors, content_columns=columns)

    def select(self, rows: np.ndarray | Sequence[int]) -> Catalog:
        """Return the items at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        vectors = None if self.vectors is None else self.vectors[rows]
        return Catalog(self.table[rows.tolist()], vectors, self.content_columns)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the table (not the vectors)."""
        return fingerprint(self.table.columns, [list(row) for row in self.table.iter_rows()])


def _one_text(row: dict[str, Any]) -> str:
    parts = []
    for name, value in row.items():
        if isinstance(value, list):
            value = ", ".join(str(v) for v in value if v not in (None, ""))
        if value in (None, ""):
            continue
        parts.append(str(value) if name == TITLE else f"{name}: {value}")
    return "; ".join(parts)
