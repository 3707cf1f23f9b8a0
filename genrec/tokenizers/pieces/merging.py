"""Which features occur together, and which of them become one token? (ActionPiece, 2502.13581.)

The vocabulary of a corpus of feature sets grows as in byte-pair encoding, by the heaviest pair at a
time; a set has no order, and a pair may also span two neighbouring sets. Tokens are plain integers
here: it knows neither items nor what a feature means.

A corpus is sequences of sets of tokens. Between two neighbouring sets lies a context slot that
holds at most one token. Weight of a pair (equation 1 of the paper, M tokens in a set):

- both in one set: 2 / M;
- one in each of two neighbouring sets, the slot between them empty: 1 / (M1 M2);
- the token of a slot and one of a set beside it: 1 / M.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import lcm

from genrec.runtime import progress

EMPTY = 0
"""No token: an empty context slot."""
NOWHERE = -1


class PairCounts:
    """Weighted counts of all pairs of a corpus, kept up to date while pairs are merged.

    Counts are integers in units of `1 / unit`, so that they never drift and a tie is a tie. An
    inverted index (token -> places) finds the places of a pair; only the sets and slots around a
    merge are counted again.

    Args:
        sequences: sets of distinct tokens >= 1, each set with at least one.
        num_tokens: upper bound of all tokens, those to come included.
    """

    def __init__(self, sequences: Sequence[Sequence[Sequence[int]]], num_tokens: int) -> None:
        self.sets: list[list[int]] = []
        self.next: list[int] = []
        for sequence in sequences:
            self.sets += [sorted(tokens) for tokens in sequence]
            self.next += [*range(len(self.next) + 1, len(self.sets)), NOWHERE][: len(sequence)]
        self.previous = [NOWHERE] * len(self.sets)
        for place, following in enumerate(self.next):
            if following != NOWHERE:
                self.previous[following] = place
        self.slots = [EMPTY] * len(self.sets)  # the slot after each set
        self.stride = num_tokens + 1
        largest = max(map(len, self.sets), default=1)
        self.unit = lcm(*range(1, largest + 1)) ** 2
        self._inside = [0, *(2 * self.unit // size for size in range(1, largest + 1))]
        self._across = [0, *(self.unit // size for size in range(1, largest**2 + 1))]
        self._sets_with: defaultdict[int, set[int]] = defaultdict(set)
        self._slots_with: defaultdict[int, set[int]] = defaultdict(set)
        for place, tokens in enumerate(self.sets):
            for token in tokens:
                self._sets_with[token].add(place)
        self.counts = self.recount()

    def recount(self) -> dict[int, int]:
        """Return the counts of the corpus as it is now, from scratch: {key of a pair: count}."""
        counts: defaultdict[int, int] = defaultdict(int)
        for place in self._live():
            self._count_set(place, 1, counts)
            self._count_gap(place, 1, counts)
        return dict(counts)

    def key(self, first: int, second: int) -> int:
        """Return the key of an unordered pair."""
        low, high = (first, second) if first <= second else (second, first)
        return low * self.stride + high

    def pair(self, key: int) -> tuple[int, int]:
        """Return the pair (smaller, larger) of a key."""
        return divmod(key, self.stride)

    def num_tokens(self) -> int:
        """Return how many tokens the corpus has now."""
        live = list(self._live())
        return sum(len(self.sets[p]) for p in live) + sum(self.slots[p] != EMPTY for p in live)

    def sequences(self) -> list[list[int]]:
        """Return the tokens of each sequence, sets and slots from left to right."""
        result = []
        for start in self._live():
            if self.previous[start] == NOWHERE:
                tokens, place = [], start
                while place != NOWHERE:
                    tokens += [
                        *self.sets[place],
                        *([self.slots[place]] if self.slots[place] else []),
                    ]
                    place = self.next[place]
                result.append(tokens)
        return result

    def merge(self, first: int, second: int, new: int) -> dict[int, int]:
        """Replace a pair by a token wherever it occurs, from left to right.

        A pair inside a set becomes a token of the set; one across a gap becomes the token of its
        slot. A set that loses its last token this way takes the token out of the slot; where both
        sets do, the left one takes it and the right one is gone. So no set is ever empty.

        Returns:
            What changed: {key: difference}, without zeros.
        """
        changes: defaultdict[int, int] = defaultdict(int)
        for place in self._candidates(first, second):
            self._merge_in_set(place, first, second, new, changes)
            self._merge_at_gap(place, first, second, new, changes)
        result = {key: change for key, change in changes.items() if change}
        for key, change in result.items():
            count = self.counts.get(key, 0) + change
            if count:
                self.counts[key] = count
            else:
                del self.counts[key]
        return result

    def _live(self) -> Iterator[int]:
        return (place for place, tokens in enumerate(self.sets) if tokens)

    def _candidates(self, first: int, second: int) -> list[int]:
        """Return places, in order, that hold the rarer token in the set or at the gap after it."""
        rarer = min(
            (first, second), key=lambda t: len(self._sets_with[t]) + len(self._slots_with[t])
        )
        sets = self._sets_with[rarer]
        before = {self.previous[place] for place in sets}
        return sorted((sets | before | self._slots_with[rarer]) - {NOWHERE})

    def _merge_in_set(
        self, place: int, first: int, second: int, new: int, changes: defaultdict[int, int]
    ) -> None:
        tokens = self.sets[place]
        if first == second or first not in tokens or second not in tokens:
            return
        self._count_around(place, place, -1, changes)
        self._drop(place, first)
        self._drop(place, second)
        self._put(place, new)
        self._count_around(place, place, 1, changes)

    def _merge_at_gap(
        self, place: int, first: int, second: int, new: int, changes: defaultdict[int, int]
    ) -> None:
        """Merge across the gap after a set, if there is one and the pair is there."""
        right = self.next[place]
        parts = None if right == NOWHERE else self._parts_at_gap(place, right, first, second)
        if parts is None:
            return
        self._count_around(place, right, -1, changes)
        for owner, token in parts:
            self._drop(owner, token)
        self._fill_slot(place, new)
        emptied = [owner for owner in (place, right) if not self.sets[owner]]
        if emptied:
            self._fill_slot(place, EMPTY)
            self._put(emptied[0], new)
        if len(emptied) == 2:
            self._unlink(right)
            right = place
        self._count_around(place, right, 1, changes)

    def _parts_at_gap(
        self, left: int, right: int, first: int, second: int
    ) -> list[tuple[int, int]] | None:
        """Return the (set, token) that a merge at this gap takes out of the sets, or None."""
        slot = self.slots[left]
        for one, other in ((first, second), (second, first)):
            if slot == EMPTY:
                if one in self.sets[left] and other in self.sets[right]:
                    return [(left, one), (right, other)]
            elif slot == one:
                for owner in (left, right):
                    if other in self.sets[owner]:
                        return [(owner, other)]
        return None

    def _drop(self, place: int, token: int) -> None:
        self.sets[place].remove(token)
        self._sets_with[token].discard(place)

    def _put(self, place: int, token: int) -> None:
        self.sets[place].append(token)
        self.sets[place].sort()
        self._sets_with[token].add(place)

    def _fill_slot(self, place: int, token: int) -> None:
        self._slots_with[self.slots[place]].discard(place)
        self.slots[place] = token
        if token != EMPTY:
            self._slots_with[token].add(place)

    def _unlink(self, place: int) -> None:
        """Take an emptied set out; its left neighbour gets the slot and the neighbour after it."""
        left, right, slot = self.previous[place], self.next[place], self.slots[place]
        self._fill_slot(place, EMPTY)
        self._fill_slot(left, slot)
        self.next[left], self.next[place], self.previous[place] = right, NOWHERE, NOWHERE
        if right != NOWHERE:
            self.previous[right] = left

    def _count_around(
        self, left: int, right: int, sign: int, counts: defaultdict[int, int]
    ) -> None:
        """Count all that depends on one set (left = right) or on two neighbouring ones."""
        if self.previous[left] != NOWHERE:
            self._count_gap(self.previous[left], sign, counts)
        for place in (left,) if left == right else (left, right):
            self._count_set(place, sign, counts)
            self._count_gap(place, sign, counts)

    def _count_set(self, place: int, sign: int, counts: defaultdict[int, int]) -> None:
        tokens, stride = self.sets[place], self.stride
        weight = sign * self._inside[len(tokens)]
        for low, high in combinations(tokens, 2):
            counts[low * stride + high] += weight

    def _count_gap(self, place: int, sign: int, counts: defaultdict[int, int]) -> None:
        following = self.next[place]
        if following == NOWHERE:
            return
        slot = self.slots[place]
        if slot == EMPTY:
            self._count_across(self.sets[place], self.sets[following], sign, counts)
        else:
            self._count_across(self.sets[place], [slot], sign, counts)
            self._count_across([slot], self.sets[following], sign, counts)

    def _count_across(
        self, left: list[int], right: list[int], sign: int, counts: defaultdict[int, int]
    ) -> None:
        weight, stride = sign * self._across[len(left) * len(right)], self.stride
        for a in left:
            for b in right:
                counts[a * stride + b if a <= b else b * stride + a] += weight


def learn_merges(corpus: PairCounts, first_token: int, num_merges: int) -> list[tuple[int, int]]:
    """Merge the heaviest pair, again and again.

    The heap is lazy: an entry whose count fell since is corrected when it comes up. Of pairs of
    equal weight the one with the smaller tokens (smaller one first) is merged, so the outcome
    depends on nothing but the corpus.

    Args:
        corpus: is changed: every merge is applied to it.
        first_token: the token of the first merge; the next ones count up from there.
        num_merges: how many at most.

    Returns:
        Merges in the order in which they were learned; fewer where no pair is left.
    """
    heap = _heap(corpus)
    learned: dict[int, int] = {}
    shift, mask = _layout(corpus)
    with progress("ActionPiece merges", num_merges) as advance:
        while heap and len(learned) < num_merges:
            entry = heapq.heappop(heap)
            key, count = entry & mask, -(entry >> shift)
            current = corpus.counts.get(key, 0)
            if current != count:
                if 0 < current < count:
                    heapq.heappush(heap, -(current << shift) | key)
                continue
            if key not in learned:  # else a pair that a later merge brought together again
                learned[key] = first_token + len(learned)
                advance(1)
            for other, change in corpus.merge(*corpus.pair(key), learned[key]).items():
                if change > 0:
                    heapq.heappush(heap, -(corpus.counts[other] << shift) | other)
            if len(heap) > 4 * len(corpus.counts) + 1024:
                heap = _heap(corpus)
    return [corpus.pair(key) for key in learned]


def _layout(corpus: PairCounts) -> tuple[int, int]:
    """Return shift and mask of a heap entry: count above, key below, in one integer."""
    shift = (corpus.stride**2).bit_length()
    return shift, (1 << shift) - 1


def _heap(corpus: PairCounts) -> list[int]:
    shift, _ = _layout(corpus)
    heap = [-(count << shift) | key for key, count in corpus.counts.items()]
    heapq.heapify(heap)
    return heap
