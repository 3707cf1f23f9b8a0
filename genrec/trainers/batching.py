"""Which training examples stand in which batch, as a pure function of (seed, epoch).

Data stays in memory as flat arrays; there is no DataLoader and no hidden state, so resuming is
knowing the epoch and the batch number, and any number of processes can compute the same plan and
take their share of each batch.

Shapes: U users, X examples, B batch rows, H history items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from genrec.data.interactions import Interactions
from genrec.models.base import Backbone, Batch, Truncation
from genrec.models.batch import num_first
from genrec.trainers.config import LoopConfig

# Examples are sorted by length inside blocks of this many batches: little padding, much shuffling.
BLOCK_BATCHES = 32


@dataclass(frozen=True)
class Spans:
    """X slices [start, stop) of a flat array of item rows; the last item is a target."""

    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


class TrainingExamples:
    """Training sequences of all users and the ways to cut them.

    Args:
        interactions: training interactions only.
        unit: "target": one example per (user, position), history -> target, as encoder-decoders
            train; "sequence": one example per stretch of max_history + 1 items, every position a
            target, as causal models train.
        max_history: history items that a model sees.
        weights: how much each interaction counts as a target, float32; None: all alike.
        truncation: which items of longer histories are read; for "target".
        with_times: batches say when items were taken.
        user_rows: (U,) rows of the users in the model's user table, for batches; None: left out.
    """

    def __init__(
        self,
        interactions: Interactions,
        unit: Literal["target", "sequence"],
        max_history: int,
        weights: np.ndarray | None = None,
        *,
        truncation: Truncation = "last",
        with_times: bool = False,
        user_rows: np.ndarray | None = None,
    ) -> None:
        self.flat = interactions.item_rows.astype(np.int64)
        self.weights = weights
        self.offsets = interactions.offsets
        self.unit = unit
        self.max_history = max_history
        self.truncation = truncation
        self.times = interactions.timestamps.astype(np.int64) if with_times else None
        self.user_rows = user_rows

    @classmethod
    def for_model(
        cls,
        model: Backbone,
        interactions: Interactions,
        unit: Literal["target", "sequence"],
        weights: np.ndarray | None = None,
    ) -> Self:
        """Return examples with all that a model reads, its users' rows and times included."""
        return cls(
            interactions,
            unit,
            model.config.max_history,
            weights,
            truncation=model.config.truncation,
            with_times=model.reads_times,
            user_rows=model.user_rows(interactions.user_names),
        )

    def spans(self, seed: int, epoch: int) -> Spans:
        """Return the examples of one epoch.

        Long sequences are cut into consecutive stretches whose borders are drawn anew in every
        epoch, so that no position is always without context.
        """
        first, last = self.offsets[:-1], self.offsets[1:]
        if self.unit == "target":
            position = np.arange(len(self.flat))
            begin = np.repeat(first, last - first)
            start = np.maximum(begin, position - self.max_history)
            if self.weights is None:
                return Spans(start, position + 1)
            counts = self.weights > 0  # what does not count is only read as history
            return Spans(start[counts], position[counts] + 1)
        length = self.max_history + 1
        rng = np.random.default_rng([seed, epoch, 1])
        starts, stops = [], []
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            if b - a <= length:
                cuts = [a, b]
            else:
                shift = int(rng.integers(1, length + 1))
                cuts = [a, *range(a + shift, b, length), b]
            starts.extend(cuts[:-1])
            stops.extend(cuts[1:])
        start, stop = np.array(starts, np.int64), np.array(stops, np.int64)
        keep = stop > start
        if self.weights is not None:
            total = np.concatenate([[0.0], np.cumsum(self.weights > 0)])
            keep &= total[stop] > total[start]
        return Spans(start[keep], stop[keep])

    def batch_size(self, config: LoopConfig, seed: int) -> int:
        """Return the examples of a step; from `batch_targets` by the targets of the first epoch."""
        if config.batch_targets is None:
            return config.batch_size
        spans = self.spans(seed, 0)
        if not len(spans):
            return 1
        length = spans.stop - spans.start if self.unit == "sequence" else np.ones(len(spans))
        targets = config.batch_targets
        while targets > 1 and length.sum() * config.epochs < config.min_steps * targets:
            targets //= 2
        return max(1, round(targets / float(length.mean())))

    def plan(self, batch_size: int, seed: int, epoch: int) -> tuple[Spans, list[np.ndarray]]:
        """Return the epoch's spans and its batches (arrays of positions in the spans)."""
        spans = self.spans(seed, epoch)
        rng = np.random.default_rng([seed, epoch, 2])
        order = rng.permutation(len(spans))
        length = spans.stop - spans.start
        batches: list[np.ndarray] = []
        for begin in range(0, len(order), batch_size * BLOCK_BATCHES):
            block = order[begin : begin + batch_size * BLOCK_BATCHES]
            block = block[np.argsort(length[block], kind="stable")]
            batches.extend(np.array_split(block, range(batch_size, len(block), batch_size)))
        return spans, [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, spans: Spans, chosen: np.ndarray) -> Batch:
        """Return the padded batch of some spans (int64, right padded with -1)."""
        start, stop = spans.start[chosen], spans.stop[chosen]
        beside: dict[str, Any] = {}
        if self.user_rows is not None:
            beside["users_B"] = torch.from_numpy(self.user_rows[self._users(start)])
        if self.unit == "target":
            weights = None if self.weights is None else torch.from_numpy(self.weights[stop - 1])
            targets = torch.from_numpy(self.flat[stop - 1])
            if self.times is not None:
                beside["now_B"] = torch.from_numpy(self.times[stop - 1])
            stop = stop - 1
        else:
            targets = None
            weights = self._gather(self.weights, start, stop, 0.0)
        history_BH = self._gather(self.flat, start, stop, -1)
        beside["times_BH"] = self._gather(self.times, start, stop, 0)
        assert history_BH is not None
        return Batch(history_BH, targets, weights, **beside)

    def _users(self, place: np.ndarray) -> np.ndarray:
        """Return whose interactions stand at these places."""
        return np.searchsorted(self.offsets, place, side="right") - 1

    def _gather(
        self, values: np.ndarray | None, start: np.ndarray, stop: np.ndarray, padding: float
    ) -> torch.Tensor | None:
        if values is None:
            return None
        length = stop - start
        column = np.arange(int(length.max(initial=0)))
        place = start[:, None] + column
        if self.unit == "target" and self.truncation != "last":
            # The first columns are the user's first items, the others stay the last ones.
            first = self.offsets[self._users(start)][:, None]
            is_first = column < num_first(self.max_history, self.truncation)
            place = np.where(is_first, first + column, place)
        place = np.minimum(place, len(values) - 1)
        rows = np.where(column < length[:, None], values[place], values.dtype.type(padding))
        return torch.from_numpy(rows)
