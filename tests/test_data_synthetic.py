"""Are the planted worlds what they claim to be: the law, the vectors, the splits, the seeds?"""

from __future__ import annotations

import numpy as np
import pytest

from genrec.data import TEST, TRAIN, VALID
from genrec.data.synthetic import planted, planted_leaves, planted_transitions, ring
from genrec.errors import UserError


def test_ring_is_the_ring():
    dataset = ring(num_items=7, num_users=10, length=5)
    for user in range(10):
        assert dataset.interactions.user(user).tolist() == [(user + k) % 7 for k in range(5)]
    expected = [TRAIN, TRAIN, TRAIN, VALID, TEST] * 10
    assert dataset.interactions.splits.tolist() == expected
    assert len(np.unique(dataset.catalog.vectors, axis=0)) == 7
    assert dataset.catalog.titles[3] == "Ring item 3"


def test_planted_is_determined_by_its_seed():
    first, again, other = planted(seed=1), planted(seed=1), planted(seed=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(first.catalog.vectors, again.catalog.vectors)
    assert not np.array_equal(first.catalog.vectors, other.catalog.vectors)


def test_planted_follows_its_law():
    dataset = planted(num_items=30, num_users=4000, seed=0, branching=2, length=(8, 8))
    law = planted_transitions(dataset.catalog)
    assert np.allclose(law.sum(axis=1), 1.0)
    walks = dataset.interactions.item_rows.reshape(-1, 8)
    counts = np.zeros_like(law)
    np.add.at(counts, (walks[:, :-1].ravel(), walks[:, 1:].ravel()), 1)
    expected = counts.sum(axis=1, keepdims=True) * law
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = 30 * 29
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)
    leaves = planted_leaves(dataset.catalog)
    stays = (leaves[walks[:, :-1]] == leaves[walks[:, 1:]]).mean()
    assert abs(stays - (0.6 + 0.15 / 8)) < 0.01


def test_planted_vectors_show_the_tree():
    dataset = planted(num_items=128, num_users=1, noise=0.1)
    leaves, vectors = planted_leaves(dataset.catalog), dataset.catalog.vectors
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (leaves[distances.argmin(axis=1)] == leaves).all()
    assert len(set(dataset.catalog.titles)) == 128
    assert np.bincount(leaves).tolist() == [2] * 64


@pytest.mark.parametrize("arguments", [{"num_items": 63}, {"branching": 1}, {"length": (2, 5)}])
def test_planted_refuses_what_it_cannot_make(arguments):
    with pytest.raises(UserError, match=r"planted: got .*expected"):
        planted(**arguments)


def test_ring_refuses_what_it_cannot_make():
    with pytest.raises(UserError, match=r"ring: got num_items=1"):
        ring(num_items=1)
