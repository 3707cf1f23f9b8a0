"""Draft and verify: the lists of plain beam search, with fewer calls of the target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding import Boosts, CSRIndex, Filters, beam_search
from genrec.decoding.speculative import speculative_beam_search, step_levels
from genrec.errors import UserError
from genrec.testing import TableModel, random_index
from genrec.testing.decoding import random_titles

SIZES = (4, 5, 6, 3, 4)
INDEX = random_index(300, SIZES, seed=3)


class Target(TableModel):
    """A table model that scores trees in one call, and counts calls."""

    calls = 0

    def step(self, codes_R, state, parents_R):
        self.calls += 1
        return super().step(codes_R, state, parents_R)

    def step_levels(self, codes, state, parents):
        self.calls += 1
        logits, states = [], []
        for codes_R, parents_R in zip(codes, parents, strict=True):
            logits_RK, state = super().step(codes_R, state, parents_R)
            logits.append(logits_RK)
            states.append(state)
        return logits, states


def assert_same(got, expected):
    assert torch.equal(got.rows_Bk, expected.rows_Bk)
    assert torch.equal(got.logprobs_Bk, expected.logprobs_Bk)
    assert torch.equal(got.codes_BkL, expected.codes_BkL)
    assert torch.equal(got.certified_B, expected.certified_B)


@st.composite
def problems(draw):
    titles = draw(st.booleans())
    num_levels = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 5))
    if titles:
        index = random_titles(draw(st.integers(1, 60)), 4, num_levels, seed)
    else:
        sizes = tuple(draw(st.integers(1, 6)) for _ in range(num_levels))
        index = random_index(draw(st.integers(1, 60)), sizes, seed)
    width = draw(st.integers(1, 8))
    filters = None
    if draw(st.booleans()):
        row = st.lists(st.integers(0, len(index) - 1), max_size=20)
        filters = Filters(exclude=[draw(row), None])
    others = draw(st.sampled_from([0, 3]))
    draft_seed = draw(st.sampled_from([0, 9]))  # 0: the target's own table
    quantum = draw(st.sampled_from([None, 1.0]))
    table = dict(quantum=quantum, num_others=others)
    target = Target(index.codebook_sizes, seed=0, **table)
    draft = TableModel(index.codebook_sizes, seed=draft_seed, **table)
    options = dict(
        width=width,
        k=width,
        filters=filters,
        scoring=draw(st.sampled_from(["renormalized", "level", "raw"])),
    )
    drafting = dict(ahead=draw(st.integers(1, 4)), draft_width=draw(st.integers(1, 12)))
    return index, target, draft, options, drafting


@settings(max_examples=80, deadline=None)
@given(problems())
def test_lists_are_those_of_plain_beam_search(problem):
    index, target, draft, options, drafting = problem
    constraint, batch = CSRIndex.from_index(index), torch.tensor([4, 7])
    expected = beam_search(target, batch, constraint, **options)
    got, report = speculative_beam_search(target, draft, batch, constraint, **options, **drafting)
    assert_same(got, expected)
    assert report.num_accepted == report.num_levels - report.num_calls >= 0
    assert 0 <= report.num_levels <= constraint.depth - 1
    assert report.num_calls >= min(1, report.num_levels)


def test_a_perfect_draft_needs_one_call_and_a_poor_one_no_more_than_plain():
    constraint, batch = CSRIndex.from_index(INDEX), torch.tensor([1])
    target = Target(SIZES, seed=0)
    plain = beam_search(target, batch, constraint, width=5, k=5, scoring="level")
    plain_calls, target.calls = target.calls, 0
    options = dict(width=5, k=5, scoring="level")
    got, report = speculative_beam_search(
        target, TableModel(SIZES, seed=0), batch, constraint, ahead=9, **options
    )
    assert_same(got, plain)
    assert (report.num_levels, report.num_calls, report.num_accepted) == (4, 1, 3)
    assert target.calls == 1 and report.accepted_per_call == 3.0
    assert report.rows_used == 15 and report.rows_drafted == 30
    target.calls = 0
    got, report = speculative_beam_search(
        target, TableModel(SIZES, seed=5), batch, constraint, draft_width=1, **options
    )
    assert_same(got, plain)
    assert report.num_calls == target.calls == plain_calls == 4 and report.num_accepted == 0


def test_depth_of_the_drafts_bounds_what_is_accepted():
    constraint, target = CSRIndex.from_index(INDEX), Target(SIZES, seed=0)
    draft = TableModel(SIZES, seed=0)
    calls = []
    for ahead in (1, 2, 3):
        _, report = speculative_beam_search(
            target, draft, torch.tensor([1]), constraint, width=4, k=4, ahead=ahead, scoring="level"
        )
        calls.append(report.num_calls)
    assert calls == [2, 2, 1]


def test_boosts_and_batches_keep_their_lists():
    constraint, target = CSRIndex.from_index(INDEX), Target(SIZES, seed=0)
    boosts = Boosts(constraint, np.random.default_rng(0).normal(size=len(INDEX)))
    batch = torch.arange(5)
    options = dict(width=6, k=6, boosts=boosts)
    expected = beam_search(target, batch, constraint, **options)
    got, report = speculative_beam_search(
        target, TableModel(SIZES, seed=0), batch, constraint, draft_width=40, **options
    )
    assert_same(got, expected)
    assert report.num_accepted > 0


def test_a_draft_may_read_another_form_of_the_requests():
    class Text(TableModel):
        def begin(self, batch):
            return super().begin(torch.tensor([int(word) for word in batch]))

    constraint, target = CSRIndex.from_index(INDEX), Target(SIZES, seed=0)
    _, report = speculative_beam_search(
        target,
        Text(SIZES, seed=0),
        torch.tensor([3]),
        constraint,
        width=4,
        k=4,
        draft_batch=["3"],
        scoring="level",
    )
    assert report.num_accepted > 0


def test_models_without_a_call_for_levels_are_stepped():
    model = TableModel(SIZES, seed=0)
    _, state = model.begin(torch.tensor([1, 2]))
    codes = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0])]
    parents = [torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2])]
    logits, states = step_levels(model, codes, state, parents)
    assert [len(rows) for rows in logits] == [4, 2] and len(states) == 2
    assert torch.equal(logits[1][0], model.logits(1, (1, 4)))
    assert torch.equal(logits[1][1], model.logits(2, (2, 0)))


def test_nan_of_the_draft_is_harmless_and_of_the_target_an_error():
    class Broken(TableModel):
        def all_logits(self, request, prefix):
            values = super().all_logits(request, prefix)
            return values * torch.nan if len(prefix) == 2 else values

    constraint, batch = CSRIndex.from_index(INDEX), torch.tensor([1])
    options = dict(width=4, k=4)
    expected = beam_search(Target(SIZES), batch, constraint, **options)
    got, _ = speculative_beam_search(Target(SIZES), Broken(SIZES), batch, constraint, **options)
    assert_same(got, expected)
    with pytest.raises(UserError, match="NaN logits"):
        speculative_beam_search(Broken(SIZES), Target(SIZES), batch, constraint, **options)


def test_pretrained_models_draft_for_each_other():
    from test_decoding_pretrained import INDEX as ITEMS
    from test_decoding_pretrained import decoder

    target, draft = decoder("llama"), decoder("gpt2")
    constraint, batch = CSRIndex.from_index(ITEMS), [[1, 2, 3], [5]]
    for small in (draft, target):
        options = dict(width=5, k=5, scoring="level")
        expected = beam_search(target, batch, constraint, **options)
        got, report = speculative_beam_search(
            target, small, batch, constraint, draft_width=12, **options
        )
        assert torch.equal(got.rows_Bk, expected.rows_Bk)
        assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-4)
    assert report.num_calls == 1 and report.num_accepted == 1


def test_errors_say_what_to_do():
    constraint, model = CSRIndex.from_index(INDEX), TableModel(SIZES)
    for name in ("ahead", "draft_width"):
        with pytest.raises(UserError, match=rf"{name}: got 0.*>= 1"):
            speculative_beam_search(
                model, model, torch.tensor([1]), constraint, width=4, k=4, **{name: 0}
            )
    with pytest.raises(UserError, match="width: got 0"):
        speculative_beam_search(model, model, torch.tensor([1]), constraint, width=0, k=1)
