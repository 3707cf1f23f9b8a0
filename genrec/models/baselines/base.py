"""What is a baseline? The contract: fitted on training interactions, it scores bare histories.

It knows nothing about metrics or masking (`genrec.evaluation.evaluator` does that), and it refuses
held-out interactions, so that a baseline cannot be flattered by accident.

Shapes: B histories, N items, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from genrec.config import StrictConfig
from genrec.data.interactions import TRAIN, Examples, Interactions
from genrec.errors import UserError

if TYPE_CHECKING:
    from genrec.data import Catalog

TIE_BREAK = 1e-6


class Baseline(ABC):
    """A recommender to stand beside a model.

    Args:
        config: the class's own `Config`; None takes its defaults.
    """

    Config: type[StrictConfig]
    needs_vectors: ClassVar[bool] = False
    """Whether `fit` reads the item vectors of the catalogue."""
    reads_validation: ClassVar[bool] = False
    """Whether `fit` stops by validation targets, as a generator's training does."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.num_items = 0

    def fit(
        self,
        interactions: Interactions,
        catalog: Catalog | None = None,
        validation: Examples | None = None,
    ) -> Self:
        """Count, solve or train.

        Args:
            interactions: `interactions.training()` of a data set.
            catalog: its items with vectors; read where `needs_vectors`.
            validation: `interactions.examples("valid")`; read where `reads_validation`.

        Raises:
            UserError: nothing to count, validation or test interactions among them, or vectors are
                needed and there are none.
        """
        held_out = int(np.count_nonzero(interactions.splits != TRAIN))
        if held_out:
            raise UserError(
                f"baseline: got {held_out} validation or test interactions. Pass "
                "interactions.training(), or the numbers mean nothing."
            )
        if not len(interactions):
            raise UserError("baseline: got no training interactions. Check the data set's split.")
        self._fit(interactions, catalog, validation)
        self.num_items = interactions.num_items
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Return a score for every item of the catalogue; comparable within one user.

        Args:
            histories: B arrays of item rows, oldest first; may be empty.

        Returns:
            (B, N) float64, higher is better. Hold B small: 1,000 histories over 12,101 items
            take 97 MB.

        Raises:
            UserError: not fitted, or a row outside the catalogue.
        """
        if not self.num_items:
            raise UserError("baseline: not fitted. Call fit(interactions.training()) first.")
        for history in histories:
            if len(history) and not 0 <= np.min(history) <= np.max(history) < self.num_items:
                raise UserError(
                    f"baseline: a history holds rows outside [0, {self.num_items}). Map it to the "
                    "catalogue that the baseline was fitted on."
                )
        return self._scores(histories)

    @abstractmethod
    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None: ...

    @abstractmethod
    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray: ...


def popularity_tie_break(interactions: Interactions) -> np.ndarray:
    """Return `TIE_BREAK` times each item's share of the interactions, (N,) float64."""
    counts_N = interactions.counts().astype(np.float64)
    tie_break_N: np.ndarray = TIE_BREAK * counts_N / counts_N.sum()
    return tie_break_N


def seen_matrix(interactions: Interactions) -> sp.csr_array:
    """Return who had what, users by items, of ones (float64)."""
    ones = np.ones(len(interactions))
    shape = (interactions.num_users, interactions.num_items)
    seen_UN = sp.csr_array((ones, (interactions.user_rows, interactions.item_rows)), shape)
    seen_UN.data[:] = 1.0  # duplicates were summed by the constructor
    return seen_UN


def history_matrix(
    histories: Sequence[np.ndarray], num_items: int, last: int | None = None
) -> sp.csr_array:
    """Return how often each item stands among the last items of each history, (B, N) float64.

    Args:
        histories: B arrays of item rows, oldest first.
        num_items: N.
        last: how many items of the end of a history are read; None reads all.
    """
    recent = [np.asarray(h)[-last if last else 0 :] for h in histories]
    flat = np.concatenate(recent).astype(np.int64) if recent else np.empty(0, np.int64)
    user = np.repeat(np.arange(len(recent)), [len(h) for h in recent])
    return sp.csr_array((np.ones(len(flat)), (user, flat)), (len(recent), num_items))
