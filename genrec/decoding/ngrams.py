"""Which n-grams do the strings of a catalogue hold, what may follow one, and where do they stand?

A suffix array over the facet strings of all items; it has the role that an FM-index has in TransRec
and SEAL, for catalogues whose strings fit into memory. It knows neither models nor weights.

Shapes: N items, S positions of the text, P occurrences of an n-gram, C children.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from genrec.errors import UserError, nearest
from genrec.item_index import END

IntArray = np.ndarray


@dataclass(frozen=True)
class Span:
    """All occurrences of an n-gram: a range of the suffix array.

    Args:
        low: first place in the suffix array.
        high: one past the last; `high - low` is how often the n-gram occurs.
        length: number of codes of the n-gram.
    """

    low: int
    high: int
    length: int

    @property
    def count(self) -> int:
        """How often the n-gram occurs, F."""
        return self.high - self.low


class NgramIndex:
    """Every n-gram of every facet string, by a suffix array per facet.

    Build it with `NgramIndex.build`; an n-gram lies within one string of one facet.

    Args:
        names: the facets.
        text_S: all strings, facet after facet, item after item, `END` after each, int32.
        rows_S: the item of each position, int64.
        bounds: where each facet begins and ends in the text.
    """

    def __init__(
        self, names: tuple[str, ...], text_S: IntArray, rows_S: IntArray, bounds: Sequence[int]
    ) -> None:
        self.facets = names
        self.text_S, self.rows_S = text_S, rows_S
        self.num_items = int(rows_S.max()) + 1
        self.num_tokens = int((text_S != END).sum())
        self.num_codes = int(text_S.max()) + 1
        facet_S = np.repeat(np.arange(len(names)), np.diff(bounds))
        order = _suffix_array(text_S, facet_S)
        self._suffixes = order[text_S[order] != END]  # by facet, then as words in a dictionary
        self._first = text_S[self._suffixes]
        edges = np.searchsorted(facet_S[self._suffixes], np.arange(len(names) + 1)).tolist()
        self._roots = {
            name: Span(edges[place], edges[place + 1], 0) for place, name in enumerate(names)
        }
        self._markers = {name: int(text_S[bounds[place]]) for place, name in enumerate(names)}

    @classmethod
    def build(cls, facets: Mapping[str, Sequence[Sequence[int]]]) -> NgramIndex:
        """Index facet strings.

        Args:
            facets: per facet, the codes (>= 1) of each of N items, in row order; all strings of a
                facet begin with one code, its marker, which stands nowhere else.

        Raises:
            UserError: no facets or items, lengths that differ, a code 0, or no such marker.
        """
        counts = {name: len(strings) for name, strings in facets.items()}
        if not counts or len(set(counts.values())) != 1 or not next(iter(counts.values())):
            raise UserError(
                f"NgramIndex: got facets with so many items: {counts}. Expected at least one "
                "facet, and one string for each item in every facet."
            )
        for name, strings in facets.items():
            _check(name, strings)
        lines = [(*codes, END) for strings in facets.values() for codes in strings]
        lengths = np.array([len(line) for line in lines])
        num_items = next(iter(counts.values()))
        text = np.fromiter((code for line in lines for code in line), np.int32, lengths.sum())
        rows = np.repeat(np.arange(len(lines)) % num_items, lengths)
        ends = np.cumsum(lengths)[num_items - 1 :: num_items]
        return cls(tuple(facets), text, rows, [0, *ends.tolist()])

    def root(self, facet: str) -> Span:
        """Return the empty n-gram of a facet; every other n-gram extends it.

        Raises:
            UserError: no such facet, with the nearest name.
        """
        if facet not in self._roots:
            raise UserError(
                f"NgramIndex: got facet {facet!r}, expected one of {', '.join(self.facets)}."
                f"{nearest(facet, self.facets)}"
            )
        return self._roots[facet]

    def marker(self, facet: str) -> int:
        """Return the code that begins every string of a facet."""
        self.root(facet)
        return self._markers[facet]

    def children(self, span: Span) -> tuple[IntArray, list[Span]]:
        """Return the codes (C,) that may follow an n-gram, in rising order, and what they lead to.

        These and no others: each child occurs in some string. No code is `END` (see `ends`).
        """
        following = self._following(span)
        starts = np.flatnonzero(np.diff(following, prepend=END))  # END sorts first, and is skipped
        edges = [*(starts + span.low).tolist(), span.high]
        spans = [Span(low, high, span.length + 1) for low, high in pairwise(edges)]
        return following[starts], spans

    def ends(self, span: Span) -> bool:
        """Return whether some string ends after this n-gram."""
        return span.count > 0 and bool(self._following(span)[0] == END)

    def extend(self, span: Span, code: int) -> Span:
        """Return the n-gram with one more code; its count is 0 if it does not occur."""
        following = self._following(span)
        low, high = np.searchsorted(following, [code, code + 1]).tolist() if code > END else (0, 0)
        return Span(span.low + low, span.low + high, span.length + 1)

    def find(self, facet: str, ngram: Sequence[int]) -> Span:
        """Return where an n-gram occurs in a facet; its count is 0 if it does not."""
        span = self.root(facet)
        for code in ngram:
            span = self.extend(span, int(code))
        return span

    def positions(self, span: Span) -> IntArray:
        """Return where the occurrences begin in the text, (P,) int64, in rising order."""
        return np.sort(self._suffixes[span.low : span.high])

    def rows(self, span: Span) -> IntArray:
        """Return the rows of the items whose strings hold the n-gram, each once, rising."""
        return np.unique(self.rows_S[self._suffixes[span.low : span.high]])

    def _following(self, span: Span) -> IntArray:
        """Return the code after each occurrence, in rising order, `END` where a string ends."""
        if span.length == 0:
            return self._first[span.low : span.high]
        return self.text_S[self._suffixes[span.low : span.high] + span.length]


def _check(name: str, strings: Sequence[Sequence[int]]) -> None:
    marker = strings[0][0] if len(strings[0]) else None
    for row, codes in enumerate(strings):
        if not len(codes) or codes[0] != marker or marker in codes[1:] or min(codes) <= END:
            raise UserError(
                f"NgramIndex: facet {name!r} of item row {row} is {list(codes)}. Expected codes "
                f"above {END}, of which the first, and no other, is the facet's marker ({marker})."
            )


def _suffix_array(text_S: IntArray, facet_S: IntArray) -> IntArray:
    """Return positions sorted by facet and then by the string that begins there (prefix doubling).

    Strings are compared as far as the longest one reaches; what lies behind an `END` may order
    equal strings, which changes no range of equal n-grams.
    """
    width = int(text_S.max()) + 1
    rank = np.unique(facet_S * width + text_S, return_inverse=True)[1].reshape(-1).astype(np.int64)
    longest = int(np.diff(np.flatnonzero(text_S == END), prepend=-1).max())
    step = 1
    while step < longest and rank.max() + 1 < len(rank):
        behind = np.zeros_like(rank)
        behind[:-step] = rank[step:] + 1
        keys = rank * (len(rank) + 1) + behind
        rank = np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)
        step *= 2
    return np.argsort(rank, kind="stable")
