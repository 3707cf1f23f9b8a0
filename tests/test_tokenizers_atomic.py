"""Do the numberings keep the contract, and does `sequential` see training interactions only?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.config import parse_component
from genrec.data import Catalog, Interactions
from genrec.data.interactions import TEST, TRAIN, VALID
from genrec.data.splits import leave_one_out
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.atomic import digits, first_appearances
from genrec.tokenizers.base import ItemTokenizer


class TestSequential(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "sequential", "base": 4}


class TestRandom(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "random"}


class TestIndependent(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "independent"}


NAMES = ["sequential", "random", "independent"]


def make(name: str, **config: Any) -> ItemTokenizer:
    cls, checked = parse_component(TOKENIZERS, {"name": name, **config}, path="tokenizer")
    return cls(checked)


def sequences(*walks: list[int], num_items: int, held_out: bool = False) -> Interactions:
    offsets = np.concatenate([[0], np.cumsum([len(walk) for walk in walks])]).astype(np.int64)
    rows = np.array([row for walk in walks for row in walk], np.int32)
    splits = leave_one_out(offsets) if held_out else np.full(len(rows), TRAIN, np.uint8)
    return Interactions(rows, offsets, np.arange(len(rows)), splits, num_items)


def bare(num_items: int) -> Catalog:
    return Catalog(planted(max(8, num_items), 1, branching=2).catalog.table[:num_items])


def numbers(tokenizer: ItemTokenizer, catalog: Catalog) -> list[int]:
    """Read the digits as numbers again."""
    codes, sizes = tokenizer.encode(catalog), tokenizer.codebook_sizes
    base = sizes[-1]
    return [int(sum(c * base**n for n, c in enumerate(reversed(row)))) for row in codes.tolist()]


# -- numbers ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(2, 40))
def test_digits_write_every_number_once_and_no_level_is_larger_than_needed(count, base):
    codes, sizes = digits(np.arange(count), base)
    assert len(np.unique(codes, axis=0)) == count
    assert codes[:, 0].max() + 1 == sizes[0]
    assert (codes < np.array(sizes)).all() and sizes[1:] == (base,) * (len(sizes) - 1)
    powers = base ** np.arange(len(sizes) - 1, -1, -1)
    assert np.array_equal(codes @ powers, np.arange(count))
    assert len(sizes) == 1 or base ** (len(sizes) - 1) < count


def test_sequential_follows_the_first_appearance_user_by_user():
    events = sequences([3, 1, 3], [1, 0, 2], num_items=6)
    tokenizer = make("sequential", base=10).fit(bare(6), events)
    found = numbers(tokenizer, bare(6))
    assert found[:4] == [2, 1, 3, 0]
    assert sorted(found[4:]) == [4, 5]  # never seen in training: behind all others


def test_orders_walk_users_by_length():
    events = sequences([0, 1, 2], [3], [4, 5], num_items=6)
    found = {
        order: numbers(make("sequential", base=10, order=order).fit(bare(6), events), bare(6))
        for order in ("original", "short_to_long", "long_to_short")
    }
    assert found["original"] == [0, 1, 2, 3, 4, 5]
    assert found["short_to_long"] == [3, 4, 5, 0, 1, 2]
    assert found["long_to_short"] == [0, 1, 2, 5, 3, 4]
    drawn = {
        tuple(numbers(make("sequential", order="random", seed=s).fit(bare(6), events), bare(6)))
        for s in range(6)
    }
    assert len(drawn) > 1


def test_first_appearances_equal_a_plain_walk():
    events = planted(150, 60, seed=5, branching=3).interactions.training()
    users = np.random.default_rng(0).permutation(events.num_users)
    walked = dict.fromkeys(row for user in users for row in events.user(user).tolist())
    assert first_appearances(events, users).tolist() == list(walked)


def test_items_never_seen_are_shuffled_by_the_seed_and_not_by_the_rows():
    catalog, events = bare(40), sequences([0, 1], num_items=40)
    one, same, other = (make("sequential", seed=s).fit(catalog, events) for s in (0, 0, 1))
    assert np.array_equal(one.encode(catalog), same.encode(catalog))
    assert not np.array_equal(one.encode(catalog), other.encode(catalog))


@pytest.mark.parametrize("name", NAMES)
def test_codes_do_not_depend_on_the_order_of_catalogue_rows(name):
    data = planted(60, 20, seed=2, branching=2)
    events = data.interactions.training()
    order = np.random.default_rng(4).permutation(60)
    shuffled = Interactions(
        np.argsort(order)[events.item_rows].astype(np.int32),
        events.offsets,
        events.timestamps,
        events.splits,
        60,
    )
    one = make(name).fit(data.catalog, events)
    other = make(name).fit(data.catalog.select(order), shuffled)
    assert np.array_equal(one.encode(data.catalog), other.encode(data.catalog))


# -- leakage ----------------------------------------------------------------------------------


def next_number_hits(tokenizer: ItemTokenizer, catalog: Catalog, events: Interactions) -> float:
    """Return how often the rule "the last item's number + 1" finds the test item."""
    found = np.array(numbers(tokenizer, catalog))
    examples = events.examples("test")
    last = np.array([history[-1] for history in examples.histories()])
    return float((found[examples.target_rows] == found[last] + 1).mean())


def test_numbering_all_interactions_would_leak_and_training_only_does_not():
    rng = np.random.default_rng(0)
    walks = [rng.integers(0, 2000, size=5).tolist() for _ in range(400)]  # nothing to learn
    events, catalog = sequences(*walks, num_items=2000, held_out=True), bare(2000)
    leaky = Interactions(
        events.item_rows,
        events.offsets,
        events.timestamps,
        np.full(len(events), TRAIN, np.uint8),
        2000,
    )
    honest = make("sequential").fit(catalog, events.training())
    assert next_number_hits(honest, catalog, events) < 0.01
    cheating = make("sequential").fit(catalog, leaky)
    assert next_number_hits(cheating, catalog, events) > 0.2


@pytest.mark.parametrize("split", [VALID, TEST])
def test_held_out_interactions_are_refused(split):
    events = sequences([0, 1, 2, 3], num_items=4, held_out=True)
    kept = np.isin(events.splits, [TRAIN, split])
    some = Interactions(
        events.item_rows[kept],
        np.array([0, kept.sum()]),
        events.timestamps[kept],
        events.splits[kept],
        4,
    )
    with pytest.raises(UserError, match=r"1 validation or test .*leak.*training\(\)"):
        make("sequential").fit(bare(4), some)


# -- bad input and the ends of the scale ------------------------------------------------------


def test_sequential_needs_training_interactions_of_the_same_catalogue():
    for events in (None, sequences([], num_items=4)):
        with pytest.raises(UserError, match="sequential: got no training interactions"):
            make("sequential").fit(bare(4), events)
    with pytest.raises(UserError, match="of 9 items, the catalogue has 4"):
        make("sequential").fit(bare(4), sequences([0, 8], num_items=9))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_items_are_named(name):
    tokenizer = make(name).fit(bare(4), sequences([0, 1, 2], num_items=4))
    strangers = Catalog.from_vectors(np.ones((7, 1)), [f"new{n}" for n in range(7)])
    with pytest.raises(UserError, match=rf"{name}: 7 item\(s\).*'new0', 'new1'.*\.\.\. It numbers"):
        tokenizer.encode(strangers)


@pytest.mark.parametrize("name", NAMES)
def test_empty_catalogues_are_refused_and_one_item_is_enough(name):
    with pytest.raises(UserError, match="0 items"):
        make(name).fit(bare(0), sequences([0], num_items=0))
    one = make(name).fit(bare(1), sequences([0], num_items=1))
    assert one.encode(bare(1)).tolist() == [[0]] and one.codebook_sizes == (1,)


@pytest.mark.parametrize("base", [0, 1, "ten"])
def test_a_base_below_two_is_an_error_with_its_path(base):
    with pytest.raises(ConfigError, match=r"tokenizer\.base"):
        make("random", base=base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("collisions", ["extra_level", "forbid"])
def test_from_fit_to_the_tree_of_a_search(name, collisions):
    data = planted(70, 30, seed=1, branching=2)
    catalog = Catalog(data.catalog.table)  # no vectors
    tokenizer = make(name).fit(catalog, data.interactions.training())
    index = ItemIndex.build(tokenizer, catalog, collisions=collisions)
    assert np.array_equal(index.rows_of_codes(index.codes), np.arange(70))
    extra = (1,) if collisions == "extra_level" else ()
    assert index.codebook_sizes == (*tokenizer.codebook_sizes, *extra)
    tree = CSRIndex.from_index(index)
    assert tree.num_nodes[-1] == 70 and tree.depth == index.num_levels
    if name == "independent":
        assert tree.num_nodes[1] == 70  # one child of the root per item


def test_distances_to_last_codes_do_not_exist():
    tokenizer = make("random").fit(bare(9))
    with pytest.raises(UserError, match="extra_level"):
        tokenizer.last_level_distances(bare(9))
