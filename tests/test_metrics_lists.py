"""What lists are like beside accuracy: exposure, diversity, calibration, groups, search, ids."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import cosine, jaccard

from genrec.data import Catalog, Examples
from genrec.errors import DataError, UserError
from genrec.evaluation import (
    beyond_accuracy,
    exposure,
    groups,
    list_content,
    search_quality,
    semantic_id_hits,
)

COUNTS = np.array([10, 4, 1, 0])
ROWS = np.array([[0, 1], [0, 2], [0, -1]])


def catalog(labels: list[list[str] | None]) -> Catalog:
    ids = [str(i) for i in range(len(labels))]
    genres = pl.Series("genres", labels, dtype=pl.List(pl.String))
    return Catalog(pl.DataFrame({"item_id": ids, "title": ids}).with_columns(genres))


def attributes(labels: list[list[str] | None]) -> list_content.ItemAttributes:
    found = list_content.attributes_of(catalog(labels))
    assert found is not None
    return found


def examples(histories: list[list[int]], targets: list[int]) -> Examples:
    arrays = [np.array(history, np.int64) for history in histories]
    return Examples.of(np.arange(len(targets)), np.array(targets), arrays)


# -- exposure -----------------------------------------------------------------------------------


def test_exposure_figures_equal_hand_computed_values():
    placed = exposure.exposure(ROWS, 4)
    assert placed.tolist() == [3, 1, 1, 0]
    assert exposure.coverage(placed) == 3 / 4
    assert exposure.average_popularity(placed, COUNTS) == (3 * 10 + 4 + 1) / 5
    consumed = (10 * 10 + 4 * 4 + 1) / 15  # of the item of a training interaction
    assert exposure.popularity_lift(placed, COUNTS) == pytest.approx(7 / consumed - 1)
    # 0, 1, 1, 3 in ascending order: sum((2i - n - 1) x_i) / (n sum x).
    assert exposure.gini(placed) == pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 3) / (4 * 5))
    shares = [3 / 5, 1 / 5, 1 / 5]
    assert exposure.entropy(placed) == pytest.approx(-sum(p * math.log2(p) for p in shares))
    bits = [-math.log2((count + 1) / 19) for count in COUNTS]
    assert exposure.novelty(placed, COUNTS) == pytest.approx((3 * bits[0] + bits[1] + bits[2]) / 5)
    assert exposure.long_tail_share(placed, COUNTS) == 2 / 5  # the head is item 0 alone


def test_even_and_concentrated_exposure():
    even = exposure.exposure(np.arange(8).reshape(2, 4), 8)
    assert exposure.gini(even) == pytest.approx(0) and exposure.entropy(even) == pytest.approx(3)
    one = exposure.exposure(np.zeros((5, 1), int), 8)
    assert exposure.gini(one) == pytest.approx(7 / 8) and exposure.entropy(one) == 0


def test_ties_at_the_border_belong_to_the_head_whatever_their_order():
    counts = np.array([5, 3, 1, 3, 1])
    assert np.flatnonzero(exposure.in_head(counts, 0.4)).tolist() == [0, 1, 3]
    assert not exposure.in_head(np.array([5, 3]), 0.0).any()


def test_nothing_recommended_and_a_foreign_catalogue():
    empty = exposure.exposure(np.full((3, 2), -1), 4)
    assert exposure.coverage(empty) == 0
    for value in (
        exposure.gini(empty),
        exposure.entropy(empty),
        exposure.novelty(empty, COUNTS),
        exposure.popularity_lift(empty, COUNTS),
    ):
        assert math.isnan(value)
    with pytest.raises(UserError, match="the lists hold row 9"):
        exposure.exposure(np.array([[9]]), 4)


def test_chunks_do_not_change_counts(monkeypatch: pytest.MonkeyPatch):
    rows = np.random.default_rng(0).integers(-1, 30, (50, 7))
    whole = exposure.exposure(rows, 30)
    monkeypatch.setattr(exposure, "_CHUNK_CELLS", 10)
    assert np.array_equal(exposure.exposure(rows, 30), whole)


# -- content of lists ---------------------------------------------------------------------------


def test_diversity_equals_the_mean_over_pairs_of_scipys_distances(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(exposure, "_CHUNK_CELLS", 20)
    rng = np.random.default_rng(1)
    has = rng.random((12, 5)) < 0.5
    has[:, 0] |= ~has.any(axis=1)
    found = attributes([[f"g{a}" for a in np.flatnonzero(row)] for row in has])
    vectors = rng.normal(size=(12, 3)).astype(np.float32)
    rows = np.stack([rng.permutation(12)[:4] for _ in range(6)])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    by_labels = [np.mean([jaccard(has[r[i]], has[r[j]]) for i, j in pairs]) for r in rows]
    by_vectors = [np.mean([cosine(vectors[r[i]], vectors[r[j]]) for i, j in pairs]) for r in rows]
    assert list_content.attribute_diversity(rows, found).tolist() == pytest.approx(by_labels)
    measured = list_content.vector_diversity(rows, vectors)
    assert measured.tolist() == pytest.approx(by_vectors, abs=1e-6)


def test_diversity_of_lists_that_have_no_pair_is_undefined():
    found = attributes([["a"], ["b"], None])
    rows = np.array([[0, 1, -1], [0, -1, -1], [-1, -1, -1], [0, 2, -1]])
    measured = list_content.attribute_diversity(rows, found)
    assert measured[0] == 1 and np.isnan(measured[1:3]).all()
    assert measured[3] == 1  # nothing in common: one of them has no label
    vectors = np.array([[1.0, 0], [0, 1], [0, 0]])
    measured = list_content.vector_diversity(rows, vectors)
    assert measured[0] == pytest.approx(1) and np.isnan(measured[1:]).all()


def test_calibration_miss_equals_stecks_formula():
    found = attributes([["a"], ["b"], ["a", "b"], None])
    history = examples([[0, 0, 1], [3], [0]], [1, 1, 1])
    rows = np.array([[1, 2], [0, 1], [3, 3]])
    p, q = np.array([2 / 3, 1 / 3]), np.array([1 / 4, 3 / 4])
    mixed = 0.99 * q + 0.01 * p
    measured = list_content.calibration_miss(rows, history, found)
    assert measured[0] == pytest.approx(float((p * np.log(p / mixed)).sum()))
    assert np.isnan(measured[1])  # a history without labels wants nothing
    assert measured[2] == pytest.approx(-math.log(0.01))  # a list without labels
    same = list_content.calibration_miss(np.array([[0, 1]]), examples([[1, 0]], [0]), found)
    assert same[0] == pytest.approx(0)


def test_lift_over_the_history_is_the_ratio_of_mean_popularity():
    history = examples([[1, 2], [1]], [0, 0])
    lists = np.array([[0, 1], [1, -1]])
    own, listed = (2.5 + 4) / 2, (7 + 4) / 2
    assert list_content.history_popularity_lift(lists, history, COUNTS) == pytest.approx(
        listed / own - 1
    )
    nobody = list_content.history_popularity_lift(np.array([[-1]]), examples([[1]], [0]), COUNTS)
    assert math.isnan(nobody)


def test_attributes_come_from_a_column_of_labels():
    shelf = catalog([["a", "b", "a"], None, [""]])
    found = list_content.attributes_of(shelf)
    assert found is not None and (found.name, found.labels) == ("genres", ["a", "b"])
    assert found.matrix_NA.toarray().tolist() == [[1, 1], [0, 0], [0, 0]]
    plain = Catalog(pl.DataFrame({"item_id": ["x", "y"], "brand": ["b", None], "price": [1, 2]}))
    assert list_content.attributes_of(plain) is None
    named = list_content.attributes_of(plain, "brand")
    assert named is not None and named.matrix_NA.toarray().tolist() == [[1], [0]]
    with pytest.raises(DataError, match=r"'brnd'.*Did you mean 'brand'"):
        list_content.attributes_of(plain, "brnd")
    with pytest.raises(DataError, match="'price' holds Int64, expected labels"):
        list_content.attributes_of(plain, "price")


# -- groups -------------------------------------------------------------------------------------


def test_groups_by_length_popularity_and_training():
    assert groups.by_history_length(np.array([1, 5, 6, 50, 51])).group_U.tolist() == [0, 0, 1, 3, 4]
    assert groups.by_history_length(np.array([1])).labels[0] == "1-5"
    target = np.array([0, 1, 3])
    assert groups.by_target_popularity(target, COUNTS).group_U.tolist() == [0, 1, 1]
    assert groups.by_target_seen(target, COUNTS).group_U.tolist() == [0, 0, 1]


def test_gap_and_worst_group_with_an_empty_group_and_users_in_none():
    division = groups.Groups("test", ("a", "b", "nobody"), np.array([0, 0, 1, -1]))
    found = groups.group_figures({"ndcg@10": np.array([1.0, 0.5, 0.25, 9.0])}, division)
    assert [(line["group"], line["num_users"]) for line in found["groups"]] == [("a", 2), ("b", 1)]
    assert found["gap"] == {"ndcg@10": 0.5} and found["worst"] == {"ndcg@10": "b"}
    assert found["groups"][1]["ndcg@10_ci"] == [0.25, 0.25]
    single = groups.Groups("t", ("a",), np.zeros(3, int))
    alone = groups.group_figures({"x": np.ones((2, 3))}, single)
    assert alone["gap"] == {"x": None} and alone["worst"] == {"x": None}
    nobody = groups.group_figures({"x": np.ones(2)}, groups.Groups("t", ("a",), np.full(2, -1)))
    assert nobody["groups"] == []


def test_groups_of_other_users_are_refused():
    with pytest.raises(UserError, match="3 users in groups and 2 values"):
        groups.group_figures({"x": np.ones(2)}, groups.Groups("t", ("a",), np.zeros(3, int)))
    with pytest.raises(UserError, match="got group 1, but 1 labels"):
        groups.group_figures({"x": np.ones(1)}, groups.Groups("t", ("a",), np.ones(1, int)))


# -- search and semantic ids --------------------------------------------------------------------


def test_search_figures():
    assert search_quality.invalid_rate(ROWS) == 1 / 6
    assert math.isnan(search_quality.invalid_rate(np.empty((0, 3))))
    assert search_quality.certified_share(np.array([True, False])) == 0.5
    found = search_quality.latency(np.arange(1, 102) / 1e3)
    assert (found["p50_ms"], found["p95_ms"]) == (pytest.approx(51), pytest.approx(96))
    assert found["p99_ms"] == pytest.approx(100)
    assert found["num_requests"] == 101 and found["mean_ms"] == pytest.approx(51)
    for wrong in ([], [-1.0], [math.nan]):
        with pytest.raises(UserError, match="latency"):
            search_quality.latency(np.array(wrong))


def test_semantic_ids_stand_where_their_best_item_stands_and_take_one_place():
    numbers = semantic_id_hits.semantic_id_numbers(
        np.array([[0, 0], [0, 0], [1, 0], [1, 0], [2, 2]])
    )
    rows = np.array([[0, 1, 3, -1], [0, 1, 2, 4], [4, -1, -1, -1], [2, 3, 1, 0]])
    ranks = semantic_id_hits.semantic_id_ranks(rows, np.array([2, 4, 0, 0]), numbers)
    assert ranks.tolist() == [1, 2, -1, 1]


def test_without_collisions_semantic_ids_are_items():
    rng = np.random.default_rng(3)
    rows = np.stack([rng.permutation(20)[:8] for _ in range(30)])
    target = rng.integers(0, 20, 30)
    ranks = semantic_id_hits.semantic_id_ranks(rows, target, np.arange(20))
    from genrec.evaluation.metrics import ranks_in_lists

    assert np.array_equal(ranks, ranks_in_lists(rows, target))
    shared = semantic_id_hits.semantic_id_ranks(rows, target, np.arange(20) // 2)
    assert ((shared >= 0) >= (ranks >= 0)).all() and (shared[ranks >= 0] <= ranks[ranks >= 0]).all()
    with pytest.raises(UserError, match=r"expected \(items, levels\)"):
        semantic_id_hits.semantic_id_numbers(np.arange(3))


# -- together -----------------------------------------------------------------------------------


def test_what_a_result_holds_is_json_and_leaves_out_what_the_data_has_not():
    people = examples([[1], [2, 1], [0]], [0, 1, 3])
    bare = beyond_accuracy.Surroundings(people, COUNTS)
    plain = beyond_accuracy.list_figures(ROWS, bare)
    assert plain["coverage"] == 3 / 4 and plain["invalid_rate"] == 1 / 6
    assert "calibration_miss" not in plain and "diversity_vectors" not in plain
    assert beyond_accuracy.semantic_id_figures(ROWS, bare, (1,)) == {}
    full = beyond_accuracy.Surroundings(
        people,
        COUNTS,
        attributes([["a"], ["b"], ["a"], ["b"]]),
        np.eye(4, 3),
        np.array([[0], [0], [1], [2]]),
    )
    more = beyond_accuracy.list_figures(ROWS, full)
    assert {"diversity_attributes", "diversity_vectors", "calibration_miss"} <= set(more)
    assert json.loads(json.dumps(more)) == more
    by_id = beyond_accuracy.semantic_id_figures(ROWS, full, (1, 2))
    assert by_id["recall@1"] == pytest.approx(2 / 3)  # item 1 shares the id of item 0
    nothing = beyond_accuracy.list_figures(np.full((3, 2), -1), full)
    assert nothing["coverage"] == 0 and "gini" not in nothing
    with pytest.raises(UserError, match="got 2 lists and 3 users"):
        beyond_accuracy.list_figures(ROWS[:2], bare)


def test_groups_of_a_result_and_means_over_seeds():
    people = examples([[1], [2, 1, 1, 1, 1, 1]], [0, 3])
    around = beyond_accuracy.Surroundings(people, COUNTS)
    values = {"ndcg@10": np.array([[1.0, 0.0], [0.5, 0.0]]), "mrr@10": np.ones((2, 2))}
    found = beyond_accuracy.group_tables(values, around, num_samples=100)
    assert found["target_in_training"]["gap"] == {"ndcg@10": 0.75}
    assert found["target_in_training"]["worst"] == {"ndcg@10": "cold"}
    assert {line["group"] for line in found["history_length"]["groups"]} == {"1-5", "6-10"}
    assert beyond_accuracy.mean_of([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0}
