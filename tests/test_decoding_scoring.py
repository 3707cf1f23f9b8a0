"""What scores mean: renormalized, level and raw; what is lost on invalid items; ends; NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from genrec.decoding import (
    CSRIndex,
    Trie,
    beam_search,
    exact_search,
    invalid_mass,
    reference_beam_search,
    score_candidates,
    score_catalogue,
)
from genrec.errors import UserError
from genrec.testing import TableModel, brute_force_logprobs, random_index, rank
from genrec.testing.decoding import random_titles

SIZES = (3, 4, 2)
ALL = ("renormalized", "level", "raw")


def sequence_probability(model, request, codes, *, others):
    """Multiply softmax probabilities by hand, in float64, over a level's codes or all tokens."""
    probability = 1.0
    for level, code in enumerate(codes):
        logits = model.all_logits(request, tuple(codes[:level])).double()
        if not others:
            logits = logits[: model.codebook_sizes[level]]
        probability *= float(logits.softmax(0)[code])
    return probability


def test_probabilities_of_the_catalogue_sum_to_one_or_lack_the_invalid_mass():
    index = random_index(11, SIZES, seed=4)
    constraint, model = CSRIndex.from_index(index), TableModel(SIZES, num_others=3)
    batch = torch.arange(4)
    items = set(map(tuple, index.codes.tolist()))
    for scoring in ALL:
        mass_B = score_catalogue(model, batch, constraint, scoring=scoring).double().exp().sum(1)
        missing_B = invalid_mass(model, batch, constraint, scoring=scoring)
        assert torch.allclose(missing_B, 1 - mass_B) and missing_B.dtype == torch.float64
    assert torch.allclose(
        invalid_mass(model, batch, constraint, scoring="renormalized"),
        torch.zeros(4, dtype=torch.float64),
        atol=1e-5,
    )
    sequences = list(itertools.product(*map(range, SIZES)))
    for request in range(4):
        wrong = [
            sequence_probability(model, request, codes, others=False)
            for codes in sequences
            if codes not in items
        ]
        found = invalid_mass(model, batch, constraint, scoring="level")[request]
        assert float(found) == pytest.approx(sum(wrong), abs=1e-5) and sum(wrong) > 0.1
        said = sum(sequence_probability(model, request, codes, others=True) for codes in items)
        found = invalid_mass(model, batch, constraint, scoring="raw")[request]
        assert float(found) == pytest.approx(1 - said, abs=1e-5)


def test_raw_is_level_where_a_model_can_say_nothing_else():
    index = random_index(20, SIZES)
    constraint, model = CSRIndex.from_index(index), TableModel(SIZES)
    level, raw = (
        beam_search(model, torch.arange(3), constraint, width=8, k=8, scoring=scoring)
        for scoring in ("level", "raw")
    )
    assert torch.equal(level.rows_Bk, raw.rows_Bk)
    assert torch.allclose(level.logprobs_Bk, raw.logprobs_Bk, atol=1e-5)


def test_raw_needs_a_model_that_knows_its_vocabulary():
    class Narrow:
        def __init__(self):
            self.table = TableModel(SIZES)
            self.begin, self.step = self.table.begin, self.table.step

    index = random_index(20, SIZES)
    constraint, batch = CSRIndex.from_index(index), torch.arange(2)
    calls = [
        lambda: beam_search(Narrow(), batch, constraint, width=4, k=4, scoring="raw"),
        lambda: exact_search(Narrow(), batch, constraint, k=4, scoring="raw"),
        lambda: score_catalogue(Narrow(), batch, constraint, scoring="raw"),
        lambda: score_candidates(Narrow(), batch, constraint, [[1], [2]], scoring="raw"),
        lambda: reference_beam_search(
            Narrow(), batch, Trie.from_index(index), width=4, k=4, scoring="raw"
        ),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"'raw' with a Narrow.*over_vocabulary"):
            call()


# Semantic IDs of different lengths.


@pytest.mark.parametrize("scoring", ALL)
def test_exhaustive_beam_is_brute_force_on_titles(scoring):
    index = random_titles(40, num_words=4, num_levels=4, seed=1)
    lengths = (index.codes != 0).sum(1)
    assert set(lengths) == {1, 2, 3, 4}
    constraint, model = CSRIndex.from_index(index), TableModel(index.codebook_sizes, num_others=2)
    batch, count = torch.arange(3), len(index)
    truth_BN = brute_force_logprobs(
        model, batch, index.codes, scoring=scoring, shared_vocabulary=True
    )
    for static in (True, False):
        beams = beam_search(
            model, batch, constraint, width=count, k=count, scoring=scoring, static_shapes=static
        )
        for b in range(3):
            assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], count).tolist()
            assert np.allclose(beams.logprobs_Bk[b], np.sort(truth_BN[b])[::-1], atol=1e-4)
        assert beams.certified_B.all()
    assert np.array_equal(beams.codes_BkL.numpy(), index.codes[beams.rows_Bk.numpy()])
    scores_BN = score_catalogue(model, batch, constraint, scoring=scoring)
    assert np.allclose(scores_BN, truth_BN, atol=1e-4)


def test_what_follows_the_end_costs_nothing_and_is_not_asked():
    codes = np.array([[1, 0, 0, 0], [1, 2, 0, 0], [2, 0, 0, 0], [2, 1, 1, 0]])
    constraint = CSRIndex.from_codes(codes, (3,) * 4, shared_vocabulary=True)
    assert constraint.num_running == (1, 2, 2, 1, 0)
    model = TableModel((3,) * 4)
    beams = beam_search(model, torch.arange(1), constraint, width=4, k=4, scoring="level")
    # Two prefixes of one code, two of two codes that go on, one of three; never a fourth END.
    assert model.rows_per_step == [1, 2, 2, 1]
    at = {row: i for i, row in enumerate(beams.rows_Bk[0].tolist())}
    expected = model.logits(0, ()).log_softmax(0)[1] + model.logits(0, (1,)).log_softmax(0)[0]
    assert float(beams.logprobs_Bk[0, at[0]]) == pytest.approx(float(expected), abs=1e-5)
    score_candidates(model, torch.arange(1), constraint, [[0, 2]], scoring="level")
    assert model.rows_per_step == [1, 2]
    # The same rows without a shared vocabulary pay for every level.
    paid = CSRIndex.from_codes(codes, (3,) * 4)
    other = beam_search(model, torch.arange(1), paid, width=4, k=4, scoring="level")
    assert float(other.logprobs_Bk.max()) < float(beams.logprobs_Bk.max())


def test_titles_that_all_end_early_stop_the_search_early():
    codes = np.array([[1, 0, 0, 0, 0], [2, 1, 0, 0, 0], [2, 2, 0, 0, 0]])
    constraint = CSRIndex.from_codes(codes, (3,) * 5, shared_vocabulary=True)
    model = TableModel((3,) * 5)
    beams = beam_search(model, torch.arange(2), constraint, width=3, k=3, scoring="level")
    assert len(model.rows_per_step) == 3
    assert sorted(beams.rows_Bk[0].tolist()) == [0, 1, 2]
    assert (beams.codes_BkL[0] == torch.from_numpy(codes)[beams.rows_Bk[0]]).all()


def test_invalid_mass_over_titles_counts_sequences_once_they_end():
    index = random_titles(6, num_words=2, num_levels=3, seed=2)
    constraint, model = CSRIndex.from_index(index), TableModel((3, 3, 3))
    said = 0.0
    for codes in map(tuple, index.codes.tolist()):
        length = min([*np.flatnonzero(np.array(codes) == 0), 2]) + 1
        said += sequence_probability(model, 0, codes[:length], others=False)
    found = invalid_mass(model, torch.arange(1), constraint, scoring="level")
    assert float(found[0]) == pytest.approx(1 - said, abs=1e-5)


# Several items on one leaf; numbers that are none.


def test_several_items_on_one_leaf_are_refused():
    with pytest.raises(UserError, match=r"3 items have 2 semantic IDs; rows 0 and 2 share one.*"):
        CSRIndex.from_codes(np.array([[1, 2], [0, 0], [1, 2]]), (3, 3))


class Broken(TableModel):
    """Gives NaN for one request after one prefix."""

    def __init__(self, sizes, request, prefix):
        super().__init__(sizes)
        self.broken = (request, prefix)

    def all_logits(self, request, prefix):
        logits = super().all_logits(request, prefix)
        return logits * torch.nan if (request, prefix) == self.broken else logits


@pytest.mark.parametrize("scoring", ALL)
@pytest.mark.parametrize("static", [True, False])
def test_nan_never_hides(scoring, static):
    """Even below a prefix that is hardly reached, as long as the search looks there."""
    index = random_index(24, SIZES)
    constraint, batch = CSRIndex.from_index(index), torch.arange(4)
    for prefix in ((), (1,), (1, int(index.codes[index.codes[:, 0] == 1][0, 1]))):
        model = Broken(SIZES, 2, prefix)
        with pytest.raises(UserError, match=r"NaN logits for request\(s\) 2 of 4"):
            beam_search(
                model, batch, constraint, width=24, k=3, scoring=scoring, static_shapes=static
            )
        with pytest.raises(UserError, match="NaN"):
            reference_beam_search(model, batch, Trie.from_index(index), width=24, k=24)
    with pytest.raises(UserError, match="NaN"):
        score_catalogue(Broken(SIZES, 2, ()), batch, constraint, scoring=scoring)


def test_minus_infinity_forbids_codes():
    class Closed(TableModel):
        def all_logits(self, request, prefix):
            logits = super().all_logits(request, prefix).clone()
            if prefix == ():
                logits[1] = -torch.inf
            return logits

    index = random_index(24, SIZES)
    beams = beam_search(Closed(SIZES), torch.arange(2), CSRIndex.from_index(index), width=24, k=24)
    found = beams.rows_Bk[0][beams.rows_Bk[0] >= 0].numpy()
    assert sorted(found) == np.flatnonzero(index.codes[:, 0] != 1).tolist()
