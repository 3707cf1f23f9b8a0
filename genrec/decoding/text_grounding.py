"""Which items are meant by text that a model wrote? BM25, distance of embeddings, and merged lists.

Scores of items come out; how the text was written is in `free_text.py`. N-grams of several facets
have a way of their own (`grounding.py`).

Shapes: M texts written for one request, N items, E width of embeddings, k list length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from genrec.errors import UserError

FloatArray = np.ndarray
IntArray = np.ndarray
_WORDS = re.compile(r"\w+")


class BM25:
    """Okapi BM25 over the texts of items (Robertson & Zaragoza 2009; as GPT4Rec uses it).

    Args:
        texts: N texts; words are runs of letters and digits, in lower case.
        k1: how soon a repeated word saturates.
        b: how much long texts are held back, 0 to 1.

    Raises:
        UserError: settings out of range, or no text with a word.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        if not (k1 >= 0 and 0 <= b <= 1):
            raise UserError(f"BM25: got k1={k1}, b={b}, expected k1 >= 0 and 0 <= b <= 1.")
        words = [_words(text) for text in texts]
        self._places = {w: n for n, w in enumerate(sorted({w for ws in words for w in ws}))}
        if not self._places:
            raise UserError(f"BM25: got {len(texts)} texts without a word, expected titles.")
        counts = self._counts(words)
        lengths_N = np.asarray(counts.sum(1)).reshape(-1)
        size_N = k1 * (1 - b + b * lengths_N / lengths_N.mean())
        documents = np.bincount(counts.indices, minlength=counts.shape[1])
        rarity = np.log1p((len(texts) - documents + 0.5) / (documents + 0.5))
        frequency = counts.data
        rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        weights = frequency * (k1 + 1) / (frequency + size_N[rows])
        counts.data = weights * rarity[counts.indices]
        self._weights = counts

    def scores(self, queries: Sequence[str]) -> FloatArray:
        """Return how well each text fits each query, (M, N) float64; 0 without a common word."""
        found: FloatArray = (self._counts([_words(q) for q in queries]) @ self._weights.T).toarray()
        return found

    def _counts(self, texts: Sequence[Sequence[str]]) -> sparse.csr_array:
        pairs = [
            (row, self._places[word])
            for row, words in enumerate(texts)
            for word in words
            if word in self._places
        ]
        rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
        shape = (len(texts), len(self._places))
        return sparse.csr_array((np.ones(len(pairs)), (rows, columns)), shape=shape)


def distance_scores(
    written_ME: FloatArray,
    items_NE: FloatArray,
    *,
    popularity_N: FloatArray | None = None,
    gamma: float = 0.0,
) -> FloatArray:
    """Return minus the distance of items to what was written, as BIGRec ranks, (M, N) float64.

    Euclidean distances are scaled to [0, 1] per text and divided by (1 + popularity)^gamma, with
    popularity scaled to [0, 1] (Bao et al. 2023, equations 2 and 3).

    Args:
        written_ME: embeddings of texts.
        items_NE: embeddings of items, made in the same way.
        popularity_N: of items; None with gamma 0.
        gamma: how much popularity counts; choose one on validation, for all metrics.
    """
    if gamma and popularity_N is None:
        raise UserError(f"distance: got gamma={gamma} without popularity, expected both or none.")
    written_ME, items_NE = np.asarray(written_ME, float), np.asarray(items_NE, float)
    squares = (written_ME**2).sum(1)[:, None] + (items_NE**2).sum(1)
    distance_MN = np.sqrt(np.maximum(squares - 2 * written_ME @ items_NE.T, 0.0))
    scaled_MN = np.round(_unit(distance_MN), 6)  # equal texts are equally far, however summed up
    if popularity_N is not None:
        scaled_MN = scaled_MN / (1 + _unit(np.asarray(popularity_N, float)[None])) ** gamma
    found: FloatArray = -scaled_MN
    return found


def by_turns(scores_MN: FloatArray, k: int) -> IntArray:
    """Return k items, an equal part from each text in the order of the texts, (k,) int64.

    Items that an earlier text gave are skipped; texts that have nothing more leave their part to
    the later ones (GPT4Rec, Li et al. 2023, section 3.3). Only items with a score above the lowest
    are taken for one; -1 pads.
    """
    chosen: list[int] = []
    part = -(-k // max(len(scores_MN), 1))
    for number, scores in enumerate(scores_MN):
        order = _best(scores)
        room = min(part * (number + 1), k) - len(chosen)
        chosen += [row for row in order if row not in set(chosen)][: max(room, 0)]
    return _padded(chosen, k)


def round_robin(scores_MN: FloatArray, logprobs_M: FloatArray, k: int) -> IntArray:
    """Return k items: the best one of each text first, then by score, (k,) int64.

    Scores are scaled to [0, 1] per text and weighted with the texts' probabilities relative to the
    best text; an item's score is its best one (CALRec, Li et al. 2024, quasi-round-robin).
    """
    if not len(scores_MN):
        return _padded([], k)
    weights_M = np.exp(np.asarray(logprobs_M) - np.max(logprobs_M))
    weighted_MN = _unit(scores_MN) * weights_M[:, None]
    firsts = [
        order[0] for n in np.argsort(-weights_M, kind="stable") if (order := _best(scores_MN[n]))
    ]
    rest = _best(weighted_MN.max(0))
    return _padded(list(dict.fromkeys([*firsts, *rest])), k)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _unit(values_MN: FloatArray) -> FloatArray:
    """Return values scaled to [0, 1] per row, 0 where all are equal."""
    low, high = values_MN.min(1, keepdims=True), values_MN.max(1, keepdims=True)
    scaled: FloatArray = (values_MN - low) / np.where(high > low, high - low, 1.0)
    return scaled


def _best(scores_N: FloatArray) -> list[int]:
    """Return rows by falling score, ties by row, without those that have the lowest of all."""
    order = np.lexsort((np.arange(len(scores_N)), -scores_N))
    found: list[int] = order[scores_N[order] > scores_N.min()].tolist()
    return found


def _padded(rows: Sequence[int], k: int) -> IntArray:
    padded = np.full(k, -1, dtype=np.int64)
    padded[: len(rows[:k])] = rows[:k]
    return padded
