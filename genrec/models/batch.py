"""What goes into a backbone and what comes out of its loss: histories, targets, weights, sums.

It knows no network and no item ids: an item is a row of the catalogue.

Shapes: B requests, H history items, M predicted items, X negatives, K choices, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # what torch's cross_entropy skips
Truncation = Literal["last", "first", "recent_and_first"]
Order = Literal["chronological", "reversed"]


@dataclass(frozen=True)
class RequestContext:
    """What is known of B requests beside their items. None: nothing; 0: not known of this one.

    Args:
        times: per history, int64 seconds since 1970 at which each item was taken.
        now_B: int64 seconds since 1970 at which each request is made.
        users_B: int64 rows of the model's user table (`Backbone.user_rows`).
    """

    times: Sequence[np.ndarray] | None = None
    now_B: np.ndarray | None = None
    users_B: np.ndarray | None = None

    def select(self, chosen: np.ndarray) -> RequestContext:
        """Return the context of the requests at these positions, in that order."""
        return RequestContext(
            None if self.times is None else [self.times[i] for i in chosen],
            None if self.now_B is None else self.now_B[chosen],
            None if self.users_B is None else self.users_B[chosen],
        )


@dataclass(frozen=True)
class Batch:
    """Histories, and for training optionally what follows them.

    Args:
        history_BH: int64 item rows, oldest first, right-padded with -1; a row of only -1 is an
            empty history.
        target_B: int64 item rows to predict; needed by `loss` where `training_unit` is "target".
        weights: float32, how much each target counts, (B,) or, where `training_unit` is
            "sequence", (B, H); None: each counts 1.
        negatives: int64 item rows that targets are set against, for trainers that do: (X,) for
            all, or (B, X) with -1 for none.
        times_BH: int64 seconds since 1970 at which the items of `history_BH` were taken; 0 where
            not known and where padded.
        now_B: int64 seconds since 1970 at which the requests are made; 0 where not known. Where
            every item of a sequence is a target, `times_BH` says when it was asked for.
        users_B: int64 rows of the model's user table; 0 for users that it does not know.
    """

    history_BH: Tensor
    target_B: Tensor | None = None
    weights: Tensor | None = None
    negatives: Tensor | None = None
    times_BH: Tensor | None = None
    now_B: Tensor | None = None
    users_B: Tensor | None = None

    def __len__(self) -> int:
        return self.history_BH.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        history_BH = self.history_BH.to(device, non_blocking=non_blocking)
        others = {f.name: moved(getattr(self, f.name)) for f in fields(self)[1:]}
        return Batch(history_BH, **others)

    def last(self, limit: int) -> Batch:
        """Return the batch with the last `limit` items of each sequence, and what is theirs."""
        if self.history_BH.shape[1] <= limit:
            return self
        weights = self.weights
        if weights is not None and weights.ndim == 2:
            weights = self._kept(weights, limit)
        return replace(self.kept(limit), weights=weights)

    def kept(
        self, limit: int, truncation: Truncation = "last", order: Order = "chronological"
    ) -> Batch:
        """Return the batch with at most `limit` items of each history; see `keep`."""
        times_BH = self.times_BH
        if times_BH is not None:
            times_BH = self._kept(times_BH, limit, truncation, order)
        history_BH = self._kept(self.history_BH, limit, truncation, order)
        return replace(self, history_BH=history_BH, times_BH=times_BH)

    def histories(self) -> Batch:
        """Return the batch as a search reads it: without targets, weights and negatives."""
        return replace(self, target_B=None, weights=None, negatives=None)

    def _kept(
        self,
        values_BH: Tensor,
        limit: int,
        truncation: Truncation = "last",
        order: Order = "chronological",
    ) -> Tensor:
        return keep(values_BH, limit, truncation, order, of_BH=self.history_BH)


@dataclass(frozen=True)
class Targets:
    """What a backbone knew of the items that it predicted, for objectives beside the likelihood.

    Args:
        states_MD: the state after each item's history, which its first code is scored with.
        rows_M: int64 item rows (anything where the weight is 0).
        weights_M: float32, how much each counts; 0 for padding.
    """

    states_MD: Tensor
    rows_M: Tensor
    weights_M: Tensor


@dataclass(frozen=True)
class LossOutput:
    """Negative log-likelihood of items in nats; `loss` is the weighted mean of -log p(item).

    Args:
        loss: scalar, `loss_sum / normalizer` (0 for a batch without targets).
        loss_sum: scalar, weighted and summed over levels and items.
        num_targets: int64 scalar, number of items predicted.
        figures: float (F,), sums that a trainer keeps beside the loss; None: none.
        total_weight: float32 scalar, sum of the targets' weights; None: each counts 1. With
            `loss_sum` it is what averaging exactly over parts of a batch and processes takes.
        targets: what was predicted from what; None where a backbone does not say.
    """

    loss: Tensor
    loss_sum: Tensor
    num_targets: Tensor
    figures: Tensor | None = None
    total_weight: Tensor | None = None
    targets: Targets | None = None

    @property
    def normalizer(self) -> Tensor:
        """What `loss_sum` is divided by."""
        return self.num_targets if self.total_weight is None else self.total_weight

    @classmethod
    def of(
        cls,
        loss_sum: Tensor,
        num_targets: Tensor,
        total_weight: Tensor | None = None,
        *,
        figures: Tensor | None = None,
        targets: Targets | None = None,
    ) -> LossOutput:
        """Divide, without a host synchronisation and without 0/0."""
        weight = num_targets if total_weight is None else total_weight
        loss = loss_sum / torch.where(weight > 0, weight, 1)
        return cls(loss, loss_sum, num_targets, figures, total_weight, targets)


def pad_histories(
    histories: Sequence[np.ndarray | Sequence[int]],
    max_history: int,
    *,
    targets: Sequence[int] | np.ndarray | None = None,
    context: RequestContext | None = None,
    truncation: Truncation = "last",
) -> Batch:
    """Collate histories of item rows into a right-padded batch.

    Args:
        histories: B arrays of item rows, oldest first; may be empty.
        max_history: at most so many items of each are kept.
        targets: B item rows.
        context: what is known beside the items.
        truncation: which items of longer histories are kept.

    Returns:
        a CPU batch as wide as its longest kept history (at least 1).

    >>> pad_histories([[4, 5, 6], []], max_history=2).history_BH.tolist()
    [[5, 6], [-1, -1]]
    """
    history_BH = _padded(histories, max_history, truncation, -1)
    target_B = None if targets is None else torch.as_tensor(np.asarray(targets, dtype=np.int64))
    if context is None:
        return Batch(history_BH, target_B)
    now, users = (
        None if part is None else torch.as_tensor(np.asarray(part, dtype=np.int64))
        for part in (context.now_B, context.users_B)
    )
    times = context.times
    times_BH = None if times is None else _padded(times, max_history, truncation, 0)
    return Batch(history_BH, target_B, times_BH=times_BH, now_B=now, users_B=users)


def _padded(
    values: Sequence[np.ndarray | Sequence[int]], limit: int, truncation: Truncation, fill: int
) -> Tensor:
    kept = [np.asarray(row, dtype=np.int64) for row in values]
    kept = [row[kept_places(len(row), limit, truncation)] for row in kept]
    padded = np.full((len(kept), max((len(h) for h in kept), default=1) or 1), fill, dtype=np.int64)
    for row, found in zip(padded, kept, strict=True):
        row[: len(found)] = found
    return torch.from_numpy(padded)


def num_first(limit: int, truncation: Truncation) -> int:
    """Return how many of `limit` kept items are a history's first ones; the rest are its last.

    >>> [num_first(50, name) for name in ("last", "first", "recent_and_first")]
    [0, 50, 12]
    """
    return {"last": 0, "first": limit, "recent_and_first": limit // 4}[truncation]


def kept_places(length: int, limit: int, truncation: Truncation = "last") -> np.ndarray:
    """Return which places of a history of `length` items a model reads, oldest first (int64)."""
    places = np.arange(min(length, limit))
    skipped = max(0, length - limit)
    return places + skipped * (places >= num_first(limit, truncation))


def keep(
    values_BH: Tensor,
    limit: int,
    truncation: Truncation = "last",
    order: Order = "chronological",
    *,
    of_BH: Tensor | None = None,
) -> Tensor:
    """Return at most `limit` entries of each right-padded history, right-padded again.

    Args:
        values_BH: item rows, or one value for each place of `of_BH`.
        limit: entries to keep.
        truncation: which entries of longer histories are kept.
        order: "reversed": the last one stands first.
        of_BH: item rows, -1 for padding; None: `values_BH` itself.
    """
    history_BH = values_BH if of_BH is None else of_BH
    width = history_BH.shape[1]
    if width <= limit and order == "chronological":
        return values_BH
    lengths_B1 = (history_BH >= 0).sum(1, keepdim=True)
    places_BH = torch.arange(min(width, limit), device=history_BH.device).expand(len(values_BH), -1)
    if order == "reversed":
        mirrored_BH = lengths_B1.clamp(max=limit) - 1 - places_BH
        places_BH = torch.where(mirrored_BH >= 0, mirrored_BH, places_BH)
    skipped_B1 = (lengths_B1 - limit).clamp(min=0)
    is_late_BH = places_BH >= num_first(limit, truncation)
    return values_BH.gather(1, places_BH + skipped_B1 * is_late_BH)


def choice_nll(
    logits_MK: Tensor, target_M: Tensor, weights_M: Tensor | None, *, smoothing: float = 0.0
) -> Tensor:
    """Return the summed cross-entropy of choices.

    Args:
        logits_MK: float32, -inf for what cannot be chosen.
        target_M: int64 right choices, `IGNORED` where there is none.
        weights_M: float32, how much each choice counts; None: 1.
        smoothing: share of the target that is spread evenly over what can be chosen.
    """
    if not smoothing and weights_M is None:
        return F.cross_entropy(logits_MK, target_M, reduction="sum")
    nll_M = F.cross_entropy(logits_MK, target_M, reduction="none")
    if smoothing:
        open_MK = logits_MK > -torch.inf
        logprobs_MK = logits_MK.log_softmax(-1).masked_fill(~open_MK, 0.0)
        even_M = -logprobs_MK.sum(-1) / open_MK.sum(-1).clamp(min=1)
        even_M = even_M.masked_fill(target_M == IGNORED, 0.0)
        nll_M = (1.0 - smoothing) * nll_M + smoothing * even_M
    return (nll_M if weights_M is None else nll_M * weights_M).sum()
