"""Given merges, which tokens does a set of features become, and which a sequence of them?

It does not know how merges were learned (`merging.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import combinations

from genrec.tokenizers.pieces.merging import EMPTY


def merge_set(tokens: Sequence[int], ranks: Mapping[tuple[int, int], int]) -> list[int]:
    """Return the canonical encoding of one set: the earliest learned merge that fits, repeatedly.

    Any two tokens of the set may merge, wherever they stand; the token of the latest merge comes
    first (coarse to fine), then the features that no merge took, in their order.

    Args:
        tokens: distinct features.
        ranks: {(smaller, larger): token of the merge}; tokens rise in the order of learning.
    """
    result = list(tokens)
    while len(result) > 1:
        found = [(ranks[pair], pair) for pair in combinations(sorted(result), 2) if pair in ranks]
        if not found:
            break
        new, (first, second) = min(found)
        result = [new, *(token for token in result if token not in (first, second))]
    return result


def merge_sequence(tokens: Sequence[int], ranks: Mapping[tuple[int, int], int]) -> list[int]:
    """Return a sequence after all merges, the earliest learned first, of neighbouring tokens.

    Of several places of one merge the leftmost comes first. O(n log n) with a lazy heap.

    Args:
        tokens: features, set after set, each set in the order that it was given.
        ranks: {(smaller, larger): token of the merge}; tokens rise in the order of learning.
    """
    values = [*tokens, EMPTY]
    last = len(tokens)
    following = [*range(1, last + 1), last]
    previous = [*range(-1, last)]

    def rank(place: int) -> int | None:
        low, high = values[place], values[following[place]]
        return ranks.get((low, high) if low <= high else (high, low))

    heap = [(new, place) for place in range(last) if (new := rank(place)) is not None]
    heapq.heapify(heap)
    while heap:
        new, place = heapq.heappop(heap)
        if values[place] == EMPTY or rank(place) != new:
            continue
        right = following[place]
        values[place], values[right] = new, EMPTY
        following[place] = following[right]
        previous[following[right]] = place
        for start in (previous[place], place):
            if start >= 0 and (found := rank(start)) is not None:
                heapq.heappush(heap, (found, start))
    return [token for token in values if token != EMPTY]
