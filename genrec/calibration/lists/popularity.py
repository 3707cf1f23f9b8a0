"""Does a list lean on what is popular anyway? A penalty on popularity, and room for the long tail.

Two methods: a penalty on the log of an item's popularity (what a list loses is exactly known), and
xQuAD over two kinds of items, the popular head and the long tail (Abdollahpouri et al. 2019).
Neither counts anything: popularity comes from the caller, from training interactions only.

Shapes: U users, C users of a chunk, M candidates, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from genrec.calibration.lists.base import (
    Candidates,
    ItemFacts,
    Reranker,
    ScoreScale,
    greedy,
    relevance,
    sorted_places,
)
from genrec.config import StrictConfig
from genrec.errors import UserError

HEAD, TAIL = 0, 1


class PopularityPenalty(Reranker):
    """Scores minus strength times the log of popularity, ordered anew.

    With log-probabilities as scores, strength 1 ranks by log p(i|u) / p(i), the pointwise mutual
    information. The list is the exact best of its objective, and the mean log popularity of a list
    never rises with strength.
    """

    class Config(StrictConfig):
        """Settings."""

        name: Literal["popularity"] = "popularity"
        strength: float = Field(default=0.5, ge=0)
        """Natural-log units of score per natural-log unit of popularity; 0 keeps the list."""
        prior: float = Field(default=1.0, gt=0)
        """Added to every count, so that items never consumed have a finite penalty."""

    needs: ClassVar[tuple[str, ...]] = ("popularity_N",)

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        penalty_N = np.log(np.asarray(self.facts.popularity_N, np.float64) + self.config.prior)
        values_CM = candidates.scores_UM - self.config.strength * penalty_N[candidates.rows_UM]
        return sorted_places(values_CM, candidates.real_UM, k)


class LongTail(Reranker):
    """xQuAD over head and tail (Abdollahpouri et al. 2019): as much tail as the user likes.

    Smooth: a kind is wanted as far as its share of the list so far leaves room, and strength 1
    reaches the share of the user's history. Binary: a kind that the list holds once is done.
    """

    class Config(StrictConfig):
        """Settings of Abdollahpouri, Burke & Mobasher 2019."""

        name: Literal["long_tail"] = "long_tail"
        strength: float = Field(default=0.5, ge=0, le=1)
        """Weight of the long tail, lambda of equation 1; 0 keeps the list."""
        head_share: float = Field(default=0.2, gt=0, lt=1)
        """Share of the items, the most popular ones, that are the head."""
        smooth: bool = True
        """Share of the list instead of yes or no."""
        score: ScoreScale = "scaled"
        """What an item is worth: a user's scores from 0 to 1, or calibrated probabilities."""

    needs: ClassVar[tuple[str, ...]] = ("popularity_N",)
    needs_histories: ClassVar[bool] = True

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        assert candidates.histories is not None and self.facts.popularity_N is not None
        kinds = ItemFacts(popularity_groups(self.facts.popularity_N, (self.config.head_share,)))
        wanted_C2 = kinds.history_shares(candidates.histories)[:, :2]
        bonus = _Room(wanted_C2, kinds.members_NG[candidates.rows_UM], self.config.smooth)
        value_CM = relevance(candidates, self.config.score)
        return greedy(value_CM, candidates.real_UM, k, self.config.strength, bonus)


class _Room:
    """Sum over kinds of P(kind|u) P(i|kind) times the room that the list leaves for the kind."""

    def __init__(self, wanted_C2: np.ndarray, members_CM2: np.ndarray, smooth: bool) -> None:
        self.wanted_C2, self.members_CM2, self.smooth = wanted_C2, members_CM2, smooth
        self.count_C2 = np.zeros_like(wanted_C2)

    def values(self) -> np.ndarray:
        total_C1 = np.maximum(self.count_C2.sum(axis=1, keepdims=True), 1.0)
        taken_C2 = self.count_C2 / total_C1 if self.smooth else np.minimum(self.count_C2, 1.0)
        worth_C2 = self.wanted_C2 * (1.0 - taken_C2)
        result: np.ndarray = (worth_C2[:, None, :] * self.members_CM2).sum(axis=2)
        return result

    def choose(self, places_C: np.ndarray, open_C: np.ndarray) -> None:
        users = np.flatnonzero(open_C)
        self.count_C2[users] += self.members_CM2[users, places_C[users]]


def popularity_groups(popularity_N: np.ndarray, shares: Sequence[float] = (0.2, 0.6)) -> np.ndarray:
    """Return groups by popularity: 0 the most popular items, then the next, the last the rest.

    Args:
        popularity_N: (N,) counts.
        shares: rising shares of the items at which groups end; (.2, .6) gives 20%, 40%, 40%.
            Items with equal counts are never torn apart: they all join the more popular group.

    Returns:
        (N,) int64. With these as `groups_N`, `Steck` is calibrated popularity (Abdollahpouri et
        al. 2021).

    Raises:
        UserError: shares that do not rise between 0 and 1, or no items.
    """
    edges = np.asarray(shares, dtype=np.float64)
    if (np.diff(edges) <= 0).any() or (edges <= 0).any() or (edges >= 1).any():
        raise UserError(f"shares: got {list(shares)}, expected rising numbers between 0 and 1.")
    popularity_N = np.asarray(popularity_N)
    if not len(popularity_N):
        raise UserError("popularity: got no items, expected at least one.")
    ordered = np.sort(popularity_N)[::-1]
    last = np.maximum(np.ceil(edges * len(ordered)).astype(int) - 1, 0)
    return (popularity_N[:, None] < ordered[last]).sum(axis=1).astype(np.int64)
