"""The tree of the biggest branches: which items do codes say are alike, with examples.

It counts and cuts; how the tree is shown is decided elsewhere.

Shapes: N items, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec.item_index import END
from genrec.tokenizers.base import IntArray

WIDTH, DEPTH, NUM_EXAMPLES = 5, 3, 3


def branch_tree(
    codes_NL: IntArray,
    item_ids: Sequence[str],
    titles: Sequence[str | None] | None = None,
    *,
    shared_vocabulary: bool = False,
    width: int = WIDTH,
    depth: int = DEPTH,
    num_examples: int = NUM_EXAMPLES,
) -> list[dict[str, Any]]:
    """Return the branches with the most items, level by level, as JSON types.

    Args:
        codes_NL: codes of all items.
        item_ids: N ids.
        titles: N titles, where there are any.
        shared_vocabulary: code 0 ends a semantic ID and is no branch.
        width: branches of a node that are kept.
        depth: levels that are shown; the last level of the codes never is, unless it is the first.
        num_examples: items named at each branch, spread over its rows.

    Returns:
        branches, biggest first (of equal ones the lowest code): `code`, `prefix`, `num_items`,
        `num_branches` (different codes at the next level), `examples` (`item_id`, `title`) and
        `children`, those of two items or more.
    """
    depth = min(depth, max(1, codes_NL.shape[1] - 1))

    def grow(rows: IntArray, level: int) -> list[dict[str, Any]]:
        codes, inverse, counts = np.unique(
            codes_NL[rows, level], return_inverse=True, return_counts=True
        )
        if shared_vocabulary:
            counts = np.where(codes == END, 0, counts)
        found = []
        for place in np.argsort(-counts, kind="stable")[:width]:
            if counts[place] < (2 if level else 1):
                continue  # below the first level a single item is no branch
            below = rows[inverse == place]
            deeper = level + 1 < codes_NL.shape[1]
            found.append(
                {
                    "code": int(codes[place]),
                    "prefix": codes_NL[below[0], : level + 1].tolist(),
                    "num_items": len(below),
                    "num_branches": len(np.unique(codes_NL[below, level + 1])) if deeper else 0,
                    "examples": [_example(row, item_ids, titles) for row in _spread(below)],
                    "children": grow(below, level + 1)
                    if level + 1 < depth and len(below) > 1
                    else [],
                }
            )
        return found

    def _spread(rows: IntArray) -> IntArray:
        places = np.linspace(0, len(rows) - 1, min(num_examples, len(rows)))
        return rows[places.astype(int)]

    return grow(np.arange(len(codes_NL)), 0) if codes_NL.size else []


def _example(
    row: int, item_ids: Sequence[str], titles: Sequence[str | None] | None
) -> dict[str, str | None]:
    return {"item_id": item_ids[row], "title": titles[row] if titles is not None else None}
