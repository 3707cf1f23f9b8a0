"""PQ and OPQ: one code for each of several parts of an item vector, the codes in no hierarchy.

Principal components, a rotation (chosen for PQ, learned for OPQ), a split into L sub-vectors, and
k-means in each; the linear algebra is in `subspaces.py`. It knows neither the models that predict
all codes at once (RPG, 2506.05781) nor how codes become unique (`collisions.py`).

Shapes: N fitted items, M encoded items, L levels, K codes, E embedding width, D width after PCA,
S = D / L width of a sub-vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from genrec.errors import UserError
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
    kmeans,
    nearest,
    squared_distances,
)
from genrec.tokenizers.quantization.subspaces import Space, most_telling_first, procrustes, split

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)

MOST_COMPONENTS = 512
"""Principal components unless `pca_dim` says otherwise (RPG: 128 to 512)."""
ROUND_ITERATIONS = 2
"""k-means iterations after each update of the rotation."""


class Settings(CodebookConfig):
    """Settings that PQ and OPQ share."""

    num_levels: int = Field(default=4, ge=1)
    """Number of codes of an item, L (RPG: 16 to 64, for models that predict all codes at once; 4
    keep decoding code by code short)."""
    pca_dim: int | None = Field(default=None, ge=1)
    """Principal components that are kept, a multiple of `num_levels` (RPG: 128 to 512). None: as
    many as the vectors have, at most 512."""
    whiten: bool = False
    """Scale all components to variance 1 first (RPG: true). The error in the space of the vectors
    is then larger."""
    split: Literal["balanced", "contiguous"] = "balanced"
    """Which components form a sub-vector: "balanced" gives all of them the same product of
    variances (Ge et al. 2013), "contiguous" gives the leading ones to the first code."""
    normalize: bool = False
    """Scale vectors to length 1 first (the feature extractors do so by default)."""
    num_iterations: int = Field(default=25, ge=1)
    """Upper bound on k-means iterations per level."""
    fit_items: int = Field(default=262_144, ge=1)
    """Learn from a random sample of so many items when there are more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first centroids and of the sample."""

    @field_validator("pca_dim")
    @classmethod
    def _divisible(cls, value: int | None, info: ValidationInfo) -> int | None:
        levels = info.data.get("num_levels", 1)
        if value is not None and value % levels:
            raise ValueError(
                f"expected a multiple of num_levels={levels}, e.g. {-(-value // levels) * levels}"
            )
        return value


class PQ(ItemTokenizer):
    """Product quantization: level l holds the nearest centroid of the l-th sub-vector.

    The levels are no hierarchy. They are ordered by how much of the vectors they explain, most
    first, so that a model which predicts code by code decides the most telling one first.

    Args:
        config: see `PQ.Config`.
    """

    class Config(Settings):
        """Settings of product quantization (Jegou et al. 2011)."""

        name: Literal["pq"] = "pq"
        """Name in the registry."""

    config: Settings

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self._asked = config  # before `fit` chose the codebook size
        self._space: Space | None = None
        self._codebooks: list[FloatArray] = []

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Learn components, rotation and codebooks; the order of the items does not matter.

        A level whose sub-vectors take fewer different values than `codebook_size` gets one code
        for each of them, and a warning says so.

        Raises:
            UserError: fewer different vectors than codes, or vectors too narrow for the settings.
        """
        self.config = config = self._asked.for_items(len(catalog))
        inputs = checked_vectors(catalog, normalize=config.normalize)
        require_distinct(inputs, config.codebook_size)
        width = _width(inputs.shape[1], config)
        rows = _fitting_rows(catalog.item_ids, config)
        space, variances_D = Space.of(inputs, rows, width, whiten=config.whiten)
        points_ND = space.project(inputs, rows)
        rotation_DD = split(variances_D, config.num_levels, config.split)
        clusters = self._quantize(points_ND @ rotation_DD)
        rotation_DD, clusters = self._improve(points_ND, rotation_DD, clusters)
        space = space.rotated(rotation_DD)
        order = most_telling_first(points_ND @ rotation_DD, space, clusters)
        self._space = space.reordered(order)
        self._codebooks = [clusters[level].centroids for level in order]
        return self

    def _quantize(self, points_ND: FloatArray) -> list[Clusters]:
        """Cluster every sub-vector from scratch."""
        config = self.config
        parts = [np.ascontiguousarray(p) for p in np.split(points_ND, config.num_levels, axis=1)]
        sizes = [count_distinct(part, stop=config.codebook_size) for part in parts]
        if min(sizes) < config.codebook_size:
            short = sum(size < config.codebook_size for size in sizes)
            log.warning(
                "%s: the sub-vectors of %d of %d levels take fewer than %d different values (one "
                "%d), so these levels get fewer codes. Set fewer levels, a smaller "
                "tokenizer.codebook_size or a smaller tokenizer.pca_dim.",
                self.name, short, len(sizes), config.codebook_size, min(sizes),
            )  # fmt: skip
        clusters = []
        with progress(f"{self.name.upper()} levels", len(parts)) as advance:
            for level, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                seed = config.seed * 1_000 + level  # levels must not share their random draws
                clusters.append(kmeans(part, size, num_iterations=config.num_iterations, seed=seed))
                advance(1)
        return clusters

    def _improve(
        self, points_ND: FloatArray, rotation_DD: FloatArray, clusters: list[Clusters]
    ) -> tuple[FloatArray, list[Clusters]]:
        """Return a better rotation and its clusters; PQ keeps the one that it chose."""
        return rotation_DD, clusters

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32: per level the centroid nearest to the sub-vector."""
        space = self._fitted()
        inputs = self.inputs(catalog)
        codes = np.empty((len(inputs), len(self._codebooks)), np.int32)
        for start in range(0, len(inputs), CHUNK):
            points = space.project(inputs, np.arange(start, min(start + CHUNK, len(inputs))))
            for level, part in enumerate(np.split(points, len(self._codebooks), axis=1)):
                found, _ = nearest(np.ascontiguousarray(part), self._codebooks[level])
                codes[start : start + CHUNK, level] = found
        return codes

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return the vectors (M, E) float32 that the centroids of all sub-vectors stand for."""
        space = self._fitted()
        parts = [book[codes_ML[:, level]] for level, book in enumerate(self._codebooks)]
        return np.hstack(parts) @ space.reconstruction_DE + space.mean_E

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors (M, E) float32, scaled to length 1 if so configured."""
        width = None if self._space is None else len(self._space.mean_E)
        return checked_vectors(catalog, normalize=self.config.normalize, width=width)

    def last_level_distances(self, catalog: Catalog) -> FloatArray:
        """Return squared distances (M, K) from the last sub-vector to every last code."""
        space = self._fitted()
        points = space.project(self.inputs(catalog), np.arange(len(catalog)))
        part = np.split(points, len(self._codebooks), axis=1)[-1]
        return squared_distances(part, self._codebooks[-1])

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level; some may have fewer than configured (see `fit`)."""
        self._fitted()
        return tuple(len(book) for book in self._codebooks)

    def state(self) -> dict[str, np.ndarray]:
        """Return `mean` (E,), `projection` (E, D), `reconstruction` (D, E), `codebook_0`.. (K, S).

        The projection holds components, scales and rotation in one.
        """
        space = self._fitted()
        books = {f"codebook_{level}": book for level, book in enumerate(self._codebooks)}
        return {
            "mean": space.mean_E,
            "projection": space.projection_ED,
            "reconstruction": space.reconstruction_DE,
            **books,
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        names = ("mean", "projection", "reconstruction")
        self._space = Space(*(np.asarray(state[name]) for name in names))
        levels = range(self.config.num_levels)
        self._codebooks = [np.asarray(state[f"codebook_{level}"]) for level in levels]
        return self

    def _fitted(self) -> Space:
        if self._space is None:
            raise not_fitted(self.name)
        return self._space


class OPQ(PQ):
    """Optimized product quantization: PQ in the rotation that serves its codebooks best.

    Starts from PQ's solution and alternates between the codebooks and the rotation, each best for
    the other: the error in the space that is quantized never rises. With `whiten` that space is
    not the one of the vectors, whose error may then rise.

    Args:
        config: see `OPQ.Config`.
    """

    class Config(Settings):
        """Settings of optimized product quantization (Ge et al. 2013, non-parametric)."""

        name: Literal["opq"] = "opq"
        """Name in the registry."""
        num_rounds: int = Field(default=15, ge=0)
        """Updates of the rotation (10 to 20 are usual)."""

    config: OPQ.Config

    def _improve(
        self, points_ND: FloatArray, rotation_DD: FloatArray, clusters: list[Clusters]
    ) -> tuple[FloatArray, list[Clusters]]:
        with progress("OPQ rotations", self.config.num_rounds) as advance:
            for _ in range(self.config.num_rounds):
                decoded_ND = np.hstack([c.centroids[c.labels] for c in clusters])
                rotation_DD = procrustes(points_ND, decoded_ND)
                clusters = _refined(points_ND @ rotation_DD, clusters, ROUND_ITERATIONS)
                advance(1)
        return rotation_DD, _refined(points_ND @ rotation_DD, clusters, self.config.num_iterations)


def _width(embedding_width: int, config: Settings) -> int:
    """Return D, or say which settings the vectors are too narrow for."""
    if config.num_levels > embedding_width:
        raise UserError(
            f"tokenizer.num_levels: got {config.num_levels}, but vectors of width "
            f"{embedding_width} have no {config.num_levels} parts. Set "
            f"tokenizer.num_levels={embedding_width} or less, or use wider vectors."
        )
    most = embedding_width // config.num_levels * config.num_levels
    if config.pca_dim is None:
        return min(max(1, MOST_COMPONENTS // config.num_levels) * config.num_levels, most)
    if config.pca_dim > most:
        raise UserError(
            f"tokenizer.pca_dim: got {config.pca_dim}, but the vectors have width "
            f"{embedding_width}. Set tokenizer.pca_dim={most} or less, or leave it out."
        )
    return config.pca_dim


def _fitting_rows(item_ids: Sequence[str], config: Settings) -> IntArray:
    """Return the rows to learn from, in the order of their ids."""
    rows = np.array(sorted(range(len(item_ids)), key=lambda row: item_ids[row]), dtype=np.int64)
    if len(rows) <= config.fit_items:
        return rows
    rng = np.random.default_rng(config.seed)
    chosen: IntArray = rows[np.sort(rng.choice(len(rows), config.fit_items, replace=False))]
    return chosen


def _refined(
    points_ND: FloatArray, clusters: list[Clusters], num_iterations: int
) -> list[Clusters]:
    """Return clusters after more iterations of k-means from the centroids they have."""
    parts = np.split(points_ND, len(clusters), axis=1)
    return [
        kmeans(
            np.ascontiguousarray(part),
            len(old.centroids),
            num_iterations=num_iterations,
            seed=0,
            first_KE=old.centroids,
        )
        for part, old in zip(parts, clusters, strict=True)
    ]
