"""Is the item index a bijection that notices every change?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.errors import ArtifactError, UserError
from genrec.item_index import ItemIndex

SIZES = (3, 4, 2)


@st.composite
def indexes(draw, min_items=1, max_items=12):
    cells = draw(
        st.lists(
            st.integers(0, np.prod(SIZES) - 1), min_size=min_items, max_size=max_items, unique=True
        )
    )
    codes = np.stack(np.unravel_index(cells, SIZES), axis=1)
    names = draw(
        st.lists(st.text(max_size=4), min_size=len(cells), max_size=len(cells), unique=True)
    )
    return ItemIndex(tuple(names), codes, SIZES)


@settings(max_examples=40, deadline=None)
@given(indexes())
def test_ids_rows_and_codes_are_one_to_one(index):
    rows = np.arange(len(index))
    assert np.array_equal(index.rows_of(index.item_ids), rows)
    assert np.array_equal(index.rows_of_codes(index.codes), rows)
    assert np.array_equal(index.codes_of(index.item_ids), index.codes)
    assert index.codes.dtype == np.int32 and not index.codes.flags.writeable


@settings(max_examples=40, deadline=None)
@given(indexes(), st.integers(0, 50))
def test_tokens_of_different_levels_never_meet(index, first_token):
    tokens = index.tokens(first_token)
    start = first_token
    for level, size in enumerate(SIZES):
        assert ((tokens[:, level] >= start) & (tokens[:, level] < start + size)).all()
        assert np.array_equal(tokens[:, level] - start, index.codes[:, level])
        start += size
    assert start - first_token == index.num_tokens


@settings(max_examples=40, deadline=None)
@given(indexes(min_items=3), st.data())
def test_remove_and_add_keep_every_other_code(index, data):
    gone = data.draw(st.lists(st.sampled_from(index.item_ids), min_size=1, unique=True, max_size=2))
    kept = [item for item in index.item_ids if item not in gone]
    smaller = index.remove(gone)
    assert list(smaller.item_ids) == kept
    assert np.array_equal(smaller.codes, index.codes_of(kept))
    back = smaller.add(gone, index.codes_of(gone))
    assert np.array_equal(back.codes[: len(kept)], smaller.codes)
    assert np.array_equal(back.codes_of(index.item_ids), index.codes)
    assert smaller.fingerprint != index.fingerprint


@settings(max_examples=25, deadline=None)
@given(indexes())
def test_a_saved_index_is_the_same_index(tmp_path_factory, index):
    path = tmp_path_factory.mktemp("index") / "index"
    index.save(path, upstream={"tokenizer": "abc"})
    loaded = ItemIndex.load(path)
    assert loaded.fingerprint == index.fingerprint
    assert loaded.item_ids == index.item_ids and np.array_equal(loaded.codes, index.codes)


def small() -> ItemIndex:
    return ItemIndex(("a", "b", "c"), np.array([[0, 0], [0, 1], [1, 0]]), (2, 2))


def test_the_fingerprint_changes_when_anything_changes():
    base = small()
    assert small().fingerprint == base.fingerprint
    changed = [
        ItemIndex(("a", "b", "d"), base.codes, (2, 2)),
        ItemIndex(("b", "a", "c"), base.codes, (2, 2)),
        ItemIndex(base.item_ids, np.array([[0, 0], [0, 1], [1, 1]]), (2, 2)),
        ItemIndex(base.item_ids, base.codes, (2, 3)),
        ItemIndex(base.item_ids, base.codes[[1, 0, 2]], (2, 2)),
    ]
    assert len({index.fingerprint for index in [base, *changed]}) == 6


@pytest.mark.parametrize(
    ("ids", "codes", "sizes", "message"),
    [
        (("a",), [[0, 0], [0, 1]], (2, 2), r"shape \(2, 2\), expected \(1, 2\)"),
        (("a", "b"), [[0, 0], [0, 1]], (2,), r"expected \(2, 1\)"),
        (("a", "a"), [[0, 0], [0, 1]], (2, 2), "item ids repeat"),
        (("a", "b"), [[0, 0], [0, 2]], (2, 2), "outside their levels' sizes"),
        (("a", "b"), [[0, 0], [0, -1]], (2, 2), "outside their levels' sizes"),
        (("a", "b"), [[0, 1], [0, 1]], (2, 2), "share one semantic ID.*extra_level"),
    ],
)
def test_what_is_no_bijection_is_refused(ids, codes, sizes, message):
    with pytest.raises(UserError, match=message):
        ItemIndex(ids, np.array(codes), sizes)


def test_unknown_items_raise_or_are_skipped_or_marked():
    index = small()
    with pytest.raises(UserError, match=r"2 item\(s\) not in the catalogue: 'x', 'y'"):
        index.rows_of(["a", "x", "y"])
    assert index.rows_of(["a", "x", "c"], missing="skip").tolist() == [0, 2]
    assert index.rows_of(["a", "x"], missing="mark").tolist() == [0, -1]
    assert index.codes_of(["x", "c"], missing="skip").tolist() == [[1, 0]]
    assert index.rows_of_codes(np.array([[1, 1], [1, 0]])).tolist() == [-1, 2]


def test_add_refuses_what_is_taken_or_does_not_fit():
    index = small()
    with pytest.raises(UserError, match="ids repeat"):
        index.add(["a"], np.array([[1, 1]]))
    with pytest.raises(UserError, match="share one semantic ID"):
        index.add(["d"], np.array([[1, 0]]))
    with pytest.raises(UserError, match="outside"):
        index.add(["d"], np.array([[2, 0]]))
    with pytest.raises(UserError, match=r"got codes of shape \(1, 3\), expected \(1, 2\)"):
        index.add(["d"], np.array([[1, 1, 0]]))
    with pytest.raises(UserError, match="not in the catalogue: 'z'"):
        index.remove(["z"])


def test_a_damaged_index_is_refused(tmp_path):
    small().save(tmp_path / "index")
    file = tmp_path / "index" / "arrays.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        ItemIndex.load(tmp_path / "index")


class Constant:
    """A tokenizer that gives every item the same code."""

    codebook_sizes = (1,)
    shared_vocabulary = False

    def encode(self, catalog):
        return np.zeros((len(catalog.item_ids), 1), np.int32)

    def collision_policy(self, name, catalog=None):
        raise AssertionError("a policy was given")


class Items:
    item_ids = ("a", "b", "c")


def test_build_takes_any_policy_and_fails_without_one():
    def number(codes, sizes, item_ids):
        return np.arange(len(item_ids))[:, None], (len(item_ids),)

    index = ItemIndex.build(Constant(), Items(), collisions=number)
    assert index.codes[:, 0].tolist() == [0, 1, 2] and index.codebook_sizes == (3,)
    with pytest.raises(UserError, match="share one semantic ID"):
        ItemIndex.build(Constant(), Items(), collisions=lambda c, k, i: (c, tuple(k)))


WORDS = np.array([[1, 0, 0], [1, 2, 0], [1, 2, 3]])


def test_a_shared_vocabulary_has_one_token_per_word(tmp_path):
    index = ItemIndex(("a", "b", "c"), WORDS, (4, 4, 4), shared_vocabulary=True)
    assert index.num_tokens == 4
    assert index.tokens(10).tolist() == [[11, 10, 10], [11, 12, 10], [11, 12, 13]]
    separate = ItemIndex(("a", "b", "c"), WORDS, (4, 4, 4))
    assert separate.num_tokens == 12 and separate.fingerprint != index.fingerprint
    index.save(tmp_path / "index")
    loaded = ItemIndex.load(tmp_path / "index")
    assert loaded.shared_vocabulary and loaded.fingerprint == index.fingerprint
    grown = loaded.remove(["b"]).add(["d"], np.array([[3, 3, 0]]))
    assert grown.shared_vocabulary and grown.codes.tolist() == [[1, 0, 0], [1, 2, 3], [3, 3, 0]]


@pytest.mark.parametrize("codes", [[[0, 0, 0]], [[1, 0, 2]], [[0, 1, 0]]])
def test_a_semantic_id_ends_once_and_is_not_empty(codes):
    with pytest.raises(UserError, match="after its end"):
        ItemIndex(("a",), np.array(codes), (4, 4, 4), shared_vocabulary=True)
    with pytest.raises(UserError, match="expected equal ones"):
        ItemIndex(("a",), np.array([[1, 1, 1]]), (4, 3, 4), shared_vocabulary=True)
