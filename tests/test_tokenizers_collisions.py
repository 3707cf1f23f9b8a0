"""Do collision policies always end in a bijection, whatever the order of the rows?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import Catalog
from genrec.errors import ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.tokenizers.collisions import assign_last, collision_groups, extra_level, forbid
from genrec.tokenizers.rqkmeans import RQKMeans
from genrec.tokenizers.rqvae import RQVAE

codes_with_duplicates = st.integers(1, 3).flatmap(
    lambda levels: st.lists(
        st.tuples(*[st.integers(0, 2)] * levels).map(list), min_size=1, max_size=14
    )
)


def ids(count: int) -> list[str]:
    return [f"item{number}" for number in range(count)]


@settings(max_examples=60, deadline=None)
@given(codes_with_duplicates, st.randoms())
def test_extra_level_is_a_bijection_that_ignores_row_order(rows, random):
    codes, items = np.array(rows, np.int32), ids(len(rows))
    unique, sizes = extra_level(codes, (3,) * codes.shape[1], items)
    assert unique.dtype == np.int32
    index = ItemIndex(tuple(items), unique, sizes)  # checks range and uniqueness
    assert np.array_equal(index.codes[:, :-1], codes)
    counts = [rows.count(row) for row in rows]
    assert sizes == (*(3,) * codes.shape[1], max(counts))
    order = list(range(len(rows)))
    random.shuffle(order)
    again, _ = extra_level(codes[order], (3,) * codes.shape[1], [items[i] for i in order])
    assert np.array_equal(again, unique[order])


def test_extra_level_numbers_each_group_in_the_order_of_ids():
    codes = np.array([[1, 1], [0, 0], [1, 1], [1, 1], [0, 1]], np.int32)
    unique, sizes = extra_level(codes, (2, 2), ["c", "x", "a", "b", "y"])
    assert unique[:, -1].tolist() == [2, 0, 0, 1, 0]
    assert sizes == (2, 2, 3)


def test_extra_level_is_appended_even_when_nothing_collides():
    unique, sizes = extra_level(np.array([[0], [1]], np.int32), (2,), ["a", "b"])
    assert unique.tolist() == [[0, 0], [1, 0]] and sizes == (2, 1)


def test_forbid_names_the_largest_groups():
    codes = np.array([[0, 1], [0, 0], [0, 1], [1, 1], [1, 1], [0, 1]], np.int32)
    with pytest.raises(UserError) as error:
        forbid(codes, (2, 2), ["a", "b", "c", "d", "e", "f"])
    text = str(error.value)
    assert "5 items in 2 group(s)" in text and "extra_level" in text
    assert text.index("(0, 1): 'a', 'c', 'f' (3 items)") < text.index("(1, 1): 'd', 'e' (2 items)")
    unique, sizes = forbid(codes[:2], (2, 2), ["a", "b"])
    assert np.array_equal(unique, codes[:2]) and sizes == (2, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_assign_last_is_the_cheapest_way_to_make_a_prefix_distinct(seed, num_items):
    rng = np.random.default_rng(seed)
    num_codes = 6
    distances = rng.random((num_items, num_codes))
    codes = np.stack([np.zeros(num_items, np.int64), distances.argmin(1)], axis=1)
    unique, sizes = assign_last(
        codes, (1, num_codes), ids(num_items), distances=distances.__getitem__
    )
    assert sizes == (1, num_codes) and len(np.unique(unique, axis=0)) == num_items
    cost = distances[np.arange(num_items), unique[:, 1]].sum()
    best = min(
        distances[np.arange(num_items), list(choice)].sum()
        for choice in itertools.permutations(range(num_codes), num_items)
    )
    assert cost == pytest.approx(best)


def test_assign_last_leaves_prefixes_without_collisions_alone():
    codes = np.array([[0, 1], [0, 1], [1, 2], [1, 0]], np.int32)
    asked = []

    def distances(rows):
        asked.append(sorted(rows.tolist()))
        return np.ones((len(rows), 3))

    unique, _ = assign_last(codes, (2, 3), ids(4), distances=distances)
    assert np.array_equal(unique[2:], codes[2:]) and asked == [[0, 1]]
    assert unique[0, 1] != unique[1, 1]


def test_assign_last_says_when_a_prefix_has_no_room_and_when_it_lacks_distances():
    codes = np.zeros((4, 2), np.int32)
    with pytest.raises(UserError, match=r"4 items share the prefix \(0,\).*3 codes.*extra_level"):
        assign_last(codes, (1, 3), ids(4), distances=lambda rows: np.ones((len(rows), 3)))
    with pytest.raises(UserError, match="no distances"):
        assign_last(codes, (1, 3), ids(4))


def world(num_items: int = 60) -> Catalog:
    vectors = np.random.default_rng(0).normal(size=(num_items, 6))
    return Catalog.from_vectors(vectors, ids(num_items))


TOKENIZERS = [
    RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=12)),
    RQVAE(
        RQVAE.Config(num_levels=2, codebook_size=12, hidden_dims=(8,), latent_dim=4, num_epochs=5)
    ),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["rqkmeans", "rqvae"])
def test_an_index_by_assign_last_keeps_levels_and_prefixes(tokenizer):
    catalog = world()
    codes = tokenizer.fit(catalog).encode(catalog)
    assert collision_groups(codes)
    index = ItemIndex.build(tokenizer, catalog, collisions="assign_last")
    assert index.codebook_sizes == tokenizer.codebook_sizes
    assert np.array_equal(index.codes[:, 0], codes[:, 0])
    moved = (index.codes != codes).any(axis=1)
    assert 0 < moved.sum() < len(catalog)
    shuffled = np.random.default_rng(1).permutation(len(catalog))
    again = ItemIndex.build(tokenizer, catalog.select(shuffled), collisions="assign_last")
    assert np.array_equal(again.codes_of(catalog.item_ids), index.codes)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["rqkmeans", "rqvae"])
def test_last_level_distances_are_smallest_at_the_code_chosen(tokenizer):
    catalog = world()
    codes = tokenizer.fit(catalog).encode(catalog)
    distances = tokenizer.last_level_distances(catalog)
    assert distances.shape == (60, 12) and (distances >= 0).all()
    chosen = distances[np.arange(60), codes[:, -1]]
    assert np.allclose(chosen, distances.min(axis=1), atol=1e-5)


def test_an_unknown_policy_names_the_nearest():
    tokenizer = TOKENIZERS[0].fit(world())
    with pytest.raises(ConfigError, match=r"'extra_levl'.*Did you mean 'extra_level'"):
        ItemIndex.build(tokenizer, world(), collisions="extra_levl")
