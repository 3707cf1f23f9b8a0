"""What would counting recommend? Popularity, recent popularity, item-kNN and a Markov chain.

Nothing here is trained, and none of it looks at texts or vectors. Item-kNN and Markov add a small
multiple of the popularity share, which orders items that they say nothing about; what is still tied
is ranked by expectation.

Shapes: B histories, N items, U users, M interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from genrec.config import StrictConfig
from genrec.data.interactions import Examples, Interactions
from genrec.errors import UserError
from genrec.models.baselines.base import (
    Baseline,
    history_matrix,
    popularity_tie_break,
    seen_matrix,
)
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data import Catalog

log = get_logger(__name__)
SECONDS_PER_DAY = 86_400.0
# Similarities kept in memory: 50 million entries are 600 MB; beyond that rows are made per call.
_MAX_STORED = 50_000_000


class MostPopular(Baseline):
    """How often each item occurs in training; the same for everyone."""

    class Config(StrictConfig):
        """No settings."""

        name: Literal["most_popular"] = "most_popular"
        """Name in the registry."""

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        self._counts_N = interactions.counts().astype(np.float64)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return np.tile(self._counts_N, (len(histories), 1))


class RecentPopular(Baseline):
    """Popularity in which an interaction counts half after each half-life; the same for everyone.

    Age is taken at the latest training interaction. Histories come without times, so what was
    popular when a user was last here is not looked up.
    """

    class Config(StrictConfig):
        """Settings of recent popularity."""

        name: Literal["recent_popular"] = "recent_popular"
        """Name in the registry."""
        clock: Literal["auto", "time", "order"] = "auto"
        """What age is. time: days before the latest training interaction (an error without
        timestamps). order: later interactions of the same user. auto: time where there is any."""
        half_life_days: float | None = Field(default=365.0, gt=0, allow_inf_nan=False)
        """Days after which an interaction counts half; null: never, which is most popular. Leave-
        one-out wants a long one (docs/evaluation.md): targets lie anywhere in time."""
        half_life_places: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
        """The same for clock `order`, in later interactions of the user."""

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        age_M, half_life = self._ages(interactions)
        weights_M = np.exp2(-age_M / half_life) if half_life else np.ones(len(age_M))
        self._recent_N = np.bincount(
            interactions.item_rows, weights_M, minlength=interactions.num_items
        )

    def _ages(self, interactions: Interactions) -> tuple[np.ndarray, float | None]:
        times_M = np.asarray(interactions.timestamps)
        timed = bool(len(times_M)) and bool(np.any(times_M))
        if self.config.clock == "time" and not timed:
            raise UserError(
                "recent_popular: clock 'time' needs timestamps, and the data set has none. "
                "Expected seconds per interaction; prepare it with them, or choose clock 'order'."
            )
        if timed and self.config.clock != "order":
            age_M = (times_M.max() - times_M) / SECONDS_PER_DAY
            return age_M, self.config.half_life_days
        if self.config.clock == "auto":
            log.info("recent_popular: no timestamps, age counts later interactions of the user.")
        ends_M = np.repeat(interactions.offsets[1:], np.diff(interactions.offsets))
        return ends_M - 1.0 - np.arange(len(ends_M)), self.config.half_life_places

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return np.tile(self._recent_N, (len(histories), 1))


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

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        seen_UN = seen_matrix(interactions)
        users_per_item_N = np.maximum(np.asarray(seen_UN.sum(axis=0)).reshape(-1), 1.0)
        self._seen_UN = (seen_UN @ sp.diags_array(users_per_item_N**-0.5)).tocsr()
        self._tie_break_N = popularity_tie_break(interactions)
        pairs = float((np.diff(self._seen_UN.indptr).astype(np.float64) ** 2).sum())
        entries = min(pairs, float(interactions.num_items) ** 2)
        all_items = np.arange(interactions.num_items)
        self._stored = self._similarity(all_items) if entries <= _MAX_STORED else None

    def _similarity(self, items: np.ndarray) -> sp.csr_array:
        """Return the similarities of `items` to all items, (len(items), N), without themselves."""
        rows = (self._seen_UN[:, items].T.tocsr() @ self._seen_UN).tocoo()
        others = items[rows.row] != rows.col
        kept = (rows.data[others], (rows.row[others], rows.col[others]))
        return sp.csr_array(kept, shape=rows.shape)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        votes_BN = history_matrix(histories, self.num_items, self.config.history_length)
        items = np.unique(votes_BN.indices)
        similarity = self._similarity(items) if self._stored is None else self._stored[items]
        return (votes_BN[:, items] @ similarity).toarray() + self._tie_break_N


class Markov(Baseline):
    """How often each item directly followed the last item of the history in training."""

    class Config(StrictConfig):
        """No settings."""

        name: Literal["markov"] = "markov"
        """Name in the registry."""

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        same_user = interactions.user_rows[1:] == interactions.user_rows[:-1]
        before = interactions.item_rows[:-1][same_user].astype(np.int64)
        after = interactions.item_rows[1:][same_user].astype(np.int64)
        shape = (interactions.num_items, interactions.num_items)
        self._followed_NN = sp.csr_array((np.ones(len(before)), (before, after)), shape)
        self._tie_break_N = popularity_tie_break(interactions)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        scores_BN = np.tile(self._tie_break_N, (len(histories), 1))
        known = [b for b, history in enumerate(histories) if len(history)]
        if known:
            last = np.array([histories[b][-1] for b in known], dtype=np.int64)
            scores_BN[known] += self._followed_NN[last].toarray()
        return scores_BN
