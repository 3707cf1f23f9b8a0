"""Diagnostics: what codes are like, before and after collisions were resolved, as plain numbers.

It judges nothing and plots nothing; `genrec inspect tokens` and the reports show these figures. How
codes agree with vectors and interactions is counted in `agreement.py`.

Shapes: N items, L levels of the tokenizer, L' levels of the index, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec.item_index import END
from genrec.tokenizers.base import FloatArray, IntArray, ItemTokenizer
from genrec.tokenizers.diagnostics.agreement import (
    cooccurrence_figures,
    neighbour_figures,
    reconstruction_figures,
    total_variance,
)

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions
    from genrec.item_index import ItemIndex

Report = dict[str, Any]


def diagnose(
    tokenizer: ItemTokenizer,
    index: ItemIndex,
    catalog: Catalog,
    interactions: Interactions | None = None,
    *,
    codes_NL: IntArray | None = None,
) -> Report:
    """Return the figures of a tokenizer and of the index built with it, as JSON types.

    Args:
        tokenizer: fitted.
        index: holds all items of the catalogue.
        catalog: what the tokenizer encodes (with vectors where it needs them).
        interactions: training interactions in the catalogue's row order; optional.
        codes_NL: the tokenizer's codes, where they are known already.

    Returns:
        what `code_figures` does; for tokenizers that decode, `reconstruction` and `neighbours` of
        the tokenizer's own codes and of the index's (`index.reconstruction`, ...), and
        `index.moved_distance`.
    """
    if codes_NL is None:
        codes_NL = tokenizer.encode(catalog)
    report = code_figures(
        codes_NL, tokenizer.codebook_sizes, index, catalog.item_ids, interactions=interactions
    )
    report["tokenizer"] = tokenizer.name
    if tokenizer.decodes and len(catalog):
        before, after = _vector_figures(
            tokenizer, catalog, codes_NL, index.codes_of(catalog.item_ids)
        )
        report |= before
        report["index"] |= after
    return report


def code_figures(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    index: ItemIndex,
    item_ids: Sequence[str],
    *,
    interactions: Interactions | None = None,
) -> Report:
    """Return the figures that codes alone give, before and after the collision policy.

    Args:
        codes_NL: the tokenizer's own codes.
        codebook_sizes: of its L levels.
        index: holds these items.
        item_ids: N ids, the rows of `codes_NL`.
        interactions: training interactions in the same row order; optional.

    Returns:
        `num_items`; of the tokenizer's codes `collisions` (`rate`, `num_distinct`,
        `largest_group`, `num_items_colliding`), `levels`, `prefixes` and (with interactions)
        `cooccurrence`; `index` with the same of the index's codes and `num_levels`,
        `codebook_sizes`, `shared_vocabulary`, `num_distinct`, `num_items_moved` (codes of the
        tokenizer's levels changed) and `num_items_numbered` (told apart by an added number only).
    """
    final_NL = index.codes_of(item_ids)
    shared = index.shared_vocabulary
    after: Report = {
        "num_levels": index.num_levels,
        "codebook_sizes": list(index.codebook_sizes),
        "shared_vocabulary": shared,
        "num_distinct": len(np.unique(final_NL, axis=0)),
        **_moves(codes_NL, final_NL, codebook_sizes, shared_vocabulary=shared),
    }
    before: Report = {"num_items": len(item_ids)}
    sides = ((before, codes_NL, codebook_sizes), (after, final_NL, index.codebook_sizes))
    for side, codes, sizes in sides:
        side["collisions"] = collision_figures(codes)
        side["levels"] = level_figures(codes, sizes, shared_vocabulary=shared)
        side["prefixes"] = prefix_figures(codes)
        if interactions is not None:
            side["cooccurrence"] = cooccurrence_figures(
                codes, interactions, shared_vocabulary=shared
            )
    return {**before, "index": after}


def _moves(
    codes_NL: IntArray,
    final_NL: IntArray,
    codebook_sizes: Sequence[int],
    *,
    shared_vocabulary: bool,
) -> Report:
    num_levels = codes_NL.shape[1]
    changed = (codes_NL != final_NL[:, :num_levels]).any(axis=1)
    if shared_vocabulary:  # a number is a code beyond the tokenizer's vocabulary
        numbered = (final_NL >= max(codebook_sizes, default=1)).any(axis=1)
        changed &= ~numbered
    else:
        numbered = (final_NL[:, num_levels:] > 0).any(axis=1)
    return {"num_items_moved": int(changed.sum()), "num_items_numbered": int(numbered.sum())}


def _vector_figures(
    tokenizer: ItemTokenizer, catalog: Catalog, codes_NL: IntArray, final_NL: IntArray
) -> tuple[Report, Report]:
    """Return reconstruction and neighbours before and after, and how far codes were moved."""
    inputs_NE, decoded_NE = tokenizer.inputs(catalog), tokenizer.decode(codes_NL)
    compared_NE = catalog.vectors if catalog.vectors is not None else inputs_NE
    before: Report = {
        "reconstruction": reconstruction_figures(inputs_NE, decoded_NE),
        "neighbours": neighbour_figures(compared_NE, decoded_NE),
    }
    kept_NL = final_NL[:, : codes_NL.shape[1]]
    moved = (kept_NL != codes_NL).any(axis=1)
    if not moved.any():
        return before, {**before, "moved_distance": None}
    moved_NE = decoded_NE.copy()
    moved_NE[moved] = tokenizer.decode(kept_NL[moved])
    after: Report = {
        "reconstruction": reconstruction_figures(inputs_NE, moved_NE),
        "neighbours": neighbour_figures(compared_NE, moved_NE),
        "moved_distance": _distance_figures(
            decoded_NE[moved], moved_NE[moved], np.sqrt(total_variance(inputs_NE))
        ),
    }
    return before, after


def _distance_figures(from_ME: FloatArray, to_ME: FloatArray, scale: float) -> Report:
    """Return how far apart vectors are, also relative to the items' distance from their mean."""
    distances = np.linalg.norm((from_ME - to_ME).astype(np.float64), axis=1)
    mean = float(distances.mean())
    return {
        "mean": mean,
        "max": float(distances.max()),
        "relative_mean": mean / scale if scale > 0 else 0.0,
    }


def collision_figures(codes_NL: IntArray) -> Report:
    """Return how many items share their codes with others; `rate` = (N - distinct) / N."""
    _, counts = np.unique(codes_NL, axis=0, return_counts=True)
    num_items = len(codes_NL)
    return {
        "rate": (num_items - len(counts)) / num_items if num_items else 0.0,
        "num_distinct": len(counts),
        "num_items_colliding": int(counts[counts > 1].sum()),
        "largest_group": int(counts.max(initial=0)),
    }


def level_figures(
    codes_NL: IntArray, codebook_sizes: Sequence[int], *, shared_vocabulary: bool = False
) -> list[Report]:
    """Return per level: codes used, utilisation (used / K), entropy (nats), perplexity.

    With a shared vocabulary the end of a semantic ID is no code: items that have ended before a
    level do not count in it (`num_items` says how many are left).
    """
    figures = []
    for level, size in enumerate(codebook_sizes):
        counts_K = np.bincount(codes_NL[:, level], minlength=size)
        if shared_vocabulary:
            counts_K[END] = 0
        figures.append(_one_level(level + 1, counts_K))
    return figures


def _one_level(level: int, counts_K: IntArray) -> Report:
    shares = counts_K[counts_K > 0] / max(1, counts_K.sum())
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0  # + 0.0: no -0.0
    used = int((counts_K > 0).sum())
    return {
        "level": level,
        "codebook_size": len(counts_K),
        "num_items": int(counts_K.sum()),
        "used": used,
        "utilisation": used / len(counts_K),
        "entropy": entropy,
        "perplexity": float(np.exp(entropy)),
        "largest_share": float(shares.max(initial=0.0)),
    }


def prefix_figures(codes_NL: IntArray) -> list[Report]:
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
