"""Which attribute values does an item have, as strings? It knows no codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genrec.errors import DataError, nearest
from genrec.tokenizers.category import read_labels

if TYPE_CHECKING:
    from genrec.data import Catalog

DELIMITER = "|"
"""What separates values where a column holds text instead of lists."""


def attribute_values(catalog: Catalog, column: str, limit: int) -> list[list[str]]:
    """Return the values of each item in a column: different, not empty, in their order.

    Args:
        catalog: M items.
        column: lists of values, text with values between delimiters, or one number per item.
        limit: keep the first so many of an item.

    Raises:
        DataError: no such column, with the nearest name.
    """
    if column not in catalog.columns:
        raise DataError(
            f"tokenizer.attributes: the catalogue has no column {column!r}; it has "
            f"{', '.join(catalog.columns) or 'none but the item id'}."
            f"{nearest(column, catalog.columns)}"
        )
    cells = catalog.table[column].to_list()
    return [list(dict.fromkeys(read_labels(cell, DELIMITER)))[:limit] for cell in cells]
