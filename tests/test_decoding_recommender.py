"""What a service can ask for: rules, boosts, list rules and scoring, through item ids."""

from __future__ import annotations

import itertools
import json

import numpy as np
import polars as pl
import pytest

from genrec.data import Catalog
from genrec.data.rules import group_labels, matching_rows
from genrec.decoding.lists import MaxPerGroup, MinShare, Spacing
from genrec.errors import DataError, UserError
from genrec.recommender import MAX_RULES, Recommender

TABLE = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "price": [5.0, 30.0, None, 12.5],
        "in_stock": [True, True, True, False],
        "genres": [["x", "y"], ["y"], None, []],
        "brand": ["m", None, "n", "m"],
    }
)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("in_stock and price < 20", "a"),
        ("not in_stock or price >= 30", "bd"),
        ("price is null", "c"),
        ("brand in ('m', 'n') and item_id <> 'd'", "ac"),
        ("array_contains(genres, 'y')", "ab"),
        ("price < 0", ""),
    ],
)
def test_expressions_mean_rows_and_unknown_values_do_not_match(expression, expected):
    catalog = Catalog(TABLE)
    mask = matching_rows(catalog, expression)
    assert mask.dtype == bool and "".join(np.array(catalog.item_ids)[mask]) == expected


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("prize < 20", r"prize.*Expected a condition over.*Did you mean 'price'"),
        ("price <", r"unable to parse.*Expected a condition"),
        ("price", r"type Float64, expected true or false for each of 4 items"),
        ("count(*) > 1", r"got 1 values"),
        ("read_csv('/etc/hosts')", r"unsupported function.*Expected a condition"),
    ],
)
def test_expressions_that_are_none_say_what_to_do(expression, words):
    with pytest.raises(DataError, match=words):
        matching_rows(Catalog(TABLE), expression)


def test_groups_of_columns():
    catalog = Catalog(TABLE)
    assert group_labels(catalog, "brand").tolist() == [0, -1, 1, 0]
    assert group_labels(catalog, "genres").tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    with pytest.raises(DataError, match=r"no column 'brnd'.*Did you mean 'brand'"):
        group_labels(catalog, "brnd")


@pytest.fixture(scope="module")
def recommender(small_run):
    return Recommender.from_pretrained(small_run / "bundle", device="cpu")


HISTORIES = [["0", "1", "2"], ["90"], []]


def test_a_rule_equals_the_same_items_as_candidates(recommender):
    low = [item for item in recommender.item_ids if item < "3"]
    by_rule = recommender.recommend(HISTORIES, 5, rule="item_id < '3'")
    by_list = recommender.recommend(HISTORIES, 5, candidates=low)
    assert np.array_equal(by_rule.item_ids, by_list.item_ids)
    assert np.allclose(by_rule.scores, by_list.scores, atol=1e-5)
    assert np.allclose(by_rule.probabilities, by_list.probabilities, atol=1e-6)
    assert np.array_equal(by_rule.certified, by_list.certified)
    mask = np.array([item < "3" for item in recommender.item_ids])
    again = recommender.recommend(HISTORIES, 5, rule=mask)
    assert np.array_equal(again.item_ids, by_rule.item_ids)
    for number in range(2 * MAX_RULES):
        recommender.recommend([[]], 1, rule=f"item_id <> '{number}'")
    assert len(recommender._views) == MAX_RULES
    nothing = recommender.recommend(HISTORIES, 3, rule="item_id = 'none'")
    assert (nothing.item_ids == None).all()  # noqa: E711


def test_boosts_add_to_scores_and_nothing_is_the_identity(recommender):
    plain = recommender.recommend(HISTORIES, 4)
    same = recommender.recommend(HISTORIES, 4, boosts={"7": 0.0})
    assert np.array_equal(same.item_ids, plain.item_ids)
    assert np.array_equal(same.scores, plain.scores)
    boosted = recommender.recommend(HISTORIES, 4, boosts={"150": 40.0})
    assert boosted.item_ids[:, 0].tolist() == ["150"] * 3 and boosted.certified[0]
    logprob = recommender.score(HISTORIES, [["150"]] * 3)[:, 0]
    assert (boosted.scores[:, 0] > logprob + 39).all()
    assert np.array_equal(boosted.item_ids[:, 1:], plain.item_ids[:, :3])
    with pytest.raises(UserError, match="'nowhere'"):
        recommender.recommend(HISTORIES, 4, boosts={"nowhere": 1.0})


def test_list_rules_choose_from_the_wide_list(recommender):
    items = recommender.item_ids
    decades = np.array([int(item) // 10 for item in items])
    plain = recommender.recommend(HISTORIES, 6)
    loose = recommender.recommend(HISTORIES, 6, list_rules=[MaxPerGroup(decades, 200)])
    assert np.array_equal(loose.item_ids, plain.item_ids) and (loose.rule_costs == 0).all()
    assert plain.rule_costs is None
    even = np.array([int(item) % 2 == 0 for item in items])
    rules = [MaxPerGroup(decades, 2), MinShare(even, 0.5), Spacing(decades, 2)]
    ruled = recommender.recommend(HISTORIES, 6, list_rules=rules, width=60)
    for row, cost in zip(ruled.item_ids, ruled.rule_costs, strict=True):
        found = [int(item) // 10 for item in row if item is not None]
        assert max(found.count(d) for d in found) <= 2 and cost >= 0
        assert all(a != b for a, b in itertools.pairwise(found))
        assert sum(int(item) % 2 == 0 for item in row if item is not None) * 2 >= len(found)
    assert np.array_equal(recommender.groups("item_id").shape, (len(items),))


def test_scoring_is_passed_on(recommender, small_run):
    level = Recommender.from_pretrained(small_run / "bundle", device="cpu", scoring="level")
    found = level.recommend(HISTORIES, 4, exclude_seen=False)
    ids = [[item for item in row] for row in found.item_ids]
    assert np.allclose(level.score(HISTORIES, ids), found.scores, atol=1e-4)
    among_items = recommender.score(HISTORIES, ids)
    assert (found.scores <= among_items + 1e-5).all()  # equal where every code has items below it
    assert (found.scores < among_items - 0.1).any()


def test_the_top_of_a_list_can_be_proven_where_the_list_is_not(recommender):
    wide = recommender.recommend(HISTORIES * 20, 12)
    short = recommender.recommend(HISTORIES * 20, 1, width=12)
    assert (short.certified >= wide.certified).all()


def test_the_quality_benchmark_counts_what_a_beam_finds(small_run, ring_dataset, tmp_path):
    from benchmarks.decoding_quality import main

    path = tmp_path / "quality.json"
    main([str(small_run / "bundle"), str(ring_dataset), "--users", "20", "--json", str(path)])
    result = json.loads(path.read_text())
    beams = [row for row in result["beams"] if row["k"] == 5 and not row["masked"]]
    assert [row["width"] for row in beams] == [5, 10, 20, 50, 100, 200]
    for row in beams:
        assert row["certified"] <= row["equal_lists"] <= row["true_top_k_recall"]
    assert beams[-1]["certified"] == beams[-1]["true_top_k_recall"] == 1.0
    masses = {row["scoring"]: row["quartiles"] for row in result["invalid_mass"]}
    assert max(masses["renormalized"]) < 1e-3 < min(masses["level"]) < min(masses["raw"])
