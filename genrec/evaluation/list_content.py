"""How varied is one list, and how like its user's history? A value per user, NaN where undefined.

It reads attributes and vectors of items and knows no targets. Attributes are what a catalogue calls
genres, categories or class: a set of labels per item.

Shapes: U users, k list length, N items, A labels, E vector width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.sparse as sp

from genrec.data.catalog import TITLE, Catalog
from genrec.data.interactions import Examples
from genrec.errors import DataError, nearest
from genrec.evaluation.exposure import chunks

SMOOTHING = 0.01


@dataclass(frozen=True, eq=False)
class ItemAttributes:
    """Labels of items.

    Args:
        name: of the catalogue's column.
        labels: A names.
        matrix_NA: (N, A) float32 CSR, 1 where an item has a label.
    """

    name: str
    labels: list[str]
    matrix_NA: sp.csr_array


def attributes_of(catalog: Catalog, column: str | None = None) -> ItemAttributes | None:
    """Return the labels in a column of the catalogue.

    Args:
        catalog: N items.
        column: list of strings, or string; default the first column that holds lists of strings.

    Returns:
        None where no column is named and none holds lists.

    Raises:
        DataError: an unknown column, or one of numbers.
    """
    table = catalog.table
    if column is None:
        lists = [c for c in catalog.columns if table[c].dtype == pl.List(pl.String)]
        if not lists:
            return None
        column = lists[0]
    if column not in table.columns or column == TITLE:
        raise DataError(
            f"attributes: got column {column!r}, expected one of "
            f"{', '.join(c for c in catalog.columns if c != TITLE)}."
            f"{nearest(column, catalog.columns)}"
        )
    series = table[column]
    if series.dtype not in (pl.String, pl.List(pl.String)):
        raise DataError(f"attributes: column {column!r} holds {series.dtype}, expected labels.")
    values = [[v] if isinstance(v, str) else (v or []) for v in series.to_list()]
    sets = [sorted({label for label in labels if label}) for labels in values]
    labels = sorted({label for found in sets for label in found})
    places = {label: place for place, label in enumerate(labels)}
    offsets = np.concatenate([[0], np.cumsum([len(found) for found in sets])])
    columns = np.array([places[label] for found in sets for label in found], np.int64)
    data = np.ones(len(columns), np.float32)
    matrix = sp.csr_array((data, columns, offsets), shape=(len(catalog), len(labels)))
    return ItemAttributes(column, labels, matrix)


def attribute_diversity(rows_Uk: np.ndarray, attributes: ItemAttributes) -> np.ndarray:
    """Return the mean Jaccard distance between the items of each list, (U,) float64 in [0, 1].

    Pairs without any label have no distance and are left out.

    Args:
        rows_Uk: (U, k) int item rows, -1 = padding.
        attributes: of the N items.
    """
    if not attributes.labels:
        return np.full(len(rows_Uk), np.nan)
    found = [np.empty(0)]
    for part_Bk, has_BkA in _gathered(rows_Uk, attributes.matrix_NA):
        both_Bkk = has_BkA @ has_BkA.transpose(0, 2, 1)
        size_Bk = has_BkA.sum(axis=2)
        either_Bkk = size_Bk[:, :, None] + size_Bk[:, None, :] - both_Bkk
        valid_Bk = part_Bk >= 0
        pairs_Bkk = valid_Bk[:, :, None] & valid_Bk[:, None, :] & (either_Bkk > 0)
        pairs_Bkk &= np.triu(np.ones(pairs_Bkk.shape[1:], bool), 1)
        distance_Bkk = 1 - both_Bkk / np.maximum(either_Bkk, 1)
        found.append(_ratio((distance_Bkk * pairs_Bkk).sum((1, 2)), pairs_Bkk.sum((1, 2))))
    return np.concatenate(found)


def vector_diversity(rows_Uk: np.ndarray, vectors_NE: np.ndarray) -> np.ndarray:
    """Return the mean cosine distance between the items of each list, (U,) float64 in [0, 2].

    Items with a zero vector are left out. The sum over all pairs of unit vectors is half of
    |sum of them|^2 - k, so that no pair is formed.

    Args:
        rows_Uk: (U, k) int item rows, -1 = padding.
        vectors_NE: (N, E) float vectors.
    """
    rows_Uk = np.asarray(rows_Uk)
    norms_N = np.linalg.norm(vectors_NE, axis=1)
    unit_NE = np.asarray(vectors_NE, np.float32) / np.maximum(norms_N, 1e-30)[:, None]
    found = [np.empty(0)]
    for part_Bk in chunks(rows_Uk, unit_NE.shape[1]):
        valid_Bk = (part_Bk >= 0) & (norms_N[part_Bk] > 0)
        total_BE = np.einsum("bke,bk->be", unit_NE[part_Bk], valid_Bk.astype(np.float32))
        count_B = valid_Bk.sum(axis=1)
        similar_B = (total_BE.astype(np.float64) ** 2).sum(axis=1) - count_B
        mean_B = _ratio(similar_B, count_B * (count_B - 1))
        found.append(np.clip(1 - mean_B, 0, 2))
    return np.concatenate(found)


def calibration_miss(
    rows_Uk: np.ndarray, histories: Examples, attributes: ItemAttributes, alpha: float = SMOOTHING
) -> np.ndarray:
    """Return how far each list's labels are from its user's history: KL(history || list), nats.

    Every item counts 1, shared evenly by its labels (Steck 2018, eq. 2 and 3, equal weights); then
    eq. 5 and 6: the list's distribution q is mixed with the history's p, q' = (1 -
    alpha) q + alpha p, so that a label that the list lacks costs much, but not infinitely much. A
    list without labels costs -ln(alpha), the most there is.

    Args:
        rows_Uk: (U, k) int item rows, -1 = padding.
        histories: examples of the same U users.
        attributes: of the N items.
        alpha: share of the history's distribution, between 0 and 1.

    Returns:
        (U,) float64 >= 0; NaN where no item of the history has a label.
    """
    found, start = [np.empty(0)], 0
    for part_Bk in chunks(np.asarray(rows_Uk), max(1, len(attributes.labels))):
        stop = start + len(part_Bk)
        offsets = histories.offsets[start : stop + 1]
        flat = histories.flat[offsets[0] : offsets[-1]]
        wanted_BA = _shares(flat, offsets - offsets[0], attributes)
        valid_Bk = part_Bk >= 0
        ends = np.concatenate([[0], np.cumsum(valid_Bk.sum(axis=1))])
        listed_BA = np.nan_to_num(_shares(part_Bk[valid_Bk], ends, attributes))
        mixed_BA = (1 - alpha) * listed_BA + alpha * wanted_BA
        with np.errstate(divide="ignore", invalid="ignore"):
            terms_BA = np.where(wanted_BA > 0, wanted_BA * np.log(wanted_BA / mixed_BA), 0.0)
        known_B = np.isfinite(wanted_BA).all(axis=1) & bool(attributes.labels)
        found.append(np.where(known_B, np.maximum(terms_BA.sum(axis=1), 0.0), np.nan))
        start = stop
    return np.concatenate(found)


def history_popularity_lift(
    rows_Uk: np.ndarray, histories: Examples, counts_N: np.ndarray
) -> float:
    """Return how much more popular lists are than their users' histories, minus 1.

    The mean over users of the mean training count in the list, over the same mean for histories
    (the "lift" or delta GAP of Abdollahpouri et al. 2019). Users with an empty list or history are
    left out; NaN where none is left.
    """
    counts_N = np.asarray(counts_N, np.float64)
    rows_Uk = np.asarray(rows_Uk)
    listed_U, start = np.empty(len(rows_Uk)), 0
    for part_Bk in chunks(rows_Uk):
        valid_Bk = part_Bk >= 0
        total_B = (counts_N[part_Bk] * valid_Bk).sum(axis=1)
        listed_U[start : start + len(part_Bk)] = _ratio(total_B, valid_Bk.sum(axis=1))
        start += len(part_Bk)
    sums = np.concatenate([[0.0], np.cumsum(counts_N[histories.flat])])
    own_U = _ratio(sums[histories.offsets[1:]] - sums[histories.offsets[:-1]], histories.lengths)
    known_U = np.isfinite(listed_U) & np.isfinite(own_U)
    if not known_U.any() or not own_U[known_U].mean():
        return float("nan")
    return float(listed_U[known_U].mean() / own_U[known_U].mean() - 1)


def _shares(flat: np.ndarray, offsets: np.ndarray, attributes: ItemAttributes) -> np.ndarray:
    """Return (U, A): the mean over labelled items of their evenly shared labels."""
    matrix = attributes.matrix_NA
    sizes_N = np.diff(matrix.indptr)
    even = matrix.copy()
    even.data = np.repeat(1.0 / np.maximum(sizes_N, 1), sizes_N)
    has_U = sp.csr_array(
        (np.ones(len(flat)), flat, offsets), shape=(len(offsets) - 1, len(sizes_N))
    )
    total_UA = (has_U @ even).toarray()
    labelled_U = has_U @ (sizes_N > 0).astype(np.float64)
    return _ratio(total_UA, labelled_U[:, None])


def _gathered(
    rows_Uk: np.ndarray, matrix_NA: sp.csr_array
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of the lists with the dense labels (B, k, A) of their items; 0 for padding."""
    rows_Uk = np.asarray(rows_Uk)
    for part_Bk in chunks(rows_Uk, max(matrix_NA.shape[1], rows_Uk.shape[1])):
        used, places = np.unique(part_Bk, return_inverse=True)
        dense = matrix_NA[np.maximum(used, 0)].toarray()
        dense[used < 0] = 0
        yield part_Bk, dense[places.reshape(part_Bk.shape)]


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return total / count, NaN where the count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(count) > 0, total / np.asarray(count, np.float64), np.nan)
