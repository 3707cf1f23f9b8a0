"""Do the figures about codes say what they should, by brute force and by hand?"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import Catalog, Interactions
from genrec.data.synthetic import planted, planted_leaves
from genrec.item_index import ItemIndex
from genrec.tokenizers.diagnostics import agreement
from genrec.tokenizers.diagnostics.agreement import cooccurrence_figures, reconstruction_distances
from genrec.tokenizers.diagnostics.branches import branch_tree
from genrec.tokenizers.diagnostics.figures import code_figures, diagnose, level_figures
from genrec.tokenizers.rqkmeans import RQKMeans


def events(lists: list[list[int]], num_items: int) -> Interactions:
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])]).astype(np.int64)
    flat = np.array([item for items in lists for item in items], np.int32)
    zeros = np.zeros(len(flat))
    return Interactions(flat, offsets, zeros.astype(np.int64), zeros.astype(np.uint8), num_items)


def brute_force(codes, lists, ended):
    """Pearson correlation and lifts over all pairs, one by one."""
    count = len(codes)
    users = [{u for u, items in enumerate(lists) if i in items} for i in range(count)]
    shared, cosine = [], []
    for i, j in itertools.combinations(range(count), 2):
        depth = 0
        for a, b in zip(codes[i], codes[j], strict=True):
            if a != b or (ended and a == 0):
                break
            depth += 1
        shared.append(depth)
        norm = np.sqrt(max(1, len(users[i])) * max(1, len(users[j])))
        cosine.append(len(users[i] & users[j]) / norm)
    shared, cosine = np.array(shared), np.array(cosine)
    lifts = [
        cosine[shared >= n].mean() / cosine.mean() if (shared >= n).any() and cosine.any() else None
        for n in range(1, len(codes[0]) + 1)
    ]
    constant = shared.std() < 1e-12 or cosine.std() < 1e-12
    return None if constant else np.corrcoef(shared, cosine)[0, 1], lifts


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(*[st.integers(1, 2)] * 2), min_size=n, max_size=n),
            st.lists(st.lists(st.integers(0, n - 1), max_size=6), min_size=1, max_size=5),
        )
    ),
    st.booleans(),
)
def test_cooccurrence_equals_brute_force_over_all_pairs(drawn, ended):
    codes, lists = np.array(drawn[0]), drawn[1]
    if ended:
        codes[::2, 1] = 0
    found = cooccurrence_figures(codes, events(lists, len(codes)), shared_vocabulary=ended)
    correlation, lifts = brute_force(codes.tolist(), lists, ended)
    if correlation is None:
        assert found["correlation"] is None or abs(found["correlation"]) < 1e-6
    else:
        assert found["correlation"] == pytest.approx(correlation, abs=1e-9)
    for prefix, lift in zip(found["prefixes"], lifts, strict=True):
        assert prefix["lift"] == (None if lift is None else pytest.approx(lift))


def test_cooccurrence_does_not_depend_on_the_blocks(monkeypatch):
    data = planted(128, num_users=60)
    codes = np.stack([planted_leaves(data.catalog) // 4, planted_leaves(data.catalog)], axis=1)
    training = data.interactions.training()
    whole = cooccurrence_figures(codes, training)
    monkeypatch.setattr(agreement, "BLOCK_ITEMS", 7)
    parts = cooccurrence_figures(codes, training)
    assert parts["num_together"] == whole["num_together"]
    assert parts["correlation"] == pytest.approx(whole["correlation"])


def test_codes_of_the_planted_tree_agree_with_who_is_consumed_together():
    data = planted(128, num_users=300)
    leaves, training = planted_leaves(data.catalog), data.interactions.training()
    codes = np.stack([leaves // 16, leaves // 4, leaves], axis=1)
    true = cooccurrence_figures(codes, training)
    shuffled = np.random.default_rng(0).permutation(codes)
    random = cooccurrence_figures(shuffled, training)
    assert true["correlation"] > 0.2 > 5 * abs(random["correlation"])
    lifts = [prefix["lift"] for prefix in true["prefixes"]]
    assert lifts == sorted(lifts) and lifts[-1] > 5


def test_levels_of_a_shared_vocabulary_do_not_count_the_end():
    codes = np.array([[1, 0, 0], [1, 2, 0], [2, 2, 2]])
    first, second, third = level_figures(codes, (4, 4, 4), shared_vocabulary=True)
    assert (first["num_items"], second["num_items"], third["num_items"]) == (3, 2, 1)
    assert (first["used"], second["used"], third["used"]) == (2, 1, 1)
    assert second["perplexity"] == pytest.approx(1.0)
    assert first["entropy"] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))


def test_moves_are_told_from_numbers():
    own = np.array([[0, 1], [0, 1], [1, 1]])
    moved = ItemIndex(("a", "b", "c"), np.array([[0, 1], [0, 0], [1, 1]]), (2, 2))
    found = code_figures(own, (2, 2), moved, ["a", "b", "c"])
    assert found["collisions"]["rate"] == pytest.approx(1 / 3)
    assert found["index"]["collisions"]["rate"] == 0.0
    assert found["index"]["num_items_moved"] == 1 and found["index"]["num_items_numbered"] == 0
    numbered = ItemIndex(("a", "b", "c"), np.array([[0, 1, 0], [0, 1, 1], [1, 1, 0]]), (2, 2, 2))
    after = code_figures(own, (2, 2), numbered, ["a", "b", "c"])["index"]
    assert after["num_items_moved"] == 0 and after["num_items_numbered"] == 1
    words = ItemIndex(("a", "b", "c"), np.array([[1, 4], [1, 5], [2, 0]]), (6, 6), True)
    after = code_figures(np.array([[1, 0], [1, 0], [2, 0]]), (4, 4), words, ["a", "b", "c"])
    assert after["index"]["num_items_numbered"] == 2 and after["index"]["shared_vocabulary"]
    assert "cooccurrence" not in after


def test_the_report_says_what_a_policy_cost():
    data = planted(128, num_users=50, noise=2.0)
    catalog = data.catalog
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=24)).fit(catalog)
    training = data.interactions.training()
    index = ItemIndex.build(tokenizer, catalog, collisions="assign_last")
    report = json.loads(json.dumps(diagnose(tokenizer, index, catalog, training)))
    after, moved = report["index"], report["index"]["moved_distance"]
    assert report["tokenizer"] == "rqkmeans" and after["num_items_moved"] > 0
    codes, final = tokenizer.encode(catalog), index.codes
    steps = np.linalg.norm(tokenizer.decode(codes) - tokenizer.decode(final), axis=1)
    steps = steps[(codes != final).any(axis=1)]
    assert moved["mean"] == pytest.approx(steps.mean(), rel=1e-5)
    assert moved["max"] == pytest.approx(steps.max(), rel=1e-5)
    errors = [side["reconstruction"]["squared_error"] for side in (report, after)]
    assert errors[0] < errors[1]
    distances = reconstruction_distances(tokenizer, catalog, codes)
    assert distances.mean() == pytest.approx(errors[0], rel=1e-5)
    assert report["cooccurrence"]["num_pairs"] == 128 * 127 // 2
    known = diagnose(tokenizer, index, catalog, training, codes_NL=codes)
    assert json.loads(json.dumps(known)) == report


def test_an_extra_level_moves_nothing():
    catalog = planted(64, num_users=1).catalog
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=4)).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    report = diagnose(tokenizer, index, catalog)
    assert report["index"]["moved_distance"] is None
    assert report["index"]["reconstruction"] == report["reconstruction"]
    rest = report["collisions"]["num_distinct"]
    assert report["index"]["num_items_numbered"] == 64 - rest


def test_a_tokenizer_without_vectors_has_no_vector_figures():
    class Numbers(RQKMeans):
        decodes = False

    catalog = Catalog.from_vectors(np.random.default_rng(0).normal(size=(20, 3)))
    tokenizer = Numbers(RQKMeans.Config(codebook_size=4)).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    report = diagnose(tokenizer, index, catalog)
    assert "reconstruction" not in report and "neighbours" not in report


# -- the tree ------------------------------------------------------------------------------------


def test_the_tree_holds_the_biggest_branches_with_examples():
    codes = np.array([[1, 0, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0], [2, 0, 0], [2, 1, 0]])
    ids, titles = list("abcdef"), ["A", None, "C", "D", "E", "F"]
    tree = branch_tree(codes, ids, titles, width=2)
    assert [(b["code"], b["num_items"], b["num_branches"]) for b in tree] == [(1, 3, 2), (2, 2, 2)]
    assert tree[0]["examples"] == [
        {"item_id": "a", "title": "A"},
        {"item_id": "b", "title": None},
        {"item_id": "c", "title": "C"},
    ]
    assert [b["prefix"] for b in tree[0]["children"]] == [[1, 0]]  # one item is no branch
    assert tree[0]["children"][0]["children"] == [] and tree[1]["children"] == []


def test_the_tree_of_a_shared_vocabulary_has_no_end():
    codes = np.array([[3, 0, 0, 0], [3, 1, 0, 0], [3, 1, 2, 0], [4, 0, 0, 0]])
    tree = branch_tree(codes, list("abcd"), shared_vocabulary=True)
    assert [b["prefix"] for b in tree] == [[3], [4]]
    assert [b["prefix"] for b in tree[0]["children"]] == [[3, 1]]
    assert tree[1]["children"] == []
    assert branch_tree(np.empty((0, 2), int), []) == []
    assert branch_tree(np.array([[0], [1]]), ["a", "b"])[0]["num_items"] == 1
