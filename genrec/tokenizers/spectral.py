"""Which items are consumed by the same people? Codes from clusters of the co-occurrence graph.

CID of Hua et al. 2023 (2305.06569): spectral clustering of the training co-occurrence counts, again
inside every cluster that is too large. It reads no texts and no vectors, and it does not number the
items of a cluster: that is what the collision policy `extra_level` does.

Shapes: N items, n items of a node, L levels, K clusters per node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import scipy.sparse as sp
from pydantic import Field
from scipy.linalg import qr, svd
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.features.collaborative import cooccurrence
from genrec.runtime import get_logger, progress
from genrec.tokenizers.base import FloatArray, IntArray
from genrec.tokenizers.fixed import FixedCodes, id_order, training_interactions

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)
DENSE_BELOW = 600
"""Items of a node up to which all eigenvectors are computed: faster than Lanczos, never fails."""
TOLERANCE = 1e-5
"""Relative accuracy of eigenvalues; cluster assignments stop changing well before."""


class Collaborative(FixedCodes):
    """CID: the path of an item through a tree of clusters of items that are consumed together.

    Args:
        config: see `Collaborative.Config`.
    """

    class Config(StrictConfig):
        """Settings of recursive spectral clustering."""

        name: Literal["collaborative"] = "collaborative"
        """Name in the registry."""
        num_clusters: int = Field(default=20, ge=2)
        """Clusters that a node is split into, N in the paper (20)."""
        leaf_size: int = Field(default=500, ge=1)
        """A cluster of more items is split again, k in the paper (500)."""
        max_levels: int = Field(default=6, ge=1)
        """Longest path, without the number in the leaf. Where clusters would come out too uneven
        to end in time, a node is cut evenly along its clusters instead (not in the paper)."""
        uniform_affinity: float = Field(default=0.1, gt=0)
        """Affinity of every item with all items together, in mean degrees of the node. It connects
        items without interactions, and keeps small separate groups from taking a cluster each."""
        node_codes: Literal["shared", "unique"] = "shared"
        """Clusters are numbered inside their parent, so that siblings' children share codes, or
        have a code of their own at their level (both are in the paper)."""

    config: Collaborative.Config
    needs: ClassVar[frozenset[str]] = frozenset({"interactions"})

    def number_items(
        self, item_ids: list[str], catalog: Catalog, interactions: Interactions | None
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Cluster the items recursively; a path that ends early goes on with code 0.

        Raises:
            UserError: no two items occur together, or more items than such a tree can hold.
        """
        training = training_interactions(interactions, catalog, name=self.name)
        self._check_room(len(item_ids))
        by_id = id_order(item_ids)  # the tree follows ids, whatever the order of the catalogue
        rank = np.empty(len(by_id), dtype=np.int32)
        rank[by_id] = np.arange(len(by_id))
        affinity_NN = cooccurrence(replace(training, item_rows=rank[training.item_rows]))
        if not affinity_NN.nnz:
            raise UserError(
                "collaborative: no two items occur in one training history. Expected users with "
                "at least two different items; use another tokenizer for such data."
            )
        isolated = int((np.diff(affinity_NN.indptr) == 0).sum())
        if isolated:
            log.info(
                "collaborative: %d of %d items occur with no other item in training; only the "
                "uniform affinity places them.", isolated, len(item_ids),
            )  # fmt: skip
        paths = self._tree(affinity_NN)[rank]
        return _level_codes(paths, self.config.node_codes)

    def _check_room(self, num_items: int) -> None:
        config = self.config
        room = config.leaf_size * config.num_clusters**config.max_levels
        if num_items > room:
            raise UserError(
                f"tokenizer.max_levels: got {config.max_levels}, but {config.max_levels} levels of "
                f"{config.num_clusters} clusters with leaves of {config.leaf_size} hold {room} "
                f"items, the catalogue has {num_items}. Raise max_levels or leaf_size."
            )

    def _tree(self, affinity_NN: sp.csr_array) -> IntArray:
        """Return paths (N, levels): 1 + the cluster's number at each level, 0 after the end."""
        config = self.config
        num_items, num_cut = affinity_NN.shape[0], 0
        paths = np.zeros((num_items, config.max_levels), dtype=np.int64)
        nodes = [(np.arange(num_items), affinity_NN, 0)]
        with progress("spectral clustering", num_items) as advance:
            while nodes:
                rows, affinity, depth = nodes.pop()
                parts, was_cut = self._split(affinity, depth)
                num_cut += was_cut
                for number, part in enumerate(parts):
                    paths[rows[part], depth] = number + 1
                    if len(part) > config.leaf_size:
                        nodes.append((rows[part], affinity[part][:, part], depth + 1))
                    else:
                        advance(len(part))
        if num_cut:
            log.info(
                "collaborative: %d node(s) of the tree had no clusters small enough and were cut "
                "evenly.", num_cut,
            )  # fmt: skip
        return paths[:, paths.any(axis=0)]

    def _split(self, affinity_nn: sp.csr_array, depth: int) -> tuple[list[IntArray], bool]:
        """Return the rows of each child of a node, and whether it had to be cut evenly.

        The largest child comes first. None is larger than what the levels below can hold.
        """
        config, num_items = self.config, affinity_nn.shape[0]
        room = config.leaf_size * config.num_clusters ** (config.max_levels - depth - 1)
        labels = split_graph(affinity_nn, config.num_clusters, config.uniform_affinity)
        parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        parts.sort(key=lambda part: (-len(part), part[0]))
        no_progress = len(parts) == 1 and num_items > config.leaf_size
        if not no_progress and len(parts[0]) <= room:
            return parts, False
        wanted = min(-(-num_items // config.leaf_size), config.num_clusters)
        return np.array_split(np.concatenate(parts), wanted), True


def split_graph(affinity_nn: sp.csr_array, num_clusters: int, uniform_affinity: float) -> IntArray:
    """Return the cluster of each item by spectral clustering, (n,) int64.

    The leading eigenvectors of D^-1/2 (A + tau / n) D^-1/2, scaled by D^-1/2 as in scikit-learn's
    `SpectralClustering`, are assigned by `cluster_qr`. The uniform part is never written out, so
    the cost is that of the stored affinities (regularised spectral clustering: Qin and Rohe 2013,
    1309.4111, with tau equal to the mean degree).

    Args:
        affinity_nn: symmetric, non-negative, sparse; rows without affinity are allowed.
        num_clusters: K; at most n clusters come out, and fewer where items cannot be told apart.
        uniform_affinity: tau in mean degrees.
    """
    num_items = affinity_nn.shape[0]
    degrees_n = np.asarray(affinity_nn.sum(axis=1), dtype=np.float64).reshape(-1)
    if num_items <= num_clusters:
        return np.arange(num_items)
    if not degrees_n.any():
        return np.zeros(num_items, dtype=np.int64)  # nothing tells these items apart
    tau = uniform_affinity * degrees_n.mean()
    scale_n = 1 / np.sqrt(degrees_n + tau)
    vectors_nK = _leading_eigenvectors(affinity_nn, scale_n, tau / num_items, num_clusters)
    return cluster_qr(vectors_nK * scale_n[:, None])


def cluster_qr(vectors_nK: FloatArray) -> IntArray:
    """Return the cluster of each row of eigenvectors (Damle, Minden and Ying 2019, 1708.07481).

    K items that lie in directions as different as can be are picked by a pivoted QR decomposition;
    every item joins the one whose direction, made orthogonal, it shares most. No random start.
    """
    num_clusters = vectors_nK.shape[1]
    pivots = qr(vectors_nK.T, mode="r", pivoting=True)[1]
    left, _, right = svd(vectors_nK[pivots[:num_clusters]].T)
    return np.abs(vectors_nK @ (left @ right)).argmax(axis=1)


def _leading_eigenvectors(
    affinity_nn: sp.csr_array, scale_n: FloatArray, uniform: float, count: int
) -> FloatArray:
    """Return eigenvectors (n, count) of S (A + uniform) S for the largest eigenvalues."""
    num_items = len(scale_n)
    if num_items <= DENSE_BELOW:
        matrix = scale_n[:, None] * (affinity_nn.toarray() + uniform) * scale_n
        return np.linalg.eigh(matrix)[1][:, -count:]

    def multiply(vector: FloatArray) -> FloatArray:
        scaled = scale_n * vector.reshape(-1)
        return scale_n * (affinity_nn @ scaled + uniform * scaled.sum())

    operator = LinearOperator((num_items, num_items), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=num_items)  # a fixed start: no seed decides
    try:
        return eigsh(operator, count, which="LA", v0=start, tol=TOLERANCE)[1]
    except ArpackNoConvergence as error:
        log.warning(
            "collaborative: only %d of %d eigenvectors of a node of %d items converged; it gets as "
            "many clusters.", error.eigenvectors.shape[1], count, num_items,
        )  # fmt: skip
        return error.eigenvectors if error.eigenvectors.shape[1] else np.ones((num_items, 1))


def _level_codes(paths_NL: IntArray, node_codes: str) -> tuple[IntArray, tuple[int, ...]]:
    """Return codes and sizes; code 0 is the end of a path at levels where one has ended."""
    codes = paths_NL.copy()
    if node_codes == "unique":
        for level in range(1, codes.shape[1]):
            inside = codes[:, level] > 0
            _, numbers = np.unique(paths_NL[inside, : level + 1], axis=0, return_inverse=True)
            codes[inside, level] = numbers.reshape(-1) + 1
    codes -= codes.min(axis=0)  # a level where no path has ended needs no code for it
    return codes.astype(np.int32), tuple((codes.max(axis=0) + 1).tolist())
