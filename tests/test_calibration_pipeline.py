"""Calibration in the pipeline: periods, strength, refusals, every calibrator in a bundle."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from genrec import Recommender
from genrec.artifacts import load_artifact
from genrec.bundle import load_calibration, save_bundle
from genrec.calibration import CALIBRATORS
from genrec.calibration.base import ListContext
from genrec.calibration.scores import TemperatureCalibrator
from genrec.calibration.strength import preference_strength
from genrec.config import parse_component
from genrec.data import Dataset
from genrec.errors import DataError, MismatchError, UserError
from genrec.inference import RankedLists
from genrec.item_index import ItemIndex
from genrec.pipeline import calibrating, calibration_figures, scored_lists
from genrec.pipeline.config import load_run_config
from genrec.pipeline.run import Run
from genrec.pipeline.scored_lists import Scored


def simulated(temperature_U: np.ndarray, seed: int = 0, k: int = 10, items: int = 60) -> Scored:
    """Users whose next item follows softmax(x / T) while the model reports softmax(x)."""
    rng = np.random.default_rng(seed)
    users = len(temperature_U)
    x = np.sort(rng.normal(size=(users, items)) * rng.uniform(0.2, 2.5, (users, 1)))[:, ::-1]
    x[:, k:] = x[:, k:].mean(1, keepdims=True)  # an even tail, as calibrators suppose
    x = -np.sort(-x, axis=1)

    def softmax(values: np.ndarray) -> np.ndarray:
        weights = np.exp(values - values.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    truth = softmax(x / temperature_U[:, None])
    drawn = (truth.cumsum(1) < rng.random((users, 1))).sum(1).clip(max=items - 1)
    rows = np.tile(np.arange(k), (users, 1))
    lists = RankedLists(
        rows, np.log(softmax(x))[:, :k], np.ones(users, bool), np.full(users, items)
    )
    rank = np.where(drawn < k, drawn, -1)
    return Scored(lists, rank, np.arange(users) + 1, ListContext(np.ones(users)), drawn)


def test_a_calibrator_holds_in_the_next_period_only_if_nothing_changed():
    steady = simulated(np.full(6000, 1.8))
    halves = scored_lists.equal_periods(steady.time_U, 2)
    (line,) = calibrating.over_periods(TemperatureCalibrator, steady, halves)
    assert line["ece"] <= line["ece_bound"]
    assert line["actual_hits_ci"][0] <= line["predicted_hits"] <= line["actual_hits_ci"][1]
    assert line["num_fitted"] == line["num_users"] == 3000
    assert line["fitted_on"]["last"] <= line["measured_on"]["first"]

    drifting = simulated(np.where(np.arange(6000) < 3000, 1.0, 4.0))
    (line,) = calibrating.over_periods(TemperatureCalibrator, drifting, halves)
    assert line["ece"] > line["ece_bound"]
    assert line["predicted_hits"] > line["actual_hits_ci"][1]


def test_other_users_of_one_period_do_not_show_what_a_later_period_does():
    drifting = simulated(np.where(np.arange(6000) < 3000, 1.0, 4.0))
    held_out = calibrating.other_users(TemperatureCalibrator, drifting, np.arange(3000))
    assert held_out is not None and held_out["ece"] <= held_out["ece_bound"]
    assert "bins" not in held_out and held_out["num_users"] == 3000
    assert calibrating.other_users(TemperatureCalibrator, drifting, np.arange(3)) is None


def test_recent_users_follow_the_newest_period():
    world = simulated(np.where(np.arange(8000) < 4000, 1.0, 3.0))
    everyone = world.fit(TemperatureCalibrator, calibrating.most_recent(world.time_U, 1.0))
    recent = world.fit(TemperatureCalibrator, calibrating.most_recent(world.time_U, 0.5))
    assert recent.state()["temperature"] == pytest.approx(3.0, rel=0.15)
    assert everyone.state()["temperature"] < 2.6


def test_auto_follows_the_newest_period_where_that_foretells_better():
    drifting = simulated(np.where(np.arange(8000) < 3500, 1.0, 4.0))
    share, lines = calibrating.choose_share(TemperatureCalibrator, drifting, "auto")
    assert share == 0.25 and [line["share"] for line in lines] == [1.0, 0.5, 0.25]
    assert [line["num_fitted"] for line in lines] == [6000, 4000, 2000]
    assert {line["num_users"] for line in lines} == {2000}  # the last quarter
    assert lines[2]["nll_list"] < lines[0]["nll_list"]
    low, high = lines[2]["actual_hits_ci"]
    assert low <= lines[2]["predicted_hits"] <= high
    assert calibrating.choose_share(TemperatureCalibrator, drifting, 0.3) == (0.3, [])


def test_auto_takes_everyone_without_times_or_with_few_hits():
    world = simulated(np.ones(2000))
    assert calibrating.choose_share(
        TemperatureCalibrator, replace(world, time_U=np.zeros(2000, int)), "auto"
    ) == (1.0, [])
    few = simulated(np.ones(120))
    assert calibrating.choose_share(TemperatureCalibrator, few, "auto") == (1.0, [])


def test_recent_users_are_chosen_by_time_and_ties_stay_together():
    times = np.array([5, 1, 9, 9, 9, 2])
    assert calibrating.most_recent(times, 1.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert calibrating.most_recent(times, 0.2).tolist() == [2, 3, 4]
    assert calibrating.most_recent(times, 0.7).tolist() == [0, 2, 3, 4]
    with pytest.raises(DataError, match="have the same time"):
        calibrating.most_recent(np.zeros(4), 0.5)


def test_periods_are_days_and_ties_share_one():
    assert scored_lists.period(np.array([86400, 3 * 86400, 10 * 86400])) == {
        "first": "1970-01-02",
        "median": "1970-01-04",
        "last": "1970-01-11",
    }
    assert scored_lists.period(np.zeros(3)) is None and scored_lists.period(np.empty(0)) is None
    assert scored_lists.equal_periods(np.array([1, 2, 3, 4]), 2).tolist() == [0, 0, 1, 1]
    assert len(set(scored_lists.equal_periods(np.array([7, 7, 7, 8]), 4))) <= 2
    with pytest.raises(UserError, match="got 1 with users, expected at least 2"):
        calibrating.over_periods(TemperatureCalibrator, simulated(np.ones(9)), np.zeros(9, int))


# Preference strength.


def test_strength_ranks_users_by_how_predictable_they_truly_are():
    world = simulated(np.full(4000, 2.0))
    everyone = np.arange(4000)
    fitted = world.fit(TemperatureCalibrator, everyone)
    p = world.probabilities(fitted, everyone, 10)
    strength = preference_strength(p, world.lists.num_rest)
    truth = np.exp(world.lists.logprobs / 2)
    rest = 50 * ((1 - np.exp(world.lists.logprobs).sum(1)) / 50) ** 0.5
    truth, rest = truth / (truth.sum(1) + rest)[:, None], rest / (truth.sum(1) + rest)
    true_entropy = -(truth * np.log(truth)).sum(1) - rest * np.log(rest / 50)
    assert spearmanr(strength, -true_entropy).statistic > 0.99
    # What strength promises: the mean surprise of users of strength s is (1 - s) log n.
    none = (1 - p.sum(1)) / 50
    found = np.where(world.rank_U >= 0, p[everyone, np.maximum(world.rank_U, 0)], none)
    for group in np.array_split(np.argsort(strength), 4):
        promised = (1 - strength[group].mean()) * np.log(60)
        assert -np.log(found[group]).mean() == pytest.approx(promised, abs=0.12)


def test_strength_of_known_lists():
    assert preference_strength(np.array([[0.25, 0.25]]), np.array([2])) == pytest.approx([0.0])
    assert preference_strength(np.array([[1.0, 0.0]]), np.array([9])) == pytest.approx([1.0])
    assert preference_strength(np.array([[1.0]]), np.array([0])) == pytest.approx([1.0])
    assert preference_strength(np.array([[0.0, 0.0]]), np.array([0])) == pytest.approx([0.0])
    half = 1 - (0.5 * np.log(2) + 0.5 * np.log(6)) / np.log(4)
    assert preference_strength(np.array([[0.5]]), np.array([3])) == pytest.approx([half])
    cut = preference_strength(np.array([[0.5, 0.3, 0.1]]), np.array([100]))
    assert 0 < cut[0] < 1


# The pipeline.


@pytest.fixture(scope="module")
def run(small_config: Path, small_cache: Path, tmp_path_factory) -> Run:
    config = load_run_config(small_config)
    return Run(config, out=tmp_path_factory.mktemp("out"), cache=small_cache, device="cpu")


@pytest.fixture(scope="module")
def parts(run: Run, small_run: Path):
    """The data set and the artifacts of the small run, all from its cache."""
    dataset = run.dataset()
    catalog = run.embed(dataset)
    _, index_artifact = run.tokenize(dataset, catalog, 1)
    index = ItemIndex.load(index_artifact.path)
    model = run.train(dataset, index, 1)
    lists = {
        (split, masked): run.lists(dataset, index, model, split, masked, 1)
        for split in ("valid", "test")
        for masked in (True, False)
    }
    return dataset, index, model, lists


@pytest.mark.parametrize("masked", [True, False])
def test_levels_add_up_to_the_scores_of_masked_lists_too(parts, tmp_path, masked):
    dataset, index, model, lists = parts
    found = lists["test", masked]
    calibrating.score_levels(tmp_path / "levels", dataset, index, model, found)
    levels = load_artifact(tmp_path / "levels", kind="levels")
    real = found.arrays["rows"] >= 0
    assert levels.arrays["levels"].shape == (*real.shape, index.num_levels)
    summed = levels.arrays["levels"].sum(2)
    np.testing.assert_allclose(summed[real], found.arrays["logprobs"][real], atol=1e-4)
    with pytest.raises(MismatchError):
        scored_lists.read_scored(lists["valid", masked], dataset, levels)


@pytest.mark.parametrize("name", list(CALIBRATORS))
def test_every_calibrator_runs_is_saved_measured_and_answers(
    name, parts, small_config, small_cache, small_run, tmp_path
):
    dataset, index, model, lists = parts
    overrides = [f"calibration.name={name}"]
    if name == "platt":
        overrides.append("calibration.features=[rank, list_entropy, history_length]")
    config = load_run_config(small_config, overrides)
    run = Run(config, out=tmp_path / "out", cache=small_cache, device="cpu")
    valid = {"masked": lists["valid", True], "unmasked": lists["valid", False]}
    test = {"masked": lists["test", True], "unmasked": lists["test", False]}
    calibration = run.calibrate(dataset, index, model, valid, 1)
    levels = run.levels(dataset, index, model, test, 1)
    assert set(levels) == (set(test) if name == "level_temperature" else set())
    for mode, found in test.items():
        measured = calibration_figures.measure_calibration(
            calibration, mode, found, dataset, levels.get(mode)
        )
        assert measured["name"] == name and measured["fitted"]["split"] == "valid"
        assert measured["fitted"]["other_users"]["num_users"] == 184
        assert (measured["rising"] == 0) or name == "level_temperature"
        low, high = measured["nll_difference_ci"]
        assert low <= measured["nll_difference"] <= high
        assert set(measured["groups"]) == {
            "history_length",
            "target_popularity",
            "item_popularity",
        }
        for lines in measured["groups"].values():
            total = sum(line["predicted_hits"] for line in lines)
            assert total == pytest.approx(measured["predicted_hits_after"])
    rebuilt = tmp_path / "rebuilt"
    save_bundle(
        rebuilt,
        catalog=dataset.catalog,
        index=small_run / "bundle" / "index",
        tokenizer=None,
        model=small_run / "bundle" / "model",
        calibration=calibration.path,
    )
    recommender = Recommender.from_pretrained(rebuilt, device="cpu")
    examples = dataset.interactions.examples("test")
    ids = dataset.catalog.item_ids
    users = [0, 5, 100]
    histories = [[ids[row] for row in examples.history(u)] for u in users]
    answer = recommender.recommend(histories, k=5)
    scored = scored_lists.read_scored(test["masked"], dataset, levels.get("masked"))
    calibrator = load_calibration(calibration.path)[0]["masked"]
    expected = scored.probabilities(calibrator, np.array(users), 5)
    np.testing.assert_allclose(answer.probabilities, expected, atol=2e-4)
    np.testing.assert_allclose(answer.expected_hits, answer.probabilities.sum(1))
    assert ((answer.preference_strength >= 0) & (answer.preference_strength <= 1)).all()
    more = recommender.recommend(histories, k=9)
    np.testing.assert_allclose(answer.preference_strength, more.preference_strength)
    assert (more.expected_hits >= answer.expected_hits).all()


def test_itemwise_maps_warn_where_they_do_not_hold(parts, small_run, caplog):
    dataset, *_ = parts
    recommender = Recommender.from_pretrained(small_run / "bundle", device="cpu")
    cls, config = parse_component(CALIBRATORS, {"name": "platt"}, path="calibration")
    ids = dataset.catalog.item_ids
    with caplog.at_level(logging.WARNING, logger="genrec"):
        recommender.recommend([ids[:3]], k=2, candidates=ids[10:20])
        assert not caplog.records
        recommender.calibrators["masked"] = cls(config)
        recommender.recommend([ids[:3]], k=2)
        assert not caplog.records
        recommender.recommend([ids[:3]], k=2, candidates=ids[10:20])
    assert "do not hold among candidates" in caplog.text


def test_measuring_on_the_fitted_split_is_refused(run: Run, parts):
    dataset, index, model, lists = parts
    valid = {"masked": lists["valid", True], "unmasked": lists["valid", False]}
    calibration = run.calibrate(dataset, index, model, valid, 1)
    with pytest.raises(MismatchError, match="fitted on the valid split") as error:
        calibration_figures.measure_calibration(
            calibration, "masked", lists["valid", True], dataset
        )
    assert lists["valid", True].fingerprint in str(error.value)


def test_times_and_lengths_are_those_of_the_examples(parts):
    dataset: Dataset = parts[0]
    interactions = dataset.interactions
    for split in ("valid", "test"):
        examples = interactions.examples(split)
        times, lengths = scored_lists.target_times(interactions, split)
        assert lengths[examples.user_rows].tolist() == examples.lengths.tolist()
        for example in (0, 7):
            place = interactions.offsets[examples.user_rows[example]] + examples.lengths[example]
            assert times[examples.user_rows[example]] == interactions.timestamps[place]
