"""Do codes agree with what they were made from, and with what is consumed together?

Plain figures of codes beside vectors or training interactions. It judges nothing, and does not know
how the codes were made or made unique.

Shapes: N items, L levels, Q queried items, k neighbours, E width, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec.item_index import END
from genrec.tokenizers.base import FloatArray, IntArray, ItemTokenizer

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

NUM_QUERIES = 1000
NUM_NEIGHBOURS = 10
CHUNK_ITEMS = 65_536
BLOCK_ITEMS = 512


def reconstruction_distances(
    tokenizer: ItemTokenizer, catalog: Catalog, codes_NL: IntArray
) -> FloatArray:
    """Return the squared distance (N,) float32 from each item to the vector of its codes.

    Args:
        tokenizer: fitted, with codes that stand for vectors.
        catalog: N items.
        codes_NL: their codes, of the tokenizer's levels.
    """
    found = np.empty(len(catalog), np.float32)
    for start in range(0, len(catalog), CHUNK_ITEMS):
        rows = np.arange(start, min(start + CHUNK_ITEMS, len(catalog)))
        inputs = tokenizer.inputs(catalog.select(rows))
        found[rows] = np.square(inputs - tokenizer.decode(codes_NL[rows])).sum(axis=1)
    return found


def reconstruction_figures(inputs_NE: FloatArray, decoded_NE: FloatArray) -> dict[str, float]:
    """Return the squared error per item, and relative to the variance (1 = as bad as the mean)."""
    error = float(np.square(inputs_NE - decoded_NE, dtype=np.float64).sum(axis=1).mean())
    spread = total_variance(inputs_NE)
    return {
        "squared_error": error,
        "relative_squared_error": error / spread if spread > 0 else 0.0,
    }


def total_variance(vectors_NE: FloatArray) -> float:
    """Return the mean squared distance of vectors to their mean."""
    spread = vectors_NE - vectors_NE.mean(axis=0, dtype=np.float64)
    return float(np.square(spread).sum(axis=1).mean())


def neighbour_figures(inputs_NE: FloatArray, decoded_NE: FloatArray) -> dict[str, Any]:
    """Return how many of an item's nearest items are still nearest after quantisation.

    By cosine similarity, over at most 1,000 items drawn with a fixed seed; the item itself is left
    out. Items that share all codes are equally near: the lowest rows are taken.
    """
    num_items = len(inputs_NE)
    k = min(NUM_NEIGHBOURS, num_items - 1)
    if k < 1:
        return {"k": 0, "num_queries": 0, "overlap": 1.0}
    draw = np.random.default_rng(0).permutation(num_items)[:NUM_QUERIES]
    queries = np.sort(draw)
    before, after = (_nearest_items(v, queries, k) for v in (inputs_NE, decoded_NE))
    hits = [len(np.intersect1d(a, b)) for a, b in zip(before, after, strict=True)]
    return {"k": k, "num_queries": len(queries), "overlap": float(np.mean(hits) / k)}


def cooccurrence_figures(
    codes_NL: IntArray, interactions: Interactions, *, shared_vocabulary: bool = False
) -> dict[str, Any]:
    """Return whether items that share a prefix are consumed by the same users, over all pairs.

    The codes that two items share from the first level on (the end of a semantic ID is none) are
    set against the cosine of their users, c_ij / sqrt(n_i n_j), where c_ij users consumed both and
    n_i users consumed i. Exact over all pairs: only pairs with a common user are looked at one by
    one, the sums of the others follow from the sizes of the groups.

    Args:
        codes_NL: codes of all items, in the row order of `interactions`.
        interactions: training interactions only.
        shared_vocabulary: code 0 ends a semantic ID.

    Returns:
        `correlation` (Pearson; None where either side is constant), `num_pairs`, `num_together`
        (pairs with a common user), and `prefixes`: per length the `num_pairs` that share so many
        codes and their `lift`, the mean cosine relative to that of all pairs (None without any).
    """
    num_items, num_levels = codes_NL.shape
    pairs_L = np.array(
        [_num_sharing(codes_NL, n + 1, shared_vocabulary) for n in range(num_levels)]
    )
    together_L, cosine_sum, square_sum, num_together = np.zeros(num_levels), 0.0, 0.0, 0
    for left, right, cosine in _together(interactions, num_items):
        depth_P = _shared_length(codes_NL[left], codes_NL[right], shared_vocabulary)
        together_L += [cosine[depth_P > level].sum() for level in range(num_levels)]
        cosine_sum += float(cosine.sum())
        square_sum += float(np.square(cosine).sum())
        num_together += len(cosine)
    total = num_items * (num_items - 1)
    # With s the shared length: sum of s = sum of pairs_L, of s^2 = sum of (2 l - 1) pairs_l.
    shared, shared_squares = float(pairs_L.sum()), float(pairs_L @ (2 * np.arange(num_levels) + 1))
    spread = (total * shared_squares - shared**2) * (total * square_sum - cosine_sum**2)
    covariance = total * float(together_L.sum()) - shared * cosine_sum
    mean = cosine_sum / total if total else 0.0
    return {
        "correlation": covariance / float(np.sqrt(spread)) if spread > 0 else None,
        "num_pairs": total // 2,
        "num_together": num_together // 2,
        "prefixes": [
            {
                "length": level + 1,
                "num_pairs": int(pairs) // 2,
                "lift": float(summed / pairs / mean) if pairs and mean else None,
            }
            for level, (pairs, summed) in enumerate(zip(pairs_L, together_L, strict=True))
        ],
    }


def _num_sharing(codes_NL: IntArray, length: int, shared_vocabulary: bool) -> int:
    """Return the number of ordered pairs of different items that share `length` codes."""
    prefixes = codes_NL[:, :length]
    if shared_vocabulary:
        prefixes = prefixes[prefixes[:, -1] != END]
    _, counts = np.unique(prefixes, axis=0, return_counts=True)
    return int((counts.astype(np.int64) * (counts - 1)).sum())


def _shared_length(left_PL: IntArray, right_PL: IntArray, shared_vocabulary: bool) -> IntArray:
    equal = left_PL == right_PL
    if shared_vocabulary:
        equal &= left_PL != END
    return np.logical_and.accumulate(equal, axis=1).sum(axis=1)


def _together(
    interactions: Interactions, num_items: int
) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Yield the ordered pairs of items with a common user, and the cosine of their users."""
    from scipy import sparse

    ones = np.ones(len(interactions.item_rows))
    shape = (interactions.num_users, num_items)
    users = sparse.csc_array((ones, (interactions.user_rows, interactions.item_rows)), shape=shape)
    users.sum_duplicates()
    users.data[:] = 1.0
    norms = np.sqrt(np.maximum(users.sum(axis=0), 1.0))
    by_user = users.tocsr()
    for start in range(0, num_items, BLOCK_ITEMS):
        counts = (users[:, start : start + BLOCK_ITEMS].T @ by_user).tocoo()
        left, right = counts.row.astype(np.int64) + start, counts.col
        other = left != right
        left, right = left[other], right[other]
        yield left, right, counts.data[other] / (norms[left] * norms[right])


def _nearest_items(vectors_NE: FloatArray, queries_Q: IntArray, k: int) -> IntArray:
    norms = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    unit_NE = np.divide(vectors_NE, norms, out=np.zeros_like(vectors_NE), where=norms > 0)
    rows = np.empty((len(queries_Q), k), np.int64)
    for place, query in enumerate(queries_Q):
        similarity = unit_NE @ unit_NE[query]
        similarity[query] = -np.inf
        rows[place] = _top(similarity, k)
    return rows


def _top(scores_N: FloatArray, k: int) -> IntArray:
    """Return the rows of the k largest scores; of equal ones the lowest rows."""
    threshold = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    above = np.flatnonzero(scores_N > threshold)
    level = np.flatnonzero(scores_N == threshold)
    return np.concatenate([above, level[: k - len(above)]])
