"""Recommender: histories of item ids in, ranked items with calibrated probabilities out.

What a service imports. It loads a bundle and answers; it does not train, and imports neither the
trainers nor wandb nor peft.

Shapes: B requests, k list length, C candidates, N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genrec import runtime
from genrec.bundle import Bundle, load_bundle, mode_name
from genrec.calibration.base import ListContext
from genrec.calibration.lists.base import Candidates, Reranker
from genrec.calibration.strength import preference_strength
from genrec.data import Catalog
from genrec.data.rules import group_labels, matching_rows
from genrec.decoding import Boosts, CSRIndex, Scoring, score_candidates
from genrec.decoding.lists import ListRule, select
from genrec.errors import UserError
from genrec.inference import RankedLists, level_logprobs, read_batch, search
from genrec.item_index import ItemIndex
from genrec.models.base import RequestContext

log = runtime.get_logger(__name__)

Histories = Sequence[Sequence[str]]
MAX_RULES = 16
"""Expressions whose view of the index is kept ready (about 6 bytes an item each)."""


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


class Recommender:
    """Answers requests from a bundle.

    Args:
        bundle: loaded parts.
        device: torch device name; None chooses.
        scoring: what a code's probability is among (see docs/decoding.md); default what the bundle
            was calibrated for. Probabilities hold for that one only.
    """

    def __init__(
        self, bundle: Bundle, *, device: str | None = None, scoring: Scoring | None = None
    ) -> None:
        self.device = runtime.choose_device(device)
        self.index: ItemIndex = bundle.index
        self.catalog: Catalog = bundle.catalog
        self.model = bundle.model.to(self.device).eval()
        self.calibrators = bundle.calibrators
        self.width = bundle.width
        self.info: dict[str, Any] = bundle.artifact.extra
        self.fingerprint: str = bundle.artifact.fingerprint
        self.scoring: Scoring = scoring or bundle.scoring
        self._constraint = CSRIndex.from_index(bundle.index).to(self.device)
        self._views: dict[str, CSRIndex] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        scoring: Scoring | None = None,
        base: str | None = None,
    ) -> Recommender:
        """Load the bundle that `genrec run` or `genrec calibrate` wrote.

        Args:
            path: the bundle.
            device: torch device name; None chooses.
            scoring: as above.
            base: where the language model lies that the bundle's model stands on, if not where it
                was trained from; default $GENREC_BASE.

        Raises:
            ArtifactError: missing, truncated, edited, or parts that do not belong together.
        """
        return cls(load_bundle(path, base=base), device=device, scoring=scoring)

    @property
    def item_ids(self) -> list[str]:
        """The catalogue, as in the raw data, in row order."""
        return list(self.index.item_ids)

    def titles(self, item_ids: Iterable[str | None]) -> list[str | None]:
        """Return the titles of items (None for padding and for items without one)."""
        rows = [None if i is None else int(self.index.rows_of([i])[0]) for i in item_ids]
        return [None if row is None else self.catalog.titles[row] for row in rows]

    def recommend(
        self,
        histories: Histories,
        k: int = 10,
        *,
        candidates: Histories | Sequence[str] | None = None,
        exclude: Histories | Sequence[str] | None = None,
        exclude_seen: bool = True,
        rule: str | np.ndarray | None = None,
        boosts: Mapping[str, float] | None = None,
        list_rules: Sequence[ListRule] = (),
        rerank: Reranker | None = None,
        width: int | None = None,
        missing: Literal["skip", "error"] = "skip",
        times: Sequence[Sequence[float] | np.ndarray] | None = None,
        now: Sequence[float] | None = None,
        users: Sequence[str | None] | None = None,
    ) -> Recommendations:
        """Return the k most likely next items of every history.

        Args:
            histories: B histories of item ids as in the raw data, oldest first; may be empty.
            k: list length, >= 1. More than there are eligible items gives a shorter, padded list.
            candidates: the only items that may be returned: one list for all, or one per history.
            exclude: items that may not be returned: one list for all, or one per history.
            exclude_seen: leave out the items of the history.
            rule: the only items that any of these requests may get: an expression over the
                catalogue's columns ("year >= 1990 and title is not null"), kept ready for the next
                call, or one bool per catalogue row.
            boosts: item id -> natural-log units added to its score for ranking (log 2 doubles the
                odds). Scores and probabilities stay the model's; `scores` includes the boost.
            list_rules: rules about the whole list (`genrec.decoding.lists`), kept by choosing from
                the `width` best items. Groups come from `groups`.
            rerank: trades score for calibrated, rarer, more varied or fairer lists by choosing from
                the `width` best items (`genrec.calibration.lists`); not together with list rules.
                Lists are then no longer ordered by score.
            width: beam width, >= k; default the one that the bundle was calibrated at. Another
                width changes which items are found, not what an item scores.
            missing: unknown items in a history: "skip" them with one warning, or raise.
            times: seconds since 1970 at which each item of each history was taken, 0 where not
                known. Models that were trained with times need them; others do not look.
            now: seconds at which each request is made; models trained with
                `time_features: gap_recency` answer by it, or as they learned to without it.
            users: who asks, as the training data calls them (a data set of `genrec prepare`: its
                user rows, as text); None for nobody known. Models without user tokens do not look.

        Raises:
            UserError: k or width below 1, width below k, unknown items in a filter or boost (or in
                a history with missing="error"), a rule that cannot be read, rerank with list rules,
                times that are missing or do not fit the histories.
        """
        if rerank is not None and list_rules:
            raise UserError(
                "recommend: got list_rules and rerank, expected one of them. Rules choose from "
                "lists ordered by score, which re-ranked ones are not."
            )
        self._check_histories(histories)
        rows, kept = self._history_rows(histories, missing)
        context = self._context(histories, kept, times, now, users)
        width = self._check_width(k, width)
        denied = self._filter_rows(exclude, len(rows), "exclude")
        if exclude_seen:
            denied = [np.concatenate(pair) for pair in zip(rows, denied, strict=True)]
        allowed = (
            None if candidates is None else self._filter_rows(candidates, len(rows), "candidates")
        )
        # Probabilities are those of the calibrated list at the bundle's width, cut to k.
        depth = min(max(width, k), len(self.index))
        lists = search(
            self.model,
            self._view(rule),
            rows,
            width=depth,
            k=depth,
            exclude=denied if exclude_seen or exclude is not None else None,
            allow=allowed,
            boosts=self._boosts(boosts),
            scoring=self.scoring,
            context=context,
        )
        probabilities = self._probabilities(lists, rows, context, allowed, rule, exclude_seen)
        if list_rules:
            answer = self._selected(lists, probabilities, k, list_rules)
        elif rerank is not None:
            answer = self._reranked(lists, probabilities, k, rerank, rows)
        else:
            certified = lists.top(k).certified
            answer = self._answer(lists.rows, lists.scores, probabilities, certified, k)
        strength = preference_strength(probabilities, lists.num_rest)
        return replace(answer, preference_strength=strength)

    def groups(self, column: str) -> np.ndarray:
        """Return the groups of all items by a catalogue column, for list rules.

        Returns:
            (N,) int64, -1 where an item has no value; for a column of lists (N, G) bool.
        """
        return group_labels(self.catalog, column)

    def score(
        self,
        histories: Histories,
        candidates: Histories,
        *,
        times: Sequence[Sequence[float] | np.ndarray] | None = None,
        now: Sequence[float] | None = None,
        users: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Return exact log-probabilities of given items over the whole catalogue.

        Args:
            histories: B histories of item ids (unknown ones are skipped with a warning).
            candidates: B lists of item ids to score.
            times: as for `recommend`.
            now: as for `recommend`.
            users: as for `recommend`.

        Returns:
            (B, C) float64, C the longest list; shorter ones are padded with -inf.

        Raises:
            UserError: numbers of histories and lists differ, an unknown candidate, or times that
                are missing or do not fit.
        """
        self._check_histories(histories)
        if len(histories) != len(candidates):
            raise UserError(
                f"score: got {len(histories)} histories and {len(candidates)} candidate lists, "
                "expected one list per history."
            )
        rows, kept = self._history_rows(histories, "skip")
        context = self._context(histories, kept, times, now, users)
        wanted = [self.index.rows_of(items) for items in candidates]
        longest = max((len(w) for w in wanted), default=0)
        if not longest:
            return np.empty((len(rows), 0))
        rows_BC = np.full((len(rows), longest), -1, dtype=np.int64)
        for i, found in enumerate(wanted):
            rows_BC[i, : len(found)] = found
        batch = read_batch(self.model, rows, np.arange(len(rows)), context).to(self.device)
        with torch.inference_mode():
            scores = score_candidates(
                self.model,
                batch,
                self._constraint,
                torch.from_numpy(rows_BC).to(self.device),
                scoring=self.scoring,
            )
        return scores.double().cpu().numpy()

    # -- checks and conversions ---------------------------------------------------------------

    @staticmethod
    def _check_histories(histories: Any) -> None:
        if isinstance(histories, str) or any(isinstance(h, str) for h in histories):
            raise UserError(
                'histories: got text, expected a list of lists of item ids, e.g. [["50", "181"]].'
            )

    def _history_rows(
        self, histories: Histories, missing: Literal["skip", "error"]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the rows of the known items, and which places of the histories they come from."""
        if missing not in ("skip", "error"):
            raise UserError(f"missing: got {missing!r}, expected 'skip' or 'error'.")
        if missing == "error":
            found = [self.index.rows_of(h) for h in histories]
            return found, [np.arange(len(rows)) for rows in found]
        marked = [self.index.rows_of(h, missing="mark") for h in histories]
        unknown = {
            str(item)
            for history, rows in zip(histories, marked, strict=True)
            for item, row in zip(history, rows, strict=True)
            if row < 0
        }
        if unknown:
            shown = ", ".join(sorted(unknown)[:5])
            log.warning(
                "%d item(s) in the histories are not in the catalogue and were skipped: %s%s. "
                "Pass missing='error' to stop instead.",
                len(unknown),
                shown,
                " ..." if len(unknown) > 5 else "",
            )
        kept = [np.flatnonzero(rows >= 0) for rows in marked]
        return [rows[places] for rows, places in zip(marked, kept, strict=True)], kept

    def _context(
        self,
        histories: Histories,
        kept: Sequence[np.ndarray],
        times: Sequence[Sequence[float] | np.ndarray] | None,
        now: Sequence[float] | None,
        users: Sequence[str | None] | None,
    ) -> RequestContext | None:
        """Return what the model reads beside the items that were kept; None: nothing."""
        for name, given in (("times", times), ("now", now), ("users", users)):
            if given is not None and (isinstance(given, str) or len(given) != len(histories)):
                raise UserError(
                    f"{name}: got {len(given)} for {len(histories)} histories, expected one for "
                    "each."
                )
        found = None if users is None else self.model.user_rows(users)
        if not self.model.reads_times:
            return None if found is None else RequestContext(users_B=found)
        if times is None:
            raise UserError(
                "times: got none, but this model reads when items were taken. Expected seconds "
                "since 1970 for each item of each history (0 where not known): "
                "times=[[881250949, 881250991]]."
            )
        seconds = [np.asarray(row, dtype=np.float64) for row in times]
        for number, (row, history) in enumerate(zip(seconds, histories, strict=True)):
            if row.shape != (len(history),):
                raise UserError(
                    f"times[{number}]: got {row.size} times for {len(history)} items, expected one "
                    "for each item of the history, 0 where not known."
                )
            _check_seconds(f"times[{number}]", row)
        now_B = None if now is None else np.asarray(now, dtype=np.float64)
        if now_B is not None:
            _check_seconds("now", now_B)
        return RequestContext(
            [row[places].astype(np.int64) for row, places in zip(seconds, kept, strict=True)],
            None if now_B is None else now_B.astype(np.int64),
            found,
        )

    def _filter_rows(
        self, items: Histories | Sequence[str] | None, count: int, what: str
    ) -> list[np.ndarray]:
        if items is None:
            return [np.empty(0, np.int64)] * count
        if isinstance(items, str):
            raise UserError(f"{what}: got text, expected a list of item ids.")
        if all(isinstance(item, str) for item in items):
            return [self.index.rows_of(items)] * count  # type: ignore[arg-type]
        if len(items) != count:
            raise UserError(
                f"{what}: got {len(items)} lists for {count} histories, expected one list for "
                "all, or one per history."
            )
        return [self.index.rows_of(each) for each in items]

    def _check_width(self, k: int, width: int | None) -> int:
        for name, value in (("k", k), ("width", width)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}: got {value!r}, expected an integer >= 1.")
        if width is None:
            return max(self.width, k)
        if width < k:
            raise UserError(f"width: got {width}, expected at least k={k}. Raise width or lower k.")
        return width

    def _view(self, rule: str | np.ndarray | None) -> CSRIndex:
        if rule is None:
            return self._constraint
        if not isinstance(rule, str):
            return self._constraint.restricted(np.asarray(rule))
        if rule not in self._views:
            if len(self._views) >= MAX_RULES:
                self._views.pop(next(iter(self._views)))
            self._views[rule] = self._constraint.restricted(matching_rows(self.catalog, rule))
        return self._views[rule]

    def _boosts(self, boosts: Mapping[str, float] | None) -> Boosts | None:
        if not boosts:
            return None
        values_N = np.zeros(len(self.index), dtype=np.float32)
        values_N[self.index.rows_of(boosts)] = list(boosts.values())
        return Boosts(self._constraint, values_N)

    def _selected(
        self, lists: RankedLists, probabilities: np.ndarray, k: int, rules: Sequence[ListRule]
    ) -> Recommendations:
        """Choose each list from the wide one; what is left out is cut or padded at the end."""
        found = [
            select(rows, scores, k, rules, certified=bool(certain))
            for rows, scores, certain in zip(lists.rows, lists.scores, lists.certified, strict=True)
        ]
        places = np.full((len(found), k), -1)
        for i, selection in enumerate(found):
            places[i, : len(selection.places)] = selection.places
        certified = np.array([selection.proven for selection in found], dtype=bool)
        costs = np.array([selection.cost for selection in found], dtype=np.float64)
        return self._chosen(lists, probabilities, places, certified, costs)

    def _reranked(
        self,
        lists: RankedLists,
        probabilities: np.ndarray,
        k: int,
        rerank: Reranker,
        histories: Sequence[np.ndarray],
    ) -> Recommendations:
        """Let a re-ranker choose; a list is certified where it holds the certified top k."""
        found = rerank.rerank(Candidates(lists.rows, lists.scores, probabilities, histories), k)
        kept = (found.places_Uk < k).all(axis=1)
        certified = lists.top(k).certified & kept
        return self._chosen(lists, probabilities, found.places_Uk, certified, found.costs_U)

    def _chosen(
        self,
        lists: RankedLists,
        probabilities: np.ndarray,
        places: np.ndarray,
        certified: np.ndarray,
        costs: np.ndarray,
    ) -> Recommendations:
        """Return the items at these places of the wide lists, (B, k), -1 = padding."""

        def chosen(values: np.ndarray, fill: float) -> np.ndarray:
            padded = np.pad(values, ((0, 0), (0, 1)), constant_values=fill)
            return np.take_along_axis(padded, places, axis=1)

        rows, scores = chosen(lists.rows, -1), chosen(lists.scores, -np.inf)
        probabilities = chosen(probabilities, 0.0)
        answer = self._answer(rows, scores, probabilities, certified, places.shape[1])
        return replace(answer, rule_costs=costs)

    def _probabilities(
        self,
        lists: RankedLists,
        histories: Sequence[np.ndarray],
        context: RequestContext | None,
        allowed: Sequence[np.ndarray] | None,
        rule: str | np.ndarray | None,
        exclude_seen: bool,
    ) -> np.ndarray:
        """Return the calibrated probabilities of wide lists, (B, W)."""
        calibrator = self._calibrator(exclude_seen)
        if not calibrator.whole_catalogue and (allowed is not None or rule is not None):
            log.warning(
                "calibration %r learned from lists of the whole catalogue; its probabilities do "
                "not hold among candidates or under a rule. Calibrate with 'temperature' for such "
                "requests.",
                calibrator.config.name,
            )
        levels = None
        if "level_logprobs" in calibrator.needs:
            levels = level_logprobs(
                self.model,
                self._view(rule),
                histories,
                lists.rows,
                scoring=self.scoring,
                context=context,
            )
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        known = ListContext(lengths, levels)
        found: np.ndarray = calibrator.probabilities(lists.logprobs, lists.num_rest, known)
        return found

    def _calibrator(self, exclude_seen: bool) -> Any:
        name = mode_name(exclude_seen)
        if name not in self.calibrators:
            raise UserError(
                f"this bundle was calibrated for {', '.join(self.calibrators)} lists only, not for "
                f"{name} ones. Calibrate again with evaluation.masked=[true, false]."
            )
        return self.calibrators[name]

    def _answer(
        self,
        rows: np.ndarray,
        scores: np.ndarray,
        probabilities: np.ndarray,
        certified: np.ndarray,
        k: int,
    ) -> Recommendations:
        ids = np.array([*self.index.item_ids, None], dtype=object)
        shape = (len(rows), k)
        item_ids = np.full(shape, None, dtype=object)
        all_scores, all_probabilities = np.full(shape, -np.inf), np.zeros(shape)
        got = min(k, rows.shape[1])
        item_ids[:, :got] = ids[rows[:, :got]]
        all_scores[:, :got] = scores[:, :got]
        all_probabilities[:, :got] = probabilities[:, :got]
        return Recommendations(item_ids, all_scores, all_probabilities, certified)


def _check_seconds(name: str, seconds: np.ndarray) -> None:
    if seconds.size and not (np.isfinite(seconds).all() and seconds.min() >= 0):
        raise UserError(
            f"{name}: got {seconds.min()}, expected seconds since 1970, or 0 where not known."
        )
