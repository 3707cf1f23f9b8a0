"""Constrained search over many histories at once: length-sorted, padded, batched, on one device.

Shared by the Recommender, the trainer's validation and the evaluation stage. It knows rows, not
item ids, and returns numpy; what a score means to a user is decided by the callers.

Shapes: B histories, k list length, N items.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from genrec import runtime
from genrec.data.interactions import Examples
from genrec.decoding import Boosts, CSRIndex, Filters, Scoring, beam_search, score_levels
from genrec.models.base import Backbone, Batch, RequestContext, pad_histories


@dataclass(frozen=True)
class RankedLists:
    """Best-first lists.

    Args:
        rows: (B, k) int64 item rows, -1 where a list is shorter than k.
        logprobs: (B, k) float64 natural log-probabilities, -inf where padded.
        certified: (B,) bool; True where the list provably is the top k of the whole catalogue.
        num_eligible: (B,) int64 items that the list was chosen from (after filters and rules).
        num_proven: (B,) int64 places from the top that are proven; None where unknown.
        boosts: (B, k) float64 what was added to the log-probabilities for ranking; None: nothing.
    """

    rows: np.ndarray
    logprobs: np.ndarray
    certified: np.ndarray
    num_eligible: np.ndarray
    num_proven: np.ndarray | None = None
    boosts: np.ndarray | None = None

    @property
    def scores(self) -> np.ndarray:
        """What ranks, (B, k) float64: log-probability plus boost."""
        return self.logprobs if self.boosts is None else self.logprobs + self.boosts

    @property
    def num_rest(self) -> np.ndarray:
        """Eligible items that are not in the list, (B,) int64."""
        return self.num_eligible - (self.rows >= 0).sum(1)

    def top(self, k: int) -> RankedLists:
        """Return the first k columns; a short list may be proven where the long one is not."""
        certified, proven = self.certified, self.num_proven
        if proven is not None:
            certified, proven = certified | (proven >= k), np.minimum(proven, k)
        boosts = None if self.boosts is None else self.boosts[:, :k]
        rows, logprobs = self.rows[:, :k], self.logprobs[:, :k]
        return RankedLists(rows, logprobs, certified, self.num_eligible, proven, boosts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and, at the end, back into the mode it had.

    One that is there already is left alone: setting the mode of every part costs a request of one
    user more than finding out.
    """
    if not any(module.training for module in model.modules()):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.inference_mode()
def search(
    model: Backbone,
    constraint: CSRIndex,
    histories: Sequence[np.ndarray],
    *,
    width: int,
    k: int,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray] | None = None,
    boosts: Boosts | None = None,
    scoring: Scoring = "renormalized",
    context: RequestContext | None = None,
    batch_size: int = 64,
    description: str | None = None,
    on_batch: Callable[[int, float], None] | None = None,
) -> RankedLists:
    """Return the best k items of every history.

    Args:
        model: a backbone; used in eval mode and left in the mode it had.
        constraint: the item index, or a restricted view of it, on the model's device.
        histories: B arrays of item rows, oldest first (cut to the model's maximum here).
        width: beam width (>= k unless the catalogue is smaller).
        k: list length.
        exclude: per history, rows that may not be returned.
        allow: per history, the only rows that may be returned.
        boosts: additive scores of all items.
        scoring: what a log-probability is among (see `beam_search`).
        context: what is known of the requests beside their items; None: nothing.
        batch_size: histories searched together; does not change results.
        description: text of a progress bar, or None for none.
        on_batch: called after each batch with its requests and the seconds that they took.
    """
    total = len(histories)
    rows = np.full((total, k), -1, dtype=np.int64)
    logprobs = np.full((total, k), -np.inf)
    certified = np.ones(total, dtype=bool)
    proven = np.zeros(total, dtype=np.int64)
    added = None if boosts is None else np.zeros((total, k))
    # Long and short histories apart: padding is what costs (measured 1.45x, docs/decoding.md).
    order = np.argsort([len(h) for h in histories], kind="stable")
    shown = total if description else 0
    advance: Callable[[int], None]
    with evaluating(model), runtime.progress(description or "", shown) as advance:
        for start in range(0, total, batch_size):
            begun = time.perf_counter()
            chosen = order[start : start + batch_size]
            batch = read_batch(model, histories, chosen, context)
            filters = _filters(exclude, allow, chosen)
            beams = beam_search(
                model,
                batch.to(model.device),
                constraint,
                width=width,
                k=k,
                filters=filters,
                boosts=boosts,
                scoring=scoring,
            )
            got = beams.rows_Bk.shape[1]
            rows[chosen, :got] = beams.rows_Bk.cpu().numpy()
            logprobs[chosen, :got] = beams.logprobs_Bk.double().cpu().numpy()
            certified[chosen] = beams.certified_B.cpu().numpy()
            proven[chosen] = beams.num_proven_B.cpu().numpy()
            if added is not None and beams.boosts_Bk is not None:
                added[chosen] = beams.boosts_Bk.double().cpu().numpy()
            if on_batch is not None:  # the results are on the host: nothing is still running
                on_batch(len(chosen), time.perf_counter() - begun)
            advance(len(chosen))
    open_N = _open_rows(constraint)
    eligible = np.array([_num_eligible(open_N, exclude, allow, i) for i in range(total)])
    return RankedLists(rows, logprobs, certified, eligible.astype(np.int64), proven, added)


@torch.inference_mode()
def level_logprobs(
    model: Backbone,
    constraint: CSRIndex,
    histories: Sequence[np.ndarray],
    rows: np.ndarray,
    *,
    scoring: Scoring = "renormalized",
    context: RequestContext | None = None,
    batch_size: int = 64,
    description: str | None = None,
) -> np.ndarray:
    """Return the parts of the log-probabilities of listed items, level by level.

    Args:
        model: as for `search`.
        constraint: as for `search`.
        histories: B arrays of item rows, oldest first.
        rows: (B, k) what `search` listed, -1 where padded.
        scoring: as for that search, so that the parts add up to its log-probabilities.
        context: as for that search.
        batch_size: histories scored together.
        description: text of a progress bar, or None for none.

    Returns:
        (B, k, L) float64, 0 where padded.
    """
    found = np.zeros((*rows.shape, constraint.depth))
    if not rows.shape[1]:
        return found
    order = np.argsort([len(h) for h in histories], kind="stable")
    shown = len(histories) if description else 0
    with evaluating(model), runtime.progress(description or "", shown) as advance:
        for start in range(0, len(histories), batch_size):
            chosen = order[start : start + batch_size]
            batch = read_batch(model, histories, chosen, context)
            levels = score_levels(
                model,
                batch.to(model.device),
                constraint,
                torch.from_numpy(rows[chosen]).to(model.device),
                scoring=scoring,
            )
            found[chosen] = levels.double().cpu().numpy()
            advance(len(chosen))
    return found


def read_batch(
    model: Backbone,
    histories: Sequence[np.ndarray],
    chosen: np.ndarray,
    context: RequestContext | None = None,
) -> Batch:
    """Return the batch of some histories, cut to what the model reads."""
    return pad_histories(
        [histories[i] for i in chosen],
        model.config.max_history,
        context=None if context is None else context.select(chosen),
        truncation=model.config.truncation,
    )


def context_of(model: Backbone, examples: Examples) -> RequestContext | None:
    """Return what a model reads of a data set's examples beside their items; None: nothing.

    The request is taken to be made at the time of the target. Only a model with
    `time_features: gap_recency` looks at it.
    """
    users_B = model.user_rows([str(row) for row in examples.user_rows])
    if model.reads_times:
        return RequestContext(examples.history_times(), examples.target_times, users_B)
    return None if users_B is None else RequestContext(users_B=users_B)


def _open_rows(constraint: CSRIndex) -> np.ndarray:
    """Return which catalogue rows the constraint's rule allows, (N,) bool."""
    open_N = np.empty(constraint.num_items, dtype=bool)
    open_N[constraint.rows_N.cpu().numpy()] = constraint.allowed_positions().cpu().numpy()
    return open_N


def _filters(
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray] | None,
    chosen: np.ndarray,
) -> Filters | None:
    if exclude is None and allow is None:
        return None
    return Filters(
        exclude=None if exclude is None else [exclude[i] for i in chosen],
        allow=None if allow is None else [allow[i] for i in chosen],
    )


def _num_eligible(
    open_N: np.ndarray,
    exclude: Sequence[np.ndarray] | None,
    allow: Sequence[np.ndarray] | None,
    i: int,
) -> int:
    denied = np.unique(exclude[i]) if exclude is not None else np.empty(0, np.int64)
    if allow is None:
        return int(open_N.sum() - open_N[denied].sum())
    return int(open_N[np.setdiff1d(np.unique(allow[i]), denied)].sum())
