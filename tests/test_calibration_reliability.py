"""ECE, MCE, Brier, NLL and reliability data against hand-computed numbers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from genrec.errors import UserError
from genrec.evaluation import reliability as r

P = np.array([0.05, 0.05, 0.15, 0.95])
HIT = np.array([0, 1, 0, 1])


def test_equal_width_bins_ece_and_mce_by_hand():
    bins = r.reliability_bins(P, HIT, num_bins=10, binning="equal_width")
    assert [(b.count, b.hits) for b in bins] == [(2, 1), (1, 0), (1, 1)]
    assert [b.predicted for b in bins] == pytest.approx([0.05, 0.15, 0.95])
    assert r.ece(bins) == pytest.approx((2 * 0.45 + 0.15 + 0.05) / 4)
    assert r.mce(bins) == pytest.approx(0.45)


def test_brier_and_nll_by_hand():
    assert r.brier(P, HIT) == pytest.approx((0.05**2 + 0.95**2 + 0.15**2 + 0.05**2) / 4)
    expected = -(math.log(0.95) + math.log(0.05) + math.log(0.85) + math.log(0.95)) / 4
    assert r.binary_nll(P, HIT) == pytest.approx(expected)
    assert math.isfinite(r.binary_nll(np.array([0.0, 1.0]), np.array([1, 0])))


def test_equal_mass_bins_hold_about_as_many_pairs_each():
    rng = np.random.default_rng(0)
    p = rng.random(1500) ** 4
    bins = r.reliability_bins(p, rng.random(1500) < p, num_bins=15)
    assert [b.count for b in bins] == [100] * 15
    assert all(a.high < b.low for a, b in itertools.pairwise(bins))


def test_equal_probabilities_share_a_bin_and_constants_make_one():
    bins = r.reliability_bins(np.full(90, 0.2), np.arange(90) < 18)
    assert len(bins) == 1 and bins[0].count == 90 and r.ece(bins) == pytest.approx(0)
    mixed = r.reliability_bins(np.repeat([0.1, 0.3], [80, 10]), np.zeros(90), num_bins=15)
    assert [b.count for b in mixed] == [80, 10]


def test_probability_one_belongs_to_the_last_equal_width_bin():
    bins = r.reliability_bins(np.array([1.0, 0.999]), np.array([1, 1]), binning="equal_width")
    assert len(bins) == 1 and bins[0].count == 2


def test_wilson_interval_of_known_values_and_of_nothing():
    assert r.wilson_interval(10, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert r.wilson_interval(0, 100)[0] == 0 and r.wilson_interval(100, 100)[1] == 1
    assert r.wilson_interval(0, 0) == (0, 1)


def test_hits_of_marks_one_place_or_none():
    assert r.hits_of(np.array([1, -1, 7]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_reliability_counts_real_pairs_and_totals():
    p = np.array([[0.5, 0.2, 0.0], [0.4, 0.1, 0.1]])
    found = r.reliability(p, np.array([0, -1]))
    assert found["num_pairs"] == 5 and found["base_rate"] == pytest.approx(1 / 5)
    assert found["predicted_hits"] == pytest.approx(1.3) and found["actual_hits"] == 1
    low, high = found["actual_hits_ci"]
    assert 0 < low < 1 < high < 2


def test_comparison_has_both_sides_and_is_json():
    rng = np.random.default_rng(0)
    before = rng.dirichlet(np.ones(6), size=50)[:, :5]
    found = r.compare_reliability(before, before / 2, rng.integers(-1, 5, 50))
    assert found["ece_before"] != found["ece_after"]
    assert found["predicted_hits_before"] == pytest.approx(2 * found["predicted_hits_after"])
    assert found["before"]["bins"] and found["after"]["bins_equal_width"]
    json.dumps(found)


def test_expected_ece_equals_a_slow_simulation():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), size=100)[:, :3]
    slow = []
    for _ in range(400):
        places = np.array([rng.choice(4, p=[*row, 1 - row.sum()]) for row in p])
        rank = np.where(places < 3, places, -1)
        slow.append(r.ece(r.reliability_bins(p, r.hits_of(rank, 3))))
    fast = r.expected_ece(p, num_samples=1000, quantile=0.5)
    assert fast == pytest.approx(np.median(slow), rel=0.08)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: r.reliability_bins(np.array([]), np.array([])), "at least one pair"),
        (lambda: r.reliability_bins(P, HIT[:2]), "same shape"),
        (lambda: r.brier(np.array([-2.0]), np.array([1])), "not scores"),
        (lambda: r.brier(np.array([np.nan]), np.array([1])), "NaN"),
        (lambda: r.reliability_bins(P, HIT, num_bins=0), "num_bins: got 0"),
        (lambda: r.reliability_bins(P, HIT, binning="x"), "equal_width"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
