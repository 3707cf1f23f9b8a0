"""Drawing at random: exact distributions on tiny catalogues, filters, seeds, diverse groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from genrec.decoding import CSRIndex, Filters, beam_search, score_catalogue
from genrec.decoding.diverse import diverse_beam_search
from genrec.decoding.sampling import sample
from genrec.errors import UserError
from genrec.testing import TableModel, random_index
from genrec.testing.decoding import random_titles

SIZES = (3, 4, 2)
INDEX = random_index(7, SIZES, seed=3)
CONSTRAINT = CSRIndex.from_index(INDEX)
MODEL = TableModel(SIZES, seed=5)
ONE = torch.tensor([4])


def fits(counts, probabilities) -> bool:
    """Chi-square test at one in a thousand (seeds are fixed: it holds for ever or never)."""
    counts, expected = np.asarray(counts), np.asarray(probabilities) * np.sum(counts)
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def catalogue_probabilities(temperature=1.0):
    class Tempered(TableModel):
        def logits(self, request, prefix):
            return super().logits(request, prefix) / temperature

    model = Tempered(SIZES, seed=5)
    return score_catalogue(model, ONE, CONSTRAINT)[0].double().exp().numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_with_replacement_follow_the_model(temperature):
    drawn = sample(MODEL, ONE, CONSTRAINT, num_samples=4000, temperature=temperature)
    truth = catalogue_probabilities(temperature)
    assert fits(np.bincount(drawn.rows_BS[0], minlength=7), truth)
    assert np.allclose(drawn.logprobs_BS[0].exp(), truth[drawn.rows_BS[0]], atol=1e-5)
    assert np.array_equal(drawn.codes_BSL[0], INDEX.codes[drawn.rows_BS[0]])
    if temperature == 0.5:
        assert not fits(np.bincount(drawn.rows_BS[0], minlength=7), catalogue_probabilities(1.0))


def test_samples_without_replacement_follow_successive_draws():
    """Every ordered pair has the probability p_i * p_j / (1 - p_i)."""
    requests = torch.full((4000,), 4)
    drawn = sample(MODEL, requests, CONSTRAINT, num_samples=2, replacement=False, seed=2)
    truth = catalogue_probabilities()
    pairs = list(itertools.permutations(range(7), 2))
    expected = [truth[i] * truth[j] / (1 - truth[i]) for i, j in pairs]
    found = np.zeros(len(pairs))
    for i, j in drawn.rows_BS.tolist():
        found[pairs.index((i, j))] += 1
    assert sum(expected) == pytest.approx(1, abs=1e-5) and fits(found, expected)
    assert (drawn.keys_BS.diff(dim=1) <= 0).all()
    assert np.allclose(drawn.logprobs_BS.exp(), truth[drawn.rows_BS], atol=1e-5)


def test_without_replacement_items_differ_and_run_out():
    drawn = sample(MODEL, torch.arange(5), CONSTRAINT, num_samples=9, replacement=False)
    for rows in drawn.rows_BS.tolist():
        assert sorted(rows[:7]) == list(range(7)) and rows[7:] == [-1, -1]
    assert torch.isinf(drawn.logprobs_BS[:, 7:]).all() and (drawn.codes_BSL[:, 7:] == -1).all()
    assert torch.allclose(drawn.logprobs_BS.exp().sum(1), torch.ones(5), atol=1e-5)


@pytest.mark.parametrize("replacement", [True, False])
def test_filters_and_rules_leave_the_model_s_proportions(replacement):
    filters = Filters(exclude=[[0, 5]], allow=[[0, 1, 2, 5, 6]])
    kept = np.array([1, 2, 6])
    options = dict(num_samples=3000 if replacement else 3, replacement=replacement)
    drawn = sample(MODEL, ONE, CONSTRAINT, filters=filters, **options)
    assert set(drawn.rows_BS[0].tolist()) == set(kept.tolist())
    smaller = CSRIndex.from_codes(INDEX.codes[kept], SIZES)
    truth = score_catalogue(MODEL, ONE, smaller)[0].exp().numpy()
    found = drawn.rows_BS[0].numpy()
    assert np.allclose(drawn.logprobs_BS[0].exp(), truth[np.searchsorted(kept, found)], atol=1e-5)
    if replacement:
        assert fits([np.sum(found == row) for row in kept], truth)
    view = CONSTRAINT.restricted(np.isin(np.arange(7), kept))
    again = sample(MODEL, ONE, view, **options)
    assert torch.equal(again.rows_BS, drawn.rows_BS)
    nothing = sample(MODEL, ONE, CONSTRAINT, filters=Filters(allow=[[]]), **options)
    assert (nothing.rows_BS == -1).all() and torch.isinf(nothing.logprobs_BS).all()


def test_top_p_keeps_the_fewest_likely_codes():
    model = TableModel((4,), seed=1)
    constraint = CSRIndex.from_codes(np.arange(4)[:, None], (4,))
    p = model.logits(0, ()).softmax(0).double().numpy()
    order = np.argsort(-p)
    for kept in (1, 2, 3):
        top_p = p[order[:kept]].sum() - 0.01
        drawn = sample(model, torch.tensor([0]), constraint, num_samples=500, top_p=top_p)
        assert set(drawn.rows_BS[0].tolist()) == set(order[:kept].tolist())
        share = p / p[order[:kept]].sum()
        assert np.allclose(drawn.logprobs_BS[0].exp(), share[drawn.rows_BS[0]], atol=1e-5)


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_depend_on_the_request_s_seed_only(replacement):
    index = random_titles(60, 5, 4)
    constraint, model = CSRIndex.from_index(index), TableModel(index.codebook_sizes)
    options = dict(num_samples=8, replacement=replacement)
    batch = torch.arange(5)
    first = sample(model, batch, constraint, seed=[9, 8, 7, 6, 5], **options)
    again = sample(model, batch, constraint, seed=[9, 8, 7, 6, 5], **options)
    assert torch.equal(first.rows_BS, again.rows_BS)
    for b, seed in enumerate([9, 8, 7, 6, 5]):
        alone = sample(model, batch[b : b + 1], constraint, seed=[seed], **options)
        assert torch.equal(alone.rows_BS[0], first.rows_BS[b])
        assert torch.allclose(alone.logprobs_BS[0], first.logprobs_BS[b], atol=1e-6)
    other = sample(model, batch, constraint, seed=1, **options)
    assert not torch.equal(other.rows_BS, first.rows_BS)
    same = sample(model, torch.full((3,), 2), constraint, seed=1, **options)
    assert not torch.equal(same.rows_BS[0], same.rows_BS[1])


def test_distinct_prefixes_run_once():
    sample(MODEL, ONE, CONSTRAINT, num_samples=1000)
    shared = [CONSTRAINT.num_shared[depth] for depth in (1, 2)]
    assert MODEL.rows_per_step == [1, *(n for n in shared if n)]


# Diverse groups.


@pytest.mark.parametrize("scoring", ["renormalized", "level"])
@pytest.mark.parametrize("titles", [False, True])
def test_groups_without_penalty_are_the_plain_beam(scoring, titles):
    index = random_titles(50, 4, 3) if titles else random_index(50, (4, 5, 4))
    constraint = CSRIndex.from_index(index)
    model = TableModel(index.codebook_sizes, quantum=0.5)  # ties too
    filters = Filters(exclude=[[1, 2, 3], None, [7]])
    options = dict(width=6, k=5, filters=filters, scoring=scoring)
    plain = beam_search(model, torch.arange(3), constraint, **options)
    groups = diverse_beam_search(
        model, torch.arange(3), constraint, num_groups=3, penalty=0.0, **options
    )
    for group in range(3):
        assert torch.equal(groups.rows_BGk[:, group], plain.rows_Bk)
        assert torch.allclose(groups.logprobs_BGk[:, group], plain.logprobs_Bk, atol=1e-5)
        assert torch.equal(groups.codes_BGkL[:, group], plain.codes_BkL)


def test_penalties_make_groups_differ_and_the_first_stays_plain():
    index = random_index(200, (8, 8, 8))
    constraint, model = CSRIndex.from_index(index), TableModel((8, 8, 8))
    batch = torch.arange(10)
    options = dict(num_groups=4, width=3, k=3)
    plain = beam_search(model, batch, constraint, width=3, k=3)

    def num_different(penalty):
        groups = diverse_beam_search(model, batch, constraint, penalty=penalty, **options)
        assert torch.equal(groups.rows_BGk[:, 0], plain.rows_Bk)
        scores = score_catalogue(model, batch, constraint).gather(1, groups.rows_BGk.flatten(1))
        assert torch.allclose(scores, groups.logprobs_BGk.flatten(1), atol=1e-4)
        assert (groups.logprobs_BGk.diff(dim=2) <= 0).all()
        return sum(len(set(rows)) for rows in groups.rows_BGk.flatten(1).tolist())

    counts = [num_different(penalty) for penalty in (0.0, 0.3, 1.0, 5.0)]
    assert counts == sorted(counts) and counts[0] == 30 and counts[-1] > 90


def test_groups_are_padded_where_items_run_out():
    groups = diverse_beam_search(
        MODEL, torch.arange(2), CONSTRAINT, num_groups=2, width=9, k=9, penalty=0.4
    )
    for rows in groups.rows_BGk.flatten(0, 1).tolist():
        assert sorted(rows[:7]) == list(range(7)) and rows[7:] == [-1, -1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_samples=0), "num_samples: got 0"),
        (dict(num_samples=2, temperature=0.0), "temperature: got 0.0.*beam_search"),
        (dict(num_samples=2, top_p=0.0), "top_p: got 0.0"),
        (dict(num_samples=2, top_p=1.5), "top_p: got 1.5"),
        (dict(num_samples=2, seed=[1, 2]), "2 seeds for 1 requests"),
        (dict(num_samples=2, filters=Filters(exclude=[[9]])), "row 9"),
    ],
)
def test_bad_arguments_say_what_to_do(options, words):
    with pytest.raises(UserError, match=words):
        sample(MODEL, ONE, CONSTRAINT, **options)


def test_bad_groups_say_what_to_do():
    for wrong in (dict(num_groups=0, penalty=1.0), dict(num_groups=2, penalty=-1.0)):
        with pytest.raises(UserError, match=r"at least 1 group and a penalty >= 0"):
            diverse_beam_search(MODEL, ONE, CONSTRAINT, width=2, k=2, **wrong)
    with pytest.raises(UserError, match=r"k: got 3 with width 2"):
        diverse_beam_search(MODEL, ONE, CONSTRAINT, num_groups=1, penalty=0, width=2, k=3)


def test_nan_is_an_error_here_too():
    class Broken(TableModel):
        def all_logits(self, request, prefix):
            return super().all_logits(request, prefix) * torch.nan

    for replacement in (True, False):
        with pytest.raises(UserError, match="NaN"):
            sample(Broken(SIZES), ONE, CONSTRAINT, num_samples=3, replacement=replacement)
