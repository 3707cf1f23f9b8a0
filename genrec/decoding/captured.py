"""How does a search run on a GPU without waiting for Python? As one CUDA graph per shape.

A search with fixed shapes reads nothing back from the device, so prefill, all levels and the final
ranking are recorded once and replayed with one launch. Requests are padded to a few shapes (powers
of two), so that few graphs serve all. On a CPU the same padding and the same search run eagerly. It
knows no network; what it needs of one is that `begin` and `step` do not read from the device.

Shapes: B requests, H history items (or prompt tokens), E excluded rows, k list length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.beam import Search
from genrec.decoding.csr import CSRIndex
from genrec.decoding.filters import PaddedFilter
from genrec.decoding.protocol import (
    NO_ROW,
    Beams,
    Scoring,
    StepModel,
    check_numbers,
    check_search,
    speaker,
)
from genrec.errors import UserError

WARM_UP_RUNS = 3  # libraries choose kernels and take workspaces in these; a graph may not


@dataclass(frozen=True)
class Bucket:
    """One shape that all its requests are padded to.

    Args:
        requests: B.
        history: H.
        excluded: E, 0 where nothing is excluded.
        width: beam width.
        k: list length.
    """

    requests: int
    history: int
    excluded: int
    width: int
    k: int


def bucket_of(size: int, largest: int | None = None) -> int:
    """Return the power of two that `size` is padded to, at most `largest`.

    >>> [bucket_of(n) for n in (1, 2, 3, 50)], bucket_of(70, largest=100)
    ([1, 2, 4, 64], 100)
    """
    padded = 1 << max(0, size - 1).bit_length()
    return padded if largest is None else min(padded, largest)


class CapturedSearch:
    """Constrained beam search over padded shapes, recorded as CUDA graphs where there is a GPU.

    A graph reads the weights where they lay when it was recorded: change them in place or call
    `clear`. Graphs share one memory pool and are replayed one at a time; an object is not for
    several threads.

    Args:
        model: a StepModel in evaluation mode whose `begin` and `step` use tensors only.
        constraint: the catalogue on the model's device; restrict it before, not after.
        make_batch: builds the model's batch from int64 rows (B, H), right-padded with -1, e.g.
            `genrec.models.base.Batch`.
        scoring: as in `beam_search`.
        max_requests: larger batches are cut into parts of so many.
        max_history: older entries of longer rows are dropped (the newest stay); None keeps all.
            Set it to the model's own limit, so that its buckets end there.
        autocast: run the model in this precision (torch.bfloat16); lists then differ, see
            docs/decoding.md. None: as the weights are.

    Raises:
        UserError: max_requests below 1.
    """

    def __init__(
        self,
        model: StepModel,
        constraint: CSRIndex,
        make_batch: Callable[[Tensor], Any],
        *,
        scoring: Scoring = "renormalized",
        max_requests: int = 64,
        max_history: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if max_requests < 1:
            raise UserError(
                f"max_requests: got {max_requests}, expected an integer >= 1. Set e.g. 64."
            )
        self.model, self.constraint = speaker(model, scoring), constraint
        self.make_batch, self.scoring = make_batch, scoring
        self.max_requests, self.max_history = max_requests, max_history
        self.autocast = autocast
        self._graphs: dict[Bucket, _Graph] = {}
        self._pool: Any = None

    @property
    def buckets(self) -> list[Bucket]:
        """Shapes that have been recorded (none on a CPU)."""
        return list(self._graphs)

    def clear(self) -> None:
        """Forget all graphs, and give their memory back."""
        self._graphs.clear()
        self._pool = None

    def warm_up(self, buckets: Sequence[Bucket]) -> None:
        """Record graphs ahead of the first requests."""
        for bucket in buckets:
            history_BH = np.full((bucket.requests, bucket.history), NO_ROW)
            exclude: list[list[int]] | None = [[]] * bucket.requests if bucket.excluded else None
            self._padded(history_BH, exclude, bucket)

    def __call__(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        *,
        width: int,
        k: int,
        exclude: Sequence[Sequence[int] | np.ndarray] | None = None,
    ) -> Beams:
        """Return what `beam_search` returns for these histories, on the CPU or the GPU.

        Args:
            histories: B lists of rows (or of prompt tokens), oldest first.
            width: prefixes kept after each level.
            k: list length.
            exclude: per request, catalogue rows that may not be returned.

        Raises:
            UserError: as in `beam_search`; excluded rows outside the catalogue or lists that do
                not match the histories.
        """
        check_search(width, k, self.constraint.num_items, self.scoring)
        self._check_excluded(exclude, len(histories))
        parts = []
        for start in range(0, len(histories), self.max_requests):
            part = slice(start, start + self.max_requests)
            rows = [self._newest(history) for history in histories[part]]
            denied = None if exclude is None else [np.asarray(r, np.int64) for r in exclude[part]]
            bucket = Bucket(
                bucket_of(len(rows), self.max_requests),
                bucket_of(max(map(len, rows)), self.max_history),
                0 if denied is None else bucket_of(max(map(len, denied))),
                width,
                k,
            )
            beams = self._padded(_matrix(rows, bucket.requests, bucket.history), denied, bucket)
            parts.append(_first(beams, len(rows)))
        beams = _join(parts, k, self.constraint)
        check_numbers(beams.logprobs_Bk)
        return beams

    def _newest(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(history, dtype=np.int64).reshape(-1)
        return rows if self.max_history is None else rows[-self.max_history :]

    def _check_excluded(self, exclude: Sequence[Any] | None, num_requests: int) -> None:
        if exclude is None:
            return
        if len(exclude) != num_requests:
            raise UserError(
                f"exclude: got {len(exclude)} lists for {num_requests} histories. Give one list of "
                "rows per history (an empty one for no rule)."
            )
        for request, rows in enumerate(exclude):
            listed = np.asarray(rows, dtype=np.int64)
            if listed.size and (listed.min() < 0 or listed.max() >= self.constraint.num_items):
                raise UserError(
                    f"exclude[{request}]: got rows {listed.min()} to {listed.max()}, expected "
                    f"0 <= row < {self.constraint.num_items}. Take rows from the ItemIndex that "
                    "the constraint was built from (rows_of)."
                )

    def _padded(
        self, history_BH: np.ndarray, exclude: Sequence[Any] | None, bucket: Bucket
    ) -> Beams:
        """Search a batch that has the bucket's shape."""
        inputs = [torch.from_numpy(history_BH)]
        if bucket.excluded:
            assert exclude is not None
            rows = [np.unique(np.asarray(listed, dtype=np.int64)) for listed in exclude]
            inputs.append(torch.from_numpy(_matrix(rows, bucket.requests, bucket.excluded)))
        device = self.constraint.device
        if device.type != "cuda":
            return self._search(inputs, bucket)
        if bucket not in self._graphs:
            on_device = [tensor.to(device) for tensor in inputs]
            self._graphs[bucket] = self._record(on_device, bucket)
        return self._graphs[bucket].replay(inputs)

    def _search(self, inputs: Sequence[Tensor], bucket: Bucket) -> Beams:
        """Run one search of fixed shapes; nothing is read back from the device."""
        rules = None
        if bucket.excluded:
            rules = PaddedFilter(self.constraint, inputs[1])
        search = Search(self.constraint, rules=rules, scoring=self.scoring, static_shapes=True)
        with torch.no_grad(), self._precision():
            logits_BK, state = self.model.begin(self.make_batch(inputs[0]))
            return search.run(self.model, logits_BK, state, width=bucket.width, k=bucket.k)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # A cast that the cache keeps would belong to the graph that made it.
        return torch.autocast(self.constraint.device.type, self.autocast, cache_enabled=False)

    def _record(self, inputs: list[Tensor], bucket: Bucket) -> _Graph:
        """Record a search of this shape on buffers of its own."""
        self.constraint.positions(self.constraint.root(1))  # this table is built on first use
        device = self.constraint.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._search(inputs, bucket)
        torch.cuda.current_stream(device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            beams = self._search(inputs, bucket)
        return _Graph(graph, inputs, beams)


@dataclass(frozen=True)
class _Graph:
    """A recorded search, the buffers that it reads and those that it writes."""

    graph: Any
    inputs: list[Tensor]
    beams: Beams

    def replay(self, inputs: Sequence[Tensor]) -> Beams:
        """Search other requests of the same shape."""
        for buffer, values in zip(self.inputs, inputs, strict=True):
            buffer.copy_(values)
        self.graph.replay()
        return _mapped(self.beams, Tensor.clone)  # the next replay overwrites the buffers


def _matrix(rows: Sequence[np.ndarray], num_rows: int, width: int) -> np.ndarray:
    """Return right-padded rows (num_rows, width) int64; rows that are missing are all padding."""
    matrix = np.full((num_rows, width), NO_ROW, dtype=np.int64)
    for place, row in zip(matrix, rows, strict=False):
        place[: len(row)] = row
    return matrix


def _mapped(beams: Beams, function: Callable[[Tensor], Tensor]) -> Beams:
    found = {name: getattr(beams, name) for name in Beams.__dataclass_fields__}
    return replace(beams, **{n: function(t) for n, t in found.items() if t is not None})


def _first(beams: Beams, count: int) -> Beams:
    return _mapped(beams, lambda tensor: tensor[:count])


def _join(parts: Sequence[Beams], k: int, constraint: CSRIndex) -> Beams:
    """Return the parts as one batch; without requests an empty one."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        rows_Bk = torch.empty((0, k), dtype=torch.int64, device=constraint.device)
        codes_BkL = rows_Bk[..., None].expand(-1, -1, constraint.depth)
        none_B = rows_Bk.new_empty(0, dtype=torch.float32)
        return Beams(rows_Bk, rows_Bk.float(), codes_BkL, none_B.bool(), None, none_B)
    names = [n for n in Beams.__dataclass_fields__ if getattr(parts[0], n) is not None]
    return Beams(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
