"""Are co-occurrences counted right, and do items of the same users get similar vectors?"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.config import parse_component
from genrec.data import Interactions
from genrec.data.splits import leave_one_out
from genrec.data.synthetic import planted, planted_leaves
from genrec.errors import ConfigError, UserError
from genrec.features import FEATURES
from genrec.features.collaborative import (
    CollaborativeConfig,
    collaborative_vectors,
    cooccurrence,
    ppmi,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=8)


def training(sequences: list[list[int]], num_items: int = 7) -> Interactions:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    rows = np.array(list(itertools.chain(*sequences)), dtype=np.int32)
    zeros = np.zeros(len(rows))
    return Interactions(rows, offsets, zeros.astype(int), zeros.astype(np.uint8), num_items)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.one_of(st.none(), st.integers(1, 4)))
def test_cooccurrence_is_what_counting_by_hand_gives(sequences, window):
    counts: Counter[tuple[int, int]] = Counter()
    for sequence in sequences:
        if window is None:
            counts.update(itertools.permutations(set(sequence), 2))
            continue
        for (i, a), (j, b) in itertools.permutations(enumerate(sequence), 2):
            if abs(i - j) <= window and a != b:
                counts[a, b] += 1
    expected = np.zeros((7, 7))
    for pair, count in counts.items():
        expected[pair] = count
    found = cooccurrence(training(sequences), window).toarray()
    assert np.array_equal(found, expected) and np.array_equal(found, found.T)


def test_ppmi_is_the_formula():
    counts = cooccurrence(training([[0, 1, 2], [0, 1], [3, 4], [2, 3]]))
    dense, smoothing = counts.toarray(), 0.75
    share = dense.sum(1) / dense.sum()
    context = dense.sum(1) ** smoothing / (dense.sum(1) ** smoothing).sum()
    found = ppmi(counts, smoothing).toarray()
    for i, j in itertools.product(range(7), repeat=2):
        if not dense[i, j]:
            assert found[i, j] == 0
            continue
        joint = math.log(dense[i, j] / dense.sum())
        both = [joint - math.log(share[a] * context[b]) for a, b in ((i, j), (j, i))]
        assert found[i, j] == pytest.approx(max(0.0, sum(both) / 2))
    assert np.allclose(found, found.T)


@pytest.mark.parametrize("weighting", ["ppmi", "cosine", "sqrt", "count"])
@pytest.mark.parametrize("window", [None, 2])
def test_items_of_the_same_leaf_get_similar_vectors(weighting, window):
    data = planted(num_items=64, num_users=400, branching=3)
    config = CollaborativeConfig(width=16, weighting=weighting, window=window)
    vectors = collaborative_vectors(data.interactions.training(), config)
    assert vectors.shape == (64, 16) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    leaves = planted_leaves(data.catalog)
    similar = vectors @ vectors.T
    same = leaves[:, None] == leaves[None, :]
    others = ~np.eye(64, dtype=bool)
    assert similar[same & others].mean() > similar[~same].mean() + 0.2


def test_vectors_repeat_and_their_scale_is_optional():
    data = planted(num_items=64, num_users=200).interactions.training()
    config = CollaborativeConfig(width=8)
    first = collaborative_vectors(data, config)
    assert np.array_equal(first, collaborative_vectors(data, config))
    raw = collaborative_vectors(data, config.model_copy(update={"normalize": False}))
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=0.05)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.allclose(unit, first, atol=1e-5)


def test_the_order_of_users_and_rows_does_not_matter():
    """With as many dimensions as items the SVD is exact."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 7, 6).tolist() for _ in range(20)]
    config = CollaborativeConfig(width=7, normalize=False)
    first = collaborative_vectors(training(sequences), config)
    swapped = collaborative_vectors(training(sequences[::-1]), config)
    assert np.allclose(first @ first.T, swapped @ swapped.T, atol=1e-4)
    order = rng.permutation(7)
    renamed = [[int(order[i]) for i in sequence] for sequence in sequences]
    other = collaborative_vectors(training(renamed), config)[order]
    assert np.allclose(first @ first.T, other @ other.T, atol=1e-4)


def test_an_item_that_nobody_consumed_has_the_zero_vector():
    found = collaborative_vectors(training([[0, 1, 2], [1, 2], [3, 4]]), CollaborativeConfig())
    assert found.shape == (7, 64)
    assert (found[5:] == 0).all() and (found[:5] != 0).any(axis=1).all()


def test_held_out_interactions_are_refused_and_change_nothing():
    data = planted(num_items=64, num_users=50)
    with pytest.raises(UserError, match=r"got 100 validation or test.*\.training\(\)"):
        collaborative_vectors(data.interactions, CollaborativeConfig())
    rows = data.interactions.item_rows.copy()
    held_out = data.interactions.splits != 0
    rows[held_out] = np.random.default_rng(0).permutation(rows[held_out])
    other = Interactions(
        rows,
        data.interactions.offsets,
        data.interactions.timestamps,
        leave_one_out(data.interactions.offsets),
        64,
    )
    config = CollaborativeConfig(width=8)
    found = [collaborative_vectors(x.training(), config) for x in (data.interactions, other)]
    assert np.array_equal(found[0], found[1])


def test_nothing_to_learn_from_is_one_clear_error():
    with pytest.raises(UserError, match="no training interactions"):
        collaborative_vectors(training([]), CollaborativeConfig())
    with pytest.raises(UserError, match="no two items occur together"):
        collaborative_vectors(training([[1], [2], [3, 3]]), CollaborativeConfig())


def test_the_extractor_wants_the_training_interactions_of_this_catalogue():
    data = planted(num_items=64, num_users=50)
    cls, config = parse_component(FEATURES, {"name": "collaborative", "width": 8}, path="features")
    extractor = cls(config)
    interactions = data.interactions.training()
    assert extractor.needs_interactions
    found = extractor.embed(data.catalog, interactions)
    assert np.array_equal(found, collaborative_vectors(interactions, config))
    with pytest.raises(UserError, match=r"needs the training interactions"):
        extractor.embed(data.catalog)
    with pytest.raises(UserError, match=r"of 64 items, the catalogue has 3"):
        extractor.embed(data.catalog.select([0, 1, 2]), interactions)


def test_sasrec_vectors_take_the_width_and_zero_the_unseen():
    """One epoch: that they mean something is tested where SASRec is."""
    sequences = [[0, 1, 2, 3], [1, 2, 3, 4], [0, 2, 4]]
    settings_ = {"epochs": 1, "num_heads": 1, "num_layers": 1}
    config = CollaborativeConfig(method="sasrec", width=6, sasrec=settings_)
    found = collaborative_vectors(training(sequences), config)
    assert found.shape == (7, 6) and (found[5:] == 0).all()
    assert np.allclose(np.linalg.norm(found[:5], axis=1), 1, atol=1e-5)
    assert np.array_equal(found, collaborative_vectors(training(sequences), config))
    with pytest.raises(ConfigError, match=r"d_model=7 is no multiple of num_heads=2"):
        collaborative_vectors(training(sequences), CollaborativeConfig(method="sasrec", width=7))
