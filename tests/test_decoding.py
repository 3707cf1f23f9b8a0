"""The search on models with known answers: fast = reference = brute force, filters, proofs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.decoding import (
    Beams,
    Boosts,
    CSRIndex,
    Filters,
    Trie,
    beam_search,
    exact_search,
    reference_beam_search,
    score_candidates,
    score_catalogue,
)
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.testing import TableModel, brute_force_logprobs, random_index, rank
from genrec.testing.decoding import StepModelContract, allowed_mask, random_titles

SIZES = (4, 5, 3, 2)


def world(num_items=40, sizes=SIZES, seed=0, **options):
    index = random_index(num_items, sizes, seed)
    return index, CSRIndex.from_index(index), TableModel(sizes, seed=seed, **options)


def assert_same(got: Beams, expected: Beams) -> None:
    assert got.rows_Bk.tolist() == expected.rows_Bk.tolist()
    assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-4)
    assert got.codes_BkL.tolist() == expected.codes_BkL.tolist()
    assert got.certified_B.tolist() == expected.certified_B.tolist()


@st.composite
def problems(draw):
    """A catalogue of either kind, a model, a width and k, rules, and both kinds of shapes."""
    count, seed = draw(st.integers(1, 60)), draw(st.integers(0, 99))
    if draw(st.booleans()):
        index = random_index(count, draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)), seed)
    else:
        index = random_titles(count, draw(st.integers(1, 5)), draw(st.integers(1, 4)), seed)
    model = TableModel(
        index.codebook_sizes,
        seed=draw(st.integers(0, 99)),
        scale=draw(st.sampled_from([1, 4])),
        num_others=2,
    )
    width = draw(st.integers(1, 25))
    k = draw(st.integers(1, 30).filter(lambda k: min(k, len(index)) <= width))
    rows = st.lists(st.integers(-1, len(index) - 1), max_size=30).map(np.array)
    rules = st.none() | st.lists(st.none() | rows, min_size=3, max_size=3)
    filters = Filters(exclude=draw(rules), allow=draw(rules))
    scoring = draw(st.sampled_from(["renormalized", "level", "raw"]))
    return index, model, width, k, filters, scoring, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(problems())
def test_fast_equals_reference_with_filters(problem):
    index, model, width, k, filters, scoring, static = problem
    batch = torch.arange(3)
    options = dict(width=width, k=k, filters=filters, scoring=scoring)
    got = beam_search(model, batch, CSRIndex.from_index(index), static_shapes=static, **options)
    assert_same(got, reference_beam_search(model, batch, Trie.from_index(index), **options))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_certified_lists_are_the_true_top_k(problem):
    index, model, width, k, filters, scoring, _ = problem
    batch = torch.arange(3)
    beams = beam_search(
        model, batch, CSRIndex.from_index(index), width=width, k=k, filters=filters, scoring=scoring
    )
    allowed_BN = allowed_mask(filters, 3, len(index))
    truth_BN = brute_force_logprobs(
        model,
        batch,
        index.codes,
        allowed_BN=allowed_BN,
        scoring=scoring,
        shared_vocabulary=index.shared_vocabulary,
    )
    for b in range(3):
        best = rank(truth_BN[b], k)
        found = [row for row in beams.rows_Bk[b].tolist() if row >= 0]
        # No dead ends: the list is short only if it holds everything that is allowed.
        assert len(found) == len(best)
        if beams.certified_B[b]:
            assert found == best.tolist()
        scores = beams.logprobs_Bk[b, : len(found)].numpy()
        assert np.allclose(scores, truth_BN[b, found], atol=1e-4)


def test_exhaustive_beam_is_brute_force_on_all_items():
    index, constraint, model = world()
    batch = torch.arange(5)
    truth_BN = brute_force_logprobs(model, batch, index.codes)
    beams = beam_search(model, batch, constraint, width=len(index), k=len(index))
    assert np.allclose(np.exp(truth_BN).sum(1), 1, atol=1e-4)
    assert torch.allclose(beams.logprobs_Bk.exp().sum(1), torch.ones(5), atol=1e-4)
    for b in range(5):
        assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], len(index)).tolist()
        assert np.allclose(beams.logprobs_Bk[b], np.sort(truth_BN[b])[::-1], atol=1e-4)
    assert beams.codes_BkL.numpy().tolist() == index.codes[beams.rows_Bk.numpy()].tolist()
    assert beams.certified_B.all()


@pytest.mark.parametrize("scoring", ["level", "raw"])
def test_filtered_search_equals_search_on_the_catalogue_without_those_items(scoring):
    index, constraint, model = world(num_others=2)
    kept = np.setdiff1d(np.arange(len(index)), [0, 3, 4, 5, 11, 39])
    smaller = ItemIndex(tuple(index.item_ids[r] for r in kept), index.codes[kept], SIZES)
    batch, options = torch.arange(4), dict(width=8, k=8, scoring=scoring)
    expected = beam_search(model, batch, CSRIndex.from_index(smaller), **options)
    denied = [np.array([39, 0, 3, 4, 5, 11, 11, -1])] * 4
    for filters in (Filters(exclude=denied), Filters(allow=[kept] * 4)):
        got = beam_search(model, batch, constraint, filters=filters, **options)
        assert got.rows_Bk.tolist() == kept[expected.rows_Bk.numpy()].tolist()
        assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-5)
        assert got.certified_B.tolist() == expected.certified_B.tolist()


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_a_filtered_list_is_the_unfiltered_ranking_without_the_filtered_items(problem, data):
    """With the same scores, whatever is left below a prefix, and for views of the index too."""
    index, model, _, _, filters, scoring, static = problem
    count, batch, constraint = len(index), torch.arange(3), CSRIndex.from_index(index)
    everything = dict(width=max(constraint.num_nodes), k=count, scoring=scoring)
    ranking = beam_search(model, batch, constraint, **everything)
    rule_N = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    view = constraint.restricted(rule_N)
    for index_used, allowed_N in ((constraint, np.ones(count, bool)), (view, rule_N)):
        got = beam_search(
            model, batch, index_used, filters=filters, static_shapes=static, **everything
        )
        left_BN = allowed_mask(filters, 3, count) & allowed_N
        for b in range(3):
            kept = torch.from_numpy(left_BN[b])[ranking.rows_Bk[b]]
            length = int(kept.sum())
            assert got.rows_Bk[b].tolist() == [
                *ranking.rows_Bk[b, kept].tolist(),
                *[-1] * (count - length),
            ]
            assert torch.equal(got.logprobs_Bk[b, :length], ranking.logprobs_Bk[b, kept])


def test_items_of_a_cluster_gain_nothing_when_their_neighbours_are_filtered():
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])
    constraint, model = CSRIndex.from_codes(codes, (2, 3)), TableModel((2, 3), seed=1)
    plain = score_catalogue(model, torch.arange(6), constraint)
    filters = Filters(exclude=[[0, 1]] * 6)
    got = beam_search(model, torch.arange(6), constraint, width=5, k=3, filters=filters)
    assert torch.allclose(got.logprobs_Bk, plain.gather(1, got.rows_Bk), atol=1e-6)
    assert got.rows_Bk.tolist() == [
        [row for row in rank(scores, 5).tolist() if row > 1] for scores in plain.numpy()
    ]


def test_rules_that_leave_nothing_give_an_empty_list_and_leave_the_others_alone():
    index, constraint, model = world()
    everything = np.arange(len(index))
    filters = Filters(exclude=[everything, None], allow=[None, None])
    beams = beam_search(model, torch.arange(2), constraint, width=5, k=5, filters=filters)
    assert beams.rows_Bk[0].tolist() == [-1] * 5
    assert beams.logprobs_Bk[0].tolist() == [-np.inf] * 5
    assert (beams.codes_BkL[0] == -1).all() and beams.certified_B[0]
    plain = beam_search(model, torch.arange(2), constraint, width=5, k=5)
    assert beams.rows_Bk[1].tolist() == plain.rows_Bk[1].tolist()
    contradiction = Filters(exclude=[[1, 2]] * 2, allow=[[1, 2], [1, 2, 3]])
    beams = beam_search(model, torch.arange(2), constraint, width=5, k=5, filters=contradiction)
    assert beams.rows_Bk.tolist() == [[-1] * 5, [3, -1, -1, -1, -1]]


def test_alone_equals_in_a_batch():
    _, constraint, model = world(scale=2.0)
    together = beam_search(model, torch.arange(6), constraint, width=6, k=6)
    for b in range(6):
        alone = beam_search(model, torch.tensor([b]), constraint, width=6, k=6)
        assert alone.rows_Bk[0].tolist() == together.rows_Bk[b].tolist()
        assert torch.allclose(alone.logprobs_Bk[0], together.logprobs_Bk[b], atol=1e-6)
        assert alone.certified_B[0] == together.certified_B[b]


def test_certificate_is_not_vacuous():
    _, constraint, model = world(60, (5, 5, 5))
    certified = beam_search(model, torch.arange(50), constraint, width=4, k=2).certified_B
    assert 0 < certified.sum() < 50


def test_equal_scores_are_ordered_by_row():
    index = random_index(30, (3, 4, 5), seed=1)
    constraint = CSRIndex.from_index(index)
    flat = TableModel((3, 4, 5), scale=0.0)
    # All leaves below one node tie; between nodes the number of children decides.
    beams = beam_search(flat, torch.arange(2), constraint, width=30, k=30)
    truth_BN = np.round(brute_force_logprobs(flat, torch.arange(2), index.codes), 5)
    assert len(np.unique(truth_BN[0])) < 12
    for b in range(2):
        assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], 30).tolist()


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("static", [True, False])
def test_ties_are_broken_alike_by_fast_and_reference(width, static):
    index, constraint, model = world(scale=1.0, quantum=1.0)
    k = min(width, 5)
    got = beam_search(model, torch.arange(8), constraint, width=width, k=k, static_shapes=static)
    expected = reference_beam_search(
        model, torch.arange(8), Trie.from_index(index), width=width, k=k
    )
    assert_same(got, expected)


def test_prefixes_with_one_item_left_do_not_run_the_model_again():
    _, constraint, model = world(12, (12, 9, 9, 9), seed=3)
    width = 6
    beams = beam_search(model, torch.arange(2), constraint, width=width, k=width)
    assert sum(model.rows_per_step) < 2 * (1 + 3 * width)
    static = beam_search(
        model, torch.arange(2), constraint, width=width, k=width, static_shapes=True
    )
    assert beams.rows_Bk.tolist() == static.rows_Bk.tolist()
    # Without renormalisation every code costs something, so every beam runs at every level.
    beam_search(model, torch.arange(2), constraint, width=width, k=width, scoring="level")
    assert model.rows_per_step == [2, 2 * width, 2 * width, 2 * width]


def test_k_above_the_catalogue_is_padded():
    _, constraint, model = world(3, (4, 4))
    beams = beam_search(model, torch.arange(2), constraint, width=5, k=9)
    assert beams.rows_Bk.shape == (2, 9) and beams.codes_BkL.shape == (2, 9, 2)
    assert (beams.rows_Bk[:, :3] >= 0).all() and (beams.rows_Bk[:, 3:] == -1).all()
    assert torch.isinf(beams.logprobs_Bk[:, 3:]).all() and beams.certified_B.all()


def test_one_item_has_probability_one_unless_denied():
    for sizes in ((1,), (7, 3, 2)):
        _, constraint, model = world(1, sizes)
        beams = beam_search(model, torch.arange(2), constraint, width=4, k=1)
        assert beams.rows_Bk.tolist() == [[0], [0]] and beams.logprobs_Bk.tolist() == [[0.0], [0.0]]
        denied = Filters(exclude=[[0], None])
        beams = beam_search(model, torch.arange(2), constraint, width=4, k=1, filters=denied)
        assert beams.rows_Bk.tolist() == [[-1], [0]]


def test_level_scoring_counts_all_codes_of_a_level():
    index, constraint, model = world()
    truth_BN = brute_force_logprobs(model, torch.arange(2), index.codes, scoring="level")
    assert (np.exp(truth_BN).sum(1) < 0.9).all()
    beams = beam_search(model, torch.arange(2), constraint, width=40, k=40, scoring="level")
    for b in range(2):
        assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], 40).tolist()


def test_bfloat16_logits_are_scored_in_float32():
    class Half(TableModel):
        def logits(self, request, prefix):
            return super().logits(request, prefix).bfloat16()

    _, constraint, _ = world()
    model = Half(SIZES)
    beams = beam_search(model, torch.arange(2), constraint, width=40, k=40)
    assert beams.logprobs_Bk.dtype == torch.float32
    assert torch.allclose(beams.logprobs_Bk.exp().sum(1), torch.ones(2), atol=1e-4)


class HostReads(TorchDispatchMode):
    """Records operations that make a device wait for the host or give data-dependent shapes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class SilentModel:
    """Logits from tensors alone, so that every recorded read is the search's own."""

    def __init__(self, sizes):
        generator = torch.Generator().manual_seed(0)
        self.tables = [torch.randn(97, size, generator=generator) for size in sizes]

    def begin(self, batch):
        return self.tables[0][batch % 97], (1, batch)

    def step(self, codes_R, state, parents_R):
        level, keys = state
        keys_R = keys[parents_R] * 31 + codes_R
        return self.tables[level][keys_R % 97], (level + 1, keys_R)


@pytest.mark.parametrize("kind", ["plain", "filters", "rule and boosts", "titles"])
def test_static_search_reads_nothing_back(kind):
    from genrec.decoding.beam import Search
    from genrec.decoding.filters import NodeFilter

    index, constraint, _ = world()
    if kind == "titles":
        index = random_titles(40, 4, 4)
        constraint = CSRIndex.from_index(index)
    if kind == "rule and boosts":
        constraint = constraint.restricted(np.arange(40) % 3 > 0)
    model = SilentModel(index.codebook_sizes)
    filters = Filters(exclude=[[1, 2], [3], None])
    options = {
        "rules": None if kind == "plain" else NodeFilter(constraint, filters, 3),
        "boosts": Boosts(constraint, np.arange(40) / 9) if kind == "rule and boosts" else None,
        "scoring": "level" if kind == "titles" else "renormalized",
    }
    logits_BK, state = model.begin(torch.arange(3))
    search = Search(constraint, static_shapes=True, **options)
    with HostReads() as reads:
        static = search.run(model, logits_BK, state, width=6, k=6)
    assert reads.found == []
    dynamic = Search(constraint, static_shapes=False, **options)
    assert_same(dynamic.run(model, logits_BK, state, width=6, k=6), static)


# Given candidates.


def test_candidates_score_as_in_brute_force_and_prefixes_run_once():
    index, constraint, model = world()
    batch = torch.arange(3)
    truth_BN = brute_force_logprobs(model, batch, index.codes)
    rows_BC = torch.tensor([[5, 5, -1, 20], [-1, -1, -1, -1], [0, 39, 7, 12]])
    scores_BC = score_candidates(model, batch, constraint, rows_BC)
    for b in range(3):
        for c, row in enumerate(rows_BC[b].tolist()):
            assert scores_BC[b, c] == (
                -torch.inf if row < 0 else pytest.approx(truth_BN[b, row], abs=1e-4)
            )
    score_candidates(model, batch[:1], constraint, torch.arange(40)[None])
    shared = [
        len({tuple(c) for c in index.codes[:, :d].tolist()} - singles(index, d)) for d in (1, 2, 3)
    ]
    assert model.rows_per_step == [1, *shared]


def singles(index: ItemIndex, depth: int) -> set[tuple[int, ...]]:
    prefixes = [tuple(codes) for codes in index.codes[:, :depth].tolist()]
    return {prefix for prefix in prefixes if prefixes.count(prefix) == 1}


@pytest.mark.parametrize("scoring", ["renormalized", "level"])
@pytest.mark.parametrize("max_rows", [1, 17, 10_000])
def test_catalogue_scores_do_not_depend_on_the_chunks(max_rows, scoring):
    index, constraint, model = world()
    batch = torch.arange(3)
    truth_BN = brute_force_logprobs(model, batch, index.codes, scoring=scoring)
    scores_BN = score_catalogue(model, batch, constraint, max_rows=max_rows, scoring=scoring)
    assert np.allclose(scores_BN.numpy(), truth_BN, atol=1e-4)
    assert max(model.rows_per_step) <= max(3, max_rows)


@settings(max_examples=30, deadline=None)
@given(problems(), st.data())
def test_candidate_scores_on_random_catalogues(problem, data):
    index, model, _, _, _, scoring, _ = problem
    row = st.integers(-1, len(index) - 1)
    count = data.draw(st.integers(1, 6))
    lists = st.lists(st.lists(row, min_size=count, max_size=count), min_size=2, max_size=2)
    rows_BC = torch.tensor(data.draw(lists))
    constraint = CSRIndex.from_index(index)
    got_BC = score_candidates(model, torch.arange(2), constraint, rows_BC, scoring=scoring).numpy()
    shared = index.shared_vocabulary
    truth_BN = brute_force_logprobs(
        model, torch.arange(2), index.codes, scoring=scoring, shared_vocabulary=shared
    )
    expected_BC = np.take_along_axis(truth_BN, rows_BC.clamp(min=0).numpy(), 1)
    assert np.allclose(got_BC, np.where(rows_BC.numpy() < 0, -np.inf, expected_BC), atol=1e-4)


def test_search_results_score_the_same_when_given_as_candidates():
    _, constraint, model = world()
    beams = beam_search(model, torch.arange(3), constraint, width=9, k=9)
    scores = score_candidates(model, torch.arange(3), constraint, beams.rows_Bk)
    assert torch.allclose(scores, beams.logprobs_Bk, atol=1e-5)


def test_exact_search_widens_until_proven():
    index, constraint, model = world(60, (5, 5, 5))
    batch = torch.arange(8)
    narrow = beam_search(model, batch, constraint, width=3, k=3)
    assert not narrow.certified_B.all()
    beams = exact_search(model, batch, constraint, k=3)
    assert beams.certified_B.all()
    truth_BN = brute_force_logprobs(model, batch, index.codes)
    assert beams.rows_Bk.tolist() == [rank(truth_N, 3).tolist() for truth_N in truth_BN]
    capped = exact_search(model, batch, constraint, k=3, max_width=3)
    assert_same(capped, narrow)
    filters = Filters(exclude=[np.arange(30)] * 8)
    filtered = exact_search(model, batch, constraint, k=3, filters=filters)
    truth_BN = brute_force_logprobs(
        model, batch, index.codes, allowed_BN=allowed_mask(filters, 8, 60)
    )
    assert filtered.rows_Bk.tolist() == [rank(truth_N, 3).tolist() for truth_N in truth_BN]


# Errors.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(width=0, k=1), ["width: got 0", ">= 1", "width=20"]),
        (dict(width=5, k=0), ["k: got 0", ">= 1"]),
        (dict(width=5, k=6), ["k: got 6 with width 5", "Raise width to 6"]),
        (dict(width=5, k=5, scoring="odds"), ["'odds'", "'level' or 'raw'"]),
        (dict(width=5, k=5, filters=Filters(exclude=[[1]])), ["1 lists for 2 requests"]),
        (dict(width=5, k=5, filters=Filters(allow=[[1], [40]])), ["allow[1]", "row 40", "< 40"]),
        (dict(width=5, k=5, filters=Filters(exclude=[[-2], [0]])), ["exclude[0]", "row -2"]),
    ],
)
def test_bad_arguments_say_what_to_do(options, words):
    index, constraint, model = world()
    with pytest.raises(UserError) as error:
        beam_search(model, torch.arange(2), constraint, **options)
    for word in words:
        assert word in str(error.value)
    with pytest.raises(UserError):
        reference_beam_search(model, torch.arange(2), Trie.from_index(index), **options)


def test_bad_candidates_say_what_to_do():
    _, constraint, model = world()
    with pytest.raises(UserError, match=r"got row 40.*0 <= row < 40"):
        score_candidates(model, torch.arange(1), constraint, torch.tensor([[40]]))
    with pytest.raises(UserError, match=r"one list per request"):
        score_candidates(model, torch.arange(2), constraint, torch.tensor([[4]]))
    with pytest.raises(UserError, match=r"max_width: got 2.*first width 3"):
        exact_search(model, torch.arange(1), constraint, k=3, max_width=2)


class TestTableModelKeepsTheStepContract(StepModelContract):
    def make(self):
        return TableModel(SIZES), torch.tensor([4, 9, 2]), torch.tensor([4]), SIZES
