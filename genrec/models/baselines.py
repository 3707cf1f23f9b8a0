"""What would counting, or a sequence model of item ids, recommend? Baselines beside every result.

Fitted on training interactions only and scored on bare histories; they know nothing about splits,
metrics or masking (`genrec.evaluation.evaluator` does that). Scores are comparable within one user.

Recipes: docs/evaluation.md. Item-kNN and Markov add a small multiple of the popularity share, which
orders items that they say nothing about; what is still tied is ranked by expectation.

Shapes: B histories, N items, U users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from genrec.config import StrictConfig
from genrec.data.interactions import TRAIN, Interactions
from genrec.errors import UserError
from genrec.features import sasrec
from genrec.features.sasrec import SASRecConfig

BASELINES = {
    "most_popular": "genrec.models.baselines:MostPopular",
    "item_knn": "genrec.models.baselines:ItemKNN",
    "markov": "genrec.models.baselines:Markov",
    "sasrec": "genrec.models.baselines:SASRec",
}
COUNTING = ("most_popular", "item_knn", "markov")
"""Baselines that take seconds; the others train."""

TIE_BREAK = 1e-6
# Similarities kept in memory: 50 million entries are 600 MB; beyond that rows are made per call.
_MAX_STORED = 50_000_000


class Baseline(ABC):
    """A recommender that needs no item vectors."""

    Config: type[StrictConfig]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.num_items = 0

    def fit(self, interactions: Interactions) -> Self:
        """Count, or train.

        Args:
            interactions: `interactions.training()` of a data set.

        Raises:
            UserError: nothing to count, or validation or test interactions among them.
        """
        held_out = int(np.count_nonzero(interactions.splits != TRAIN))
        if held_out:
            raise UserError(
                f"baseline: got {held_out} validation or test interactions. Pass "
                "interactions.training(), or the numbers mean nothing."
            )
        if not len(interactions):
            raise UserError("baseline: got no training interactions. Check the data set's split.")
        self.num_items = interactions.num_items
        self._count(interactions)
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Return a score for every item of the catalogue.

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
    def _count(self, interactions: Interactions) -> None: ...

    @abstractmethod
    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray: ...


class MostPopular(Baseline):
    """How often each item occurs in training; the same for everyone."""

    class Config(StrictConfig):
        """No settings."""

        name: Literal["most_popular"] = "most_popular"
        """Name in the registry."""

    def _count(self, interactions: Interactions) -> None:
        self._counts_N = interactions.counts().astype(np.float64)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return np.tile(self._counts_N, (len(histories), 1))


class ItemKNN(Baseline):
    """Cosine of binary user-item columns, summed over the last items of the history.

    An item is not its own neighbour.
    """

    class Config(StrictConfig):
        """Settings of item-kNN."""

        name: Literal["item_knn"] = "item_knn"
        """Name in the registry."""
        history_length: int = Field(default=20, ge=1)
        """Last items of the history that vote (20, as the history cap of the generators)."""

    def _count(self, interactions: Interactions) -> None:
        ones = np.ones(len(interactions))
        shape = (interactions.num_users, interactions.num_items)
        seen_UN = sp.csr_array((ones, (interactions.user_rows, interactions.item_rows)), shape)
        seen_UN.data[:] = 1.0  # duplicates were summed by the constructor
        users_per_item_N = np.maximum(np.asarray(seen_UN.sum(axis=0)).reshape(-1), 1.0)
        self._seen_UN = (seen_UN @ sp.diags_array(users_per_item_N**-0.5)).tocsr()
        self._tie_break_N = _tie_break(interactions)
        pairs = float((np.diff(self._seen_UN.indptr).astype(np.float64) ** 2).sum())
        entries = min(pairs, float(self.num_items) ** 2)
        all_items = np.arange(self.num_items)
        self._stored = self._similarity(all_items) if entries <= _MAX_STORED else None

    def _similarity(self, items: np.ndarray) -> sp.csr_array:
        """Return the similarities of `items` to all items, (len(items), N), without themselves."""
        rows = (self._seen_UN[:, items].T.tocsr() @ self._seen_UN).tocoo()
        others = items[rows.row] != rows.col
        kept = (rows.data[others], (rows.row[others], rows.col[others]))
        return sp.csr_array(kept, shape=rows.shape)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        recent = [np.asarray(h)[-self.config.history_length :] for h in histories]
        flat = np.concatenate(recent).astype(np.int64) if recent else np.empty(0, np.int64)
        user = np.repeat(np.arange(len(recent)), [len(h) for h in recent])
        items, column = np.unique(flat, return_inverse=True)
        similarity = self._similarity(items) if self._stored is None else self._stored[items]
        votes = sp.csr_array((np.ones(len(flat)), (user, column)), (len(recent), len(items)))
        return (votes @ similarity).toarray() + self._tie_break_N


class Markov(Baseline):
    """How often each item directly followed the last item of the history in training."""

    class Config(StrictConfig):
        """No settings."""

        name: Literal["markov"] = "markov"
        """Name in the registry."""

    def _count(self, interactions: Interactions) -> None:
        same_user = interactions.user_rows[1:] == interactions.user_rows[:-1]
        before = interactions.item_rows[:-1][same_user].astype(np.int64)
        after = interactions.item_rows[1:][same_user].astype(np.int64)
        shape = (self.num_items, self.num_items)
        self._followed_NN = sp.csr_array((np.ones(len(before)), (before, after)), shape)
        self._tie_break_N = _tie_break(interactions)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        scores_BN = np.tile(self._tie_break_N, (len(histories), 1))
        known = [b for b, history in enumerate(histories) if len(history)]
        if known:
            last = np.array([histories[b][-1] for b in known], dtype=np.int64)
            scores_BN[known] += self._followed_NN[last].toarray()
        return scores_BN


class SASRec(Baseline):
    """A causal transformer over item ids with a softmax over the catalogue (Kang and McAuley 2018).

    It stops by the last training interactions of the users, which it does not train on; minutes
    where counting takes seconds.
    """

    class Config(SASRecConfig):
        """Settings of SASRec as a baseline."""

        name: Literal["sasrec"] = "sasrec"
        """Name in the registry."""

    def _count(self, interactions: Interactions) -> None:
        self._model = sasrec.SASRec(self.config).fit(interactions)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return self._model.scores(histories)


def _tie_break(interactions: Interactions) -> np.ndarray:
    counts_N = interactions.counts().astype(np.float64)
    return TIE_BREAK * counts_N / counts_N.sum()
