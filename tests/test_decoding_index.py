"""The catalogue's tree: contract, flat layout against the dictionary trie, memory, dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding import CSRIndex, Trie, levels
from genrec.errors import UserError
from genrec.testing import ConstraintIndexContract, random_index


class TestTrie(ConstraintIndexContract):
    def make(self, index):
        return Trie.from_index(index)


class TestCSRIndex(ConstraintIndexContract):
    def make(self, index):
        return CSRIndex.from_index(index)


class TestCSRIndexWithoutDenseLevels(ConstraintIndexContract):
    @pytest.fixture(autouse=True)
    def never_dense(self, monkeypatch):
        monkeypatch.setattr(levels, "DENSE_FILL", 2.0)

    def make(self, index):
        constraint = CSRIndex.from_index(index)
        assert all(level.mask is None for level in constraint.levels)
        return constraint


class TestCSRIndexWithDenseLevelsOnly(ConstraintIndexContract):
    @pytest.fixture(autouse=True)
    def always_dense(self, monkeypatch):
        monkeypatch.setattr(levels, "DENSE_FILL", 0.0)

    def make(self, index):
        constraint = CSRIndex.from_index(index)
        assert all(level.mask is not None for level in constraint.levels)
        return constraint


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 80),
    st.integers(0, 999),
)
def test_positions_ancestors_counts_and_codes_agree_with_the_catalogue(sizes, count, seed):
    index = random_index(count, sizes, seed)
    constraint = CSRIndex.from_index(index)
    rows = torch.arange(len(index))
    positions = constraint.positions(rows)
    assert torch.equal(constraint.row(positions), rows)
    assert constraint.codes(positions).numpy().tolist() == index.codes.tolist()
    prefixes = [list(map(tuple, index.codes[:, :d].tolist())) for d in range(len(sizes) + 1)]
    for depth, nodes in enumerate(constraint.ancestors(positions)):
        below = constraint.num_items_below(nodes, depth).tolist()
        assert below == [prefixes[depth].count(prefix) for prefix in prefixes[depth]]
        assert constraint.num_nodes[depth] == len(set(prefixes[depth]))
        shared = {p for p in prefixes[depth] if prefixes[depth].count(p) > 1}
        assert constraint.num_shared[depth] == len(shared)


def test_levels_are_dense_where_well_filled_and_gathered_where_sparse():
    index = random_index(2000, (16, 16, 256))
    constraint = CSRIndex.from_index(index)
    assert [level.mask is not None for level in constraint.levels] == [True, True, False]
    assert constraint.levels[2].num_columns == constraint.levels[2].max_degree < 256
    assert constraint.levels[0].num_columns == 16


def test_tensors_are_small():
    index = random_index(5000, (16, 300, 256))
    constraint = CSRIndex.from_index(index)
    assert [level.codes.dtype for level in constraint.levels] == [
        torch.uint8,
        torch.int16,
        torch.uint8,
    ]
    assert constraint.rows_N.dtype == constraint.levels[0].pointers.dtype == torch.int32
    assert constraint.num_bytes < 20 * len(index)


def test_identifiers_too_long_for_one_key_are_sorted_alike():
    index = random_index(200, (1 << 14,) * 5, seed=3)
    constraint = CSRIndex.from_index(index)
    expected = sorted(range(len(index)), key=lambda row: index.codes[row].tolist())
    assert constraint.row(torch.arange(len(index))).tolist() == expected


def test_to_the_same_device_is_the_same_index():
    constraint = CSRIndex.from_index(random_index(5, (4, 4)))
    assert constraint.to("cpu") is constraint
    moved = constraint.to("meta")
    assert moved.device.type == "meta" and moved.levels[0].codes.device.type == "meta"
    assert constraint.device.type == "cpu"


def test_an_empty_catalogue_is_refused():
    with pytest.raises(UserError, match=r"0 items, expected at least 1"):
        CSRIndex.from_codes(np.empty((0, 2), dtype=np.int32), (4, 4))
