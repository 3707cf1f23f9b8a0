"""Which items does an expression over catalogue columns mean, and in which group is each item?

Turns attributes into arrays by catalogue row, which the search takes as rules. It knows no search.

Shapes: N items, G groups.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from genrec.data.catalog import Catalog
from genrec.errors import DataError, nearest


def matching_rows(catalog: Catalog, expression: str) -> np.ndarray:
    """Return which items an expression holds for, (N,) bool.

    The expression is a SQL condition over the columns, read by polars: comparisons, and / or / not,
    in, like, between, is null, array_contains(column, 'value'). It can name columns only: no files
    and no statements. Where a value is missing and the condition therefore unknown, the item does
    not match.

    Args:
        catalog: the items.
        expression: e.g. "in_stock and price < 20".

    Raises:
        DataError: an expression that cannot be read, an unknown column, or no condition.

    >>> catalog = Catalog(pl.DataFrame({"item_id": ["a", "b", "c"], "price": [5.0, 30.0, None]}))
    >>> matching_rows(catalog, "price < 20").tolist()
    [True, False, False]
    """
    try:
        found = catalog.table.select(pl.sql_expr(expression).alias("rule"))["rule"]
    except pl.exceptions.PolarsError as error:
        columns = catalog.table.columns
        reason = str(error).splitlines()[0]
        unknown = reason.split('"')[1] if reason.count('"') >= 2 else ""
        hint = nearest(unknown, columns) if unknown and unknown not in columns else ""
        raise DataError(
            f"rule {expression!r}: {reason}. Expected a condition over the columns "
            f"{', '.join(columns)}.{hint}"
        ) from error
    if found.dtype != pl.Boolean or len(found) != len(catalog):
        raise DataError(
            f"rule {expression!r}: got {len(found)} values of type {found.dtype}, expected true or "
            f'false for each of {len(catalog)} items. Compare a column, e.g. "price < 20".'
        )
    return found.fill_null(False).to_numpy().copy()


def group_labels(catalog: Catalog, column: str) -> np.ndarray:
    """Return the groups of all items by the values of a column.

    Args:
        catalog: the items.
        column: a column of single values, or of lists of values.

    Returns:
        (N,) int64, groups in the sorted order of their values, -1 where there is none; or, for a
        column of lists, (N, G) bool.

    Raises:
        DataError: an unknown column.
    """
    if column not in catalog.table.columns:
        raise DataError(
            f"groups: no column {column!r}; the catalogue has {', '.join(catalog.columns)}."
            f"{nearest(column, catalog.columns)}"
        )
    values = catalog.table[column]
    if values.dtype != pl.List:
        present = {value: i for i, value in enumerate(values.drop_nulls().unique().sort())}
        return np.array([present.get(value, -1) for value in values], dtype=np.int64)
    names = {name: i for i, name in enumerate(values.explode().drop_nulls().unique().sort())}
    members_NG = np.zeros((len(catalog), len(names)), dtype=bool)
    for row, found in enumerate(values):
        for name in [] if found is None else found:
            if name is not None:
                members_NG[row, names[name]] = True
    return members_NG
