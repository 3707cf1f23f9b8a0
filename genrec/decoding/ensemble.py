"""How do several ranked lists for one request become one list?

ActionPiece (2502.13581, section 3.4) reads the same history in several segmentations. It looks at
ranks only, and knows neither models nor how the lists came about.

Shapes: P lists per request, B requests, k list length.
"""

from __future__ import annotations

import numpy as np

from genrec.decoding.protocol import NO_ROW
from genrec.errors import UserError


def aggregate_ranks(rows_PBk: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k items with the largest sum of 1 / log2(rank + 1) over P lists.

    An item gets nothing from a list that it is not in; the first of a list has rank 1.

    Args:
        rows_PBk: item rows, best first, -1 where a list is shorter.
        k: length of the lists that come out.

    Returns:
        rows (B, k) int64, ordered by (score descending, row ascending), -1 where fewer items are
        in any list; and their scores (B, k) float64, 0 where padded.

    Raises:
        UserError: not three axes, k below 1, or an item twice in one list.
    """
    rows_PBk = np.asarray(rows_PBk)
    if rows_PBk.ndim != 3 or k < 1:
        raise UserError(
            f"aggregate_ranks: got rows of shape {rows_PBk.shape} and k={k}; expected (lists, "
            "requests, list length) and k >= 1."
        )
    gains = 1.0 / np.log2(np.arange(rows_PBk.shape[2]) + 2.0)
    result = np.full((rows_PBk.shape[1], k), NO_ROW, np.int64)
    scores = np.zeros(result.shape)
    for request in range(rows_PBk.shape[1]):
        lists_Pk = rows_PBk[:, request]
        for one in lists_Pk:
            found = one[one != NO_ROW]
            if len(np.unique(found)) < len(found):
                raise UserError(
                    f"aggregate_ranks: a list of request {request} holds an item twice. Expected "
                    "each row at most once."
                )
        listed = lists_Pk != NO_ROW
        rows, places = np.unique(lists_Pk[listed], return_inverse=True)
        weights = np.broadcast_to(gains, lists_Pk.shape)[listed]
        sums = np.bincount(places.reshape(-1), weights=weights, minlength=len(rows))
        best = np.lexsort((rows, -sums))[:k]
        result[request, : len(best)], scores[request, : len(best)] = rows[best], sums[best]
    return result, scores
