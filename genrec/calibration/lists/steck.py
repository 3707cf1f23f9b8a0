"""Does a list hold an attribute's values in the shares of the user's history? Steck's re-ranking.

Steck 2018, "Calibrated recommendations" (RecSys), equations 2 to 7: the list I maximises

    (1 - strength) sum_{i in I} s(i) - strength KL(p || q~),    q~ = (1 - a) q(.|I) + a p,

with p(g|u) from the history, q(g|I) from the list and a = .01. Greedy: one item after the other.
With q's denominator fixed to the list's final length, the objective is (up to a constant) monotone
and submodular, so what greedy gains over the empty list is at least 1 - 1/e of the best possible.

Shapes: U users, C users of a chunk, M candidates, k list length, G groups.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from genrec.calibration.lists.base import (
    Candidates,
    Reranker,
    ScoreScale,
    greedy,
    relevance,
)
from genrec.config import StrictConfig


class Steck(Reranker):
    """Calibrated lists: an attribute's values in the shares of the user's own history.

    An item with several values counts for each in equal parts; items without one are a value of
    their own. A user without a history keeps the list.
    """

    class Config(StrictConfig):
        """Settings of Steck 2018."""

        name: Literal["steck"] = "steck"
        strength: float = Field(default=0.5, ge=0, le=1)
        """Weight of calibration, lambda of equation 7; 0 keeps the list."""
        smoothing: float = Field(default=0.01, gt=0, lt=1)
        """Share of p mixed into q so that the divergence stays finite (equation 6, alpha)."""
        score: ScoreScale = "scaled"
        """What s(i) is: a user's scores from 0 to 1, or calibrated probabilities."""
        prefixes: bool = False
        """Judge every prefix as a list of its own (as in common code) instead of as a part of the
        list of k; the 1 - 1/e guarantee then does not hold."""
        half_life: float | None = Field(default=None, gt=0)
        """An item so many places back in the history counts half; None: all count the same."""

    needs: ClassVar[tuple[str, ...]] = ("groups_N",)
    needs_histories: ClassVar[bool] = True

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        assert candidates.histories is not None
        wanted_CG = self.facts.history_shares(candidates.histories, half_life=self.config.half_life)
        real_CM = candidates.real_UM
        shares_CMG = self.facts.shares_NG[candidates.rows_UM] * real_CM[:, :, None]
        length_C = np.minimum(real_CM.sum(1), k)
        bonus = _Calibration(
            wanted_CG,
            shares_CMG,
            None if self.config.prefixes else np.maximum(length_C, 1).astype(np.float64),
            self.config.smoothing,
        )
        value_CM = relevance(candidates, self.config.score)
        return greedy(value_CM, real_CM, k, self.config.strength, bonus)


class _Calibration:
    """-KL(p || q~) of the list with each candidate added."""

    def __init__(
        self,
        wanted_CG: np.ndarray,
        shares_CMG: np.ndarray,
        length_C: np.ndarray | None,
        smoothing: float,
    ) -> None:
        self.wanted_CG, self.shares_CMG = wanted_CG, shares_CMG
        self.length_C, self.smoothing = length_C, smoothing
        self.sum_CG = np.zeros_like(wanted_CG)
        self.count = 0

    def values(self) -> np.ndarray:
        length_C11 = (
            np.float64(self.count + 1) if self.length_C is None else self.length_C[:, None, None]
        )
        listed_CMG = (self.sum_CG[:, None, :] + self.shares_CMG) / length_C11
        return -kl_miss(self.wanted_CG[:, None, :], listed_CMG, self.smoothing)

    def choose(self, places_C: np.ndarray, open_C: np.ndarray) -> None:
        users = np.flatnonzero(open_C)
        self.sum_CG[users] += self.shares_CMG[users, places_C[users]]
        self.count += 1


def kl_miss(wanted: np.ndarray, listed: np.ndarray, smoothing: float = 0.01) -> np.ndarray:
    """Return KL(p || q~) over the last axis in nats: how far a list is from calibrated.

    Args:
        wanted: p, (..., G); a row of zeros (no history) gives 0.
        listed: q, (..., G), broadcast against p.
        smoothing: share of p mixed into q (Steck 2018, equation 6).
    """
    mixed = (1.0 - smoothing) * listed + smoothing * wanted
    inside = np.where(wanted > 0, wanted, 1.0) / np.where(wanted > 0, mixed, 1.0)
    result: np.ndarray = (wanted * np.log(inside)).sum(axis=-1)
    return result
