"""Metrics against hand-computed numbers, brute force over tie orders, and degenerate input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.errors import UserError
from genrec.evaluation import metrics


def test_ranks_in_lists_finds_first_match_and_ignores_padding():
    rows = np.array([[7, 3, 5], [7, 3, 5], [1, 1, 2], [4, -1, -1], [-1, -1, -1]])
    target = np.array([7, 9, 1, 4, 0])
    assert metrics.ranks_in_lists(rows, target).tolist() == [0, -1, 0, 0, -1]


def test_list_metrics_equal_hand_computed_values():
    rows = np.array([[7, 3, 5, 9], [7, 3, 5, 9], [7, 3, 5, 9]])
    found = metrics.list_metrics(rows, np.array([3, 9, 8]), ks=(2, 4))
    assert found["recall@2"].tolist() == [1, 0, 0]
    assert found["recall@4"].tolist() == [1, 1, 0]
    assert found["ndcg@2"].tolist() == pytest.approx([1 / math.log2(3), 0, 0])
    assert found["ndcg@4"].tolist() == pytest.approx([1 / math.log2(3), 1 / math.log2(5), 0])
    assert found["mrr@2"].tolist() == [0.5, 0, 0]
    assert found["mrr@4"].tolist() == [0.5, 0.25, 0]
    assert all(values.dtype == np.float64 for values in found.values())


def test_k_beyond_the_list_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"got 5, but the lists hold 3 items.*at least 5"):
        metrics.list_metrics(np.zeros((2, 3), int), np.array([0, 1]), ks=(5,))


@pytest.mark.parametrize("function", [metrics.recall_at, metrics.ndcg_at, metrics.mrr_at])
def test_k_below_one_is_refused(function):
    with pytest.raises(UserError, match="k: got 0"):
        function(np.array([0]), 0)


def test_users_without_a_target_and_misfitting_shapes_are_refused():
    with pytest.raises(UserError, match="1 of 2 users have no target"):
        metrics.ranks_in_lists(np.zeros((2, 3), int), np.array([0, -1]))
    with pytest.raises(UserError, match=r"expected \(B, k\)"):
        metrics.ranks_in_lists(np.zeros((2, 3), int), np.array([0]))
    with pytest.raises(UserError, match="scores for 3 items"):
        metrics.tied_ranks(np.zeros((1, 3)), np.array([3]))
    with pytest.raises(UserError, match="NaN"):
        metrics.tied_ranks(np.array([[np.nan, 0.0]]), np.array([0]))


def test_empty_input_gives_empty_arrays():
    found = metrics.list_metrics(np.empty((0, 5), int), np.empty(0, int), ks=(5,))
    assert found["recall@5"].shape == (0,)
    assert metrics.ranks_in_lists(np.empty((2, 0), int), np.array([0, 1])).tolist() == [-1, -1]


def test_tied_ranks_count_above_and_equal_but_not_masked_items():
    scores = np.array([[3.0, 1, 1, 1, 0], [-np.inf, 1, -np.inf, 1, 0], [-np.inf, 0, 0, 0, 0]])
    above, tied = metrics.tied_ranks(scores, np.array([2, 3, 0]))
    assert above.tolist() == [1, 0, 4]
    assert tied.tolist() == [3, 2, 0]  # a masked target can never be hit
    assert metrics.expected_rank(above, tied).tolist() == [2.0, 0.5, -1.0]


def test_the_two_tie_policies_differ_and_a_masked_target_is_never_hit():
    above, tied = np.array([8, 8, 0]), np.array([4, 3, 0])
    rank = metrics.expected_rank(above, tied)
    assert metrics.recall_at(rank, 10).tolist() == [1, 1, 0]
    assert metrics.ndcg_at(rank, 10)[0] == pytest.approx(1 / math.log2(9.5 + 2))
    expected = metrics.expected_recall_at(above, tied, 10)
    assert expected.tolist() == pytest.approx([2 / 4, 2 / 3, 0])


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    place=st.integers(0, 5),
    k=st.integers(1, 8),
)
def test_expected_metrics_are_the_mean_over_all_tie_orders(scores, place, k):
    target = place % len(scores)
    above, tied = metrics.tied_ranks(np.array([scores], float), np.array([target]))
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])  # stable: `order` breaks the ties
        ranks.append(ranked.index(target))
    ranks = np.array(ranks)
    pairs = [
        (metrics.expected_recall_at, metrics.recall_at),
        (metrics.expected_ndcg_at, metrics.ndcg_at),
        (metrics.expected_mrr_at, metrics.mrr_at),
    ]
    for expected, plain in pairs:
        assert expected(above, tied, k)[0] == pytest.approx(plain(ranks, k).mean())
    assert metrics.expected_rank(above, tied)[0] == pytest.approx(ranks.mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_without_ties_lists_and_scores_agree(seed):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(20.0), (7, 1)), axis=1)
    target = rng.integers(0, 20, 7)
    lists = metrics.list_metrics(np.argsort(-scores, axis=1)[:, :10], target)
    above, tied = metrics.tied_ranks(scores, target)
    for k in (5, 10):
        assert np.allclose(lists[f"recall@{k}"], metrics.expected_recall_at(above, tied, k))
        assert np.allclose(lists[f"ndcg@{k}"], metrics.expected_ndcg_at(above, tied, k))
