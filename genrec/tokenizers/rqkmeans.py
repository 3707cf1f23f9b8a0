"""RQ-KMeans: level after level of k-means on what the levels before left over (OneRec, 2502.18965).

No network, no dead codes, the same codes for the same seed: the default tokenizer. It does not know
how codes become unique (`collisions.py`).

Shapes: N fitted items, M encoded items, L levels, K codes, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field

from genrec.runtime import get_logger, progress
from genrec.tokenizers.base import (
    FloatArray,
    IntArray,
    ItemTokenizer,
    checked_vectors,
    count_distinct,
    not_fitted,
    require_distinct,
)
from genrec.tokenizers.quantization.codebook_size import CodebookConfig
from genrec.tokenizers.quantization.kmeans import (
    CHUNK,
    Clusters,
    balanced_kmeans,
    kmeans,
    minibatch_kmeans,
    nearest,
    squared_distances,
    subtract,
)

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)


class RQKMeans(ItemTokenizer):
    """Residual k-means: level l holds the centroid nearest to x minus the centroids so far.

    Args:
        config: see `RQKMeans.Config`.
    """

    class Config(CodebookConfig):
        """Settings of RQ-KMeans."""

        name: Literal["rqkmeans"] = "rqkmeans"
        """Name in the registry."""
        num_levels: int = Field(default=3, ge=1)
        """Number of codes of an item, L (OneRec: 3)."""
        balanced: bool = False
        """Give every code of a level equally many fitted items, within one (OneRec: true). New
        items take the nearest code."""
        normalize: bool = False
        """Scale vectors to length 1 first (the feature extractors do so by default)."""
        num_iterations: int = Field(default=25, ge=1)
        """Upper bound on k-means iterations (above `minibatch_above` items: passes) per level."""
        minibatch_above: int = Field(default=500_000, ge=1)
        """Fit by mini-batches when there are more items than this (never if balanced): several
        times faster at a million items, with an error about 1% higher."""
        seed: int = Field(default=0, ge=0)
        """Seed of the first centroids."""

    config: RQKMeans.Config

    def __init__(self, config: RQKMeans.Config) -> None:
        super().__init__(config)
        self._asked = config  # before `fit` chose the codebook size
        self._codebooks: list[FloatArray] = []
        self._assigned = _Assigned.none(config.num_levels)

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Cluster the residuals level by level.

        When fewer different residuals than codes are left at a level after the first (small
        catalogues), that level gets one code for each of them, and a warning says so.

        Raises:
            UserError: fewer different vectors than codes.
        """
        self.config = config = self._asked.for_items(len(catalog))
        inputs = self.inputs(catalog)
        require_distinct(inputs, config.codebook_size)
        residuals = inputs.copy()
        codebooks, labels = [], []
        with progress("RQ-KMeans levels", config.num_levels) as advance:
            for level in range(config.num_levels):
                clusters = self._cluster(residuals, level)
                subtract(residuals, clusters.centroids, clusters.labels)
                codebooks.append(clusters.centroids)
                labels.append(clusters.labels)
                advance(1)
        self._codebooks = codebooks
        if config.balanced:
            self._assigned = _Assigned.of(catalog.item_ids, inputs, np.stack(labels, axis=1))
        return self

    def _cluster(self, residuals_NE: FloatArray, level: int) -> Clusters:
        config = self.config
        size = count_distinct(residuals_NE, stop=config.codebook_size)
        if size < config.codebook_size:
            log.warning(
                "RQ-KMeans level %d: only %d different residuals are left, so it gets %d codes "
                "instead of %d. Set a smaller tokenizer.codebook_size or fewer levels.",
                level + 1, size, size, config.codebook_size,
            )  # fmt: skip
        if config.balanced:
            method = balanced_kmeans
        elif len(residuals_NE) > config.minibatch_above:
            method = minibatch_kmeans
        else:
            method = kmeans
        seed = config.seed * 1_000 + level  # levels must not share their random draws
        return method(residuals_NE, size, num_iterations=config.num_iterations, seed=seed)

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32: per level the centroid nearest to the residual.

        With `balanced`, an item that was fitted (same id, same vector) keeps its balanced codes.
        """
        self._require_fitted()
        inputs = self.inputs(catalog)
        codes = np.empty((len(inputs), len(self._codebooks)), np.int32)
        for start in range(0, len(inputs), CHUNK):
            residuals = inputs[start : start + CHUNK].copy()
            for level, codebook in enumerate(self._codebooks):
                labels, _ = nearest(residuals, codebook)
                codes[start : start + CHUNK, level] = labels
                subtract(residuals, codebook, labels)
        return self._assigned.override(codes, catalog.item_ids, inputs)

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return the sums of centroids (M, E) float32."""
        self._require_fitted()
        vectors = np.zeros((len(codes_ML), self._codebooks[0].shape[1]), np.float32)
        for level, book in enumerate(self._codebooks):
            vectors += book[codes_ML[:, level]]
        return vectors

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors (M, E) float32, scaled to length 1 if so configured."""
        width = self._codebooks[0].shape[1] if self._codebooks else None
        return checked_vectors(catalog, normalize=self.config.normalize, width=width)

    def last_level_distances(self, catalog: Catalog) -> FloatArray:
        """Return squared distances (M, K) from the last residual to every last code."""
        prefix = self.encode(catalog)[:, :-1]
        residuals = self.inputs(catalog).copy()
        for level in range(prefix.shape[1]):
            subtract(residuals, self._codebooks[level], prefix[:, level])
        return squared_distances(residuals, self._codebooks[-1])

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level; a later level may have fewer than configured (see `fit`)."""
        self._require_fitted()
        return tuple(len(book) for book in self._codebooks)

    def state(self) -> dict[str, np.ndarray]:
        """Return `codebook_0`.. (K, E) and, if balanced, keys and codes of the fitted items."""
        self._require_fitted()
        books = {f"codebook_{level}": book for level, book in enumerate(self._codebooks)}
        if not self.config.balanced:
            return books
        return {
            **books,
            "assigned_keys": self._assigned.keys,
            "assigned_codes": self._assigned.codes,
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        levels = range(self.config.num_levels)
        self._codebooks = [np.asarray(state[f"codebook_{level}"]) for level in levels]
        if self.config.balanced:
            self._assigned = _Assigned(state["assigned_keys"], state["assigned_codes"])
        return self

    def _require_fitted(self) -> None:
        if not self._codebooks:
            raise not_fitted("RQKMeans")


class _Assigned:
    """Codes fixed at fitting time, found by a key of item id and vector.

    A balanced code is a property of the whole catalogue, yet `encode` may only look at one item:
    so the fitted items' codes are remembered. The vector is part of the key: an item that changed
    is a new item.
    """

    def __init__(self, keys: np.ndarray, codes: np.ndarray) -> None:
        self.keys = keys  # (N,) uint64, sorted
        self.codes = codes  # (N, L) int32

    @classmethod
    def none(cls, num_levels: int) -> _Assigned:
        return cls(np.empty(0, np.uint64), np.empty((0, num_levels), np.int32))

    @classmethod
    def of(cls, item_ids: list[str], inputs_NE: FloatArray, codes_NL: IntArray) -> _Assigned:
        keys = _keys(item_ids, inputs_NE)
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], np.ascontiguousarray(codes_NL[order]))

    def override(self, codes_ML: IntArray, item_ids: list[str], inputs_ME: FloatArray) -> IntArray:
        if not len(self.keys):
            return codes_ML
        keys = _keys(item_ids, inputs_ME)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[places] == keys
        codes_ML[known] = self.codes[places[known]]
        return codes_ML


def _keys(item_ids: list[str], inputs_NE: FloatArray) -> np.ndarray:
    digests = (
        hashlib.blake2b(item.encode() + b"\0" + row.tobytes(), digest_size=8).digest()
        for item, row in zip(item_ids, inputs_NE, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint64).copy()
