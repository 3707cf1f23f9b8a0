"""Does a new item get a free semantic ID, by the policy of the index, without touching another?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.tokenizers.collisions.insertion import place
from genrec.tokenizers.collisions.numbering import extra_level, suffix


def ids(count: int, prefix: str = "old") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def grown(index: ItemIndex, names: list[str], placed) -> ItemIndex:
    rows = placed.rows
    return index.add([names[row] for row in rows], placed.codes[rows])  # checks the bijection


rows_of_codes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(rows_of_codes, rows_of_codes, st.integers(0, 2), st.randoms())
def test_an_extra_level_takes_what_it_has_room_for(old, new, reserve, random):
    index = ItemIndex(
        tuple(ids(len(old))), *extra_level(np.array(old), (2, 4), ids(len(old)), reserve=reserve)
    )
    names = ids(len(new), "new")
    placed = place(index, "extra_level", names, np.array(new), (2, 4))
    after = grown(index, names, placed)
    assert np.array_equal(after.codes[: len(old)], index.codes)
    assert after.codebook_sizes == index.codebook_sizes
    size = index.codebook_sizes[-1]
    for codes in set(new):  # as many as fit, and no fewer
        count = sum(tuple(row) == codes for row in after.codes[:, :2].tolist())
        assert count == min(size, old.count(codes) + new.count(codes))
    for row, reason in enumerate(placed.reasons):
        assert reason is None or f"all {size} semantic IDs" in reason, row
    order = list(range(len(new)))
    random.shuffle(order)
    again = place(index, "extra_level", [names[i] for i in order], np.array(new)[order], (2, 4))
    assert np.array_equal(again.codes, placed.codes[order])


def test_the_lowest_free_number_is_taken():
    index = ItemIndex(("a", "b"), np.array([[5, 0], [5, 2]]), (6, 4))
    placed = place(index, "extra_level", ["y", "x", "z"], np.array([[5], [5], [5]]), (6,))
    assert placed.codes[1].tolist() == [5, 1] and placed.codes[0].tolist() == [5, 3]
    assert placed.reasons[2] == "all 4 semantic IDs with its codes (5,) are taken"


words = st.lists(
    st.lists(st.integers(1, 3), min_size=1, max_size=2).map(lambda w: w + [0] * (2 - len(w))),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(words, words, st.integers(0, 2))
def test_a_shared_vocabulary_takes_bare_codes_first_then_numbers(old, new, reserve):
    codes, sizes = suffix(np.array(old), (4, 4), ids(len(old)), reserve=reserve)
    index = ItemIndex(tuple(ids(len(old))), codes, sizes, shared_vocabulary=True)
    names = ids(len(new), "new")
    placed = place(index, "extra_level", names, np.array(new), (4, 4))
    after = grown(index, names, placed)
    assert np.array_equal(after.codes[: len(old)], index.codes)
    for row, item in enumerate(names):
        if placed.reasons[row] is None:
            found = [code for code in placed.codes[row].tolist() if 0 < code < 4]
            assert found == [code for code in new[row] if code], item
    if reserve == 2 and max(new.count(word) for word in new) <= 2:
        assert placed.reasons == (None,) * len(new)


def test_words_that_are_too_long_for_the_index_are_refused():
    index = ItemIndex(("a",), np.array([[1, 2]]), (4, 4), shared_vocabulary=True)
    placed = place(index, "forbid", ["x", "y"], np.array([[1, 2, 3], [1, 2, 0]]), (4, 4, 4))
    assert placed.reasons[0] == "it needs 3 levels, the index has 2"
    assert placed.reasons[1] == "an item with its codes (1, 2, 0) is there already"


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 6), st.integers(1, 7))
def test_last_codes_fill_up_and_the_rest_is_refused(seed, num_old, num_new):
    rng = np.random.default_rng(seed)
    old = np.stack([np.zeros(num_old, int), rng.permutation(6)[:num_old]], axis=1)
    index = ItemIndex(tuple(ids(num_old)), old.reshape(-1, 2), (2, 6))
    table = rng.integers(0, 4, (num_new, 6)).astype(float)
    own = np.stack([np.zeros(num_new, int), table.argmin(1)], axis=1)
    names = ids(num_new, "new")

    def run(order):
        return place(
            index,
            "assign_last",
            [names[i] for i in order],
            own[order],
            (2, 6),
            distances=table[order].__getitem__,
        )

    placed = run(np.arange(num_new))
    after = grown(index, names, placed)
    assert np.array_equal(after.codes[:num_old], index.codes)
    assert len(after) == num_old + min(num_new, 6 - num_old)
    for row in range(num_new):
        wanted = own[row, 1]
        if wanted not in old[:, 1] and (own[:, 1] == wanted).sum() == 1:
            assert placed.codes[row].tolist() == own[row].tolist()
        if placed.reasons[row] is not None:
            assert "no last code is free under its prefix (0,) (6 codes)" in placed.reasons[row]
    order = rng.permutation(num_new)
    assert np.array_equal(run(order).codes[run(order).rows], placed.codes[order][run(order).rows])


def test_the_nearest_free_last_code_is_taken():
    index = ItemIndex(("a", "b"), np.array([[0, 1], [1, 0]]), (2, 4))
    distances = np.array([[3.0, 0, 2, 1]])
    placed = place(
        index, "nearest_free", ["n"], np.array([[0, 1]]), (2, 4), distances=lambda _: distances
    )
    assert placed.codes.tolist() == [[0, 3]] and placed.reasons == (None,)
    with pytest.raises(UserError, match="no distances"):
        place(index, "nearest_free", ["n"], np.array([[0, 1]]), (2, 4))


def test_forbid_refuses_what_collides():
    index = ItemIndex(("a", "b"), np.array([[0, 1], [1, 0]]), (2, 2))
    placed = place(index, "forbid", ["m", "n", "o"], np.array([[0, 1], [1, 1], [1, 1]]), (2, 2))
    assert [reason is None for reason in placed.reasons] == [False, True, False]
    assert placed.rows.tolist() == [1]


def test_an_index_that_a_policy_cannot_have_made_is_refused():
    index = ItemIndex(("a",), np.array([[0, 1]]), (2, 2))
    with pytest.raises(UserError, match=r"'extra_level': an index of 2 levels does not come from"):
        place(index, "extra_level", ["n"], np.array([[0, 1]]), (2, 2))
