"""Where do an item's categories put it? Codes that spell a path of labels, coarse to fine.

SemID of Hua et al. 2023 (2305.06569). It reads one attribute column of the catalogue, no texts, no
vectors and no interactions, and it does not number the items of a category: that is what the
collision policy `extra_level` does. So an item that comes later has codes as soon as it has labels.

Shapes: N fitted items, M encoded items, L levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from genrec.artifacts import pack_strings, unpack_strings
from genrec.config import StrictConfig
from genrec.errors import DataError, UserError, nearest
from genrec.runtime import get_logger
from genrec.tokenizers.base import MAX_NAMED, IntArray, ItemTokenizer, not_fitted

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)
Kind = Literal["hierarchy", "labels"]
COLUMNS: dict[str, Kind] = {
    "categories": "hierarchy",
    "category": "hierarchy",
    "genres": "labels",
    "genre": "labels",
    "class": "labels",
}
"""Columns that `column: auto` looks for, in this order, and what they hold by convention."""


class SemanticCategory(ItemTokenizer):
    """SemID: one code per label of the item's category path; code 0 is "no label here".

    Args:
        config: see `SemanticCategory.Config`.
    """

    class Config(StrictConfig):
        """Settings of category paths."""

        name: Literal["semantic_category"] = "semantic_category"
        """Name in the registry."""
        column: str = "auto"
        """Attribute column with the labels; auto takes the first that there is of categories,
        category, genres, genre, class."""
        kind: Literal["auto", "hierarchy", "labels"] = "auto"
        """hierarchy: an item's labels are one path, coarse to fine. labels: they are a set without
        order, sorted by frequency (genres). auto: labels for genres, genre and class."""
        delimiter: str = Field(default="|", min_length=1)
        """What separates labels where the column holds text instead of lists."""
        max_levels: int = Field(default=5, ge=1)
        """Labels per item at most; further ones are left out (the paper: 5)."""
        label_threshold: int = Field(default=10, ge=0)
        """labels: a label must be on more items than this, else it is left out (the paper: 10)."""
        without_labels: Literal["branch", "error"] = "branch"
        """Items without any known label go into a branch of their own (all codes 0), or are an
        error that names them."""

    config: SemanticCategory.Config
    decodes: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"texts"})

    def __init__(self, config: SemanticCategory.Config) -> None:
        super().__init__(config)
        self._column: str | None = None
        self._kind: Kind = "hierarchy"
        self._levels: list[dict[str, int]] = []  # per level: label -> code, from 1

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Collect the labels of each level.

        Raises:
            UserError: no such column, or no item with a label.
            DataError: items without labels, if `without_labels` is "error".
        """
        column, kind = self._choose(catalog)
        labels = self._labels(catalog, column)
        counts = Counter(label for row in labels for label in dict.fromkeys(row))
        if kind == "labels":
            levels = self._levels_of_set(labels, counts)
        else:
            levels = self._levels_of_paths(labels)
        if not levels:
            raise UserError(
                f"semantic_category: column {column!r} gives no item a label"
                f"{self._threshold_hint(counts, kind)}. Expected lists of labels, or text "
                f"separated by {self.config.delimiter!r} (tokenizer.delimiter)."
            )
        self._report(_path_codes(labels, levels, kind), catalog.item_ids, column)
        self._column, self._kind, self._levels = column, kind, levels
        return self

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32: the item's labels from coarse to fine, then zeros.

        A hierarchy ends at the first label that `fit` did not see at that level: the item goes to
        the deepest category that is known. In a set of labels, unknown ones are left out.

        Raises:
            UserError: the column is missing.
            DataError: items without a known label, if `without_labels` is "error".
        """
        column = self._fitted()
        if column not in catalog.table.columns:
            raise _no_column(column, catalog)
        codes = _path_codes(self._labels(catalog, column), self._levels, self._kind)
        if self.config.without_labels == "error":
            _require_labels(codes, catalog.item_ids, column)
        return codes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Labels of each level, and one for "no label here"."""
        self._fitted()
        return tuple(len(level) + 1 for level in self._levels)

    def label_of(self, level: int, code: int) -> str | None:
        """Return the label that a code stands for at a level (from 0), None for code 0."""
        self._fitted()
        return None if code == 0 else list(self._levels[level])[code - 1]

    def state(self) -> dict[str, np.ndarray]:
        """Return the column, what it holds, and the labels of each level in the order of codes."""
        column = self._fitted()
        facts, fact_offsets = pack_strings([column, self._kind])
        labels, label_offsets = pack_strings([label for level in self._levels for label in level])
        return {
            "facts": facts,
            "fact_offsets": fact_offsets,
            "labels": labels,
            "label_offsets": label_offsets,
            "labels_per_level": np.array([len(level) for level in self._levels], dtype=np.int64),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        self._column, kind = unpack_strings(state["facts"], state["fact_offsets"])
        self._kind = "labels" if kind == "labels" else "hierarchy"
        labels = iter(unpack_strings(state["labels"], state["label_offsets"]))
        counts = np.asarray(state["labels_per_level"]).tolist()
        self._levels = [{next(labels): code for code in range(1, count + 1)} for count in counts]
        return self

    def _choose(self, catalog: Catalog) -> tuple[str, Kind]:
        config = self.config
        column = config.column
        if column == "auto":
            found = [name for name in COLUMNS if name in catalog.table.columns]
            if not found:
                raise UserError(
                    f"semantic_category: the catalogue has no column of {', '.join(COLUMNS)}; it "
                    f"has {', '.join(catalog.columns) or 'none'}. Set tokenizer.column to the one "
                    "that holds categories, or use another tokenizer."
                )
            column = found[0]
        elif column not in catalog.table.columns:
            raise _no_column(column, catalog)
        kind = COLUMNS.get(column, "hierarchy") if config.kind == "auto" else config.kind
        log.info("semantic_category: column %r, read as %s.", column, kind)
        return column, kind

    def _labels(self, catalog: Catalog, column: str) -> list[list[str]]:
        values = catalog.table[column].to_list()
        return [read_labels(value, self.config.delimiter) for value in values]

    def _levels_of_set(self, labels: list[list[str]], counts: Counter[str]) -> list[dict[str, int]]:
        """Every level knows every label: which of an item's labels comes first depends on it."""
        frequent = [label for label in counts if counts[label] > self.config.label_threshold]
        frequent.sort(key=lambda label: (-counts[label], label))
        codes = {label: code for code, label in enumerate(frequent, start=1)}
        longest = max((len({*row} & codes.keys()) for row in labels), default=0)
        return [codes] * min(longest, self.config.max_levels)

    def _levels_of_paths(self, labels: list[list[str]]) -> list[dict[str, int]]:
        depth = min(max(map(len, labels), default=0), self.config.max_levels)
        found = [sorted({row[n] for row in labels if len(row) > n}) for n in range(depth)]
        return [{label: code for code, label in enumerate(level, start=1)} for level in found]

    def _threshold_hint(self, counts: Counter[str], kind: Kind) -> str:
        if kind == "hierarchy" or not counts:
            return ""
        label, count = counts.most_common(1)[0]
        return (
            f" on more than {self.config.label_threshold} items (the most frequent, {label!r}, is "
            f"on {count}; set tokenizer.label_threshold lower)"
        )

    def _report(self, codes: IntArray, item_ids: Sequence[str], column: str) -> None:
        missing = int((codes == 0).all(axis=1).sum())
        if self.config.without_labels == "error":
            _require_labels(codes, item_ids, column)
        if missing:
            log.warning(
                "semantic_category: %d of %d items have no label in column %r; they share one "
                "branch. tokenizer.without_labels=error names them.",
                missing, len(codes), column,
            )  # fmt: skip

    def _fitted(self) -> str:
        if self._column is None:
            raise not_fitted("SemanticCategory")
        return self._column


def read_labels(value: Any, delimiter: str) -> list[str]:
    """Return the labels of one item, stripped, without empty ones.

    Args:
        value: a list of labels, a list of paths (Amazon; the first path counts), text with labels
            between delimiters, a number, or None.
        delimiter: what separates labels in text.
    """
    if value is None:
        return []
    if isinstance(value, list):
        if value and isinstance(value[0], list):
            value = value[0]
        parts = [str(part) for part in value if part is not None]
    else:
        parts = str(value).split(delimiter)
    return [part.strip() for part in parts if part.strip()]


def _path_codes(
    labels: list[list[str]], levels: Sequence[Mapping[str, int]], kind: Kind
) -> IntArray:
    codes = np.zeros((len(labels), len(levels)), dtype=np.int32)
    of_row = _codes_of_set if kind == "labels" else _codes_of_path
    for row, found in enumerate(labels):
        path = of_row(found, levels)
        codes[row, : len(path)] = path
    return codes


def _codes_of_set(labels: list[str], levels: Sequence[Mapping[str, int]]) -> list[int]:
    # Codes follow frequency, so that sorting by code is sorting by frequency.
    known = {levels[0][label] for label in labels if label in levels[0]}
    return sorted(known)[: len(levels)]


def _codes_of_path(labels: list[str], levels: Sequence[Mapping[str, int]]) -> list[int]:
    path = []
    for label, level in zip(labels, levels, strict=False):
        if label not in level:
            break
        path.append(level[label])
    return path


def _require_labels(codes_ML: IntArray, item_ids: Sequence[str], column: str) -> None:
    missing = np.flatnonzero((codes_ML == 0).all(axis=1))
    if len(missing):
        shown = ", ".join(repr(item_ids[row]) for row in missing[:MAX_NAMED])
        raise DataError(
            f"semantic_category: {len(missing)} item(s) have no known label in column {column!r}: "
            f"{shown}{' ...' if len(missing) > MAX_NAMED else ''}. Give them one, or set "
            "tokenizer.without_labels=branch."
        )


def _no_column(column: str, catalog: Catalog) -> UserError:
    return UserError(
        f"semantic_category: got a catalogue without column {column!r}; it has "
        f"{', '.join(catalog.columns) or 'none'}.{nearest(column, catalog.columns)} Expected the "
        "column that holds the categories (tokenizer.column)."
    )
