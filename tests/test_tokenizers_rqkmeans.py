"""Is RQ-KMeans k-means level by level, in every variant, with little more memory than its input?"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.quantization import kmeans
from genrec.tokenizers.quantization.kmeans import (
    Clusters,
    balanced_kmeans,
    minibatch_kmeans,
    nearest,
    squared_distances,
    subtract,
)

VARIANTS: list[dict[str, Any]] = [{}, {"balanced": True}, {"minibatch_above": 10}]


class TestRQKMeansByMiniBatches(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "rqkmeans",
        "codebook_size": 8,
        "minibatch_above": 10,
        "normalize": True,
    }


def make(**settings: Any) -> ItemTokenizer:
    cls, config = parse_component(TOKENIZERS, {"name": "rqkmeans", **settings}, path="tokenizer")
    return cls(config)


def cloud(num_points: int = 400, width: int = 10, seed: int = 0) -> np.ndarray:
    """Return points around some centres, float32."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(25, width)) * 2
    found = centres[rng.integers(0, 25, num_points)] + rng.normal(size=(num_points, width))
    return found.astype("f4")


def brute_force(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(points[:, None].astype("f8") - centroids[None]).sum(-1)


# -- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_squared_residual_never_grows_with_the_level(variant):
    catalog = Catalog.from_vectors(cloud())
    tokenizer = make(codebook_size=12, num_levels=5, **variant).fit(catalog)
    codes, residual = tokenizer.encode(catalog), catalog.vectors.copy()
    energy = [np.square(residual).sum()]
    for level in range(5):
        subtract(residual, tokenizer.state()[f"codebook_{level}"], codes[:, level])
        energy.append(np.square(residual).sum())
    assert (np.diff(energy) < 0).all()
    assert np.allclose(catalog.vectors - residual, tokenizer.decode(codes), atol=1e-5)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]])
def test_every_code_is_the_nearest_to_its_residual(variant):
    catalog = Catalog.from_vectors(cloud())
    tokenizer = make(codebook_size=12, **variant).fit(catalog)
    codes, residual = tokenizer.encode(catalog), catalog.vectors.astype("f8")
    for level in range(3):
        book = tokenizer.state()[f"codebook_{level}"]
        distances = brute_force(residual, book)
        chosen = distances[np.arange(len(residual)), codes[:, level]]
        assert np.allclose(chosen, distances.min(axis=1), rtol=1e-4, atol=1e-5)
        residual -= book[codes[:, level]]
    last = tokenizer.last_level_distances(catalog)
    assert np.allclose(last, distances, rtol=1e-3, atol=1e-3)


def test_earlier_levels_do_not_depend_on_how_many_follow():
    catalog = Catalog.from_vectors(cloud())
    two, four = (make(codebook_size=9, num_levels=n).fit(catalog) for n in (2, 4))
    assert np.array_equal(two.encode(catalog), four.encode(catalog)[:, :2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_beat_random_codebooks(variant):
    catalog = Catalog.from_vectors(cloud())
    tokenizer = make(codebook_size=16, **variant).fit(catalog)
    rng = np.random.default_rng(1)
    book = catalog.vectors[rng.choice(400, 16, replace=False)]
    random = np.square(catalog.vectors - book[nearest(catalog.vectors, book)[0]]).sum()
    error = np.square(catalog.vectors - tokenizer.decode(tokenizer.encode(catalog))).sum()
    assert error < 0.75 * random


# -- balanced ---------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 90), st.integers(1, 19), st.integers(0, 99))
def test_balanced_sizes_differ_by_at_most_one(num_points, size, seed):
    clusters = balanced_kmeans(cloud(num_points, 4, seed), size, num_iterations=4, seed=seed)
    counts = np.bincount(clusters.labels, minlength=size)
    assert counts.sum() == num_points and counts.max() - counts.min() <= 1


def test_balancing_in_blocks_of_codes_is_balancing_at_once(monkeypatch):
    points = cloud()
    whole = balanced_kmeans(points, 16, num_iterations=5, seed=0)
    monkeypatch.setattr(kmeans, "BLOCK_VALUES", 3 * len(points))
    blocks = balanced_kmeans(points, 16, num_iterations=5, seed=0)
    assert np.array_equal(whole.labels, blocks.labels)


def test_centroids_of_balanced_levels_are_means_of_what_they_hold():
    points = cloud()
    centroids, labels = balanced_kmeans(points, 16, num_iterations=5, seed=0)
    means = np.stack([points[labels == code].mean(axis=0) for code in range(16)])
    assert np.allclose(centroids, means, atol=1e-5)


# -- k-means ----------------------------------------------------------------------------------


def test_nearest_in_chunks_is_brute_force(monkeypatch):
    points, centroids = cloud(103), cloud(7, seed=1)
    monkeypatch.setattr(kmeans, "CHUNK", 10)
    labels, distances = nearest(points, centroids)
    found = brute_force(points, centroids)
    assert np.array_equal(labels, found.argmin(axis=1))
    assert np.allclose(distances, found.min(axis=1), atol=1e-3)
    assert np.allclose(squared_distances(points, centroids), found, atol=1e-3)
    assert [len(part) for part in nearest(points[:0], centroids)] == [0, 0]


def test_of_equally_near_centroids_the_lowest_is_taken():
    points = np.array([[1, 0], [0, 0]], np.float32)
    centroids = np.array([[5, 5], [0, 0], [2, 0], [0, 0]], np.float32)
    assert nearest(points, centroids)[0].tolist() == [1, 1]


def test_more_iterations_from_given_centroids_never_raise_the_error():
    points = cloud()
    start = points[:20]
    errors = [nearest(points, start)[1].sum()]
    for count in (1, 2, 4, 50):
        found = kmeans.kmeans(points, 20, num_iterations=count, seed=0, first_KE=start)
        labels, distances = nearest(points, found.centroids)
        assert np.array_equal(found.labels, labels)
        errors.append(distances.sum())
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
    assert np.array_equal(start, points[:20])  # what came in is as it was


def test_minibatch_kmeans_is_deterministic_with_any_number_of_threads():
    from threadpoolctl import threadpool_limits

    points = cloud(6_000)
    found: list[Clusters] = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(minibatch_kmeans(points, 16, num_iterations=3, seed=5))
    assert np.array_equal(found[0].centroids, found[1].centroids)
    assert np.array_equal(found[0].labels, nearest(points, found[0].centroids)[0])
    lloyd = kmeans.kmeans(points, 16, num_iterations=25, seed=5)
    errors = [nearest(points, c.centroids)[1].sum() for c in (found[0], lloyd)]
    assert errors[0] < 1.1 * errors[1]


# -- memory -----------------------------------------------------------------------------------


def peak_of(function: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2]])
def test_fitting_and_coding_need_little_more_than_one_copy_of_the_vectors(variant, monkeypatch):
    """So that 10^6 vectors of width 384 (1.5 GB) stay far below 6 GB."""
    monkeypatch.setattr(kmeans, "CHUNK", 512)
    monkeypatch.setattr(kmeans, "MINIBATCH", 512)
    monkeypatch.setattr("genrec.tokenizers.rqkmeans.CHUNK", 512)
    catalog = Catalog.from_vectors(cloud(20_000, 96))
    size = catalog.vectors.nbytes
    tokenizer = make(codebook_size=8, num_iterations=2, **variant)
    assert peak_of(lambda: tokenizer.fit(catalog)) < 1.5 * size
    assert peak_of(lambda: tokenizer.encode(catalog)) < 0.6 * size
