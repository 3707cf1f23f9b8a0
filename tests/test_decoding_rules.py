"""Rules for all requests as a view of the index, and boosts: both against plain twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding import (
    Boosts,
    CSRIndex,
    Filters,
    Trie,
    beam_search,
    exact_search,
    levels,
    reference_beam_search,
    score_candidates,
    score_catalogue,
)
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.testing import (
    ConstraintIndexContract,
    TableModel,
    brute_force_logprobs,
    random_index,
    rank,
)
from genrec.testing.decoding import allowed_mask, random_titles

SCORINGS = ["renormalized", "level", "raw"]


def subset(index: ItemIndex, rows: np.ndarray) -> ItemIndex:
    ids = tuple(index.item_ids[row] for row in rows)
    return ItemIndex(ids, index.codes[rows], index.codebook_sizes, index.shared_vocabulary)


@st.composite
def catalogues(draw):
    count, seed = draw(st.integers(1, 50)), draw(st.integers(0, 99))
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        return random_index(count, sizes, seed)
    return random_titles(count, draw(st.integers(1, 5)), draw(st.integers(1, 4)), seed)


class TestRestrictedView(ConstraintIndexContract):
    """A view that allows everything is the index."""

    def make(self, index):
        return CSRIndex.from_index(index).restricted(np.ones(len(index), dtype=bool))


@settings(max_examples=80, deadline=None)
@given(catalogues(), st.data())
def test_a_rule_equals_the_reference_with_filters_on_top(index, data):
    flags = st.lists(st.booleans(), min_size=len(index), max_size=len(index))
    allowed_N = np.array(data.draw(flags))
    rows = st.lists(st.integers(-1, len(index) - 1), max_size=20).map(np.array)
    rules = st.none() | st.lists(st.none() | rows, min_size=3, max_size=3)
    filters = Filters(exclude=data.draw(rules), allow=data.draw(rules))
    scoring, static = data.draw(st.sampled_from(SCORINGS)), data.draw(st.booleans())
    width = data.draw(st.integers(1, 12))
    model = TableModel(index.codebook_sizes, num_others=1)
    batch = torch.arange(3)
    both_BN = allowed_mask(filters, 3, len(index)) & allowed_N
    folded = Filters(allow=[np.flatnonzero(row) for row in both_BN])
    options = dict(width=width, k=width, scoring=scoring)
    if len(index) > width:
        options["k"] = data.draw(st.integers(1, width))
    view = CSRIndex.from_index(index).restricted(allowed_N)
    assert view.num_allowed == allowed_N.sum()
    got = beam_search(model, batch, view, filters=filters, static_shapes=static, **options)
    expected = reference_beam_search(
        model, batch, Trie.from_index(index), filters=folded, **options
    )
    assert got.rows_Bk.tolist() == expected.rows_Bk.tolist()
    assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-4)
    assert got.certified_B.tolist() == expected.certified_B.tolist()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_search_and_scores_on_a_view_equal_those_on_a_rebuilt_index(monkeypatch, dense, scoring):
    monkeypatch.setattr(levels, "DENSE_FILL", 0.0 if dense else 2.0)
    index = random_index(60, (4, 5, 6))
    allowed_N = np.random.default_rng(0).random(60) < 0.4
    kept = np.flatnonzero(allowed_N)
    model, batch = TableModel((4, 5, 6), num_others=2), torch.arange(3)
    view = CSRIndex.from_index(index).restricted(allowed_N[:]).restricted(allowed_N)
    rebuilt = CSRIndex.from_index(subset(index, kept))
    got = beam_search(model, batch, view, width=7, k=7, scoring=scoring)
    expected = beam_search(model, batch, rebuilt, width=7, k=7, scoring=scoring)
    scores_BN = score_catalogue(model, batch, view, scoring=scoring)
    assert torch.isinf(scores_BN[:, ~allowed_N]).all()
    if scoring == "renormalized":  # probabilities stay those of the whole catalogue
        whole_BN = score_catalogue(model, batch, CSRIndex.from_index(index), scoring=scoring)
        assert torch.equal(scores_BN[:, kept], whole_BN[:, kept])
        assert torch.allclose(got.logprobs_Bk, scores_BN.gather(1, got.rows_Bk), atol=1e-5)
    else:
        assert got.rows_Bk.tolist() == kept[expected.rows_Bk.numpy()].tolist()
        assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-5)
        assert got.certified_B.tolist() == expected.certified_B.tolist()
        rebuilt_BN = score_catalogue(model, batch, rebuilt, scoring=scoring)
        assert torch.allclose(scores_BN[:, kept], rebuilt_BN, atol=1e-5)
    rows = torch.arange(60).expand(3, -1)
    assert torch.equal(score_candidates(model, batch, view, rows, scoring=scoring), scores_BN)
    proven = exact_search(model, batch, view, k=4, scoring=scoring)
    assert proven.rows_Bk.tolist() == [rank(row, 4).tolist() for row in scores_BN.numpy()]


def test_views_of_views_allow_what_all_allow_and_share_the_tree():
    index = random_index(30, (5, 4, 3))
    constraint = CSRIndex.from_index(index)
    first, second = np.arange(30) % 2 == 0, np.arange(30) % 3 == 0
    view = constraint.restricted(first).restricted(torch.from_numpy(second))
    beams = beam_search(
        TableModel((5, 4, 3)), torch.arange(2), view, width=30, k=30, scoring="level"
    )
    assert sorted(beams.rows_Bk[0].tolist())[-5:] == [0, 6, 12, 18, 24]
    assert beams.certified_B.all() and view.num_allowed == 5
    assert view.levels[0].codes is constraint.levels[0].codes and constraint.num_allowed == 30
    empty = beam_search(
        TableModel((5, 4, 3)),
        torch.arange(2),
        constraint.restricted(np.zeros(30, dtype=bool)),
        width=4,
        k=4,
    )
    assert (empty.rows_Bk == -1).all() and empty.certified_B.all()
    assert view.to("meta").levels[0].open_children.device.type == "meta"


@pytest.mark.parametrize("wrong", [np.ones(3, dtype=bool), np.ones(30), np.ones((30, 1), bool)])
def test_a_rule_is_one_bool_per_row(wrong):
    with pytest.raises(
        UserError, match=r"rule: got .*expected one bool per catalogue row, \(30,\)"
    ):
        CSRIndex.from_index(random_index(30, (5, 4, 3))).restricted(wrong)


# Boosts.


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.data())
def test_boosted_fast_equals_reference_and_certified_lists_are_true(index, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    boosts_N = rng.normal(0, data.draw(st.sampled_from([0.0, 1.0, 5.0])), len(index))
    boosts_N = np.where(rng.random(len(index)) < 0.5, boosts_N, 0.0).astype(np.float32)
    rows = st.lists(st.integers(0, len(index) - 1), max_size=20).map(np.array)
    rules = st.none() | st.lists(st.none() | rows, min_size=2, max_size=2)
    filters = Filters(exclude=data.draw(rules), allow=data.draw(rules))
    scoring, width = data.draw(st.sampled_from(SCORINGS)), data.draw(st.integers(1, 12))
    k = width if len(index) <= width else data.draw(st.integers(1, width))
    model, batch = TableModel(index.codebook_sizes, num_others=1), torch.arange(2)
    constraint = CSRIndex.from_index(index)
    options = dict(width=width, k=k, scoring=scoring, filters=filters)
    got = beam_search(
        model,
        batch,
        constraint,
        boosts=Boosts(constraint, boosts_N),
        static_shapes=data.draw(st.booleans()),
        **options,
    )
    expected = reference_beam_search(
        model, batch, Trie.from_index(index), boosts_N=boosts_N, **options
    )
    assert got.rows_Bk.tolist() == expected.rows_Bk.tolist()
    assert torch.allclose(got.scores_Bk, expected.scores_Bk, atol=1e-4)
    assert got.certified_B.tolist() == expected.certified_B.tolist()
    truth_BN = boosts_N + brute_force_logprobs(
        model,
        batch,
        index.codes,
        allowed_BN=allowed_mask(filters, 2, len(index)),
        scoring=scoring,
        shared_vocabulary=index.shared_vocabulary,
    )
    for b in range(2):
        found = [row for row in got.rows_Bk[b].tolist() if row >= 0]
        assert np.allclose(got.scores_Bk[b, : len(found)], truth_BN[b, found], atol=1e-4)
        if got.certified_B[b]:
            assert found == rank(truth_BN[b], k).tolist()


def test_no_boost_is_the_identity_to_the_bit():
    index = random_index(60, (5, 5, 5))
    constraint, model = CSRIndex.from_index(index), TableModel((5, 5, 5), quantum=0.5)
    options = dict(width=6, k=6)
    plain = beam_search(model, torch.arange(9), constraint, **options)
    boosts = Boosts(constraint, np.zeros(60))
    zero = beam_search(model, torch.arange(9), constraint, boosts=boosts, **options)
    assert torch.equal(zero.rows_Bk, plain.rows_Bk)
    assert torch.equal(zero.logprobs_Bk, plain.logprobs_Bk)
    assert torch.equal(zero.certified_B, plain.certified_B)
    assert torch.equal(zero.scores_Bk, plain.scores_Bk) and plain.boosts_Bk is None


def test_an_exhaustive_boosted_beam_is_brute_force_and_exact_search_proves_it():
    index = random_index(60, (5, 5, 5), seed=2)
    constraint, model, batch = CSRIndex.from_index(index), TableModel((5, 5, 5)), torch.arange(6)
    values_N = np.random.default_rng(1).normal(0, 2, 60).astype(np.float32)
    boosts = Boosts(constraint, values_N)
    truth_BN = brute_force_logprobs(model, batch, index.codes) + values_N
    beams = beam_search(model, batch, constraint, width=60, k=60, boosts=boosts)
    assert beams.rows_Bk.tolist() == [rank(row, 60).tolist() for row in truth_BN]
    assert np.allclose(beams.scores_Bk, -np.sort(-truth_BN, axis=1), atol=1e-4)
    assert torch.equal(beams.boosts_Bk, torch.from_numpy(values_N)[beams.rows_Bk])
    proven = exact_search(model, batch, constraint, k=5, boosts=boosts)
    assert proven.certified_B.all()
    assert proven.rows_Bk.tolist() == [rank(row, 5).tolist() for row in truth_BN]
    # A large boost brings an item to the top from behind any prefix, with a beam of one.
    worst = int(truth_BN[0].argmin())
    lifted = np.where(np.arange(60) == worst, 50.0, 0.0)
    top = beam_search(model, batch, constraint, width=1, k=1, boosts=Boosts(constraint, lifted))
    assert top.rows_Bk.flatten().tolist() == [worst] * 6 and top.certified_B.all()


def test_denied_boosted_items_loosen_the_bound_but_never_the_list():
    index = random_index(60, (5, 5, 5), seed=2)
    constraint, model, batch = CSRIndex.from_index(index), TableModel((5, 5, 5)), torch.arange(6)
    values_N = np.where(np.arange(60) < 5, 9.0, 0.0)
    view = constraint.restricted(np.arange(60) >= 5)
    boosted = exact_search(model, batch, view, k=5, boosts=Boosts(constraint, values_N))
    plain = exact_search(model, batch, view, k=5)
    assert torch.equal(boosted.rows_Bk, plain.rows_Bk) and boosted.certified_B.all()


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(30, np.nan), np.full(30, -np.inf)])
def test_boosts_are_one_finite_number_per_row(wrong):
    constraint = CSRIndex.from_index(random_index(30, (5, 4, 3)))
    with pytest.raises(
        UserError, match=r"boosts: got .*expected one number per.*filters or a rule"
    ):
        Boosts(constraint, wrong)
