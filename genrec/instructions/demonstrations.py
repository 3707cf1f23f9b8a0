"""Which training users resemble a history, so that a prompt can show what they did next?

For models that stay as they are (few-shot prompts). Demonstrations come from training interactions
and from nothing else: the item that a demonstration answers with is the last training item of its
user. It knows no models.

Shapes: U users, N items, E width of item vectors, B histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from genrec.data.interactions import Interactions
from genrec.errors import UserError
from genrec.instructions.templates import Piece, joined


@dataclass(frozen=True)
class Demonstration:
    """What a training user had, and what came next: item rows."""

    user_row: int
    history: tuple[int, ...]
    target: int


class Demonstrations:
    """Finds training users like a history.

    Args:
        interactions: training interactions only (`Interactions.training()`).
        by: "overlap": cosine of the sets of items, rare items counting more; "vectors": cosine of
            the mean item vectors.
        vectors: (N, E), for "vectors".
        max_history: items of a demonstration's history at most.
        answers: (N,) bool, items that a demonstration may answer with; None: all.

    Raises:
        UserError: interactions that are not of training, vectors that are missing or do not fit, or
            no user with two interactions.
    """

    def __init__(
        self,
        interactions: Interactions,
        *,
        by: Literal["overlap", "vectors"] = "overlap",
        vectors: np.ndarray | None = None,
        max_history: int = 10,
        answers: np.ndarray | None = None,
    ) -> None:
        if interactions.splits.any():
            raise UserError(
                "Demonstrations: got interactions of validation or test, expected those of "
                "training. Pass interactions.training()."
            )
        counts = np.diff(interactions.offsets)
        self._users = np.flatnonzero(counts >= 2)
        if answers is not None:
            last = interactions.item_rows[interactions.offsets[1:][self._users] - 1]
            self._users = self._users[np.asarray(answers, bool)[last]]
        if not len(self._users):
            raise UserError(
                "Demonstrations: got no user with two training interactions and an answer to "
                "show, expected at least one to learn from."
            )
        self._interactions, self._max_history = interactions, max_history
        self._vectors = self._checked(vectors) if by == "vectors" else None
        holders = np.bincount(interactions.item_rows, minlength=interactions.num_items)
        self._rarity_N = np.log1p(len(self._users) / np.maximum(holders, 1))
        self._keys = self._represented([self._sequence(int(u))[:-1] for u in self._users])

    def find(self, histories: Sequence[np.ndarray], count: int) -> list[list[Demonstration]]:
        """Return the most similar users of each history, the most similar last (next to the ask).

        Users whose whole training sequence stands in the history as it is are left out: it would be
        the same person. Ties are decided by the user's row.

        Args:
            histories: B arrays of item rows, oldest first.
            count: demonstrations of each; fewer where there are no more users.
        """
        queries = self._represented([np.asarray(h, np.int64) for h in histories])
        similarity_BU = queries @ self._keys.T
        if sparse.issparse(similarity_BU):
            similarity_BU = similarity_BU.toarray()
        found = []
        for history, row in zip(histories, np.asarray(similarity_BU), strict=True):
            chosen: list[Demonstration] = []
            for place in np.lexsort((self._users, -row)):
                if len(chosen) == count:
                    break
                sequence = self._sequence(int(self._users[place]))
                if not _stands_in(sequence, np.asarray(history)):
                    chosen.append(self._demonstration(int(self._users[place]), sequence))
            found.append(chosen[::-1])
        return found

    def _sequence(self, user: int) -> np.ndarray:
        return self._interactions.user(user).astype(np.int64)

    def _demonstration(self, user: int, sequence: np.ndarray) -> Demonstration:
        history = sequence[:-1][-self._max_history :]
        return Demonstration(user, tuple(history.tolist()), int(sequence[-1]))

    def _represented(self, histories: Sequence[np.ndarray]) -> np.ndarray | sparse.csr_array:
        """Return unit vectors of histories: (B, N) sparse, or (B, E)."""
        rows = np.repeat(np.arange(len(histories)), [len(np.unique(h)) for h in histories])
        items = np.concatenate([np.unique(h) for h in histories] or [np.empty(0, np.int64)])
        items = items.astype(np.int64)
        shape = (len(histories), self._interactions.num_items)
        sets = sparse.csr_array((np.ones(len(items)), (rows, items)), shape=shape)
        if self._vectors is not None:
            means = sets @ self._vectors
            return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        weighted = sets * self._rarity_N[None]
        weighted = sparse.csr_array(weighted)
        norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).reshape(-1))
        return sparse.csr_array(sparse.diags_array(1 / np.maximum(norms, 1e-12)) @ weighted)

    def _checked(self, vectors: np.ndarray | None) -> np.ndarray:
        num_items = self._interactions.num_items
        if vectors is None or len(vectors) != num_items:
            got = "none" if vectors is None else f"{len(vectors)}"
            raise UserError(
                f"Demonstrations: got {got} item vectors, expected one for each of {num_items} "
                "items. Pass vectors, or by='overlap'."
            )
        return np.asarray(vectors, np.float64)


def few_shot(examples: Sequence[Sequence[Piece]], question: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return a prompt that shows examples before it asks, an empty line between them.

    Args:
        examples: pieces of each, with its answer.
        question: pieces of the prompt.
    """
    pieces: list[Piece] = []
    for example in examples:
        pieces += [*example, "\n\n"]
    return joined([*pieces, *question])


def _stands_in(sequence: np.ndarray, history: np.ndarray) -> bool:
    size = len(sequence)
    if size > len(history):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(history, size)
    return bool((windows == sequence).all(1).any())
