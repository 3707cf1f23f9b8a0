"""Metrics for sets of targets: by hand, against scikit-learn, and as the general form of one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score, precision_score, recall_score

from genrec.errors import UserError
from genrec.evaluation import metrics, target_sets
from genrec.evaluation.target_sets import relevance, set_metrics


def test_by_hand():
    rows = np.array([[7, 3, 5, 9], [1, 2, -1, -1]])
    found = set_metrics(rows, np.array([0, 0, 0, 1]), np.array([3, 9, 8, 4]), ks=(2, 4))
    assert found["recall@4"].tolist() == pytest.approx([2 / 3, 0])
    assert found["precision@4"].tolist() == [2 / 4, 0]
    assert found["hit@2"].tolist() == [1, 0]
    assert found["mrr@2"].tolist() == [1 / 2, 0]
    assert found["map@4"].tolist() == pytest.approx([(1 / 2 + 2 / 4) / 3, 0])
    assert found["map@2"].tolist() == pytest.approx([(1 / 2) / 2, 0])  # min(k, targets) = 2
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    gained = 1 / math.log2(3) + 1 / math.log2(5)
    assert found["ndcg@4"].tolist() == pytest.approx([gained / ideal, 0])


def test_a_perfect_list_has_one_everywhere():
    rows = np.array([[4, 2, 0]])
    found = set_metrics(rows, np.zeros(3, int), np.array([0, 2, 4]), ks=(3,))
    assert {name: value.tolist() for name, value in found.items()} == {
        name: [1.0] for name in found
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_equals_scikit_learn_on_random_rankings(seed, k):
    rng = np.random.default_rng(seed)
    num_users, num_items = 5, 12
    scores = rng.permuted(np.tile(np.arange(float(num_items)), (num_users, 1)), axis=1)
    relevant = rng.random((num_users, num_items)) < 0.4
    relevant[np.arange(num_users), rng.integers(0, num_items, num_users)] = True
    rows = np.argsort(-scores, axis=1)
    users, targets = np.nonzero(relevant)
    found = set_metrics(rows, users, targets, ks=(k, num_items))
    expected = [ndcg_score(relevant[u : u + 1], scores[u : u + 1], k=k) for u in range(num_users)]
    assert found[f"ndcg@{k}"].tolist() == pytest.approx(expected)
    chosen = np.zeros_like(relevant)
    np.put_along_axis(chosen, rows[:, :k], True, axis=1)
    for name, function in (("precision", precision_score), ("recall", recall_score)):
        expected = [function(relevant[u], chosen[u]) for u in range(num_users)]
        assert found[f"{name}@{k}"].tolist() == pytest.approx(expected)
    expected = [average_precision_score(relevant[u], scores[u]) for u in range(num_users)]
    assert found[f"map@{num_items}"].tolist() == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_with_one_target_each_is_a_metric_of_one_rank(seed, k):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(9)[:6] for _ in range(8)])
    target = rng.integers(0, 9, 8)
    many = set_metrics(rows, np.arange(8), target, ks=(k,))
    one = metrics.list_metrics(rows, target, ks=(k,))
    for name in ("recall", "ndcg", "mrr"):
        assert many[f"{name}@{k}"].tolist() == pytest.approx(one[f"{name}@{k}"].tolist())
    assert np.array_equal(many[f"hit@{k}"], many[f"recall@{k}"])
    assert np.allclose(many[f"map@{k}"], many[f"mrr@{k}"])
    assert np.allclose(many[f"precision@{k}"], many[f"hit@{k}"] / k)


def test_pairs_in_any_order_repeats_and_items_listed_twice_count_once():
    rows = np.array([[5, 5, 1], [2, 0, 5]])
    users, targets = np.array([1, 0, 0, 1]), np.array([5, 5, 5, 2])
    relevant, counts = relevance(rows, users, targets)
    assert relevant.tolist() == [[True, False, False], [True, False, True]]
    assert counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("users", "targets", "ks", "message"),
    [
        ([0], [1], (2,), "1 of 2 users have no target"),
        ([0, 2], [1, 1], (2,), r"outside 0 \.\. 1"),
        ([0, 1], [1, -1], (2,), "negative item row"),
        ([0, 1], [1], (2,), r"expected \(U, k\), \(P,\) and \(P,\)"),
        ([0, 1], [1, 1], (4,), "k: got 4, but the lists hold 3 items"),
        ([0, 1], [1, 1], (0,), "k: got 0"),
    ],
)
def test_bad_input_is_refused(users, targets, ks, message):
    rows = np.array([[5, 3, 1], [2, 0, 5]])
    with pytest.raises(UserError, match=message):
        set_metrics(rows, np.array(users), np.array(targets), ks)


def test_no_users_and_empty_lists():
    none = set_metrics(np.empty((0, 3), int), np.empty(0, int), np.empty(0, int), ks=(2,))
    assert all(values.shape == (0,) for values in none.values())
    relevant, counts = relevance(np.empty((2, 0), int), np.array([0, 1]), np.array([4, 4]))
    assert target_sets.mrr_at(relevant, counts, 1).tolist() == [0, 0]
    assert target_sets.ndcg_at(relevant, counts, 1).tolist() == [0, 0]
    with pytest.raises(UserError, match="k: got 0"):
        target_sets.hit_at(relevant, counts, 0)
