"""Platt, isotonic, beta and level temperatures: order, planted maps, states, bad input."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.calibration import CALIBRATORS
from genrec.calibration.base import Calibrator, ListContext
from genrec.calibration.levels import LevelTemperatureCalibrator
from genrec.calibration.maps import (
    BetaCalibrator,
    IsotonicCalibrator,
    PlattCalibrator,
    list_entropy,
    signed_logistic,
)
from genrec.calibration.scores import TemperatureCalibrator, target_nll
from genrec.config import load_yaml, parse_component
from genrec.errors import ConfigError, UserError
from genrec.evaluation.reliability import reliability
from genrec.runtime import load_object

ALL_FEATURES = ("rank", "list_entropy", "history_length")
NUM_LEVELS = 3


def make(name: str, **settings_: object) -> Calibrator:
    cls, config = parse_component(CALIBRATORS, {"name": name, **settings_}, path="calibration")
    return cls(config)


class World:
    """Users with a hit chance of `chance(logprob)` at each place; the model reports logprobs."""

    def __init__(self, chance, users: int = 4000, k: int = 10, rest: int = 200, seed: int = 0):
        rng = np.random.default_rng(seed)
        head = np.sort(rng.normal(size=(users, k)) * 1.2 + 1.5, axis=1)[:, ::-1]
        sharp = rng.uniform(0.6, 1.8, size=(users, 1))
        weights = np.exp(head * sharp)
        self.logprobs_Uk = np.log(weights / (weights.sum(1, keepdims=True) + rest * 0.2))
        self.truth_Uk = chance(self.logprobs_Uk)
        assert self.truth_Uk.sum(1).max() < 1
        drawn = (self.truth_Uk.cumsum(1) <= rng.random((users, 1))).sum(1)
        self.rank_U = np.where(drawn < k, drawn, -1)
        self.rest_U = np.full(users, rest)
        parts = rng.dirichlet(np.ones(NUM_LEVELS), size=(users, k))
        self.context = ListContext(rng.integers(1, 60, users), self.logprobs_Uk[..., None] * parts)

    def arguments(self):
        return self.logprobs_Uk, self.rank_U, self.rest_U, self.context

    def lists(self):
        return self.logprobs_Uk, self.rest_U, self.context


def logistic(a: float, b: float):
    return lambda s: 1 / (1 + np.exp(-(a * (s - np.log1p(-np.exp(s))) + b)))


def steps(s: np.ndarray) -> np.ndarray:
    return np.select([s < -5, s < -3.5, s < -2.5], [0.002, 0.01, 0.05], 0.09)


def test_platt_recovers_a_planted_logistic_map():
    found = PlattCalibrator().fit(*World(logistic(0.7, -0.9), users=20000).arguments())
    assert found.weights["logit"] == pytest.approx(0.7, abs=0.05)
    assert found.intercept == pytest.approx(-0.9, abs=0.1)


def test_beta_recovers_a_map_of_its_own_family():
    def chance(s):
        miss = np.log1p(-np.exp(s))
        return 1 / (1 + np.exp(-(0.8 * s - 1.0 * miss - 1.5)))

    world = World(chance, users=30000)
    found = BetaCalibrator().fit(*world.arguments())
    assert found.weights["logprob"] == pytest.approx(0.8, abs=0.06)
    other = World(chance, seed=1)
    got_Uk = found.probabilities(*other.lists())
    assert np.abs(got_Uk - other.truth_Uk).max() < 0.06


@pytest.mark.parametrize(
    ("name", "options", "chance"),
    [
        ("platt", {}, logistic(0.7, -0.9)),
        ("platt", {"score": "logprob", "features": list(ALL_FEATURES)}, logistic(0.8, -0.5)),
        ("beta", {}, logistic(0.7, -0.9)),
        ("isotonic", {}, steps),
    ],
)
def test_known_probabilities_have_an_ece_below_the_sampling_bound_on_other_users(
    name, options, chance
):
    found = make(name, **options).fit(*World(chance, users=12000, seed=1).arguments())
    other = World(chance, users=2000, seed=2)
    after = reliability(found.probabilities(*other.lists()), other.rank_U)
    before = reliability(np.exp(other.logprobs_Uk), other.rank_U)
    assert after["ece"] <= after["ece_bound"] < before["ece"]
    assert after["nll"] < before["nll"] and after["nll_list"] < before["nll_list"]
    low, high = after["actual_hits_ci"]
    assert low <= after["predicted_hits"] <= high
    assert not low <= before["predicted_hits"] <= high


rngs = st.integers(0, 2**31).map(np.random.default_rng)


def random_state(name: str, calibrator: Calibrator, rng: np.random.Generator) -> Calibrator:
    """Any state that `fit` could leave, also extreme ones."""
    if name == "temperature":
        return calibrator.load_state({"temperature": float(10 ** rng.uniform(-1.3, 1.3))})
    if name == "isotonic":
        count = int(rng.integers(1, 6))
        x, y = (
            np.sort(rng.uniform(-12, 0, count)),
            np.sort(rng.choice([0.0, 0.01, 0.3, 1.0], count)),
        )
        return calibrator.load_state({"logprobs": x.tolist(), "steps": y.tolist()})
    if name in ("platt", "beta"):
        signs = dict(zip(calibrator.input_names, calibrator.signs, strict=True))
        weights = {
            key: float((sign * abs(rng.normal()) if sign else rng.normal()) * rng.choice([0, 1, 5]))
            for key, sign in signs.items()
        }
        return calibrator.load_state({"weights": weights, "intercept": float(rng.normal() * 3)})
    return calibrator


@pytest.mark.parametrize("name", [n for n in CALIBRATORS if n != "level_temperature"])
@settings(max_examples=25, deadline=None)
@given(rng=rngs, rest=st.integers(0, 10**6))
def test_each_monotone_map_keeps_the_order_of_every_list(name, rng, rest):
    options = {"features": list(ALL_FEATURES)} if name == "platt" else {}
    calibrator = random_state(name, make(name, **options), rng)
    assert calibrator.keeps_order
    k = int(rng.integers(1, 9))
    drawn = rng.dirichlet(np.full(k + 1, rng.choice([0.05, 1.0, 30.0])), size=4)[:, :k]
    logprobs = (
        np.sort(np.log(np.maximum(drawn, 1e-26)))[:, ::-1].astype(np.float32).astype(np.float64)
    )
    logprobs[0, k // 2 :] = -np.inf
    context = ListContext(rng.integers(0, 1000, 4))
    p = calibrator.probabilities(logprobs, np.full(4, rest), context)
    assert np.isfinite(p).all() and (p >= 0).all() and (p.sum(axis=1) <= 1 + 1e-6).all()
    assert (np.diff(p, axis=1) <= 1e-15).all()
    assert (p[np.isneginf(logprobs)] == 0).all()


def test_isotonic_steps_do_not_tie_neighbours():
    world = World(steps, users=3000)
    found = IsotonicCalibrator().fit(*world.arguments())
    p = found.probabilities(*world.lists())
    different = np.diff(world.logprobs_Uk, axis=1) < -1e-9
    assert (np.diff(p, axis=1)[different] < 0).all()
    assert (p > 0).all()  # an impossible listed item would be taken for padding
    plain = np.interp(world.logprobs_Uk, found.logprobs, found.steps)
    assert np.abs(p - plain).max() <= 1e-6


def test_isotonic_is_scikit_learns_map():
    from sklearn.isotonic import IsotonicRegression

    world = World(steps, users=500)
    found = IsotonicCalibrator().fit(*world.arguments())
    hits = (world.rank_U[:, None] == np.arange(10)).astype(float)
    floor = 1 / (hits.size + 2)
    theirs = IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip")
    theirs.fit(world.logprobs_Uk.reshape(-1), hits.reshape(-1))
    x = np.linspace(-12, 0, 500)
    got = found._map(x[:, None])
    assert np.abs(got - theirs.predict(x)).max() <= 1e-6


def test_platt_is_the_smoothed_likelihoods_optimum():
    from scipy.optimize import minimize
    from scipy.special import expit

    world = World(logistic(0.7, -0.9), users=600)
    found = PlattCalibrator().fit(*world.arguments())
    s = world.logprobs_Uk.reshape(-1)
    x = s - np.log1p(-np.exp(s))
    hit = (world.rank_U[:, None] == np.arange(10)).reshape(-1)
    n = hit.sum()
    t = np.where(hit, (n + 1) / (n + 2), 1 / (len(hit) - n + 2))

    def loss(w):
        p = expit(w[0] * x + w[1])
        return -(t * np.log(p) + (1 - t) * np.log1p(-p)).mean()

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15})
    assert found.weights["logit"] == pytest.approx(best.x[0], abs=1e-3)
    assert found.intercept == pytest.approx(best.x[1], abs=2e-3)


def test_weights_of_the_wrong_sign_become_zero_and_the_rest_is_fitted_again():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2))
    hit = rng.random(4000) < 1 / (1 + np.exp(-(-1.5 * x[:, 0] + 0.8 * x[:, 1] - 1)))
    free, _ = signed_logistic(x, hit, (0, 0))
    assert free[0] < -1 and free[1] == pytest.approx(0.8, abs=0.15)
    bound, intercept = signed_logistic(x, hit, (1, 1))
    alone, intercept_alone = signed_logistic(x[:, 1:], hit, (1,))
    assert bound[0] == 0 and bound[1] == pytest.approx(alone[0])
    assert intercept == pytest.approx(intercept_alone)
    none, level = signed_logistic(x, hit, (1, -1))
    assert none.tolist() == [0, 0]
    smoothed = np.where(hit, (hit.sum() + 1) / (hit.sum() + 2), 1 / ((~hit).sum() + 2)).mean()
    assert 1 / (1 + math.exp(-level)) == pytest.approx(smoothed)


def test_scores_that_point_the_wrong_way_leave_a_constant_not_a_reversed_list():
    world = World(lambda s: np.where(s > -3, 0.002, 0.08), users=3000)
    for name in ("platt", "beta", "isotonic"):
        p = make(name).fit(*world.arguments()).probabilities(*world.lists())
        assert np.ptp(np.quantile(p, [0.001, 0.999])) < 1e-4, name
        assert (np.diff(p, axis=1) <= 0).all(), name
        # a cap may lower the sum of a list; none is reached here
        assert p.sum() == pytest.approx((world.rank_U >= 0).sum(), rel=0.02), name


@pytest.mark.parametrize("name", ["platt", "beta", "isotonic"])
def test_constant_scores_give_the_base_rate_and_a_warning(name, caplog):
    logprobs = np.full((400, 5), -4.0)
    rank = np.where(np.arange(400) % 4 == 0, np.arange(400) % 5, -1)
    with caplog.at_level(logging.WARNING, logger="genrec"):
        found = make(name).fit(logprobs, rank, np.full(400, 90))
    assert "all scores are equal" in caplog.text
    p = found.probabilities(logprobs, np.full(400, 90))
    assert p == pytest.approx(np.full((400, 5), 100 / 2000), rel=0.02)


@pytest.mark.parametrize("name", ["platt", "beta", "isotonic", "level_temperature", "temperature"])
def test_few_hits_warn_with_the_interval(name, caplog):
    world = World(logistic(0.7, -0.9), users=60)
    with caplog.at_level(logging.WARNING, logger="genrec"):
        make(name).fit(*world.arguments())
    hits = int((world.rank_U >= 0).sum())
    assert hits < 50 and f"only {hits} of 60 validation targets" in caplog.text
    assert "95% interval of the hit rate 0." in caplog.text


@pytest.mark.parametrize("name", ["platt", "beta", "isotonic"])
def test_no_hit_at_all_gives_small_finite_probabilities(name):
    world = World(logistic(0.7, -0.9), users=300)
    p = make(name).fit(world.logprobs_Uk, np.full(300, -1), world.rest_U)
    found = p.probabilities(*world.lists())
    assert (found > 0).all() and found.sum() < 3


def test_a_sum_above_one_is_scaled_to_one_and_nothing_else_is_touched():
    found = PlattCalibrator().load_state({"weights": {"logit": 0.0}, "intercept": 0.0})
    p = found.probabilities(np.log([[0.3, 0.2, 0.1], [0.3, -0.0 + 1e-9, 1e-9]]), np.array([5, 5]))
    assert p.sum(axis=1).tolist() == pytest.approx([1, 1])
    found.load_state({"weights": {"logit": 0.0}, "intercept": -2.0})
    assert found.probabilities(np.log([[0.3, 0.2, 0.1]]), np.array([5])).sum() < 1


def test_features_say_what_they_are():
    logprobs = np.log([[0.5, 0.25], [0.25, 0.25]])
    rest = np.array([1, 0])
    expected = [0.5 * np.log(2) + 2 * 0.25 * np.log(4), 0.5 * np.log(4)]
    assert list_entropy(logprobs, rest) == pytest.approx(expected)
    calibrator = make("platt", features=list(ALL_FEATURES))
    assert calibrator.input_names == ("logit", *ALL_FEATURES)
    inputs = calibrator._inputs(logprobs, rest, ListContext(np.array([3, 9])))
    assert inputs[:, 1] == pytest.approx([0, np.log(2)] * 2)
    assert inputs[:, 2] == pytest.approx(np.repeat(expected, 2))
    assert inputs[:, 3] == pytest.approx(np.log([4, 4, 10, 10]))
    assert make("platt").needs == () and calibrator.needs == ("history_lengths",)


def test_history_length_matters_where_it_does():
    world = World(logistic(0.7, -0.9), users=8000)
    short = world.context.history_lengths < 30
    rank = np.where(short & (np.random.default_rng(0).random(8000) < 0.6), -1, world.rank_U)
    found = make("platt", features=["history_length"]).fit(
        world.logprobs_Uk, rank, world.rest_U, world.context
    )
    p = found.probabilities(*world.lists()).sum(1)
    for group in (short, ~short):
        assert p[group].sum() == pytest.approx((rank[group] >= 0).sum(), rel=0.3)
    plain = (
        make("platt")
        .fit(world.logprobs_Uk, rank, world.rest_U)
        .probabilities(world.logprobs_Uk, world.rest_U)
    )
    assert plain[short].sum() > 1.3 * (rank[short] >= 0).sum()


# Temperatures of levels.


class LevelWorld:
    """Next item ~ exp(sum_l S_l / T_l) over a list that is the whole catalogue."""

    def __init__(self, temperatures, users=4000, k=30, seed=0):
        rng = np.random.default_rng(seed)
        raw = -rng.gamma(2.0, 1.0, size=(users, k, len(temperatures)))
        total = raw.sum(2)
        raw[..., 0] -= np.log(np.exp(total).sum(1))[:, None]  # levels add up to probabilities
        order = np.argsort(-raw.sum(2), axis=1)
        self.levels = np.take_along_axis(raw, order[..., None], axis=1)
        self.logprobs = self.levels.sum(2)
        weights = np.exp((self.levels / np.array(temperatures)).sum(2))
        self.truth = weights / weights.sum(1, keepdims=True)
        self.rank = (self.truth.cumsum(1) < rng.random((users, 1))).sum(1).clip(max=k - 1)
        self.context = ListContext(None, self.levels)
        self.rest = np.zeros(users, dtype=int)


def test_planted_level_temperatures_are_recovered_and_beat_one_temperature():
    world = LevelWorld([0.7, 2.0])
    found = LevelTemperatureCalibrator().fit(world.logprobs, world.rank, world.rest, world.context)
    assert found.temperatures == pytest.approx((0.7, 2.0), rel=0.1)
    other = LevelWorld([0.7, 2.0], users=1500, seed=1)
    p = found.probabilities(other.logprobs, other.rest, other.context)
    assert np.abs(p - other.truth).max() < 0.05
    after = reliability(p, other.rank)
    assert after["ece"] <= after["ece_bound"]
    one = TemperatureCalibrator().fit(world.logprobs, world.rank, world.rest)
    assert (
        reliability(one.probabilities(other.logprobs, other.rest), other.rank)["nll"] > after["nll"]
    )
    assert not found.keeps_order
    assert (np.diff(p, axis=1) > 0).any()  # so it says


def test_equal_level_temperatures_are_the_one_temperature():
    world = World(logistic(0.7, -0.9), users=200)
    same = LevelTemperatureCalibrator().load_state({"temperatures": [1.7] * NUM_LEVELS})
    one = TemperatureCalibrator().load_state({"temperature": 1.7})
    assert np.allclose(same.probabilities(*world.lists()), one.probabilities(*world.lists()))


def test_levels_fit_no_worse_than_one_temperature_and_certain_levels_keep_one():
    world = World(logistic(0.5, -1.6), users=800)
    levels = np.concatenate([world.context.level_logprobs, np.zeros((800, 10, 1))], axis=2)
    context = ListContext(None, levels)
    found = LevelTemperatureCalibrator().fit(world.logprobs_Uk, world.rank_U, world.rest_U, context)
    assert found.temperatures[-1] == 1.0
    p = found.probabilities(world.logprobs_Uk, world.rest_U, context)
    none = (1 - p.sum(1)) / world.rest_U
    listed = p[np.arange(800), np.maximum(world.rank_U, 0)]
    nll = -np.log(np.where(world.rank_U >= 0, listed, none)).mean()
    one = TemperatureCalibrator().fit(world.logprobs_Uk, world.rank_U, world.rest_U)
    best = target_nll(world.logprobs_Uk, world.rank_U, world.rest_U, one.temperature).mean()
    assert nll <= best + 1e-6


def test_levels_with_padding_and_without_a_rest_are_distributions():
    levels = np.log([[[0.5, 0.8], [0.5, 0.2], [9.0, 9.0]]])
    logprobs = levels.sum(2)
    logprobs[0, 2] = -np.inf
    found = LevelTemperatureCalibrator().load_state({"temperatures": [2.0, 0.5]})
    for rest in (0, 7):
        p = found.probabilities(logprobs, np.array([rest]), ListContext(None, levels))
        assert p[0, 2] == 0 and np.isfinite(p).all()
        assert p.sum() == pytest.approx(1) if rest == 0 else p.sum() < 1


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "got no level_logprobs"),
        (ListContext(None, np.zeros((1, 3, 2))), "expected it to begin with"),
        (ListContext(None, np.zeros((1, 2, 0))), "users, k, levels"),
        (ListContext(None, np.full((1, 2, 2), np.nan)), "no NaN"),
        (ListContext(None, np.full((1, 2, 2), -9.0)), "miss their log-probabilities by up to 17"),
    ],
)
def test_levels_that_do_not_fit_are_refused(context, message):
    with pytest.raises(UserError, match=message):
        LevelTemperatureCalibrator().fit(
            np.array([[-1.0, -2.0]]), np.array([0]), np.array([3]), context
        )


# States and bad input.


@pytest.mark.parametrize("name", list(CALIBRATORS))
def test_states_are_json_and_restore_the_same_probabilities(name):
    options = {"features": list(ALL_FEATURES)} if name == "platt" else {}
    world = World(logistic(0.7, -0.9), users=400)
    fitted = make(name, **options).fit(*world.arguments())
    state = json.loads(json.dumps(fitted.state(), allow_nan=False))
    again = make(name, **options).load_state(state)
    assert np.array_equal(fitted.probabilities(*world.lists()), again.probabilities(*world.lists()))
    assert again.state() == fitted.state()


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("platt", {}, "weights of None, expected"),
        ("platt", {"weights": {"logprob": 1.0}, "intercept": 0.0}, r"\['logit'\]"),
        ("platt", {"weights": {"logit": "a"}, "intercept": 0.0}, "logit 'a'"),
        ("beta", {"weights": {"logprob": 1.0, "minus_log_miss": 0.0}}, "intercept None"),
        ("isotonic", {}, "no rising step function"),
        ("isotonic", {"logprobs": [-1.0], "steps": [0.1, 0.2]}, "no rising step function"),
        ("isotonic", {"logprobs": [-2.0, -1.0], "steps": [0.3, 0.2]}, "no rising step function"),
        ("isotonic", {"logprobs": ["x"], "steps": [0.1]}, "no rising step function"),
        ("level_temperature", {}, "temperatures None"),
        ("level_temperature", {"temperatures": [1.0, -2.0]}, "expected positive numbers"),
    ],
)
def test_damaged_states_are_refused(name, state, message):
    with pytest.raises(UserError, match=message):
        make(name).load_state(state)


@pytest.mark.parametrize("name", ["platt", "beta", "isotonic"])
def test_bad_input_is_refused(name):
    for logprobs, rank, rest, message in [
        ([[-1.0, np.nan]], [0], [1], "NaN or positive"),
        ([[-1.0, -2.0]], [2], [1], "from -1"),
        ([[-1.0, -2.0]], [-2], [1], "Leave out users without a target"),
        ([[-np.inf, -np.inf]], [-1], [1], "no listed item"),
    ]:
        with pytest.raises(UserError, match=message):
            make(name).fit(np.array(logprobs), np.array(rank), np.array(rest))
    with pytest.raises(UserError, match="no history_lengths"):
        make("platt", features=["history_length"]).fit(
            np.array([[-1.0]]), np.array([0]), np.array([1])
        )


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="features"):
        make("platt", features=["age"])
    with pytest.raises(ConfigError, match="recent_share"):
        make("beta", recent_share=0.0)
    with pytest.raises(UserError, match="not below"):
        make("level_temperature", min_temperature=30.0)


def test_every_calibrator_has_a_file_with_all_settings_at_their_defaults(root):
    files = {path.stem: path for path in (root / "configs" / "calibration").glob("*.yaml")}
    assert set(files) == set(CALIBRATORS)
    for name, path in files.items():
        section = load_yaml(path)["calibration"]
        default = load_object(CALIBRATORS[name]).Config()
        assert section == default.to_dict(), name
        assert path.read_text(encoding="utf-8").startswith("# ")
