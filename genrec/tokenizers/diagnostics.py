"""Diagnostics: what codes are like, before and after collisions were resolved, as plain numbers.

It judges nothing and plots nothing; `genrec inspect` and the report show these figures.

Shapes: N items, L levels of the tokenizer, L' levels of the index, Q queried items, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec.tokenizers.base import FloatArray, IntArray, ItemTokenizer, checked_vectors

if TYPE_CHECKING:
    from genrec.data import Catalog
    from genrec.item_index import ItemIndex

NUM_QUERIES = 1000
NUM_NEIGHBOURS = 10


def diagnose(tokenizer: ItemTokenizer, index: ItemIndex, catalog: Catalog) -> dict[str, Any]:
    """Return the figures of a tokenizer and of the index built with it, as JSON types.

    Args:
        tokenizer: fitted.
        index: holds all items of the catalogue.
        catalog: with vectors.

    Returns:
        `num_items`; `collisions` of the tokenizer's own codes (`rate`, `num_distinct`,
        `largest_group`, `num_items_colliding`); `levels` (the tokenizer's) and `index` (the
        index's `num_levels`, `codebook_sizes`, `num_distinct`, `num_items_moved`, `levels`,
        `prefixes`); and for tokenizers that decode `reconstruction` and `neighbours`.
    """
    codes_NL = tokenizer.encode(catalog)
    final_NL = index.codes_of(catalog.item_ids)
    shared = min(codes_NL.shape[1], final_NL.shape[1])
    moved = (codes_NL[:, :shared] != final_NL[:, :shared]).any(axis=1)
    report: dict[str, Any] = {
        "num_items": len(catalog),
        "collisions": collision_figures(codes_NL),
        "levels": level_figures(codes_NL, tokenizer.codebook_sizes),
        "index": {
            "num_levels": index.num_levels,
            "codebook_sizes": list(index.codebook_sizes),
            "num_distinct": len(np.unique(final_NL, axis=0)),
            "num_items_moved": int(moved.sum()),
            "levels": level_figures(final_NL, index.codebook_sizes),
            "prefixes": prefix_figures(final_NL),
        },
    }
    if tokenizer.decodes:
        inputs_NE, decoded_NE = tokenizer.inputs(catalog), tokenizer.decode(codes_NL)
        report["reconstruction"] = reconstruction_figures(inputs_NE, decoded_NE)
        report["neighbours"] = neighbour_figures(checked_vectors(catalog), decoded_NE)
    return report


def collision_figures(codes_NL: IntArray) -> dict[str, Any]:
    """Return how many items share their codes with others; `rate` = (N - distinct) / N."""
    _, counts = np.unique(codes_NL, axis=0, return_counts=True)
    num_items = len(codes_NL)
    return {
        "rate": (num_items - len(counts)) / num_items if num_items else 0.0,
        "num_distinct": len(counts),
        "num_items_colliding": int(counts[counts > 1].sum()),
        "largest_group": int(counts.max(initial=0)),
    }


def level_figures(codes_NL: IntArray, codebook_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return per level: codes used, utilisation (used / K), entropy (nats), perplexity."""
    return [
        _one_level(level + 1, np.bincount(codes_NL[:, level], minlength=size))
        for level, size in enumerate(codebook_sizes)
    ]


def _one_level(level: int, counts_K: IntArray) -> dict[str, Any]:
    shares = counts_K[counts_K > 0] / max(1, counts_K.sum())
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0  # + 0.0: no -0.0
    used = int((counts_K > 0).sum())
    return {
        "level": level,
        "codebook_size": len(counts_K),
        "used": used,
        "utilisation": used / len(counts_K),
        "entropy": entropy,
        "perplexity": float(np.exp(entropy)),
        "largest_share": float(shares.max(initial=0.0)),
    }


def prefix_figures(codes_NL: IntArray) -> list[dict[str, Any]]:
    """Return per prefix length: distinct prefixes, mean and largest group, share that is shared."""
    figures = []
    for length in range(1, codes_NL.shape[1] + 1):
        _, counts = np.unique(codes_NL[:, :length], axis=0, return_counts=True)
        figures.append(
            {
                "length": length,
                "num_distinct": len(counts),
                "mean_items": float(counts.mean()) if len(counts) else 0.0,
                "largest_group": int(counts.max(initial=0)),
                "share_of_items_sharing": float(counts[counts > 1].sum() / max(1, len(codes_NL))),
            }
        )
    return figures


def reconstruction_figures(inputs_NE: FloatArray, decoded_NE: FloatArray) -> dict[str, float]:
    """Return the squared error per item, and relative to the variance (1 = as bad as the mean)."""
    error = float(np.square(inputs_NE - decoded_NE, dtype=np.float64).sum(axis=1).mean())
    spread = inputs_NE - inputs_NE.mean(axis=0, dtype=np.float64)
    variance = float(np.square(spread).sum(axis=1).mean())
    return {
        "squared_error": error,
        "relative_squared_error": error / variance if variance > 0 else 0.0,
    }


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
