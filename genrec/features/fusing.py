"""Fusing: how vectors of several modalities become one, with items that lack some of them.

Plain functions on arrays. A zero row means "missing", and no statistic looks at it.

Shapes: N items, P parts, E_p width of part p, E width of the result, Q items of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genrec.features.collaborative import WINDOW, cooccurrence, ppmi
from genrec.runtime import get_logger, progress

if TYPE_CHECKING:
    from genrec.data import Interactions

log = get_logger(__name__)

NEIGHBOURS = 10
SAMPLED_ITEMS = 2000
IMPUTED_FROM = 5
CHUNK = 512


def present(part: np.ndarray) -> np.ndarray:
    """Return which items have this modality, (N,) bool."""
    has: np.ndarray = np.any(part, axis=1)
    return has


@dataclass(frozen=True)
class Scale:
    """How a part is scaled: subtract, divide, then rows of length 1; for `none` not at all.

    Args:
        mean: (E_p,) of the items that have the part.
        spread: (E_p,) likewise; dimensions at 0 become 0.
        scaling: "center", "standardize" or "none".
    """

    mean: np.ndarray
    spread: np.ndarray
    scaling: str

    @classmethod
    def of(cls, part: np.ndarray, scaling: str) -> Scale:
        """Return the scale of a part (N, E_p), from the items that have it."""
        mean, spread = np.zeros(part.shape[1]), np.ones(part.shape[1])
        if scaling != "none":
            rows = part.astype(np.float64)[present(part)]
            if len(np.unique(rows, axis=0)) > 1:  # a constant part keeps its direction
                mean = rows.mean(axis=0)
                if scaling == "standardize":
                    spread = (rows - mean).std(axis=0)
        return cls(mean, spread, scaling)

    def scaled(self, part: np.ndarray) -> np.ndarray:
        """Return a part so scaled, (N, E_p) float64; missing rows stay zero."""
        result = part.astype(np.float64)
        if self.scaling == "none":
            return result
        has = present(part)
        rows = result[has] - self.mean
        rows = np.divide(rows, self.spread, out=np.zeros_like(rows), where=self.spread > 1e-12)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        result[has] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
        return result


def imputed(parts: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """Return the parts with missing rows filled in from an item's neighbours.

    A missing row becomes the mean of that part over the 5 items that have it and are most similar
    in what the item does have, scaled to the mean length of the part. Left at zero, items that lack
    a modality would be each other's neighbours because of the gap. An item that lacks every part
    stays as it is.

    Args:
        parts: scaled vectors (N, E_p).
        weights: of the parts in the similarity.
    """
    result = [part.copy() for part in parts]
    has_NP = np.stack([present(part) for part in parts], axis=1)
    seen_with = concatenate(parts, np.maximum(weights, 1e-9))
    for number, part in enumerate(parts):
        known = np.flatnonzero(has_NP[:, number])
        lacking = np.flatnonzero(~has_NP[:, number] & has_NP.any(axis=1))
        if not len(known) or not len(lacking):
            continue
        length = np.linalg.norm(part[known], axis=1).mean()
        with progress(f"Filling in part {number + 1}", len(lacking)) as advance:
            for start in range(0, len(lacking), CHUNK):
                rows = lacking[start : start + CHUNK]
                means = part[_nearest(seen_with, rows, known)].mean(axis=1)
                norms = np.linalg.norm(means, axis=1, keepdims=True)
                scale = np.divide(length, norms, out=np.zeros_like(norms), where=norms > 0)
                result[number][rows] = means * scale
                advance(len(rows))
    return result


def _nearest(vectors: np.ndarray, rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return the items of `among` that are nearest to `rows` by inner product, (Q, <= 5)."""
    similar = vectors[rows] @ vectors[among].T
    k = min(IMPUTED_FROM, len(among))
    nearest: np.ndarray = among[np.argpartition(-similar, k - 1, axis=1)[:, :k]]
    return nearest


def concatenate(parts: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Return the parts side by side, each times the root of its weight, (N, sum of E_p).

    With rows of length 1 the squared distance of two items is the weighted mean of their squared
    distances in each part. An item that lacks parts is scaled up by the root of the weight that it
    has, so that it is as long as the others.
    """
    has_NP = np.stack([present(part) for part in parts], axis=1)
    weight_N = has_NP @ weights
    scale_N = np.divide(weights.sum(), weight_N, out=np.zeros_like(weight_N), where=weight_N > 0)
    blocks = [part * np.sqrt(weight) for part, weight in zip(parts, weights, strict=True)]
    joined: np.ndarray = np.concatenate(blocks, axis=1) * np.sqrt(scale_N)[:, None]
    return joined


def principal_components(vectors: np.ndarray, width: int, *, seed: int) -> np.ndarray:
    """Return the first components (N, E <= width), fitted on rows that are not zero."""
    from sklearn.decomposition import PCA

    has = present(vectors)
    width = min(width, vectors.shape[1], int(has.sum()))
    result = np.zeros((len(vectors), width))
    if has.sum() < 2:  # one item has no direction of variance
        return result
    result[has] = PCA(width, svd_solver="auto", random_state=seed).fit_transform(vectors[has])
    return result


def weighted_sum(
    parts: Sequence[np.ndarray], weights: np.ndarray, width: int, *, seed: int
) -> np.ndarray:
    """Return the weighted mean of the parts that an item has, (N, E <= width).

    Components of different parts have nothing to do with each other, so each part is rotated onto
    the first one first (orthogonal Procrustes over the items that have both).
    """
    width = min(width, max(min(part.shape[1], int(present(part).sum())) for part in parts))
    aligned = [_padded(principal_components(part, width, seed=seed), width) for part in parts]
    total, weight_N = np.zeros_like(aligned[0]), np.zeros(len(aligned[0]))
    for part, weight in zip(aligned, weights, strict=True):
        total += weight * (part @ _rotation(part, aligned[0]))
        weight_N += weight * present(part)
    return np.divide(total, weight_N[:, None], out=total, where=weight_N[:, None] > 0)


def _padded(vectors: np.ndarray, width: int) -> np.ndarray:
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def _rotation(part: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrix R that brings part @ R closest to `onto`."""
    from scipy.linalg import orthogonal_procrustes

    both = present(part) & present(onto)
    if part is onto or not both.any():
        return np.eye(part.shape[1])
    rotation: np.ndarray = orthogonal_procrustes(part[both], onto[both])[0]
    return rotation


def agreement_weights(
    parts: Sequence[np.ndarray], interactions: Interactions, *, seed: int
) -> np.ndarray:
    """Return weights (P,), summing to 1, by how far each part agrees with co-occurrence.

    The figure of a part is the mean PPMI of items with their nearest neighbours in that part, over
    the mean PPMI of all pairs of items that have the part, less 1 (chance).

    Args:
        parts: scaled vectors (N, E_p).
        interactions: training interactions of the N items.
        seed: of the sample of items whose neighbours are looked up.
    """
    matrix = ppmi(cooccurrence(interactions, WINDOW))
    seen = interactions.counts() > 0
    lifts = np.array([_lift(part, matrix, seen, seed) for part in parts])
    if not lifts.any():
        log.warning(
            "fusion: no part's neighbours occur together more often than chance; the parts get "
            "equal weights. Give features.weights as numbers if you know better."
        )
        return np.full(len(parts), 1 / len(parts))
    weights: np.ndarray = lifts / lifts.sum()
    return weights


def _lift(part: np.ndarray, matrix: object, seen: np.ndarray, seed: int) -> float:
    items = np.flatnonzero(present(part) & seen)
    if len(items) < 3:
        return 0.0
    among = matrix[items][:, items]  # type: ignore[index]
    chance = among.sum() / (len(items) * (len(items) - 1))
    if not chance:
        return 0.0
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(items))[:SAMPLED_ITEMS]
    vectors, k = part[items], min(NEIGHBOURS, len(items) - 1)
    similar = vectors[chosen] @ vectors.T
    similar[np.arange(len(chosen)), chosen] = -np.inf
    nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
    together = among[np.repeat(chosen, k), nearest.reshape(-1)]
    return max(0.0, float(np.mean(together)) / float(chance) - 1)
