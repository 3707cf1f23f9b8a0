"""Which parts of a vector does product quantization quantize? Components, rotation, order.

Linear algebra alone: it knows neither items nor tokenizers.

Shapes: N points, L levels, K codes, E width of the vectors, D width after PCA, S = D / L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from genrec.tokenizers.quantization.kmeans import CHUNK, Clusters

FloatArray = np.ndarray
IntArray = np.ndarray

SMALLEST_VARIANCE = 1e-10
"""Components with less than this share of the largest variance are rounding errors: left at 0."""


def procrustes(points_ND: FloatArray, targets_ND: FloatArray) -> FloatArray:
    """Return the orthogonal matrix (D, D) that takes points closest to targets, row by row."""
    products = sum(
        points_ND[part].T.astype(np.float64) @ targets_ND[part] for part in chunks(len(points_ND))
    )
    left, _, right = np.linalg.svd(products)
    rotation: FloatArray = (left @ right).astype(np.float32)
    return rotation


def split(variances_D: FloatArray, num_levels: int, how: str) -> FloatArray:
    """Return the permutation matrix (D, D) that lines up the components of each sub-vector.

    Args:
        variances_D: of the components, falling.
        num_levels: L, divides D.
        how: see `Settings.split`.
    """
    width = len(variances_D)
    groups: list[list[int]] = [[] for _ in range(num_levels)]
    if how == "contiguous":
        order = list(range(width))
    else:  # the next component goes where the product of variances is smallest so far
        floor = max(variances_D[0] * SMALLEST_VARIANCE, np.finfo(np.float64).tiny)
        logs = np.log(np.maximum(variances_D, floor))
        logs -= logs.min()  # at least 0, so that a product never falls as its group grows
        for component in range(width):
            open_groups = [g for g in groups if len(g) < width // num_levels]
            min(open_groups, key=lambda g: (logs[g].sum(), len(g))).append(component)
        order = [component for group in groups for component in group]
    return np.eye(width, dtype=np.float32)[:, order]


class Space(NamedTuple):
    """The space in which sub-vectors are quantized: z = (x - mean) projection, and back."""

    mean_E: FloatArray
    projection_ED: FloatArray
    reconstruction_DE: FloatArray

    @classmethod
    def of(
        cls, inputs_NE: FloatArray, rows: IntArray, width: int, *, whiten: bool
    ) -> tuple[Space, FloatArray]:
        """Return the space of the leading components of the rows, and the components' variances.

        Sums are kept in float64 and formed in the order of `rows`: no copy of the vectors, and no
        trace of the order of the catalogue.
        """
        mean = np.zeros(inputs_NE.shape[1])
        for part in chunks(len(rows)):
            mean += inputs_NE[rows[part]].sum(axis=0, dtype=np.float64)
        mean = (mean / len(rows)).astype(np.float32)
        covariance = np.zeros((len(mean), len(mean)))
        for part in chunks(len(rows)):
            centred = inputs_NE[rows[part]] - mean
            covariance += centred.T @ centred
        variances, axes = np.linalg.eigh(covariance / len(rows))
        variances_D = np.maximum(variances[::-1][:width], 0.0)
        axes_ED = axes[:, ::-1][:, :width]
        peaks = np.abs(axes_ED).argmax(axis=0)
        axes_ED = axes_ED * np.sign(axes_ED[peaks, np.arange(width)])  # one sign everywhere
        kept = variances_D > SMALLEST_VARIANCE * max(float(variances_D[0]), 1e-30)
        deviations_D = np.sqrt(np.where(kept, variances_D, 1.0)) if whiten else np.ones(width)
        projection = np.where(kept, axes_ED / deviations_D, 0.0).astype(np.float32)
        reconstruction = np.where(kept, axes_ED * deviations_D, 0.0).astype(np.float32)
        return cls(mean, projection, np.ascontiguousarray(reconstruction.T)), variances_D

    def project(self, inputs_NE: FloatArray, rows: IntArray) -> FloatArray:
        """Return the points (R, D) float32 of some rows of the inputs."""
        points = np.empty((len(rows), self.projection_ED.shape[1]), np.float32)
        for part in chunks(len(rows)):
            np.matmul(inputs_NE[rows[part]] - self.mean_E, self.projection_ED, out=points[part])
        return points

    def rotated(self, rotation_DD: FloatArray) -> Space:
        """Return the space with an orthogonal matrix applied to its points."""
        return Space(
            self.mean_E,
            self.projection_ED @ rotation_DD,
            rotation_DD.T @ self.reconstruction_DE,
        )

    def reordered(self, order: Sequence[int]) -> Space:
        """Return the space with its L sub-vectors in another order."""
        columns = np.arange(self.projection_ED.shape[1]).reshape(len(order), -1)
        places = columns[list(order)].ravel()
        return Space(
            self.mean_E,
            np.ascontiguousarray(self.projection_ED[:, places]),
            np.ascontiguousarray(self.reconstruction_DE[places]),
        )


def most_telling_first(
    points_ND: FloatArray, space: Space, clusters: Sequence[Clusters]
) -> list[int]:
    """Return the levels by the squared error that each alone takes off the mean vector's.

    In the space of the vectors, whatever scaling came first: with x the centred vector and y what
    a code alone decodes to, ||x||^2 - ||x - y||^2 = 2 xy - ||y||^2, summed over a code's items.
    """
    maps = np.split(space.reconstruction_DE, len(clusters))
    gains = []
    for (centroids, labels), map_SE in zip(clusters, maps, strict=True):
        decoded_KD = centroids @ (map_SE @ space.reconstruction_DE.T)  # y x^T needs no vectors
        count = np.bincount(labels, minlength=len(centroids))
        members = sparse.csr_matrix(
            (np.ones(len(labels), np.float32), (labels, np.arange(len(labels)))),
            shape=(len(centroids), len(labels)),
        )
        sums_KD = members @ points_ND
        squares_K = np.square(centroids @ map_SE).sum(axis=1)
        gains.append(float(2 * (sums_KD * decoded_KD).sum() - (count * squares_K).sum()))
    return sorted(range(len(gains)), key=lambda level: -gains[level])


def chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))
