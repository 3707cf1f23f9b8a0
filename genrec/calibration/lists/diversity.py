"""Is a list varied? Maximal marginal relevance, and xQuAD over the values of an attribute.

MMR keeps apart what is alike (by attribute or by vector); xQuAD covers the user's own interests.
Neither knows how vectors were made.

Shapes: U users, C users of a chunk, M candidates, A aspects (values of an attribute), E width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from genrec.calibration.lists.base import Candidates, Reranker, ScoreScale, greedy, relevance
from genrec.config import StrictConfig


class MMR(Reranker):
    """Maximal marginal relevance (Carbonell & Goldstein 1998).

    Each place takes the best (1 - strength) s(i) - strength max sim(i, j) over the items j that are
    in the list already; the first place is always the first candidate's.
    """

    class Config(StrictConfig):
        """Settings."""

        name: Literal["mmr"] = "mmr"
        strength: float = Field(default=0.5, ge=0, le=1)
        """Weight of being unlike the others; 0 keeps the list."""
        similarity: Literal["groups", "vectors"] = "groups"
        """Jaccard of the sets of values of an attribute, or cosine of vectors."""
        score: ScoreScale = "scaled"
        """What s(i) is: a user's scores from 0 to 1, or calibrated probabilities."""

    def _needed(self) -> tuple[str, ...]:
        return ("groups_N",) if self.config.similarity == "groups" else ("vectors_NE",)

    def _cells(self, num_candidates: int) -> int:
        if self.config.similarity == "groups":
            width = self.facts.members_NG.shape[1]
        else:
            assert self.facts.vectors_NE is not None
            width = self.facts.vectors_NE.shape[1]
        return num_candidates * max(num_candidates, width)

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        rows_CM = candidates.rows_UM
        if self.config.similarity == "groups":
            similar_CMM = jaccard(self.facts.members_NG[rows_CM])
        else:
            assert self.facts.vectors_NE is not None
            similar_CMM = cosine(np.asarray(self.facts.vectors_NE)[rows_CM])
        value_CM = relevance(candidates, self.config.score)
        bonus = _Unlike(similar_CMM)
        return greedy(value_CM, candidates.real_UM, k, self.config.strength, bonus)


class XQuAD(Reranker):
    """Explicit aspects (Santos et al. 2010): cover the values that the user's history holds.

    Each place takes the best (1 - strength) s(i) + strength sum_a p(a|u) P(i|a) prod_j (1 - P(j|a))
    over the listed items j, with P(i|a) = s(i) where item i has value a, else 0. A user without a
    history keeps the list.
    """

    class Config(StrictConfig):
        """Settings."""

        name: Literal["xquad"] = "xquad"
        strength: float = Field(default=0.5, ge=0, le=1)
        """Weight of covering aspects; 0 keeps the list."""
        score: ScoreScale = "scaled"
        """What s(i) is: a user's scores from 0 to 1, or calibrated probabilities."""

    needs: ClassVar[tuple[str, ...]] = ("groups_N",)
    needs_histories: ClassVar[bool] = True

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        assert candidates.histories is not None
        wanted_CA = self.facts.history_shares(candidates.histories)[:, :-1]
        value_CM = relevance(candidates, self.config.score)
        covers_CMA = self.facts.members_NG[candidates.rows_UM] * value_CM[:, :, None]
        places_Ck = greedy(
            value_CM, candidates.real_UM, k, self.config.strength, _Uncovered(wanted_CA, covers_CMA)
        )
        return places_Ck


class _Unlike:
    """Minus the largest similarity to what is chosen; 0 while nothing is."""

    def __init__(self, similar_CMM: np.ndarray) -> None:
        self.similar_CMM = similar_CMM
        self.most_CM: np.ndarray | None = None

    def values(self) -> np.ndarray:
        if self.most_CM is None:
            return np.zeros(self.similar_CMM.shape[:2])
        return -self.most_CM

    def choose(self, places_C: np.ndarray, open_C: np.ndarray) -> None:
        new_CM = self.similar_CMM[np.arange(len(places_C)), places_C]
        self.most_CM = new_CM if self.most_CM is None else np.maximum(self.most_CM, new_CM)


class _Uncovered:
    """Sum over aspects of p(a|u) P(i|a) times what the list leaves uncovered."""

    def __init__(self, wanted_CA: np.ndarray, covers_CMA: np.ndarray) -> None:
        self.covers_CMA = covers_CMA
        self.open_CA = wanted_CA.copy()

    def values(self) -> np.ndarray:
        result: np.ndarray = (self.open_CA[:, None, :] * self.covers_CMA).sum(axis=2)
        return result

    def choose(self, places_C: np.ndarray, open_C: np.ndarray) -> None:
        users = np.flatnonzero(open_C)
        self.open_CA[users] *= 1.0 - self.covers_CMA[users, places_C[users]]


def jaccard(members_CMG: np.ndarray) -> np.ndarray:
    """Return |a and b| / |a or b| of all pairs, (C, M, M); 0 where both have no value."""
    members = members_CMG.astype(np.float64)
    both_CMM = members @ members.transpose(0, 2, 1)
    size_CM = members.sum(axis=2)
    either_CMM = size_CM[:, :, None] + size_CM[:, None, :] - both_CMM
    return both_CMM / np.maximum(either_CMM, 1.0)


def cosine(vectors_CME: np.ndarray) -> np.ndarray:
    """Return the cosine of all pairs, (C, M, M); 0 where a vector is zero."""
    vectors = np.asarray(vectors_CME, dtype=np.float64)
    norm_CM1 = np.linalg.norm(vectors, axis=2, keepdims=True)
    unit_CME = vectors / np.where(norm_CM1 > 0, norm_CM1, 1.0)
    result: np.ndarray = unit_CME @ unit_CME.transpose(0, 2, 1)
    return result
