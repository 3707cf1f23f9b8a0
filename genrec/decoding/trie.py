"""What does the tree of a catalogue look like, and what is a beam search over it, in plain Python?

The readable, slow twins of `csr.CSRIndex` and `beam.beam_search`: nothing here is vectorised, and
the fast ones are tested against it.

Shapes: B requests, N items, L levels, R rows, C columns of children, k list length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.protocol import (
    NO_ROW,
    Beams,
    Children,
    Filters,
    Scoring,
    StepModel,
    check_numbers,
    check_search,
    speaker,
)
from genrec.item_index import END, ItemIndex


@dataclass
class _Node:
    children: dict[int, int] = field(default_factory=dict)
    row: int = NO_ROW


class Trie:
    """The reference `ConstraintIndex`: nested dictionaries; a state is a node's number.

    Args:
        codes_NL: (N, L) unique codes.
        codebook_sizes: L sizes.
        rows: the catalogue rows to hold (default: all). Rows keep their numbers.
        shared_vocabulary: code 0 ends a semantic ID; what follows costs nothing.
    """

    def __init__(
        self,
        codes_NL: np.ndarray,
        codebook_sizes: Sequence[int],
        rows: Sequence[int] | np.ndarray | None = None,
        shared_vocabulary: bool = False,
    ) -> None:
        self.shared_vocabulary = shared_vocabulary
        self._codes_NL = np.asarray(codes_NL)
        self._sizes = tuple(int(size) for size in codebook_sizes)
        self._rows = [int(r) for r in (range(len(codes_NL)) if rows is None else rows)]
        self._nodes = [_Node()]
        for row in self._rows:
            self._insert(row)

    @classmethod
    def from_index(cls, index: ItemIndex) -> Trie:
        """Build from an item index (rows are the item index's rows)."""
        return cls(index.codes, index.codebook_sizes, shared_vocabulary=index.shared_vocabulary)

    def _insert(self, row: int) -> None:
        node = self._nodes[0]
        for code in self._codes_NL[row].tolist():
            if code not in node.children:
                node.children[code] = len(self._nodes)
                self._nodes.append(_Node())
            node = self._nodes[node.children[code]]
        node.row = row

    def keep(self, denied: np.ndarray | None, allowed: np.ndarray | None) -> Trie:
        """Return a new trie of the items that are not denied, or of those that are allowed."""
        rows = self._rows
        if denied is not None:
            rows = [row for row in rows if row not in set(denied.tolist())]
        if allowed is not None:
            rows = [row for row in rows if row in set(allowed.tolist())]
        return Trie(self._codes_NL, self._sizes, rows, self.shared_vocabulary)

    def node_of(self, codes: Sequence[int]) -> int:
        """Return the node of a prefix that is in the trie."""
        number = 0
        for code in codes:
            number = self._nodes[number].children[code]
        return number

    def largest_below(self, values_N: np.ndarray) -> list[float]:
        """Return, by node, the largest value of the items below it (-inf where there is none)."""
        largest = [-math.inf] * len(self._nodes)
        for number in reversed(range(len(self._nodes))):  # children come after their parents
            node = self._nodes[number]
            below = [largest[child] for child in node.children.values()]
            own = [float(values_N[node.row])] if node.row != NO_ROW else []
            largest[number] = max([-math.inf, *below, *own])
        return largest

    @property
    def depth(self) -> int:
        """Number of levels L."""
        return len(self._sizes)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return self._sizes

    @property
    def num_items(self) -> int:
        """Number of items in the trie."""
        return len(self._rows)

    def root(self, num_rows: int) -> Tensor:
        """Return the root node `num_rows` times, int64."""
        return torch.zeros(num_rows, dtype=torch.int64)

    def children(self, states_R: Tensor, level: int) -> Children:
        """Return the children of nodes whose prefix has `level` codes."""
        listed = [sorted(self._nodes[state].children.items()) for state in states_R.tolist()]
        shape = len(listed), max([1, *map(len, listed)])
        codes_RC = torch.zeros(shape, dtype=torch.int64)
        states_RC = torch.zeros(shape, dtype=torch.int64)
        valid_RC = torch.zeros(shape, dtype=torch.bool)
        for r, pairs in enumerate(listed):
            for c, (code, state) in enumerate(pairs):
                codes_RC[r, c], states_RC[r, c], valid_RC[r, c] = code, state, True
        return Children(codes_RC, states_RC, valid_RC)

    def row(self, states_R: Tensor) -> Tensor:
        """Return the catalogue rows of leaves, int64."""
        return torch.tensor([self._nodes[s].row for s in states_R.tolist()], dtype=torch.int64)


@dataclass(frozen=True)
class _Beam:
    score: float
    state: int
    codes: tuple[int, ...] = ()
    parent: int = 0


@torch.no_grad()
def reference_beam_search(
    model: StepModel,
    batch: Any,
    constraint: Trie,
    *,
    width: int,
    k: int,
    filters: Filters | None = None,
    boosts_N: np.ndarray | None = None,
    scoring: Scoring = "renormalized",
) -> Beams:
    """Do what `beam.beam_search` does, beam by beam; filters are applied by building a new trie.

    Probabilities stay those of the unfiltered trie, which says what a code competes with.
    `boosts_N` are additive scores by row. The bounds of prefixes are those of the unfiltered trie,
    as in the fast search.
    """
    check_search(width, k, constraint.num_items, scoring)
    model = speaker(model, scoring)
    logits_RK, state = model.begin(batch)
    num_requests = len(logits_RK)
    tries = _tries_of_requests(constraint, filters, num_requests)
    bound = _bound_of(constraint, boosts_N)
    fronts = [[_Beam(0.0, 0)] for _ in range(num_requests)]
    pruned = [-math.inf] * num_requests
    count = 1
    for level in range(constraint.depth):
        if level:
            codes_R, parents_R, count = _model_rows(fronts, count)
            logits_RK, state = model.step(codes_R, state, parents_R)
        for b, (trie, front) in enumerate(zip(tries, fronts, strict=True)):
            logits_WK = logits_RK[b * count : (b + 1) * count].float()
            grown = _extend(trie, constraint, front, logits_WK, scoring, first_parent=b * count)
            # Python's sort is stable: equal scores stay ordered by parent beam, then by code.
            grown.sort(key=lambda beam: -bound(beam))
            if level < constraint.depth - 1:
                pruned[b] = max([pruned[b], *(bound(beam) for beam in grown[width:])])
                grown = grown[:width]
            fronts[b] = grown
    beams = _collect(tries, fronts, pruned, k, constraint.depth, bound)
    check_numbers(beams.logprobs_Bk)
    if boosts_N is None:
        return beams
    boosts_N = np.append(boosts_N, 0.0)  # for padding
    return replace(beams, boosts_Bk=torch.from_numpy(boosts_N[beams.rows_Bk.numpy()]).float())


def _bound_of(trie: Trie, boosts_N: np.ndarray | None) -> Callable[[_Beam], float]:
    """Return what ranks a beam: its score, plus the largest boost of the items below its prefix."""
    if boosts_N is None:
        return lambda beam: beam.score
    largest = trie.largest_below(boosts_N)

    def bound(beam: _Beam) -> float:
        # The sum is rounded as in the fast search.
        largest_below = largest[trie.node_of(beam.codes)]
        return float(torch.tensor(beam.score) + torch.tensor(largest_below))

    return bound


def _tries_of_requests(trie: Trie, filters: Filters | None, num_requests: int) -> list[Trie]:
    if filters is None:
        return [trie] * num_requests
    filters.check(num_requests)
    return [trie.keep(*filters.rows_of_request(b, trie.num_items)) for b in range(num_requests)]


def _model_rows(fronts: list[list[_Beam]], last_count: int) -> tuple[Tensor, Tensor, int]:
    """Return codes, parents and their number per request; short fronts are filled by repetition."""
    count = max(1, *map(len, fronts))
    codes, parents = [], []
    for b, front in enumerate(fronts):
        filling = front[0] if front else _Beam(-math.inf, 0, (0,), b * last_count)
        for beam in [*front, *[filling] * (count - len(front))]:
            codes.append(beam.codes[-1])
            parents.append(beam.parent)
    return torch.tensor(codes), torch.tensor(parents), count


def _extend(
    trie: Trie,
    whole: Trie,
    front: list[_Beam],
    logits_WK: Tensor,
    scoring: Scoring,
    first_parent: int,
) -> list[_Beam]:
    """Return every child that one request may enter, of every beam of it."""
    grown = []
    for w, beam in enumerate(front):
        children = trie.children(torch.tensor([beam.state]), len(beam.codes))
        valid_C = children.valid_RC[0]
        codes_C, states_C = children.codes_RC[0][valid_C], children.states_RC[0][valid_C]
        if len(codes_C) == 0:
            continue
        if scoring == "renormalized":
            among = whole.children(torch.tensor([whole.node_of(beam.codes)]), len(beam.codes))
            steps_C = logits_WK[w][among.codes_RC[0]].log_softmax(0)
            steps_C = steps_C[torch.searchsorted(among.codes_RC[0], codes_C)]
        elif trie.shared_vocabulary and beam.codes[-1:] == (END,):
            steps_C = torch.zeros(1)
        elif scoring == "raw":
            steps_C = logits_WK[w][codes_C].clamp(max=0)
        else:
            steps_C = logits_WK[w].log_softmax(0)[codes_C]
        scores_C = torch.tensor(beam.score) + steps_C
        for score, code, state in zip(
            scores_C.tolist(), codes_C.tolist(), states_C.tolist(), strict=True
        ):
            grown.append(_Beam(score, state, (*beam.codes, code), first_parent + w))
    return grown


def _collect(
    tries: list[Trie],
    fronts: list[list[_Beam]],
    pruned: list[float],
    k: int,
    num_levels: int,
    bound: Callable[[_Beam], float],
) -> Beams:
    shape = len(fronts), k
    rows_Bk = torch.full(shape, NO_ROW, dtype=torch.int64)
    logprobs_Bk = torch.full(shape, -torch.inf)
    codes_BkL = torch.full((*shape, num_levels), NO_ROW, dtype=torch.int64)
    certified_B = torch.zeros(len(fronts), dtype=torch.bool)
    for b, (trie, front) in enumerate(zip(tries, fronts, strict=True)):
        rows = [int(trie.row(torch.tensor([beam.state]))) for beam in front]
        ranked = sorted(zip(rows, front, strict=True), key=lambda pair: (-bound(pair[1]), pair[0]))
        for i, (row, beam) in enumerate(ranked[:k]):
            rows_Bk[b, i], logprobs_Bk[b, i] = row, beam.score
            codes_BkL[b, i] = torch.tensor(beam.codes)
        worst = bound(ranked[k - 1][1]) if len(ranked) >= k else -math.inf
        certified_B[b] = pruned[b] == -math.inf or worst > pruned[b]
    return Beams(rows_Bk, logprobs_Bk, codes_BkL, certified_B)
