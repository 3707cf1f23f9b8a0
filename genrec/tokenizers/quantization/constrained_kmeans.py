"""Constrained k-means: clusters whose sizes stay between two bounds, each step optimal.

The assignment is a minimum-cost flow: from nearest centroids on, points move along shortest paths
between clusters until every size is allowed. It knows nothing about items or codes.

Shapes: N points, K clusters, D width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from genrec.tokenizers.quantization.kmeans import Clusters, kmeans, nearest, squared_distances

TOLERANCE = 1e-9
"""Relative gain below which a path is not shorter; keeps rounding from closing a cycle."""


def constrained_kmeans(
    points_ND: np.ndarray,
    num_clusters: int,
    *,
    smallest: int,
    largest: int,
    num_iterations: int,
    seed: int = 0,
    start_KD: np.ndarray | None = None,
) -> Clusters:
    """Cluster with `smallest` to `largest` points in every cluster (Bradley et al. 2000).

    Args:
        points_ND: float32.
        num_clusters: K, with K * smallest <= N <= K * largest.
        smallest: fewest points of a cluster.
        largest: most points of a cluster.
        num_iterations: upper bound; stops earlier when no label changes.
        seed: of the first centroids.
        start_KD: first centroids; default those of plain k-means.
    """
    assert num_clusters * smallest <= len(points_ND) <= num_clusters * largest
    if start_KD is None:
        start_KD = kmeans(points_ND, num_clusters, num_iterations=num_iterations, seed=seed)[0]
    centroids = start_KD
    labels: np.ndarray | None = None
    for _ in range(num_iterations):
        new = bounded_labels(points_ND, centroids, smallest=smallest, largest=largest)
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, points_ND)
        counts = np.bincount(labels, minlength=num_clusters)[:, None].astype(np.float32)
        centroids = np.divide(sums, counts, out=centroids.copy(), where=counts > 0)
    assert labels is not None
    return Clusters(centroids, labels)


def bounded_labels(
    points_ND: np.ndarray, centroids_KD: np.ndarray, *, smallest: int, largest: int
) -> np.ndarray:
    """Return the labels (N,) int32 with the least total squared distance within the bounds."""
    labels, _ = nearest(points_ND, centroids_KD)
    sizes = np.bincount(labels, minlength=len(centroids_KD))
    if sizes.min() >= smallest and sizes.max() <= largest:
        return labels
    distances = squared_distances(points_ND, centroids_KD).astype(np.float64)
    flow = _Flow(distances, distances.argmin(axis=1), smallest, largest)
    while flow.excess.any():
        flow.push()
    return flow.labels.astype(np.int32)


class _Flow:
    """Points, their clusters, and a sink that every cluster drains `smallest` to `largest` into.

    Node K is the sink. `excess` is what a node has taken in and not passed on; it starts where the
    nearest clusters are too large (or, negative, too small) and successive shortest paths carry it
    away. Every such flow costs least among those with its excess, so the last one is optimal.
    """

    def __init__(
        self, distances_NK: np.ndarray, labels_N: np.ndarray, smallest: int, largest: int
    ) -> None:
        num_points, self.num_clusters = distances_NK.shape
        self.distances, self.labels = distances_NK, labels_N
        self.smallest, self.largest = smallest, largest
        sizes = np.bincount(labels_N, minlength=self.num_clusters)
        self.drained = np.clip(sizes, smallest, largest)
        self.excess = np.append(sizes - self.drained, self.drained.sum() - num_points)
        self.costs = np.full((self.num_clusters + 1,) * 2, np.inf)
        self.movers = np.zeros((self.num_clusters, self.num_clusters), np.int64)
        self.tolerance = TOLERANCE * float(distances_NK.max())
        for cluster in range(self.num_clusters):
            self._refresh(cluster)

    def push(self) -> None:
        """Carry one point's worth of excess along a shortest path."""
        path = self._shortest_path()
        self.excess[path[0]] -= 1
        self.excess[path[-1]] += 1
        for source, target in pairwise(path):
            if target == self.num_clusters:
                self.drained[source] += 1
            elif source == self.num_clusters:
                self.drained[target] -= 1
            else:
                self.labels[self.movers[source, target]] = target
        for cluster in path:
            if cluster < self.num_clusters:
                self._refresh(cluster)

    def _refresh(self, cluster: int) -> None:
        """Recompute which point of a cluster goes where most cheaply, and whether it may drain."""
        members = np.flatnonzero(self.labels == cluster)
        self.costs[cluster] = np.inf
        if len(members):
            extra = self.distances[members] - self.distances[members, cluster][:, None]
            best = extra.argmin(axis=0)
            self.costs[cluster, :-1] = extra[best, np.arange(self.num_clusters)]
            self.movers[cluster] = members[best]
        self.costs[cluster, -1] = 0.0 if self.drained[cluster] < self.largest else np.inf
        self.costs[-1, cluster] = 0.0 if self.drained[cluster] > self.smallest else np.inf

    def _shortest_path(self) -> list[int]:
        """Return the nodes from one with too much to one with too little (Bellman-Ford)."""
        distance = np.where(self.excess > 0, 0.0, np.inf)
        before = np.full(len(distance), -1)
        for _ in range(len(distance)):
            through = distance[:, None] + self.costs
            best = through.argmin(axis=0)
            shorter = through[best, np.arange(len(best))] < distance - self.tolerance
            if not shorter.any():
                break
            distance = np.where(shorter, through[best, np.arange(len(best))], distance)
            before = np.where(shorter, best, before)
        node = int(np.where(self.excess < 0, distance, np.inf).argmin())
        path = [node]
        while before[node] >= 0:
            node = int(before[node])
            path.append(node)
        return path[::-1]
