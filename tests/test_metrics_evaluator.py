"""Full-ranking evaluation of score functions, masking, and the rows of a result table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genrec.data import Examples
from genrec.errors import UserError
from genrec.evaluation.evaluator import best_rows, evaluate_scores, mask_histories, summarise


def make_examples() -> Examples:
    histories = [np.array([0, 1]), np.array([3]), np.array([2, 4, 2])]
    return Examples.of(np.arange(3), np.array([2, 3, 0]), histories)


def constant_scores(histories: list[np.ndarray]) -> np.ndarray:
    return np.tile(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), (len(histories), 1))


def test_unmasked_ranks_the_whole_catalogue():
    found = evaluate_scores(constant_scores, make_examples(), ks=(1, 3), mask_seen=False)
    assert found["recall@1"].tolist() == [0, 0, 1]
    assert found["recall@3"].tolist() == [1, 0, 1]
    assert found["mrr@3"].tolist() == pytest.approx([1 / 3, 0, 1])


def test_masked_removes_history_and_never_hits_a_target_that_was_consumed_before():
    found = evaluate_scores(constant_scores, make_examples(), ks=(1, 5), mask_seen=True)
    assert found["recall@1"].tolist() == [1, 0, 1]
    assert found["recall@5"].tolist() == [1, 0, 1]  # user 1's target is in the history


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_chunks_do_not_change_results_and_progress_counts_users(chunk):
    done: list[int] = []
    found = evaluate_scores(
        constant_scores, make_examples(), mask_seen=False, chunk=chunk, on_progress=done.append
    )
    whole = evaluate_scores(constant_scores, make_examples(), mask_seen=False)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert sum(done) == 3


def test_ties_are_resolved_by_the_named_policy():
    examples = Examples.of(np.array([0]), np.array([0]), [np.array([4])])

    def flat(histories: list[np.ndarray]) -> np.ndarray:
        return np.zeros((len(histories), 5))

    rank = evaluate_scores(flat, examples, ks=(2, 3), mask_seen=False)
    assert (rank["recall@2"][0], rank["recall@3"][0]) == (0, 1)  # the mean place is the third
    spread = evaluate_scores(flat, examples, ks=(2,), mask_seen=False, ties="expected_metric")
    assert spread["recall@2"][0] == pytest.approx(2 / 5)
    masked = evaluate_scores(flat, examples, ks=(2,), mask_seen=True, ties="expected_metric")
    assert masked["recall@2"][0] == pytest.approx(2 / 4)  # the seen item is no tie
    with pytest.raises(UserError, match="'expected_rank' or 'expected_metric'"):
        evaluate_scores(flat, examples, mask_seen=False, ties="luck")  # type: ignore[arg-type]


def test_masking_leaves_the_scores_of_the_model_alone():
    scores = np.ones((2, 3), dtype=np.float32)
    masked = mask_histories(scores, [np.array([1]), np.array([], dtype=int)])
    assert np.isneginf(masked).tolist() == [[False, True, False], [False, False, False]]
    assert (scores == 1).all()


def test_no_examples_and_wrong_shapes_are_refused():
    with pytest.raises(UserError, match="no user with a target"):
        empty = Examples.of(np.array([]), np.array([]), [])
        evaluate_scores(constant_scores, empty, mask_seen=True)
    with pytest.raises(UserError, match=r"returned shape \(5,\) for 3 histories"):
        evaluate_scores(lambda h: np.zeros(5), make_examples(), mask_seen=True)


def test_row_has_the_documented_keys_and_is_json():
    rng = np.random.default_rng(0)
    ours = {"recall@10": rng.random(200) < 0.4, "ndcg@10": rng.random(200)}
    popular = {"recall@10": rng.random(200) < 0.1, "ndcg@10": rng.random(200)}
    row = summarise("genrec", "test", True, ours, popular)
    assert (row["name"], row["split"], row["masked"]) == ("genrec", "test", True)
    assert row["recall@10"] == pytest.approx(ours["recall@10"].mean())
    low, high = row["recall@10_ci"]
    assert low < row["recall@10"] < high
    versus = row["vs_most_popular"]["recall@10"]
    assert versus["difference"] == pytest.approx(row["recall@10"] - popular["recall@10"].mean())
    assert versus["ci"][0] > 0 and versus["p"] < 0.01
    assert json.loads(json.dumps(row)) == row


def test_row_over_seeds_averages_per_user_and_keeps_each_seed():
    values = np.array([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    row = summarise("genrec", "test", False, {"recall@10": values})
    assert row["recall@10"] == pytest.approx(3 / 8)
    assert row["recall@10_seeds"] == [0.25, 0.5]
    assert (row["num_seeds"], row["num_users"]) == (2, 4)
    assert "vs_most_popular" not in row


def test_row_refuses_metrics_of_different_users():
    with pytest.raises(UserError, match="expected one shape"):
        summarise("genrec", "test", False, {"recall@5": np.ones(3), "recall@10": np.ones(4)})
    with pytest.raises(UserError, match="got 3 and 4 users"):
        summarise("genrec", "test", False, {"recall@5": np.ones(3)}, {"recall@5": np.ones(4)})


@pytest.mark.parametrize("k", [1, 3, 7, 12])
def test_best_rows_equal_a_full_sort_with_ties_by_row(k):
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 3, (40, 9)).astype(float)  # ties everywhere, also at the border
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[0] = -np.inf
    for user, found in enumerate(best_rows(scores, k)):
        order = [int(row) for row in np.lexsort((np.arange(9), -scores[user]))]
        expected = [row for row in order if scores[user, row] > -np.inf][:k]
        assert found.tolist() == expected + [-1] * (k - len(expected))


def test_the_best_rows_of_every_user_come_with_the_metrics():
    examples = make_examples()
    rows = np.zeros((len(examples), 2), np.int32)
    values = evaluate_scores(
        constant_scores, examples, ks=(2,), mask_seen=True, chunk=2, out_rows=rows
    )
    hits = (rows == examples.target_rows[:, None]).any(axis=1)
    assert hits.tolist() == (values["recall@2"] > 0).tolist()
    for user, row in enumerate(rows):
        assert not set(row.tolist()) & set(examples.history(user).tolist())
