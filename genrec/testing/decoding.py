"""How does one check a decoder where correctness is equality?

A model whose logits come from a fixed random table, a scorer that tries every item, and contract
classes for indexes and step models. It knows no test runner: contract classes hold plain `test_`
methods with asserts; subclass them in a test file.

Shapes: B requests, N items, L levels, R rows, K codes, k list length.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.protocol import ConstraintIndex, Filters, StepModel, speaker
from genrec.item_index import END, ItemIndex


def random_index(num_items: int, codebook_sizes: Sequence[int], seed: int = 0) -> ItemIndex:
    """Return items with unique random codes (fewer items if there are fewer combinations)."""
    rng = np.random.default_rng(seed)
    total = int(np.prod(np.asarray(codebook_sizes, dtype=np.float64)))
    if total <= 1 << 20:
        cells = rng.permutation(total)[:num_items]
        codes_NL = np.stack(np.unravel_index(cells, tuple(codebook_sizes)), axis=1)
    else:
        drawn = rng.integers(0, np.asarray(codebook_sizes), (2 * num_items, len(codebook_sizes)))
        codes_NL = rng.permutation(np.unique(drawn, axis=0))[:num_items]
    ids = tuple(f"item{row}" for row in range(len(codes_NL)))
    return ItemIndex(ids, codes_NL, tuple(codebook_sizes))


def random_titles(num_items: int, num_words: int, num_levels: int, seed: int = 0) -> ItemIndex:
    """Return items with unique random semantic IDs of 1 to L codes of one shared vocabulary.

    Args:
        num_items: at most this many items.
        num_words: codes beside END (code 0).
        num_levels: L.
        seed: of the codes.
    """
    rng = np.random.default_rng(seed)
    codes_ML = rng.integers(1, num_words + 1, (3 * num_items, num_levels))
    lengths_M = rng.integers(1, num_levels + 1, len(codes_ML))
    codes_ML[np.arange(num_levels) >= lengths_M[:, None]] = END
    codes_NL = rng.permutation(np.unique(codes_ML, axis=0))[:num_items]
    ids = tuple(f"item{row}" for row in range(len(codes_NL)))
    return ItemIndex(ids, codes_NL, (num_words + 1,) * num_levels, shared_vocabulary=True)


class TableModel:
    """A StepModel whose logits are a fixed random function of (request, prefix).

    A batch is an int64 tensor (B,) of request numbers, so that a request has the same answer in any
    batch.

    Args:
        codebook_sizes: K of each level.
        seed: another seed is another model.
        scale: standard deviation of the logits; larger is more certain.
        quantum: round logits to multiples of this, which makes exact ties; None: do not.
        num_others: tokens that the model could say beside the codes of a level; they count in
            `over_vocabulary` only.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        seed: int = 0,
        scale: float = 1.0,
        quantum: float | None = None,
        num_others: int = 0,
    ) -> None:
        self.codebook_sizes = tuple(codebook_sizes)
        self.num_others, self.spans_vocabulary = num_others, False
        self.seed, self.scale, self.quantum = seed, scale, quantum
        self.rows_per_step: list[int] = []
        self._table: dict[tuple[int, ...], Tensor] = {}

    def over_vocabulary(self) -> TableModel:
        """Return the same model with log-probabilities over codes and other tokens."""
        view = copy.copy(self)
        view.spans_vocabulary = True
        return view

    def logits(self, request: int, prefix: tuple[int, ...]) -> Tensor:
        """Return the (K,) float32 logits after a prefix, or log-probabilities of such a view."""
        everything = self.all_logits(request, prefix)
        if self.spans_vocabulary:
            everything = everything.log_softmax(0)
        return everything[: self.codebook_sizes[len(prefix)]]

    def all_logits(self, request: int, prefix: tuple[int, ...]) -> Tensor:
        """Return the (K + others,) float32 logits of all tokens after a prefix."""
        key = (request, *prefix)
        if key not in self._table:
            # The length is part of the seed: numpy ignores trailing zeros of a seed sequence.
            rng = np.random.default_rng([self.seed, len(prefix), *key])
            size = self.codebook_sizes[len(prefix)] + self.num_others
            values = rng.normal(0.0, self.scale, size)
            if self.quantum is not None:
                values = np.round(values / self.quantum) * self.quantum
            self._table[key] = torch.from_numpy(values.astype(np.float32))
        return self._table[key]

    def begin(self, batch: Tensor) -> tuple[Tensor, Any]:
        """Return the logits of level 0; the state lists (request, prefix) of every row."""
        self.rows_per_step = [len(batch)]
        state = [(int(request), ()) for request in batch.tolist()]
        return torch.stack([self.logits(request, prefix) for request, prefix in state]), state

    def step(self, codes_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Return the logits of the rows' new prefixes."""
        assert len(codes_R) == len(parents_R)
        self.rows_per_step.append(len(codes_R))
        rows = []
        for code, parent in zip(codes_R.tolist(), parents_R.tolist(), strict=True):
            request, prefix = state[parent]
            assert 0 <= code < self.codebook_sizes[len(prefix)]
            rows.append((request, (*prefix, code)))
        return torch.stack([self.logits(request, prefix) for request, prefix in rows]), rows


@torch.no_grad()
def brute_force_logprobs(
    model: StepModel,
    batch: Any,
    codes_NL: np.ndarray,
    *,
    allowed_BN: np.ndarray | None = None,
    scoring: str = "renormalized",
    shared_vocabulary: bool = False,
) -> np.ndarray:
    """Return the log-probability of every item by walking every item alone, (B, N) float64.

    Args:
        model: any StepModel.
        batch: B requests.
        codes_NL: the catalogue.
        allowed_BN: bool, the items that each request may get; others score -inf, and count in the
            normalisation as ever.
        scoring: "renormalized", "level" or "raw".
        shared_vocabulary: what follows code 0 costs nothing.
    """
    model = speaker(model, scoring)  # type: ignore[arg-type]
    logits_RK, state = model.begin(batch)
    num_requests, (num_items, num_levels) = len(logits_RK), codes_NL.shape
    allowed_BN = np.ones((num_requests, num_items), bool) if allowed_BN is None else allowed_BN
    scores_BN = np.where(allowed_BN, 0.0, -np.inf)
    rows = np.repeat(np.arange(num_requests), num_items)
    for level in range(num_levels):
        if level:
            codes_R = torch.from_numpy(
                np.tile(codes_NL[:, level - 1].astype(np.int64), num_requests)
            )
            logits_RK, state = model.step(codes_R, state, torch.from_numpy(rows))
            rows = np.arange(num_requests * num_items)
        values_RK = logits_RK.double().cpu().numpy()[rows]
        for b, n in zip(*np.nonzero(allowed_BN), strict=True):
            same = (codes_NL[:, :level] == codes_NL[n, :level]).all(1)
            if shared_vocabulary and level and codes_NL[n, level - 1] == END:
                continue
            row_K = values_RK[b * num_items + n]
            if scoring == "raw":
                scores_BN[b, n] += row_K[codes_NL[n, level]]
                continue
            counted = np.unique(codes_NL[same, level]) if scoring == "renormalized" else slice(None)
            step = row_K[codes_NL[n, level]] - np.logaddexp.reduce(row_K[counted])
            scores_BN[b, n] += step
    return scores_BN


def rank(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the best k finite scores, ordered by (score descending, row ascending)."""
    order = np.lexsort((np.arange(len(scores_N)), -scores_N))
    return order[np.isfinite(scores_N[order])][:k]


def allowed_mask(filters: Filters | None, num_requests: int, num_items: int) -> np.ndarray:
    """Return what filters mean, (B, N) bool."""
    mask_BN = np.ones((num_requests, num_items), dtype=bool)
    if filters is None:
        return mask_BN
    for b in range(num_requests):
        denied, allowed = filters.rows_of_request(b, num_items)
        if allowed is not None:
            mask_BN[b] = np.isin(np.arange(num_items), allowed)
        if denied is not None:
            mask_BN[b, denied] = False
    return mask_BN


class ConstraintIndexContract(ABC):
    """What every `ConstraintIndex` must do; subclass and give `make`."""

    catalogues: tuple[tuple[int, tuple[int, ...]], ...] = (
        (1, (1,)),
        (1, (4, 3)),
        (5, (5,)),
        (12, (3, 1, 4)),
        (40, (2, 300, 3, 2)),
        (64, (4, 4, 4)),
    )

    @abstractmethod
    def make(self, index: ItemIndex) -> ConstraintIndex:
        """Build the index under test."""

    def _each(self) -> list[tuple[ItemIndex, ConstraintIndex]]:
        indexes = [random_index(count, sizes, seed=7) for count, sizes in self.catalogues]
        return [(index, self.make(index)) for index in indexes]

    def test_describes_the_catalogue(self) -> None:
        for index, constraint in self._each():
            assert constraint.depth == index.num_levels
            assert constraint.codebook_sizes == index.codebook_sizes
            assert constraint.num_items == len(index)

    def test_every_prefix_has_exactly_its_children_in_order(self) -> None:
        for index, constraint in self._each():
            walk: dict[tuple[int, ...], int] = {(): int(constraint.root(1)[0])}
            for level in range(constraint.depth):
                prefixes = list(walk)
                children = constraint.children(torch.tensor(list(walk.values())), level)
                walk = {}
                for r, prefix in enumerate(prefixes):
                    valid = children.valid_RC[r]
                    codes = children.codes_RC[r][valid].tolist()
                    below = (index.codes[:, :level] == np.array(prefix, dtype=int)).all(1)
                    assert codes == np.unique(index.codes[below, level]).tolist()
                    states = children.states_RC[r][valid].tolist()
                    walk |= {(*prefix, c): s for c, s in zip(codes, states, strict=True)}
            rows = constraint.row(torch.tensor(list(walk.values())))
            assert rows.dtype == torch.int64
            assert rows.tolist() == index.rows_of_codes(np.array(list(walk))).tolist()

    def test_rows_do_not_disturb_each_other(self) -> None:
        _, constraint = self._each()[-1]
        first = constraint.children(constraint.root(1), 0)
        states = first.states_RC[0][first.valid_RC[0]]
        together = constraint.children(states, 1)
        for r in range(len(states)):
            alone = constraint.children(states[r : r + 1], 1)
            valid = together.valid_RC[r]
            assert torch.equal(together.codes_RC[r][valid], alone.codes_RC[0][alone.valid_RC[0]])

    def test_root_repeats(self) -> None:
        for _, constraint in self._each():
            root = constraint.root(3)
            assert root.dtype == torch.int64 and len(root) == 3 and len(root.unique()) == 1


class StepModelContract(ABC):
    """What every `StepModel` must do for the search to be exact; subclass and give `make`."""

    tolerance: float = 1e-4

    @abstractmethod
    def make(self) -> tuple[StepModel, Any, Any, tuple[int, ...]]:
        """Return (model in eval mode, batch of >= 2 requests, first request alone, sizes)."""

    def _codes(self, sizes: tuple[int, ...], level: int, count: int) -> Tensor:
        return torch.arange(count) * 7 % sizes[level]

    @torch.no_grad()
    def test_logits_have_one_column_per_code_of_the_level(self) -> None:
        model, batch, _, sizes = self.make()
        logits, state = model.begin(batch)
        rows = torch.arange(len(logits))
        assert logits.shape == (len(rows), sizes[0])
        for level in range(1, len(sizes)):
            logits, state = model.step(self._codes(sizes, level - 1, len(rows)), state, rows)
            assert logits.shape == (len(rows), sizes[level])
            assert torch.isfinite(logits).all()

    @torch.no_grad()
    def test_a_state_can_be_used_twice(self) -> None:
        model, batch, _, sizes = self.make()
        logits, state = model.begin(batch)
        rows = torch.arange(len(logits))
        codes = self._codes(sizes, 0, len(rows))
        first, _ = model.step(codes, state, rows)
        model.step((codes + 1) % sizes[0], state, rows)
        again, _ = model.step(codes, state, rows)
        assert torch.allclose(first, again, atol=self.tolerance)

    @torch.no_grad()
    def test_widths_may_change_and_rows_follow_their_parents(self) -> None:
        """A row's logits depend on its own prefix only, however the beam is arranged."""
        model, batch, _, sizes = self.make()
        logits, state = model.begin(batch)
        requests = torch.arange(len(logits))
        codes = torch.stack([torch.full_like(requests, c % sizes[0]) for c in (0, 1, 2)], 1)
        wide, wide_state = model.step(codes.reshape(-1), state, requests.repeat_interleave(3))
        narrow, narrow_state = model.step(codes[:, 2], state, requests)
        assert torch.allclose(wide[2::3], narrow, atol=self.tolerance)
        if len(sizes) > 2:
            second = self._codes(sizes, 1, len(requests))
            swapped, _ = model.step(second, wide_state, requests * 3 + 2)
            straight, _ = model.step(second, narrow_state, requests)
            assert torch.allclose(swapped, straight, atol=self.tolerance)

    @torch.no_grad()
    def test_alone_equals_in_a_batch(self) -> None:
        model, batch, first_alone, sizes = self.make()
        logits, state = model.begin(batch)
        alone, alone_state = model.begin(first_alone)
        assert torch.allclose(logits[:1], alone, atol=self.tolerance)
        zero = torch.zeros(1, dtype=torch.int64)
        rows = torch.arange(len(logits))
        for _ in range(1, len(sizes)):
            logits, state = model.step(torch.zeros_like(rows), state, rows)
            alone, alone_state = model.step(zero, alone_state, zero)
            assert torch.allclose(logits[:1], alone, atol=self.tolerance)
