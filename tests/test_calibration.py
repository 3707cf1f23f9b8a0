"""Temperature calibration on simulators with known probabilities, and its invariants."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.calibration import CALIBRATORS
from genrec.calibration.base import ListContext
from genrec.calibration.scores import (
    IdentityCalibrator,
    TemperatureCalibrator,
    target_nll,
)
from genrec.errors import UserError
from genrec.evaluation.reliability import expected_ece, hits_of, reliability, reliability_bins
from genrec.runtime import load_object


class Simulator:
    """Users whose next item follows softmax(x); the model reports softmax(x * sharpness).

    The best temperature is then `sharpness`, because the lists hold the whole catalogue or, cut
    to k, a head with an even tail.
    """

    def __init__(self, sharpness: float, users: int = 3000, k: int = 12, tail: int = 40, seed=0):
        rng = np.random.default_rng(seed)
        head = np.sort(rng.normal(size=(users, k)) * 1.5 + 2.0, axis=1)[:, ::-1]
        truth = np.concatenate([head, np.full((users, tail), -1.0)], axis=1)
        self.truth_Uk = self._softmax(truth)[:, :k]
        self.logprobs_Uk = np.log(self._softmax(truth * sharpness))[:, :k]
        draw = (self._softmax(truth).cumsum(1) < rng.random((users, 1))).sum(1)
        self.rank_U = np.where(draw < k, draw, -1)
        self.rest_U = np.full(users, tail)

    @staticmethod
    def _softmax(x: np.ndarray) -> np.ndarray:
        p = np.exp(x - x.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.logprobs_Uk, self.rank_U, self.rest_U


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_planted_temperature_is_recovered_and_probabilities_hold_on_other_users(sharpness):
    calibrator = TemperatureCalibrator().fit(*Simulator(sharpness, seed=1).arguments())
    assert calibrator.temperature == pytest.approx(sharpness, rel=0.06)

    other = Simulator(sharpness, seed=2)
    after = calibrator.probabilities(other.logprobs_Uk, other.rest_U)
    assert np.abs(after - other.truth_Uk).max() < 0.03
    found = reliability(after, other.rank_U)
    assert found["ece"] <= found["ece_bound"]
    assert found["actual_hits_ci"][0] <= found["predicted_hits"] <= found["actual_hits_ci"][1]
    if sharpness != 1.0:
        before = reliability(np.exp(other.logprobs_Uk), other.rank_U)
        assert before["ece"] > 3 * found["ece"]
        assert before["nll"] > found["nll"]


def test_perfect_probabilities_stay_below_the_sampling_bound_of_ece():
    below = 0
    for seed in range(20):
        world = Simulator(1.0, users=800, seed=seed)
        found = reliability(world.truth_Uk, world.rank_U)
        below += found["ece"] <= found["ece_bound"]
    assert below >= 16  # 95% of 20, three standard deviations


def test_nll_never_rises_on_the_fitted_users():
    for sharpness in (0.3, 1.0, 4.0):
        world = Simulator(sharpness, users=300)
        fitted = TemperatureCalibrator().fit(*world.arguments())
        before = target_nll(*world.arguments()).mean()
        assert target_nll(*world.arguments(), fitted.temperature).mean() <= before


def test_fitted_temperature_is_the_lowest_point_of_a_fine_grid():
    world = Simulator(1.7, users=400)
    fitted = TemperatureCalibrator().fit(*world.arguments()).temperature
    lowest = target_nll(*world.arguments(), fitted).mean()
    grid = [target_nll(*world.arguments(), t).mean() for t in np.geomspace(0.05, 20, 400)]
    assert lowest <= min(grid) + 1e-12


def test_scoring_the_rest_as_a_class_would_fit_the_same_temperature():
    world = Simulator(2.0, users=500)
    fitted = TemperatureCalibrator().fit(*world.arguments()).temperature
    rest_mass = 1 - np.exp(world.logprobs_Uk).sum(1)

    def class_nll(t: float) -> float:
        weights = np.exp(world.logprobs_Uk / t)
        rest = world.rest_U * (rest_mass / world.rest_U) ** (1 / t)
        chosen = weights[np.arange(500), world.rank_U]
        return -np.log(np.where(world.rank_U >= 0, chosen, rest) / (weights.sum(1) + rest)).mean()

    grid = np.geomspace(fitted / 1.2, fitted * 1.2, 2001)
    assert grid[np.argmin([class_nll(t) for t in grid])] == pytest.approx(fitted, rel=1e-3)


lists = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=40, deadline=None)
@given(rng=lists, temperature=st.floats(0.05, 20), rest=st.integers(0, 10**7))
def test_order_is_kept_and_probabilities_are_a_distribution(rng, temperature, rest):
    k = int(rng.integers(1, 8))
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(k + 1) * 0.3, size=3)[:, :k]))[:, ::-1]
    logprobs[0, k // 2 :] = -np.inf  # padding
    calibrator = TemperatureCalibrator().load_state({"temperature": temperature})
    p = calibrator.probabilities(logprobs, np.full(3, rest))
    assert np.isfinite(p).all() and (p >= 0).all() and (p.sum(axis=1) <= 1 + 1e-9).all()
    assert (np.diff(p, axis=1) <= 1e-15).all()
    assert (p[np.isneginf(logprobs)] == 0).all()
    if rest == 0:
        full = np.isfinite(logprobs).any(axis=1)
        assert np.allclose(p[full].sum(axis=1), 1)


@settings(max_examples=30, deadline=None)
@given(rng=lists, rest=st.integers(1, 10**6))
def test_temperature_one_is_the_identity(rng, rest):
    logprobs = np.log(rng.dirichlet(np.ones(6), size=4)[:, :5])
    rest_U = np.full(4, rest)
    one = TemperatureCalibrator().probabilities(logprobs, rest_U)
    assert np.allclose(one, IdentityCalibrator().probabilities(logprobs, rest_U), atol=1e-8)


def test_whole_catalogue_in_the_list_and_float32_rounding():
    logprobs = np.log(np.array([[0.7, 0.2, 0.1]], dtype=np.float32)) + np.float32(1e-6)
    for rest in (0, 5):
        p = TemperatureCalibrator().probabilities(logprobs, np.array([rest]))
        assert p.tolist()[0] == pytest.approx([0.7, 0.2, 0.1], abs=1e-5)
    nll = target_nll(logprobs, np.array([1]), np.array([0]), 2.0)
    assert nll[0] == pytest.approx(-np.log(0.2**0.5 / (0.7**0.5 + 0.2**0.5 + 0.1**0.5)), abs=1e-5)


def test_empty_lists_give_zeros_and_extreme_values_stay_finite():
    p = TemperatureCalibrator().probabilities(np.full((2, 3), -np.inf), np.array([0, 10]))
    assert p.tolist() == [[0, 0, 0], [0, 0, 0]]
    cold = TemperatureCalibrator().load_state({"temperature": 0.05})
    p = cold.probabilities(np.array([[-1e-9, -900.0, -2000.0]]), np.array([12101]))
    assert np.isfinite(p).all() and p[0, 0] == pytest.approx(1)


def test_targets_that_were_filtered_out_do_not_move_the_fit():
    world = Simulator(2.0, users=500)
    alone = TemperatureCalibrator().fit(*world.arguments()).temperature
    logprobs = np.concatenate([world.logprobs_Uk, world.logprobs_Uk[:50]])
    rank = np.concatenate([world.rank_U, np.full(50, -1)])
    rest = np.concatenate([world.rest_U, np.zeros(50, int)])
    assert TemperatureCalibrator().fit(logprobs, rank, rest).temperature == pytest.approx(alone)


def test_few_hits_warn_and_many_do_not(caplog):
    world = Simulator(1.5, users=400)
    with caplog.at_level(logging.WARNING, logger="genrec"):
        TemperatureCalibrator().fit(*world.arguments())
        assert not caplog.records
        few = [a[:20] for a in world.arguments()]
        TemperatureCalibrator().fit(*few)
    assert "only" in caplog.text and "fewer than 50" in caplog.text and "Use more" in caplog.text


def test_scores_without_information_end_at_the_bound_with_a_warning(caplog):
    logprobs = np.log(np.tile([0.6, 0.3], (200, 1)))
    with caplog.at_level(logging.WARNING, logger="genrec"):
        fitted = TemperatureCalibrator().fit(logprobs, np.full(200, -1), np.full(200, 3))
    assert fitted.temperature == pytest.approx(20, rel=1e-3)
    assert "end of its range" in caplog.text and "hardly predict" in caplog.text


def test_scores_that_are_always_right_end_at_the_other_bound(caplog):
    logprobs = np.log(np.tile([0.6, 0.3], (200, 1)))
    with caplog.at_level(logging.WARNING, logger="genrec"):
        fitted = TemperatureCalibrator().fit(logprobs, np.zeros(200, int), np.full(200, 3))
    assert fitted.temperature == pytest.approx(0.05, rel=1e-3)
    assert "nearly every target first" in caplog.text and "hardly" not in caplog.text


def test_state_is_json_and_restores_the_same_probabilities():
    world = Simulator(2.0, users=300)
    fitted = TemperatureCalibrator().fit(*world.arguments())
    state = json.loads(json.dumps(fitted.state()))
    again = TemperatureCalibrator().load_state(state)
    args = (world.logprobs_Uk, world.rest_U)
    assert np.array_equal(fitted.probabilities(*args), again.probabilities(*args))


def test_registry_builds_every_calibrator_and_identity_is_exp():
    world = Simulator(2.0, users=100)
    for name, place in CALIBRATORS.items():
        cls = load_object(place)
        halves = ListContext(level_logprobs=np.stack([world.logprobs_Uk / 2] * 2, axis=2))
        calibrator = cls(cls.Config(name=name)).fit(*world.arguments(), halves)
        again = cls(cls.Config()).load_state(calibrator.state())
        args = (world.logprobs_Uk, world.rest_U, halves)
        assert np.array_equal(calibrator.probabilities(*args), again.probabilities(*args))
    identity = IdentityCalibrator().probabilities(world.logprobs_Uk, world.rest_U)
    assert np.array_equal(identity, np.exp(world.logprobs_Uk))


@pytest.mark.parametrize(
    ("logprobs", "rank", "rest", "message"),
    [
        ([[-1.0, np.nan]], [0], [1], "NaN or positive"),
        ([[5.0, 1.0]], [0], [1], "not raw scores"),
        ([[-1.0, -2.0]], [2], [1], "from -1"),
        ([[-1.0, -2.0]], [0, 1], [1], "target ranks of shape"),
        ([[-1.0, -np.inf]], [1], [1], "stands on padding"),
        ([[-1.0, -2.0]], [0], [-1], "negative number of rest items"),
        ([[-1.0, -2.0]], [-1], [0], "no user whose target"),
        ([-1.0, -2.0], [-1], [0], r"expected \(users, k\)"),
    ],
)
def test_bad_input_is_refused(logprobs, rank, rest, message):
    with pytest.raises(UserError, match=message):
        TemperatureCalibrator().fit(np.array(logprobs), np.array(rank), np.array(rest))


def test_bad_state_and_bad_range_are_refused():
    for state in ({}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match="expected a positive number"):
            TemperatureCalibrator().load_state(state)
    with pytest.raises(UserError, match="not below"):
        TemperatureCalibrator(TemperatureCalibrator.Config(min_temperature=30.0))


def test_simulated_bound_ignores_padding():
    world = Simulator(1.0, users=400)
    padded = np.concatenate([world.truth_Uk, np.zeros((400, 20))], axis=1)
    assert expected_ece(padded) == expected_ece(world.truth_Uk)
    assert len(reliability_bins(world.truth_Uk, hits_of(world.rank_U, 12))) > 10
