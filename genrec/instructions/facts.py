"""What can be said in words about items and histories? Titles, attributes, queries, summaries.

All words come from the catalogue's table. There is no teacher language model behind them: queries
and preference texts are put together from attributes. It knows no templates and no tasks.

Shapes: N items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from genrec.data.catalog import TITLE, Catalog
from genrec.errors import ConfigError, nearest
from genrec.instructions.templates import Record, Several

LONGEST_LABEL = 60
"""Characters up to which a value is a label, which queries and summaries are made of."""
LABELS_OF_A_KEY = 3
LABELS_OF_A_QUERY = 3


class ItemFacts:
    """Words about the items of a catalogue.

    Args:
        catalog: items in row order.
        max_characters: a title or value is cut after so many, at a blank.
        query_column: column with a search text for each item; None makes queries of labels.

    Raises:
        ConfigError: no such column.
    """

    def __init__(
        self, catalog: Catalog, *, max_characters: int = 200, query_column: str | None = None
    ) -> None:
        if query_column is not None and query_column not in catalog.columns:
            raise ConfigError(
                f"query_column: got {query_column!r}, expected a column of the catalogue "
                f"({', '.join(catalog.columns)}).{nearest(query_column, catalog.columns)}"
            )
        self.titles = [_cut(title or "", max_characters) for title in catalog.titles]
        self.queries: list[str] | None = None
        if query_column is not None:
            texts = catalog.table[query_column].to_list()
            self.queries = [_cut(str(text or ""), max_characters) for text in texts]
        columns = [name for name in catalog.columns if name not in (TITLE, query_column)]
        rows = catalog.table.select(columns).iter_rows(named=True) if columns else ()
        self._values = [
            [(key, found) for key, value in row.items() if (found := _values(value))]
            for row in rows
        ] or [[] for _ in range(len(catalog))]
        self.records = [
            Record(tuple((key, _cut(", ".join(found), max_characters)) for key, found in values))
            for values in self._values
        ]

    def __len__(self) -> int:
        return len(self.titles)

    def labels(self, row: int) -> list[tuple[str, str]]:
        """Return the short values of an item, each with its key."""
        return [
            (key, value)
            for key, values in self._values[row]
            for value in values
            if len(value) <= LONGEST_LABEL
        ]

    def has_query(self, row: int) -> bool:
        """Return whether there is anything to search the item by."""
        return bool(self.labels(row) if self.queries is None else self.queries[row])

    def query(self, row: int, rng: np.random.Generator) -> str:
        """Return a search text for an item: its own, or one to three of its labels, drawn."""
        if self.queries is not None:
            return self.queries[row]
        values = list(dict.fromkeys(value for _, value in self.labels(row)))
        count = int(rng.integers(1, min(LABELS_OF_A_QUERY, len(values)) + 1))
        return ", ".join(values[i] for i in rng.permutation(len(values))[:count])

    def described(self, row: int) -> Record:
        """Return an item as one line "title: ...; key: value; ..."."""
        title = (("title", self.titles[row]),) if self.titles[row] else ()
        return Record((*title, *self.records[row].pairs), between="; ")

    def named(self, rows: Iterable[int]) -> Several | None:
        """Return the titles of items that have one, None if none has."""
        titles = tuple(self.titles[row] for row in rows if self.titles[row])
        return Several(titles, between="; ") if titles else None

    def all_described(self, rows: Iterable[int]) -> Several | None:
        """Return items as one line each, None if nothing is known of them."""
        records = tuple(record for row in rows if (record := self.described(row)).pairs)
        return Several(records, between="\n") if records else None

    def summary(self, rows: Iterable[int]) -> Record | None:
        """Return what items have in common: the most frequent labels of each key; None: no labels.

        Of equally frequent labels the alphabet decides.
        """
        counts = Counter(label for row in rows for label in self.labels(row))
        by_key: dict[str, list[str]] = {}
        for (key, value), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            by_key.setdefault(key, []).append(value)
        pairs = ((key, ", ".join(v[:LABELS_OF_A_KEY])) for key, v in sorted(by_key.items()))
        return Record(tuple(pairs), between="; ") if by_key else None


def _values(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(v).strip() for v in values if v is not None and str(v).strip()]


def _cut(text: str, limit: int) -> str:
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    return text[:limit].rpartition(" ")[0] or text[:limit]
