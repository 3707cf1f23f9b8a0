"""Rules about whole lists, against every list that there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding.lists import MaxPerGroup, MinShare, Spacing, select
from genrec.errors import UserError


def keeps(rows, rules):
    """Say the rules once more, item by item."""
    for rule in rules:
        if isinstance(rule, MinShare):
            if sum(bool(rule.members_N[row]) for row in rows) < rule.share * len(rows) - 1e-9:
                return False
        elif isinstance(rule, MaxPerGroup):
            groups = rule.groups_N
            for group in range(12):
                inside = groups[:, group % groups.shape[1]] if groups.ndim == 2 else groups == group
                if sum(bool(inside[row]) for row in rows) > rule.limit:
                    return False
        else:
            for i, j in itertools.combinations(range(len(rows)), 2):
                group = rule.groups_N[rows[i]]
                if group >= 0 and group == rule.groups_N[rows[j]] and j - i < rule.distance:
                    return False
    return True


def brute_force(rows, scores, k, rules):
    """Return (places, total): longest, then largest sum, then best scores from the front."""
    for length in range(min(k, len(rows)), -1, -1):
        found = [
            places
            for places in itertools.permutations(range(len(rows)), length)
            if keeps([rows[p] for p in places], rules)
        ]
        if found:
            return max(
                found,
                key=lambda places: (
                    round(sum(scores[p] for p in places), 9),
                    [-p for p in places],
                ),
            )
    raise AssertionError


@st.composite
def problems(draw):
    count, num_items = draw(st.integers(1, 6)), 8
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    rows = rng.permutation(num_items)[:count]
    scores = np.sort(rng.normal(size=count))[::-1]
    groups = rng.integers(-1, 3, num_items)
    several = rng.random((num_items, 3)) < 0.4
    rules = [
        MaxPerGroup(rng.integers(-1, 3, num_items), draw(st.integers(0, 3))),
        MaxPerGroup(several, draw(st.integers(1, 3))),
        MinShare(rng.random(num_items) < 0.4, draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))),
        Spacing(groups, draw(st.integers(1, 4))),
    ]
    return rows, scores, draw(st.integers(1, 5)), [r for r in rules if draw(st.booleans())]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_choice_is_the_best_of_all_lists(problem):
    rows, scores, k, rules = problem
    found = select(rows, scores, k, rules)
    best = brute_force(rows.tolist(), scores.tolist(), k, rules)
    assert found.places.tolist() == list(best)
    total = scores[: len(best)].sum() - scores[list(best)].sum()
    assert found.cost == pytest.approx(total, abs=1e-9) and found.cost >= -1e-9


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 5))
def test_a_proof_means_that_items_below_the_last_candidate_do_not_help(problem, cut):
    """The candidates are cut; a proven choice equals the one from all of them."""
    rows, scores, k, rules = problem
    cut = min(cut, len(rows))
    few = select(rows[:cut], scores[:cut], k, rules, certified=True)
    everything = select([*rows, -1], [*scores, -np.inf], k, rules)
    assert everything.proven
    if few.proven:
        assert len(few.places) == len(everything.places)
        assert scores[few.places].sum() == pytest.approx(scores[everything.places].sum())
    assert not select(rows[:cut], scores[:cut], k, rules, certified=False).proven


def test_no_rule_and_rules_that_do_not_bite_are_the_identity():
    rows, scores = np.array([4, 2, 0, 1]), np.array([3.0, 2.0, 2.0, 1.0])
    groups = np.arange(5)
    loose = [MaxPerGroup(groups, 1), MinShare(groups >= 0, 1.0), Spacing(groups, 3)]
    for rules in ([], loose):
        found = select(rows, scores, 3, rules, certified=True)
        assert found.places.tolist() == [0, 1, 2] and found.cost == 0 and found.proven


def test_a_worked_example():
    #            A  A  A  B  B  C (place 0 ... 5)
    groups = np.array([0, 0, 0, 1, 1, 2])
    rows, scores = np.arange(6), np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -9.0])
    capped = select(rows, scores, 4, [MaxPerGroup(groups, 2)], certified=True)
    assert capped.places.tolist() == [0, 1, 3, 4] and capped.cost == 2.0 and capped.proven
    spaced = select(rows, scores, 4, [Spacing(groups, 2)], certified=True)
    assert spaced.places.tolist() == [0, 3, 1, 4] and spaced.cost == 2.0
    apart = select(rows, scores, 4, [Spacing(groups, 3)], certified=True)
    assert apart.places.tolist() == [0, 3, 5, 1] and apart.cost == 6.0
    # Something better than place 5 may exist below the last candidate: not proven there.
    assert not select(rows[:5], scores[:5], 4, [Spacing(groups, 3)], certified=True).proven
    shared = select(rows, scores, 4, [MinShare(groups == 2, 0.25)], certified=True)
    assert shared.places.tolist() == [0, 1, 2, 5] and shared.cost == 5.0 and shared.proven
    fewer = select(rows[:5], scores[:5], 4, [MinShare(groups == 2, 0.25)], certified=True)
    assert fewer.places.tolist() == [] and not fewer.proven


def test_rules_that_allow_no_full_list_give_the_longest():
    rows, scores, groups = np.arange(5), -np.arange(5.0), np.zeros(5, dtype=int)
    assert select(rows, scores, 4, [MaxPerGroup(groups, 2)]).places.tolist() == [0, 1]
    assert select(rows, scores, 4, [Spacing(groups, 3)]).places.tolist() == [0]
    none = select(rows, scores, 4, [MinShare(np.zeros(5, bool), 0.5)])
    assert none.places.tolist() == [] and none.cost == 0


@pytest.mark.parametrize(
    ("k", "rules", "words"),
    [
        (0, [], "k: got 0"),
        (2, [MaxPerGroup(np.zeros(3), -1)], "limit: got -1"),
        (2, [MinShare(np.zeros(3), 1.5)], "share: got 1.5"),
        (2, [Spacing(np.zeros(3), 0)], "distance: got 0"),
        (2, [Spacing(np.zeros(3), 2)] * 2, "several Spacing rules"),
    ],
)
def test_bad_rules_say_what_to_do(k, rules, words):
    with pytest.raises(UserError, match=words):
        select(np.arange(3), -np.arange(3.0), k, rules)


def test_bad_candidates_say_what_to_do():
    for rows, scores in (([0, 1], [1.0, 2.0]), ([0, 1], [1.0, np.nan]), ([-1, 1], [1.0, 0.5])):
        with pytest.raises(UserError, match=r"finite scores, best first"):
            select(np.array(rows), np.array(scores), 1, [])
    with pytest.raises(UserError, match="one length"):
        select(np.arange(3), np.arange(2.0), 1, [])
