"""What does a caller get: which items of the wide lists that a search found, as ids and numbers?

The first k of a list, those that list rules choose, or those that a re-ranker chooses. It refuses
to know how lists are searched and where probabilities come from.

Shapes: B requests, k list length, W length of the lists that are chosen from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from genrec.calibration.lists.base import Candidates, Reranker
from genrec.decoding.lists import ListRule, select
from genrec.inference import RankedLists
from genrec.item_index import ItemIndex


@dataclass(frozen=True)
class Recommendations:
    """Ranked lists, best first. A list with fewer than k eligible items is padded at its end.

    Args:
        item_ids: (B, k) object array of external ids; None where padded.
        scores: (B, k) float64 natural log-probabilities; -inf where padded.
        probabilities: (B, k) float64 calibrated probability that the item is the next one; 0 where
            padded.
        certified: (B,) bool; the list provably holds the k best eligible items (with list rules:
            is the best list that keeps them; re-ranked: holds the k best, in another order).
        rule_costs: (B,) float64, the sum of scores that list rules or re-ranking cost; None
            without.
        preference_strength: (B,) float64, 0 to 1, how much is known about the next item: the share
            of a blind guess's surprise that the whole calibrated list takes away. It means the same
            for every user and does not depend on k (`genrec.calibration.strength`).
    """

    item_ids: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray
    certified: np.ndarray
    rule_costs: np.ndarray | None = None
    preference_strength: np.ndarray | None = None

    @property
    def expected_hits(self) -> np.ndarray:
        """Chance that the next item is in the list, (B,) float64: the sum of its probabilities."""
        total: np.ndarray = self.probabilities.sum(axis=1)
        return total

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class WideLists:
    """What a search found for B requests, to answer from.

    Args:
        index: names the rows.
        lists: (B, W), best first.
        probabilities: (B, W) float64, calibrated.
    """

    index: ItemIndex
    lists: RankedLists
    probabilities: np.ndarray

    def best(self, k: int) -> Recommendations:
        """Return the first k of each list; shorter lists are padded."""
        lists = self.lists
        certified = lists.top(k).certified
        return self._named(lists.rows, lists.scores, self.probabilities, certified, k)

    def selected(self, k: int, rules: Sequence[ListRule]) -> Recommendations:
        """Choose lists of k that keep the rules; what is left out is padded at the end."""
        lists = self.lists
        found = [
            select(rows, scores, k, rules, certified=bool(certain))
            for rows, scores, certain in zip(lists.rows, lists.scores, lists.certified, strict=True)
        ]
        places = np.full((len(found), k), -1)
        for i, selection in enumerate(found):
            places[i, : len(selection.places)] = selection.places
        certified = np.array([selection.proven for selection in found], dtype=bool)
        costs = np.array([selection.cost for selection in found], dtype=np.float64)
        return self._chosen(places, certified, costs)

    def reranked(
        self, k: int, reranker: Reranker, histories: Sequence[np.ndarray]
    ) -> Recommendations:
        """Let a re-ranker choose k; a list is certified where it holds the certified top k.

        Args:
            k: list length.
            reranker: chooses.
            histories: B arrays of item rows, oldest first.
        """
        lists = self.lists
        candidates = Candidates(lists.rows, lists.scores, self.probabilities, histories)
        found = reranker.rerank(candidates, k)
        kept = (found.places_Uk < k).all(axis=1)
        certified = lists.top(k).certified & kept
        return self._chosen(found.places_Uk, certified, found.costs_U)

    def _chosen(
        self, places: np.ndarray, certified: np.ndarray, costs: np.ndarray
    ) -> Recommendations:
        """Return the items at these places of the wide lists, (B, k), -1 = padding."""

        def chosen(values: np.ndarray, fill: float) -> np.ndarray:
            padded = np.pad(values, ((0, 0), (0, 1)), constant_values=fill)
            return np.take_along_axis(padded, places, axis=1)

        rows, scores = chosen(self.lists.rows, -1), chosen(self.lists.scores, -np.inf)
        probabilities = chosen(self.probabilities, 0.0)
        answer = self._named(rows, scores, probabilities, certified, places.shape[1])
        return replace(answer, rule_costs=costs)

    def _named(
        self,
        rows: np.ndarray,
        scores: np.ndarray,
        probabilities: np.ndarray,
        certified: np.ndarray,
        k: int,
    ) -> Recommendations:
        """Return the first k columns under the items' ids, padded where there are fewer."""
        ids = np.array([*self.index.item_ids, None], dtype=object)
        shape = (len(rows), k)
        item_ids = np.full(shape, None, dtype=object)
        all_scores, all_probabilities = np.full(shape, -np.inf), np.zeros(shape)
        got = min(k, rows.shape[1])
        item_ids[:, :got] = ids[rows[:, :got]]
        all_scores[:, :got] = scores[:, :got]
        all_probabilities[:, :got] = probabilities[:, :got]
        return Recommendations(item_ids, all_scores, all_probabilities, certified)
