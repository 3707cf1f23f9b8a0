"""Recommender: histories of item ids in, ranked items with calibrated probabilities out.

What a service imports. It loads a bundle and answers; it does not train, and imports neither the
trainers nor wandb nor peft. How requests are read is in `genrec.request_rows`, how lists become
answers in `genrec.answers`.

Shapes: B requests, k list length, C candidates, N items, W length of the lists that are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genrec import request_rows, runtime
from genrec.answers import Recommendations, WideLists
from genrec.bundle import Bundle, load_bundle, mode_name
from genrec.calibration.base import ListContext
from genrec.calibration.lists.base import Reranker
from genrec.calibration.strength import preference_strength
from genrec.data import Catalog
from genrec.data.rules import group_labels, matching_rows
from genrec.decoding import Boosts, CSRIndex, Scoring, score_candidates
from genrec.decoding.lists import ListRule
from genrec.errors import UserError
from genrec.inference import RankedLists, level_logprobs, read_batch, search
from genrec.item_index import ItemIndex
from genrec.models.base import RequestContext
from genrec.request_rows import Histories

log = runtime.get_logger(__name__)

MAX_RULES = 16
"""Expressions whose view of the index is kept ready (about 6 bytes an item each)."""


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
        request_rows.check_histories(histories)
        rows, kept = request_rows.history_rows(self.index, histories, missing)
        context = request_rows.request_context(self.model, histories, kept, times, now, users)
        width = request_rows.check_width(k, width, self.width)
        denied = request_rows.filter_rows(self.index, exclude, len(rows), "exclude")
        if exclude_seen:
            denied = [np.concatenate(pair) for pair in zip(rows, denied, strict=True)]
        allowed = None
        if candidates is not None:
            allowed = request_rows.filter_rows(self.index, candidates, len(rows), "candidates")
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
        wide = WideLists(self.index, lists, probabilities)
        if list_rules:
            answer = wide.selected(k, list_rules)
        elif rerank is not None:
            answer = wide.reranked(k, rerank, rows)
        else:
            answer = wide.best(k)
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
        request_rows.check_histories(histories)
        if len(histories) != len(candidates):
            raise UserError(
                f"score: got {len(histories)} histories and {len(candidates)} candidate lists, "
                "expected one list per history."
            )
        rows, kept = request_rows.history_rows(self.index, histories, "skip")
        context = request_rows.request_context(self.model, histories, kept, times, now, users)
        rows_BC = request_rows.candidate_rows(self.index, candidates)
        if not rows_BC.size:
            return np.empty(rows_BC.shape)
        wanted = torch.from_numpy(rows_BC).to(self.device)
        batch = read_batch(self.model, rows, np.arange(len(rows)), context).to(self.device)
        with torch.inference_mode():
            scores = score_candidates(
                self.model, batch, self._constraint, wanted, scoring=self.scoring
            )
        return scores.double().cpu().numpy()

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
