"""How does a language model that knows no codes recommend items? It writes titles.

Prompts are titles of a history, with demonstrations of training users before them if wanted. What
the model writes is grounded in the catalogue: by the tree of all titles (nothing else can be
written), by BM25 or by the distance of embeddings. It trains nothing and reads no item's codes.

Shapes: B histories, N items, k list length, M texts of a history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from genrec import runtime
from genrec.asking import Asker
from genrec.config import StrictConfig
from genrec.data import Interactions
from genrec.decoding import beam_search
from genrec.decoding.free_text import TextTree
from genrec.decoding.text_grounding import BM25, by_turns, distance_scores, round_robin
from genrec.errors import UserError
from genrec.instructions.demonstrations import Demonstrations, few_shot
from genrec.instructions.templates import Piece

TASK = "titles_to_title"
Answer = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


class TitleConfig(StrictConfig):
    """How titles are asked for and grounded."""

    grounding: Literal["tree", "bm25", "distance"] = "tree"
    """tree: nothing but titles of the catalogue can be written (as GenRec, with a constraint).
    bm25: texts are queries (GPT4Rec, CALRec). distance: embeddings of text and titles (BIGRec)."""
    num_demonstrations: int = Field(default=0, ge=0)
    """Training users shown in the prompt, with what they did next."""
    similar_by: Literal["overlap", "vectors"] = "overlap"
    """How demonstrations are found."""
    width: int = Field(default=20, ge=1)
    """tree: beam width."""
    num_texts: int = Field(default=5, ge=1)
    """bm25: texts written per history; distance takes the most probable of them."""
    temperature: float | None = Field(default=None, gt=0)
    """bm25, distance: null writes by beam search; a number draws."""
    max_tokens: int = Field(default=32, ge=1)
    """bm25, distance: tokens of a text."""
    merge: Literal["by_turns", "round_robin"] = "by_turns"
    """bm25: an equal part of the list from each text (GPT4Rec), or the best item of each text and
    then by score (CALRec)."""
    k1: float = Field(default=1.2, ge=0)
    """bm25: how soon a repeated word saturates."""
    b: float = Field(default=0.75, ge=0, le=1)
    """bm25: how much long titles are held back."""
    gamma: float = Field(default=0.0, ge=0)
    """distance: how much popularity in training counts."""
    seed: int = 0
    """Of drawn texts."""


@dataclass(frozen=True)
class TitleLists:
    """Recommended items.

    Args:
        rows: (B, k) int64 item rows, -1 where padded.
        scores: (B, k) float64, -inf where padded; "tree": natural log-probability of the title,
            "distance": minus the scaled distance, "bm25": minus the place in the list.
        texts: what was written for each history; () for "tree".
    """

    rows: np.ndarray
    scores: np.ndarray
    texts: tuple[tuple[str, ...], ...]


class TitleRecommender:
    """Recommends items by their titles.

    Args:
        asker: the model and the catalogue.
        training: training interactions: demonstrations and popularity come from there; None where
            the settings need neither.
        config: settings.

    Raises:
        UserError: a catalogue without titles, or demonstrations that cannot be found.
    """

    def __init__(
        self, asker: Asker, training: Interactions | None, config: TitleConfig | None = None
    ) -> None:
        self.asker, self.config = asker, config or TitleConfig()
        if training is None and (self.config.num_demonstrations or self.config.gamma):
            raise UserError(
                "TitleRecommender: got no interactions for num_demonstrations="
                f"{self.config.num_demonstrations} and gamma={self.config.gamma}, expected those "
                "of training. Pass interactions.training(), or set both to 0."
            )
        titles = asker.facts.titles
        self._rows = [row for row, title in enumerate(titles) if title]
        if not self._rows:
            raise UserError(
                "TitleRecommender: got a catalogue without titles, expected a column 'title'. Ask "
                "for semantic IDs instead."
            )
        self._titles = [titles[row] for row in self._rows]
        self._popularity = None if training is None else training.counts()[self._rows]
        self._demonstrations: Demonstrations | None = None
        if training is not None and self.config.num_demonstrations:
            self._demonstrations = Demonstrations(
                training,
                by=self.config.similar_by,
                vectors=asker.catalog.vectors,
                max_history=asker.model.config.max_history,
                answers=np.array([bool(title) for title in titles]),
            )
        self._tree: TextTree | None = None
        self._bm25: BM25 | None = None
        self._embedded: np.ndarray | None = None
        if self.config.grounding == "bm25":
            self._bm25 = BM25(self._titles, k1=self.config.k1, b=self.config.b)
        elif self.config.grounding == "distance":
            distinct = {title: place for place, title in enumerate(dict.fromkeys(self._titles))}
            embedded = asker.embed([f" {title}" for title in distinct])
            self._embedded = embedded[[distinct[title] for title in self._titles]]
        else:
            self._build_tree()

    def prompts(self, histories: Sequence[np.ndarray]) -> list[tuple[Piece, ...]]:
        """Return what is asked for each history of item rows, demonstrations first."""
        questions = [self._question(history) for history in histories]
        if self._demonstrations is None:
            return questions
        found = self._demonstrations.find(histories, self.config.num_demonstrations)
        titles = self.asker.facts.titles
        shown = [
            [(*self._question(np.array(d.history)), f" {titles[d.target]}") for d in demonstrations]
            for demonstrations in found
        ]
        return [few_shot(s, question) for s, question in zip(shown, questions, strict=True)]

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        batch_size: int = 8,
    ) -> TitleLists:
        """Return k items for each history of item rows, oldest first.

        Items with one title have one score and are listed by row. Items without a title are never
        recommended.

        Args:
            histories: B arrays.
            k: list length.
            exclude_seen: leave out the items of the history (of each, not of its title).
            batch_size: histories asked together.
        """
        if k < 1:
            raise UserError(f"k: got {k}, expected an integer >= 1. Set e.g. k=10.")
        rows, scores = (
            np.full((len(histories), k), -1, np.int64),
            np.full((len(histories), k), -np.inf),
        )
        texts: list[tuple[str, ...]] = []
        with runtime.progress("titles", len(histories)) as advance:
            for start in range(0, len(histories), batch_size):
                part = histories[start : start + batch_size]
                most = k + max((len(h) for h in part), default=0) if exclude_seen else k
                for found, values, written in self._answers(part, most):
                    place = len(texts)
                    seen = set(histories[place].tolist()) if exclude_seen else set()
                    kept = [n for n, row in enumerate(found) if row >= 0 and row not in seen][:k]
                    rows[place, : len(kept)] = found[kept]
                    scores[place, : len(kept)] = values[kept]
                    texts.append(written)
                advance(len(part))
        return TitleLists(rows, scores, tuple(texts))

    def _question(self, history: np.ndarray) -> tuple[Piece, ...]:
        titles = self.asker.titles(history.tolist()) or "nothing yet"
        return self.asker.word(TASK, {"titles": titles})

    def _answers(self, histories: Sequence[np.ndarray], k: int) -> list[Answer]:
        prompts = self.prompts(histories)
        if self._tree is not None:
            return self._from_tree(self._tree, prompts, k)
        written = self.asker.texts(
            prompts,
            num_texts=self.config.num_texts,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed,
        )
        if self._bm25 is not None:
            return [self._from_queries(self._bm25, texts, k) for texts in written]
        assert self._embedded is not None
        best = self.asker.embed([f" {texts[0][0]}" for texts in written])
        popularity = self._popularity if self.config.gamma else None
        scores_BN = distance_scores(
            best, self._embedded, popularity_N=popularity, gamma=self.config.gamma
        )
        answers: list[Answer] = []
        for scores, texts in zip(scores_BN, written, strict=True):
            order = np.lexsort((np.arange(len(scores)), -scores))[:k]
            answers.append((np.array(self._rows)[order], scores[order], (texts[0][0],)))
        return answers

    def _from_queries(self, bm25: BM25, texts: Sequence[tuple[str, float]], k: int) -> Answer:
        scores_MN = bm25.scores([text for text, _ in texts])
        if self.config.merge == "by_turns":
            places = by_turns(scores_MN, k)
        else:
            places = round_robin(scores_MN, np.array([logprob for _, logprob in texts]), k)
        rows = np.where(places >= 0, np.array(self._rows)[places], -1)
        return rows, -np.arange(k, dtype=np.float64), tuple(text for text, _ in texts)

    def _build_tree(self) -> None:
        """Lay out the different titles, and remember which items have each."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, title in zip(self._rows, self._titles, strict=True):
            groups.setdefault(tuple(self.asker.encoder.text(f" {title}")), []).append(row)
        self._groups = list(groups.values())
        self._tree = TextTree(list(groups), self.asker.ends[0]).to(self.asker.model.device)

    @torch.inference_mode()
    def _from_tree(
        self, tree: TextTree, prompts: Sequence[Sequence[Piece]], k: int
    ) -> list[Answer]:
        width = max(self.config.width, k)
        beams = beam_search(
            tree.walker(self.asker.model),
            self.asker.prompts(prompts),
            tree.constraint,
            width=width,
            k=k,
        )
        answers: list[Answer] = []
        for chosen, logprobs in zip(
            beams.rows_Bk.tolist(), beams.logprobs_Bk.tolist(), strict=True
        ):
            pairs = [
                (row, logprob)
                for place, logprob in zip(chosen, logprobs, strict=True)
                if place >= 0
                for row in self._groups[place]
            ][:k]
            rows = np.array([row for row, _ in pairs], np.int64)
            answers.append((rows, np.array([logprob for _, logprob in pairs]), ()))
        return answers
