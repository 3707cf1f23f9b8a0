"""Level log-probabilities of given items: against walking every item alone, filters included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding import CSRIndex, Filters, beam_search, score_levels
from genrec.errors import UserError
from genrec.testing import TableModel, brute_force_logprobs, random_index

SIZES = (4, 3, 5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    items=st.integers(1, 40),
    scoring=st.sampled_from(["renormalized", "level", "raw"]),
    filtered=st.booleans(),
)
def test_levels_add_up_to_what_walking_every_item_alone_gives(seed, items, scoring, filtered):
    rng = np.random.default_rng(seed)
    index, model = random_index(items, SIZES, seed), TableModel(SIZES, seed=seed, num_others=3)
    allowed = rng.random((2, len(index))) < (0.6 if filtered else 1.0)
    rows = np.full((2, len(index)), -1)
    for b in range(2):
        kept = rng.permutation(np.flatnonzero(allowed[b]))
        rows[b, : len(kept)] = kept
    levels = score_levels(
        model, torch.arange(2), CSRIndex.from_index(index), torch.from_numpy(rows), scoring=scoring
    ).numpy()
    truth = brute_force_logprobs(
        model, torch.arange(2), index.codes, allowed_BN=allowed, scoring=scoring
    )
    assert levels.shape == (*rows.shape, 3)
    for b in range(2):
        for c, row in enumerate(rows[b]):
            expected = truth[b, row] if row >= 0 else 0.0
            assert levels[b, c].sum() == pytest.approx(expected, abs=1e-4)
    if scoring == "renormalized" and not filtered:
        check_each_prefix_is_a_distribution(levels, rows, index.codes)


def check_each_prefix_is_a_distribution(levels, rows, codes):
    for b in range(len(rows)):
        real = rows[b] >= 0
        for depth in range(len(SIZES)):
            children: dict[tuple, dict[int, float]] = {}
            for row, parts in zip(rows[b][real], levels[b][real], strict=True):
                prefix = tuple(codes[row, :depth])
                children.setdefault(prefix, {})[int(codes[row, depth])] = float(parts[depth])
            for found in children.values():
                assert sum(np.exp(list(found.values()))) == pytest.approx(1, abs=1e-4)


def test_levels_of_a_filtered_search_add_up_to_its_scores():
    index, model = random_index(30, SIZES, 1), TableModel(SIZES, seed=2)
    constraint, filters = CSRIndex.from_index(index), Filters(exclude=[np.arange(9), None])
    beams = beam_search(model, torch.arange(2), constraint, width=12, k=12, filters=filters)
    levels = score_levels(model, torch.arange(2), constraint, beams.rows_Bk)
    torch.testing.assert_close(levels.sum(2), beams.logprobs_Bk, atol=1e-5, rtol=0)


def test_rows_outside_the_catalogue_are_refused():
    constraint, model = CSRIndex.from_index(random_index(5, SIZES, 1)), TableModel(SIZES)
    with pytest.raises(UserError, match="got row 9"):
        score_levels(model, torch.arange(1), constraint, torch.tensor([[9]]))
    with pytest.raises(UserError, match="one list per request"):
        score_levels(model, torch.arange(2), constraint, torch.tensor([[1]]))
