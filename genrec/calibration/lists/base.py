"""What does a re-ranker take and return? Candidates and facts about items in, chosen places out.

It checks, scales scores and runs the greedy choice that several methods share. What is worth
choosing is each method's own; it knows neither models nor item ids.

Shapes: U users, C users of a chunk, M candidates, k list length, N items, G groups, E width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from genrec.config import StrictConfig
from genrec.errors import UserError

CELLS = 4_000_000
"""Numbers of the largest temporary array of a chunk of users (32 MB of float64)."""
PADDING = -1
ScoreScale = Literal["scaled", "probability"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Ranked lists to choose from, wider than what is wanted.

    Args:
        rows_UM: (U, M) int catalogue rows, best first, -1 = padding at the end.
        scores_UM: (U, M) float natural-log scores, falling; padding is ignored.
        probabilities_UM: (U, M) float calibrated probabilities, where known.
        histories: U arrays of catalogue rows, oldest first; what a user's own shares come from.
    """

    rows_UM: np.ndarray
    scores_UM: np.ndarray
    probabilities_UM: np.ndarray | None = None
    histories: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows_UM)

    @property
    def real_UM(self) -> np.ndarray:
        """Which places hold an item, (U, M) bool."""
        return np.asarray(self.rows_UM) >= 0

    def select(self, start: int, stop: int) -> Candidates:
        """Return the users [start, stop)."""
        probabilities, histories = self.probabilities_UM, self.histories
        return replace(
            self,
            rows_UM=self.rows_UM[start:stop],
            scores_UM=self.scores_UM[start:stop],
            probabilities_UM=None if probabilities is None else probabilities[start:stop],
            histories=None if histories is None else histories[start:stop],
        )


@dataclass(frozen=True, eq=False)
class ItemFacts:
    """What a re-ranker may know about items; each method needs some of it.

    Args:
        groups_N: (N,) int group of each item, -1 for none; or (N, G) bool where items may belong to
            several (`Recommender.groups` makes both).
        popularity_N: (N,) training counts.
        vectors_NE: (N, E) float vectors.
    """

    groups_N: np.ndarray | None = None
    popularity_N: np.ndarray | None = None
    vectors_NE: np.ndarray | None = None

    @cached_property
    def members_NG(self) -> np.ndarray:
        """Return which item is in which group, (N, G) bool."""
        assert self.groups_N is not None
        groups = np.asarray(self.groups_N)
        if groups.ndim == 2:
            return groups.astype(bool)
        return groups[:, None] == np.arange(max(1, groups.max(initial=-1) + 1))

    @cached_property
    def shares_NG(self) -> np.ndarray:
        """Return p(g|i), (N, G + 1): an item's groups equally; the last column is "no value"."""
        members = self.members_NG.astype(np.float64)
        count_N = members.sum(1)
        none_N = (count_N == 0).astype(np.float64)
        return np.column_stack([members / np.maximum(count_N, 1)[:, None], none_N])

    def history_shares(
        self, histories: Sequence[np.ndarray], *, half_life: float | None = None
    ) -> np.ndarray:
        """Return p(g|u), the mean of p(g|i) over each history; zeros where it is empty.

        Args:
            histories: U arrays of catalogue rows, oldest first.
            half_life: an item so many places before the last one counts half as much; None: all
                items count the same.

        Returns:
            (U, G + 1) float64, the last column for items without a value.
        """
        shares_UG = np.zeros((len(histories), self.shares_NG.shape[1]))
        for user, rows in enumerate(histories):
            if not len(rows):
                continue
            age = np.arange(len(rows))[::-1]
            weights = np.ones(len(rows)) if half_life is None else 0.5 ** (age / half_life)
            shares_UG[user] = weights @ self.shares_NG[rows] / weights.sum()
        return shares_UG


@dataclass(frozen=True, eq=False)
class Reranked:
    """The chosen lists.

    Args:
        places_Uk: (U, k) int64 places among the candidates, in the order of the new list; -1 where
            a user has fewer than k candidates.
        costs_U: (U,) float64 sum of scores given up against the first k candidates (>= 0).
        hits_lost_U: (U,) float64 calibrated probability given up: how many hits fewer are to be
            expected; None where no probabilities were given.
    """

    places_Uk: np.ndarray
    costs_U: np.ndarray
    hits_lost_U: np.ndarray | None = None

    def take(self, values_UM: np.ndarray, fill: float) -> np.ndarray:
        """Return (U, k) values of the chosen places, `fill` where padded."""
        return _take(values_UM, self.places_Uk, fill)


class Bonus(Protocol):
    """What a greedy choice adds to the scores; it remembers what was chosen."""

    def values(self) -> np.ndarray:
        """Return the finite bonus of every candidate given the choice so far, (C, M)."""

    def choose(self, places_C: np.ndarray, open_C: np.ndarray) -> None:
        """Note the next choice of each user; users that are not open choose nothing."""


class Reranker(ABC):
    """Chooses and orders k of M candidates.

    Strength 0 returns the first k candidates as they are.

    Args:
        config: of the class.
        facts: about the items; those named in `needs` must be there.

    Raises:
        UserError: a fact that the method needs is missing.
    """

    Config: type[StrictConfig]
    needs: ClassVar[tuple[str, ...]] = ()
    needs_histories: ClassVar[bool] = False

    def __init__(self, config: Any = None, facts: ItemFacts | None = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.facts = facts if facts is not None else ItemFacts()
        for name in self._needed():
            if getattr(self.facts, name) is None:
                raise UserError(
                    f"{type(self).__name__}: got no {name}, expected it in the ItemFacts. Give "
                    f"ItemFacts({name}=...), one line per catalogue row."
                )

    def rerank(self, candidates: Candidates, k: int) -> Reranked:
        """Return k of every user's candidates.

        Args:
            candidates: wider lists; rows of the catalogue that the facts describe.
            k: list length, >= 1.

        Raises:
            UserError: k below 1, arrays that do not fit, scores that rise, or missing histories or
                probabilities.
        """
        self._check(candidates, k)
        places_Uk = self._places(candidates, k)
        return _costed(candidates, places_Uk)

    def _needed(self) -> tuple[str, ...]:
        return self.needs

    def _places(self, candidates: Candidates, k: int) -> np.ndarray:
        """Choose for a chunk of users at a time; memory does not grow with U."""
        chunk = max(1, CELLS // max(1, self._cells(candidates.rows_UM.shape[1])))
        parts = [
            self._choose(candidates.select(start, start + chunk), k)
            for start in range(0, len(candidates), chunk)
        ]
        return np.concatenate(parts) if parts else np.empty((0, k), np.int64)

    def _cells(self, num_candidates: int) -> int:
        """Return how many numbers the largest temporary array holds for one user."""
        groups = self.facts.groups_N is not None and "groups_N" in self._needed()
        return num_candidates * (self.facts.members_NG.shape[1] + 1 if groups else 1)

    @abstractmethod
    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        """Return the places (C, k) of a chunk of users."""

    def _check(self, candidates: Candidates, k: int) -> None:
        if not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k: got {k!r}, expected an integer >= 1.")
        rows_UM, scores_UM = np.asarray(candidates.rows_UM), np.asarray(candidates.scores_UM)
        shapes = [rows_UM.shape, scores_UM.shape]
        if candidates.probabilities_UM is not None:
            shapes.append(np.asarray(candidates.probabilities_UM).shape)
        if rows_UM.ndim != 2 or len(set(shapes)) > 1:
            raise UserError(
                f"candidates: got shapes {', '.join(map(str, shapes))}, expected one (U, M) for "
                "rows, scores and probabilities."
            )
        real_UM = rows_UM >= 0
        if (np.diff(real_UM.astype(int), axis=1) > 0).any():
            raise UserError("candidates: got padding before items, expected it at the end only.")
        known_UM = np.where(real_UM, scores_UM, -np.inf)
        if not np.isfinite(scores_UM[real_UM]).all() or (known_UM[:, 1:] > known_UM[:, :-1]).any():
            raise UserError("candidates: expected finite scores, best first.")
        for name in self._needed():
            size = len(getattr(self.facts, name))
            if rows_UM.max(initial=-1) >= size:
                raise UserError(
                    f"candidates: got row {rows_UM.max()}, but {name} has {size} lines. Give facts "
                    "about the whole catalogue that the lists come from."
                )
        self._check_histories(candidates)

    def _check_histories(self, candidates: Candidates) -> None:
        histories = candidates.histories
        if self.needs_histories and (histories is None or len(histories) != len(candidates)):
            got = "none" if histories is None else str(len(histories))
            raise UserError(
                f"histories: got {got} for {len(candidates)} lists, expected one per list: "
                f"{type(self).__name__} compares a list with the user's own history."
            )


def relevance(candidates: Candidates, scale: ScoreScale) -> np.ndarray:
    """Return what candidates are worth on a scale that can be added up, (U, M) float64, >= 0.

    Args:
        candidates: ranked lists.
        scale: "scaled", each user's scores from 0 (last candidate) to 1 (first); "probability", the
            calibrated probabilities.

    Raises:
        UserError: "probability" without probabilities.
    """
    real_UM = candidates.real_UM
    if scale == "probability":
        if candidates.probabilities_UM is None:
            raise UserError(
                "score='probability': got candidates without probabilities. Give calibrated "
                "probabilities, or use score='scaled'."
            )
        return np.where(real_UM, candidates.probabilities_UM, 0.0)
    scores_UM = np.asarray(candidates.scores_UM, dtype=np.float64)
    low_U1 = np.where(real_UM, scores_UM, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    high_U1 = np.where(real_UM, scores_UM, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    span_U1 = np.where(np.isfinite(high_U1), high_U1, 0.0) - np.where(
        np.isfinite(low_U1), low_U1, 0.0
    )
    safe_UM = np.where(real_UM, scores_UM - np.where(np.isfinite(low_U1), low_U1, 0.0), 0.0)
    scaled_UM: np.ndarray = safe_UM / np.where(span_U1 > 0, span_U1, 1.0)
    return scaled_UM


def greedy(
    relevance_CM: np.ndarray, real_CM: np.ndarray, k: int, strength: float, bonus: Bonus
) -> np.ndarray:
    """Choose k candidates one after the other: the best (1 - strength) relevance + strength bonus.

    Equal values go to the better ranked candidate, so strength 0 is the identity.

    Returns:
        (C, k) int64 places, -1 where nothing is left.
    """
    left_CM = real_CM.copy()
    places_Ck = np.full((len(left_CM), k), PADDING, dtype=np.int64)
    users = np.arange(len(left_CM))
    for step in range(min(k, left_CM.shape[1])):
        value_CM = (1.0 - strength) * relevance_CM + strength * bonus.values()
        best_C = np.where(left_CM, value_CM, -np.inf).argmax(axis=1)
        open_C = left_CM[users, best_C]
        places_Ck[open_C, step] = best_C[open_C]
        left_CM[users[open_C], best_C[open_C]] = False
        bonus.choose(best_C, open_C)
    return places_Ck


def sorted_places(values_UM: np.ndarray, real_UM: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k largest values, ties by rank; -1 where there are fewer, (U, k)."""
    values_UM = np.where(real_UM, values_UM, -np.inf)
    order_UM = np.argsort(-values_UM, axis=1, kind="stable")[:, :k]
    order_UM = np.where(np.take_along_axis(real_UM, order_UM, axis=1), order_UM, PADDING)
    missing = k - order_UM.shape[1]
    return np.pad(order_UM, ((0, 0), (0, missing)), constant_values=PADDING).astype(np.int64)


def first_places(candidates: Candidates, k: int) -> np.ndarray:
    """Return the first k places of every list, -1 where it is shorter, (U, k)."""
    return sorted_places(np.asarray(candidates.scores_UM), candidates.real_UM, k)


def _take(values_UM: np.ndarray, places_Uk: np.ndarray, fill: float) -> np.ndarray:
    padded = np.pad(np.asarray(values_UM), ((0, 0), (0, 1)), constant_values=fill)
    return np.take_along_axis(padded, places_Uk, axis=1)  # -1 is the padded column


def _costed(candidates: Candidates, places_Uk: np.ndarray) -> Reranked:
    first_Uk = first_places(candidates, places_Uk.shape[1])

    def given_up(values_UM: np.ndarray) -> np.ndarray:
        # Sorted before summing, so that the same items in another order cost exactly nothing.
        best_U, got_U = (
            np.sort(_take(values_UM, places, 0.0), axis=1).sum(axis=1)
            for places in (first_Uk, places_Uk)
        )
        return np.maximum(best_U - got_U, 0.0)

    probabilities = candidates.probabilities_UM
    lost_U = None if probabilities is None else given_up(np.asarray(probabilities, np.float64))
    scores_UM = np.where(candidates.real_UM, candidates.scores_UM, 0.0)
    return Reranked(places_Uk, given_up(scores_UM), lost_U)
