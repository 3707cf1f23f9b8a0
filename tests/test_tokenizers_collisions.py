"""Do collision policies always end in a bijection, whatever the order of the rows?"""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import Catalog
from genrec.errors import ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.tokenizers import COLLISIONS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.collisions.last_codes import (
    assign_last,
    match_nearest,
    nearest_free,
    sinkhorn,
)
from genrec.tokenizers.collisions.numbering import collision_groups, extra_level, forbid, suffix
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


LAST = {"assign_last": assign_last, "nearest_free": nearest_free, "sinkhorn": sinkhorn}


@pytest.mark.parametrize("policy", LAST.values(), ids=LAST)
def test_prefixes_without_collisions_are_left_alone(policy):
    codes = np.array([[0, 1], [0, 1], [1, 2], [1, 0]], np.int32)
    asked = []

    def distances(rows):
        asked.append(sorted(rows.tolist()))
        return np.array([[2.0, 0, 1], [3, 0, 2]])[: len(rows)]

    unique, sizes = policy(codes, (2, 3), ids(4), distances=distances)
    assert np.array_equal(unique[2:], codes[2:]) and asked == [[0, 1]]
    assert unique[0, 1] != unique[1, 1] and sizes == (2, 3)


@pytest.mark.parametrize("policy", LAST.values(), ids=LAST)
def test_policies_that_weigh_distances_say_when_they_lack_them(policy):
    with pytest.raises(UserError, match="got no distances to the last codes"):
        policy(np.zeros((4, 2), np.int32), (1, 3), ids(4))


@pytest.mark.parametrize("policy", [assign_last, nearest_free])
def test_a_prefix_without_room_is_named(policy):
    codes = np.array([[0, 0]] * 4 + [[1, 1]] * 5, np.int32)
    with pytest.raises(
        UserError, match=r"5 items share the prefix \(1,\) \(and 1 more.*3 codes.*extra_level"
    ):
        policy(codes, (2, 3), ids(9), distances=lambda rows: np.ones((len(rows), 3)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.randoms(), st.sampled_from(sorted(LAST)))
def test_last_codes_end_in_a_bijection_that_ignores_row_order(seed, num_items, random, name):
    rng = np.random.default_rng(seed)
    vectors, books = rng.integers(0, 4, (num_items, 2)), rng.integers(0, 4, (6, 2))
    table = np.square(vectors[:, None, :] - books).sum(-1).astype(float)  # many equal distances
    codes = np.stack([rng.integers(0, 2, num_items), table.argmin(1)], axis=1).astype(np.int32)
    items = ids(num_items)

    def run(order):
        return LAST[name](
            codes[order], (2, 6), [items[i] for i in order], distances=table[order].__getitem__
        )

    rows = list(range(num_items))
    room = max(np.bincount(codes[:, 0])) <= 6
    if not room and name != "sinkhorn":
        with pytest.raises(UserError, match="share the prefix"):
            run(rows)
        return
    unique, sizes = run(rows)
    ItemIndex(tuple(items), unique, sizes)  # checks range and uniqueness
    assert np.array_equal(unique[:, 0], codes[:, 0])
    random.shuffle(rows)
    again, same_sizes = run(rows)
    assert np.array_equal(again, unique[rows]) and sizes == same_sizes
    if name != "sinkhorn":
        assert sizes == (2, 6)
    before, after = (len(np.unique(c[:, :2], axis=0)) for c in (codes, unique))
    assert after >= before  # the guard: never more collisions
    if name != "assign_last":
        alone = [row for row in range(num_items) if (codes == codes[row]).all(1).sum() == 1]
        assert np.array_equal(unique[alone, :2], codes[alone])


def test_nearest_free_goes_by_distance_then_id_then_code():
    codes = np.array([[0, 1], [0, 1], [0, 1], [0, 3]], np.int32)
    distances = np.array([[5.0, 1, 2, 0], [5, 0, 2, 0], [9, 1, 2, 0], [0, 0, 0, 0]])
    unique, _ = nearest_free(
        codes, (1, 4), ["c", "z", "a", "k"], distances=lambda rows: distances[rows]
    )
    # z is nearest to code 1 and keeps it; a and c are equally near to 2, a comes first; c gets 0;
    # code 3 belongs to k, which collides with nobody.
    assert unique[:, 1].tolist() == [0, 1, 2, 3]
    assert match_nearest(np.zeros((2, 3))).tolist() == [0, 1]


def test_assign_last_is_never_farther_than_nearest_free():
    rng = np.random.default_rng(5)
    distances = rng.random((7, 9))
    codes = np.stack([np.zeros(7, int), distances.argmin(1)], axis=1)
    found = {
        name: LAST[name](codes, (1, 9), ids(7), distances=distances.__getitem__)[0][:, 1]
        for name in LAST
    }
    cost = {name: distances[np.arange(7), last].sum() for name, last in found.items()}
    assert cost["assign_last"] <= min(cost.values()) + 1e-12


def test_sinkhorn_spreads_a_colliding_prefix_evenly():
    distances = np.square(np.linspace(0, 1, 6)[:, None] - np.linspace(0, 1, 6))
    codes = np.array([[0, 2]] * 6, np.int32)
    unique, sizes = sinkhorn(codes, (1, 6), ids(6), distances=distances.__getitem__)
    assert sizes == (1, 6) and unique[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_sinkhorn_leaves_over_gets_an_extra_level_and_a_warning(caplog):
    codes = np.array([[0, 1], [0, 1], [0, 1], [1, 0]], np.int32)
    same = np.array([[3.0, 0, 1]] * 4)  # equal items: no plan can tell them apart
    logging.getLogger("genrec").propagate = True
    with caplog.at_level(logging.WARNING, logger="genrec"):
        unique, sizes = sinkhorn(codes, (2, 3), ["c", "a", "b", "d"], distances=same.__getitem__)
    assert sizes == (2, 3, 3) and unique[:, 2].tolist() == [2, 0, 1, 0]
    assert np.array_equal(unique[:, :2], codes)  # rounds that do not help are taken back
    assert "3 item(s) in 1 group(s) still share their codes" in caplog.text


def test_a_round_of_sinkhorn_that_does_not_help_is_taken_back(monkeypatch):
    import torch

    from genrec.tokenizers.quantization import residual

    def worse(distances, **_):  # sends everybody to the first free code
        plan = torch.zeros_like(distances)
        plan[:, 0] = 1
        return plan

    monkeypatch.setattr(residual, "sinkhorn", worse)
    codes = np.array([[0, 1], [0, 1], [0, 2], [0, 2]], np.int32)
    unique, _ = sinkhorn(codes, (1, 4), ids(4), distances=lambda rows: np.ones((len(rows), 4)))
    assert np.array_equal(unique[:, :2], codes)


def test_distances_are_asked_for_in_batches(monkeypatch):
    from genrec.tokenizers.collisions import last_codes

    rng = np.random.default_rng(0)
    codes = np.stack([np.repeat(np.arange(9), 4), rng.integers(0, 2, 36)], axis=1)
    table, asked = rng.random((36, 4)), []

    def distances(rows):
        asked.append(len(rows))
        return table[rows]

    whole, _ = assign_last(codes, (9, 4), ids(36), distances=distances)
    assert asked == [36]
    monkeypatch.setattr(last_codes, "BATCH_ENTRIES", 40)  # ten items: two prefixes
    asked.clear()
    parts, _ = assign_last(codes, (9, 4), ids(36), distances=distances)
    assert np.array_equal(parts, whole) and asked == [8, 8, 8, 8, 4]


# -- numbers kept free, and shared vocabularies -------------------------------------------------


def test_a_reserve_leaves_numbers_free():
    codes = np.array([[1], [1], [0]], np.int32)
    assert extra_level(codes, (2,), ids(3), reserve=4)[1] == (2, 6)
    unique, sizes = sinkhorn(
        codes, (2,), ids(3), distances=lambda rows: np.eye(3)[rows][:, :2], reserve=4
    )
    assert sizes[-1] >= 5 and len(np.unique(unique, axis=0)) == 3
    words = np.array([[1, 2], [3, 0], [4, 5]], np.int32)
    assert suffix(words, (6, 6), ids(3))[1] == (6, 6)
    unique, sizes = suffix(words, (6, 6), ids(3), reserve=4)
    assert sizes == (10, 10, 10) and np.array_equal(unique[:, :2], words)


words = st.lists(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(lambda w: w + [0] * (3 - len(w))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(words, st.randoms(), st.integers(0, 2))
def test_suffix_is_a_bijection_that_ignores_row_order(rows, random, reserve):
    codes, items = np.array(rows, np.int32), ids(len(rows))
    unique, sizes = suffix(codes, (4, 4, 4), items, reserve=reserve)
    assert unique.dtype == np.int32
    index = ItemIndex(tuple(items), unique, sizes, shared_vocabulary=True)  # checks ends too
    counts = np.array([rows.count(row) for row in rows])
    largest = counts.max() if counts.max() > 1 else 0
    assert sizes == (4 + largest + reserve,) * index.num_levels
    full = (codes[:, 2] > 0) & (counts > 1)
    assert index.num_levels == 3 + bool(reserve or full.any())
    alone = counts == 1
    assert np.array_equal(unique[alone][:, :3], codes[alone]) and (unique[alone, 3:] == 0).all()
    for row in np.flatnonzero(~alone):  # the semantic ID, one number, END
        length = int((codes[row] > 0).sum())
        assert unique[row, :length].tolist() == codes[row, :length].tolist()
        assert 4 <= unique[row, length] < 4 + counts[row]
    order = list(range(len(rows)))
    random.shuffle(order)
    again, _ = suffix(codes[order], (4,) * 3, [items[i] for i in order], reserve=reserve)
    assert np.array_equal(again, unique[order])


def test_suffix_numbers_go_before_the_end():
    codes = np.array([[5, 2, 0], [3, 0, 0], [5, 2, 0], [3, 0, 0], [1, 1, 1]], np.int32)
    unique, sizes = suffix(codes, (6, 6, 6), ["e", "b", "a", "c", "d"])
    assert unique.tolist() == [[5, 2, 7], [3, 6, 0], [5, 2, 6], [3, 7, 0], [1, 1, 1]]
    assert sizes == (8, 8, 8)


class Words(ItemTokenizer):
    """Words of an item's id: letters as codes, two levels, one vocabulary."""

    shared_vocabulary = True
    needs = frozenset()
    name = "words"
    codebook_sizes = (27, 27)

    def fit(self, catalog, interactions=None):
        return self

    def encode(self, catalog):
        rows = [[ord(c) - 96 for c in item[:2].ljust(2, "`")] for item in catalog.item_ids]
        return np.array(rows, np.int32)

    def state(self):
        return {}

    def load_state(self, state):
        return self


def test_extra_level_of_a_shared_vocabulary_is_the_suffix():
    catalog = Catalog.from_vectors(np.zeros((4, 1)), ["ab1", "ab2", "c", "xy"])
    index = ItemIndex.build(Words(None), catalog, collisions="extra_level")
    assert index.codes.tolist() == [[1, 2, 27], [1, 2, 28], [3, 0, 0], [24, 25, 0]]
    assert index.codebook_sizes == (29, 29, 29) and index.shared_vocabulary
    with pytest.raises(UserError, match=r"\(1, 2\): 'ab1', 'ab2' \(2 items\)"):
        ItemIndex.build(Words(None), catalog, collisions="forbid")
    with pytest.raises(UserError, match=r"'sinkhorn', which weighs distances.*extra_level.*forbid"):
        ItemIndex.build(Words(None), catalog, collisions="sinkhorn")


def test_a_reserve_needs_a_policy_that_numbers():
    tokenizer = TOKENIZERS[0].fit(world())
    with pytest.raises(UserError, match=r"reserve=3, but 'assign_last' numbers no items"):
        tokenizer.collision_policy("assign_last", world(), reserve=3)
    policy = tokenizer.collision_policy("extra_level", world(), reserve=3)
    plain = ItemIndex.build(tokenizer, world(), collisions="extra_level")
    index = ItemIndex.build(tokenizer, world(), collisions=policy)
    assert np.array_equal(index.codes, plain.codes)
    assert index.codebook_sizes[-1] == plain.codebook_sizes[-1] + 3


def world(num_items: int = 60) -> Catalog:
    vectors = np.random.default_rng(0).normal(size=(num_items, 6))
    return Catalog.from_vectors(vectors, ids(num_items))


TOKENIZERS = [
    RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=12)),
    RQVAE(
        RQVAE.Config(num_levels=2, codebook_size=12, hidden_dims=(8,), latent_dim=4, num_epochs=5)
    ),
]


@pytest.mark.parametrize("policy", sorted(LAST))
@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["rqkmeans", "rqvae"])
def test_an_index_by_last_codes_keeps_levels_and_prefixes(tokenizer, policy):
    catalog = world()
    codes = tokenizer.fit(catalog).encode(catalog)
    assert collision_groups(codes)
    index = ItemIndex.build(tokenizer, catalog, collisions=policy)
    assert index.codebook_sizes[:2] == tokenizer.codebook_sizes
    assert index.num_levels == 2 or policy == "sinkhorn"
    assert np.array_equal(index.codes[:, 0], codes[:, 0])
    moved = (index.codes[:, :2] != codes).any(axis=1)
    assert 0 < moved.sum() < len(catalog)
    shuffled = np.random.default_rng(1).permutation(len(catalog))
    again = ItemIndex.build(tokenizer, catalog.select(shuffled), collisions=policy)
    assert np.array_equal(again.codes_of(catalog.item_ids), index.codes)


@pytest.mark.parametrize("policy", sorted(set(COLLISIONS) - {"first_unused"}))
def test_no_items_and_one_item_are_fine(policy):
    tokenizer = TOKENIZERS[0].fit(world())
    for rows in ([], [3]):
        index = ItemIndex.build(tokenizer, world().select(rows), collisions=policy)
        assert len(index) == len(rows) and index.num_levels >= 2


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
