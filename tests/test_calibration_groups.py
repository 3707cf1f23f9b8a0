"""Reliability by group, paired intervals, list NLL; agreement with scikit-learn and scipy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from genrec.errors import UserError
from genrec.evaluation import reliability as r
from genrec.evaluation.groups import Groups
from genrec.evaluation.reliability_detail import compare_paired, reliability_by_group

rngs = st.integers(0, 2**31).map(np.random.default_rng)


@settings(max_examples=20, deadline=None)
@given(rng=rngs)
def test_brier_and_nll_are_scikit_learns(rng):
    p = rng.random(int(rng.integers(2, 300)))
    hit = rng.random(len(p)) < p
    assert r.brier(p, hit) == pytest.approx(brier_score_loss(hit, p, pos_label=True))
    assert r.binary_nll(p, hit) == pytest.approx(log_loss(hit, p, labels=[False, True]))


@settings(max_examples=20, deadline=None)
@given(rng=rngs, num_bins=st.integers(1, 20))
def test_equal_width_bins_are_scikit_learns_curve(rng, num_bins):
    p = rng.random(400)
    hit = rng.random(400) < p
    bins = r.reliability_bins(p, hit, num_bins=num_bins, binning="equal_width")
    actual, predicted = calibration_curve(hit, p, n_bins=num_bins, strategy="uniform")
    assert [b.actual for b in bins] == pytest.approx(actual.tolist())
    assert [b.predicted for b in bins] == pytest.approx(predicted.tolist())


@settings(max_examples=20, deadline=None)
@given(rng=rngs)
def test_equal_mass_bins_are_scikit_learns_quantile_curve(rng):
    p, num_bins = rng.permutation(600) / 600, 15  # no ties: only the choice of edges could differ
    hit = rng.random(600) < p
    bins = r.reliability_bins(p, hit, num_bins=num_bins)
    actual, predicted = calibration_curve(hit, p, n_bins=num_bins, strategy="quantile")
    # Edges between two values fall on different sides by at most one pair.
    assert [b.predicted for b in bins] == pytest.approx(predicted.tolist(), abs=2 / 600)
    assert [b.actual for b in bins] == pytest.approx(actual.tolist(), abs=2 / 40)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 500), share=st.floats(0, 1))
def test_intervals_are_scipys(count, share):
    hits = round(share * count)
    for method, ours in [("wilson", r.wilson_interval), ("exact", r.clopper_pearson_interval)]:
        theirs = binomtest(hits, count).proportion_ci(method=method)
        assert ours(hits, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert r.clopper_pearson_interval(0, 0) == (0, 1)


def test_bins_take_either_interval():
    p, hit = np.full(50, 0.1), np.arange(50) < 4
    (wilson,) = r.reliability_bins(p, hit)
    (exact,) = r.reliability_bins(p, hit, interval="clopper_pearson")
    assert wilson.ci == r.wilson_interval(4, 50) and exact.ci == r.clopper_pearson_interval(4, 50)
    with pytest.raises(UserError, match="interval: got 'normal'"):
        r.reliability_bins(p, hit, interval="normal")  # type: ignore[arg-type]


def test_list_nll_by_hand():
    p = np.array([[0.5, 0.2], [0.5, 0.2], [0.0, 0.0], [0.6, 0.4]])
    found = r.list_nll(p, np.array([1, -1, -1, -1]))
    assert found[:3] == pytest.approx([-math.log(0.2), -math.log(0.3), 0.0])
    assert 20 < found[3] < 30  # impossible, yet finite
    assert r.list_nll(np.empty((2, 0)), np.array([-1, -1])).tolist() == [0, 0]


P = np.array([[0.3, 0.2, 0.0], [0.4, 0.1, 0.1], [0.5, 0.2, 0.2], [0.1, 0.1, 0.1]])
RANK = np.array([0, -1, 2, 7])


def test_groups_of_users_by_hand_and_empty_ones():
    groups = Groups("segment", ("a", "b", "nobody"), np.array([0, 0, 1, -1]))
    a, b, nobody = reliability_by_group(P, RANK, groups)
    assert (a["num_users"], a["num_pairs"], a["actual_hits"]) == (2, 5, 1)
    assert a["predicted_hits"] == pytest.approx(1.1)
    assert a["actual_hits_ci"] == pytest.approx([2 * x for x in r.wilson_interval(1, 2)])
    assert (b["num_users"], b["actual_hits"]) == (1, 1)
    assert nobody == {
        "group": "nobody", "num_users": 0, "num_pairs": 0, "predicted_hits": 0.0,
        "actual_hits": 0, "actual_hits_ci": None, "ece": None, "ece_bound": None,
    }  # fmt: skip
    json.dumps([a, b, nobody], allow_nan=False)


def test_groups_of_listed_items_add_up_to_the_whole():
    labels = np.array([[0, 1, -1], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
    head, tail = reliability_by_group(P, RANK, Groups("popularity", ("head", "tail"), labels))
    assert head["predicted_hits"] == pytest.approx(0.3 + 0.4 + 0.2 + 0.3)
    assert head["predicted_hits"] + tail["predicted_hits"] == pytest.approx(P.sum())
    assert (head["actual_hits"], tail["actual_hits"]) == (2, 0)
    assert (head["num_users"], tail["num_users"]) == (4, 3)


def test_a_group_that_is_off_shows_while_the_whole_holds():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), size=4000)[:, :5] * 0.5
    segment = np.arange(4000) % 2
    true = p * np.where(segment, 1.5, 0.5)[:, None]
    drawn = (true.cumsum(1) <= rng.random((4000, 1))).sum(1)
    rank = np.where(drawn < 5, drawn, -1)
    low, high = r.reliability(p, rank)["actual_hits_ci"]
    assert low <= p.sum() <= high
    for line in reliability_by_group(p, rank, Groups("segment", ("less", "more"), segment)):
        low, high = line["actual_hits_ci"]
        assert not low <= line["predicted_hits"] <= high
        assert line["ece"] > line["ece_bound"]


def test_paired_differences_are_those_of_the_figures_and_their_intervals_hold():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(9), size=1500)[:, :8]
    drawn = (truth.cumsum(1) <= rng.random((1500, 1))).sum(1)
    rank = np.where(drawn < 8, drawn, -1)
    sharp = truth**1.5 / (truth**1.5).sum(1, keepdims=True)
    found = compare_paired(sharp, truth, rank, num_samples=200)
    before, after = r.reliability(sharp, rank), r.reliability(truth, rank)
    for name in ("ece", "nll", "nll_list", "brier", "predicted_hits"):
        assert found[f"{name}_difference"] == pytest.approx(after[name] - before[name], abs=1e-9)
    for name in ("ece", "nll", "nll_list", "brier"):
        low, high = found[f"{name}_difference_ci"]
        assert low <= found[f"{name}_difference"] <= high < 0
    same = compare_paired(truth, truth, rank, num_samples=20)
    assert same["nll_difference_ci"] == [0, 0]
    assert compare_paired(sharp, truth, rank, num_samples=200) == found
    json.dumps(found, allow_nan=False)


def test_an_interval_of_the_nll_difference_has_about_the_spread_of_new_users():
    rng = np.random.default_rng(3)
    differences, widths = [], []
    for _ in range(40):
        truth = rng.dirichlet(np.ones(6), size=300)[:, :5]
        drawn = (truth.cumsum(1) <= rng.random((300, 1))).sum(1)
        rank = np.where(drawn < 5, drawn, -1)
        found = compare_paired(truth * 0.6, truth, rank, num_samples=100)
        low, high = found["nll_difference_ci"]
        differences.append(found["nll_difference"])
        widths.append((high - low) / 3.92)
    assert np.mean(widths) == pytest.approx(np.std(differences), rel=0.35)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: r.reliability(P, np.array([0, -2, 1, 1])), "Leave out users without a target"),
        (lambda: r.reliability(P, RANK[:2]), r"expected \(users, k\) and \(users,\)"),
        (lambda: r.list_nll(P[0], RANK), "expected"),
        (lambda: compare_paired(P, P[:, :2], RANK), "the same lists"),
        (lambda: compare_paired(P[:0], P[:0], RANK[:0]), "at least one user"),
        (lambda: reliability_by_group(P, RANK, Groups("x", ("a",), np.zeros(3))), r"\(4,\)"),
        (lambda: reliability_by_group(P, RANK, Groups("x", ("a",), np.ones(4, int))), "1 labels"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_k_beyond_the_list_changes_nothing():
    padded = np.concatenate([P, np.zeros((4, 5))], axis=1)
    assert r.reliability(padded, np.where(RANK == 7, -1, RANK)) == r.reliability(P, RANK)
