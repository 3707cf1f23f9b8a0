"""Recent popularity, EASE, content-kNN and SASRec against formulas; choices, refusals, command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from genrec.artifacts import save_artifact
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.splits import leave_one_out
from genrec.data.synthetic import ring
from genrec.errors import ConfigError, UserError
from genrec.features import sasrec
from genrec.models.baselines import (
    BASELINES,
    COUNTING,
    TIE_BREAK,
    Baseline,
    MostPopular,
    RecentPopular,
    label,
    linear,
    make_baselines,
)
from genrec.models.baselines.content import ContentKNN
from genrec.models.baselines.linear import EASE
from genrec.pipeline.config import check_run_config

DAY = 86_400
HISTORIES = [np.array([1, 2, 3]), np.array([0]), np.array([5, 5]), np.array([], dtype=np.int64)]


def make(**choice: object) -> Baseline:
    (made,) = make_baselines([choice]).values()
    return made


def world(seed: int = 0, users: int = 30, items: int = 12, *, timed: bool = True) -> Interactions:
    """Training interactions only, of 3 to 8 items a user, days apart."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 9, users))])
    rows = rng.integers(0, items, offsets[-1]).astype(np.int32)
    times = np.concatenate(
        [np.sort(rng.integers(1, 200 * DAY, n)) for n in np.diff(offsets).tolist()]
    )
    splits = np.zeros(len(rows), np.uint8)
    return Interactions(rows, offsets, times if timed else 0 * times, splits, items)


def share(training: Interactions) -> np.ndarray:
    return TIE_BREAK * training.counts() / len(training)


# -- recent popularity --------------------------------------------------------------------------


def test_recent_popularity_by_time_is_its_formula():
    training = world()
    expected = np.zeros(12)
    for item, time in zip(training.item_rows, training.timestamps, strict=True):
        age = (training.timestamps.max() - time) / DAY
        expected[item] += 0.5 ** (age / 10)
    scores = make(name="recent_popular", half_life_days=10).fit(training).scores(HISTORIES)
    assert scores == pytest.approx(np.tile(expected, (4, 1)))


def test_recent_popularity_by_order_counts_the_users_later_interactions():
    training = world(timed=False)
    expected = np.zeros(12)
    for user in range(training.num_users):
        for age, item in enumerate(training.user(user)[::-1]):
            expected[item] += 0.5 ** (age / 2)
    by_order = make(name="recent_popular", clock="order", half_life_places=2)
    assert by_order.fit(training).scores([HISTORIES[0]])[0] == pytest.approx(expected)
    without_times = make(name="recent_popular", half_life_places=2).fit(training)
    assert without_times.scores([HISTORIES[0]])[0] == pytest.approx(expected)
    timed = make(name="recent_popular", clock="order", half_life_places=2).fit(world())
    assert timed.scores([HISTORIES[0]])[0] == pytest.approx(expected)


@pytest.mark.parametrize("timed", [True, False])
def test_half_lives_go_from_the_newest_item_to_most_popular(timed):
    training = world(timed=timed)
    counts = training.counts()

    def fitted(half_life: float | None) -> np.ndarray:
        settings = {"half_life_days": half_life, "half_life_places": half_life}
        return make(name="recent_popular", **settings).fit(training).scores(HISTORIES[:1])[0]

    assert np.array_equal(fitted(None), counts)
    assert np.array_equal(fitted(None), MostPopular().fit(training).scores(HISTORIES[:1])[0])
    assert fitted(1e9) == pytest.approx(counts, rel=1e-6)
    if timed:
        newest = training.timestamps == training.timestamps.max()
        last = np.bincount(training.item_rows[newest], minlength=12)
    else:
        last = np.bincount(training.item_rows[training.offsets[1:] - 1], minlength=12)
    assert fitted(1e-6) == pytest.approx(last)


def test_recent_popularity_refuses_a_clock_without_times():
    with pytest.raises(UserError, match="needs timestamps, and the data set has none"):
        make(name="recent_popular", clock="time").fit(world(timed=False))
    with pytest.raises(ConfigError, match=r"x\[0\]\.half_life_days: got 0"):
        make_baselines([{"name": "recent_popular", "half_life_days": 0}], path="x")


# -- EASE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("block", [5, 2048])
def test_ease_is_the_plain_formula_with_a_zero_diagonal(precision, block, monkeypatch):
    monkeypatch.setattr(linear, "_BLOCK", block)
    training = world(seed=3)
    X = np.zeros((training.num_users, 12))
    X[training.user_rows, training.item_rows] = 1.0
    P = np.linalg.inv(X.T @ X + 2.5 * np.eye(12))
    B = P / -np.diag(P)
    np.fill_diagonal(B, 0.0)
    model = EASE(EASE.Config(regularization=2.5, precision=precision)).fit(training)
    close = {"rel": 1e-10, "abs": 1e-12} if precision == "float64" else {"rel": 1e-3, "abs": 1e-5}
    assert not model._weights_NN.diagonal().any()
    for history, row in zip(HISTORIES, model.scores(HISTORIES), strict=True):
        had = np.isin(np.arange(12), history).astype(float)
        assert row == pytest.approx(had @ B + share(training), **close)


def test_ease_minimises_the_error_of_the_columns_it_predicts():
    """Each column of the weights is scikit-learn's ridge on the other items."""
    from sklearn.linear_model import Ridge

    training = world(seed=4)
    X = np.zeros((training.num_users, 12))
    X[training.user_rows, training.item_rows] = 1.0
    model = EASE(EASE.Config(regularization=3.0, precision="float64")).fit(training)
    for item in (0, 7):
        others = np.arange(12) != item
        ridge = Ridge(alpha=3.0, fit_intercept=False).fit(X[:, others], X[:, item])
        assert model._weights_NN[others, item] == pytest.approx(ridge.coef_, abs=1e-9)


def test_ease_reads_the_last_items_where_told_and_empty_histories_by_popularity():
    training = world()
    model = make(name="ease", history_length=2).fit(training)
    longer, recent = model.scores([np.array([7, 8, 1, 2]), np.array([1, 2])])
    assert np.array_equal(longer, recent)
    assert model.scores([np.array([], dtype=int)])[0] == pytest.approx(share(training))


def test_ease_refuses_catalogues_beyond_its_limit_and_names_the_memory():
    training = world()
    huge = Interactions(
        training.item_rows, training.offsets, training.timestamps, training.splits, 200_000
    )
    with pytest.raises(
        UserError, match=r"got 200,000 items, expected at most 25,000 .*160\.0 GB in float32"
    ):
        make(name="ease").fit(huge)
    with pytest.raises(UserError, match=r"expected at most 11 .*max_items"):
        make(name="ease", max_items=11).fit(training)
    with pytest.raises(UserError, match=r"not positive definite.*Raise regularization"):
        linear._inverse(np.asfortranarray(-np.eye(3)))


# -- content-kNN ----------------------------------------------------------------------------------


def test_content_knn_is_brute_force_over_the_last_items():
    training, rng = world(), np.random.default_rng(1)
    vectors = rng.standard_normal((12, 4)).astype(np.float32)
    vectors[4] = 0.0
    vectors[6] *= 1e30  # only the direction matters
    model = make(name="content_knn", history_length=2).fit(training, Catalog.from_vectors(vectors))

    def cosine(i: int, j: int) -> float:
        if i == j or 4 in (i, j):
            return 0.0
        a, b = vectors[i].astype(np.float64), vectors[j].astype(np.float64)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    histories = [*HISTORIES, np.array([9, 4, 6])]
    for history, row in zip(histories, model.scores(histories), strict=True):
        expected = [sum(cosine(h, i) for h in history[-2:].tolist()) for i in range(12)]
        assert row == pytest.approx(np.array(expected) + share(training), abs=2e-6)


def test_content_knn_refuses_missing_short_and_broken_vectors():
    training = world()
    with pytest.raises(UserError, match=r"needs item vectors.*--vectors"):
        ContentKNN().fit(training)
    bare = Catalog(pl.DataFrame({"item_id": [str(i) for i in range(12)]}))
    with pytest.raises(UserError, match="the catalogue has none"):
        ContentKNN().fit(training, bare)
    with pytest.raises(UserError, match="got 11 vectors for 12 items"):
        ContentKNN().fit(training, Catalog.from_vectors(np.ones((11, 2))))
    broken = np.ones((12, 2))
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match=r"vectors of 1 items hold NaN or infinity, e\.g\. row 3"):
        ContentKNN().fit(training, Catalog.from_vectors(broken))
    unfitted = ContentKNN()
    with pytest.raises(UserError):
        unfitted.fit(training)
    with pytest.raises(UserError, match="not fitted"):
        unfitted.scores(HISTORIES)


# -- SASRec ---------------------------------------------------------------------------------------


def test_sasrec_as_a_baseline_is_the_sequence_model_with_its_settings():
    events = ring(num_items=12, num_users=30, length=8).interactions
    training, valid = events.training(), events.examples("valid")
    found = []
    for loss in ("bce", "sampled_softmax", "softmax"):
        settings = {"loss": loss, "epochs": 1, "d_model": 8, "num_layers": 1, "seed": 3}
        settings |= {"num_negatives": 4} if loss == "sampled_softmax" else {}
        model = make(name="sasrec", **settings).fit(training, validation=valid)
        found.append(model.scores(HISTORIES[:3]))
        alone = sasrec.SASRec(sasrec.SASRecConfig(**settings)).fit(training, valid)
        assert np.array_equal(found[-1], alone.scores(HISTORIES[:3]))
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])


def test_sasrec_trains_on_every_training_interaction_where_validation_stops_it():
    data = ring(num_items=12, num_users=30, length=8)
    training, valid = data.interactions.training(), data.interactions.examples("valid")

    def scores(**given: object) -> np.ndarray:
        model = make(name="sasrec", epochs=1, d_model=8, num_layers=1)
        return model.fit(training, **given).scores(HISTORIES[:3])

    assert np.array_equal(scores(validation=valid), scores(validation=valid))
    assert not np.array_equal(scores(validation=valid), scores())


# -- choices --------------------------------------------------------------------------------------


def test_choices_have_labels_settings_and_an_order():
    strong = {"name": "ease", "regularization": 500}
    made = make_baselines(["markov", "ease", strong, {"name": "most_popular"}])
    assert list(made) == ["markov", "ease", "ease(regularization=500)", "most_popular"]
    assert made["ease(regularization=500)"].config.regularization == 500
    assert label(strong) == "ease(regularization=500)"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["eas"], r"evaluation\.baselines\[0\]\.name: got 'eas'.*ease"),
        ([{"regularization": 3}], r"evaluation\.baselines\[0\]\.name: missing"),
        ([{"name": "ease", "lambda": 3}], r"evaluation\.baselines\[0\]\.lambda"),
        ([{"name": "ease", "regularization": -1}], r"regularization: got -1"),
        (["ease", "ease"], r"got 'ease' twice"),
        ([7], r"evaluation\.baselines"),
    ],
)
def test_a_configuration_with_a_wrong_choice_is_refused_before_anything_runs(choices, message):
    with pytest.raises(ConfigError, match=message):
        check_run_config({"data": "somewhere", "evaluation": {"baselines": choices}})


def test_a_configuration_names_baselines_with_settings_and_survives_a_round_trip():
    choices = ["most_popular", {"name": "ease", "regularization": 500}]
    config = check_run_config({"data": "somewhere", "evaluation": {"baselines": choices}})
    assert config.evaluation.to_dict()["baselines"] == choices
    assert check_run_config(config.to_dict()) == config


def test_the_counting_baselines_are_the_default_everywhere():
    assert check_run_config({"data": "x"}).evaluation.baselines == COUNTING
    assert set(COUNTING) < set(BASELINES)


# -- command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A data set of 20 items in a ring, and vectors along a circle."""
    sequences = [[(start + i) % 20 for i in range(6)] for start in range(20)] * 3
    offsets = np.arange(len(sequences) + 1) * 6
    rows = np.array(sequences, dtype=np.int32).reshape(-1)
    times = np.tile(np.arange(1, 7), len(sequences))
    events = Interactions(rows, offsets, times, leave_one_out(offsets), 20)
    catalog = Catalog(pl.DataFrame({"item_id": [f"i{n}" for n in range(20)]}))
    root: Path = tmp_path_factory.mktemp("data")
    Dataset(catalog, events, {"name": "ring"}).save(root / "ring")
    angle = np.arange(20) * np.pi / 10
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    made = {"name": "lsa"}
    save_artifact(root / "vectors", kind="vectors", arrays={"vectors": vectors}, config=made)
    save_artifact(root / "short", kind="vectors", arrays={"vectors": vectors[:7]})
    return str(root / "ring"), str(root)


def call(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run(*arguments: str):
    from genrec.cli import baselines as command

    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, ["baselines", *arguments])


def test_command_evaluates_named_baselines_with_settings(folders):
    dataset, root = folders
    names = "markov, {name: ease, regularization: 5}"
    found = call(
        dataset, "--names", names, "--names", "content_knn", "--vectors", f"{root}/vectors"
    )
    wanted = ["markov", "ease(regularization=5)", "content_knn"]
    assert [row["name"] for row in found["rows"]] == wanted * 2
    assert found["baselines"]["ease(regularization=5)"]["regularization"] == 5
    assert list(found["timing"]["fit"]) == wanted
    left_out = {row["name"]: row for row in found["rows"] if row["masked"]}
    # The next item of the ring is one of the two nearest to what was had last.
    assert left_out["content_knn"]["recall@5"] == 1.0
    assert "vs_most_popular" not in left_out["markov"]


def test_command_takes_all_that_need_no_training(folders):
    dataset, root = folders
    named = [row["name"] for row in call(dataset, "--names", "all")["rows"]]
    assert named[: len(named) // 2] == [
        "most_popular",
        "recent_popular",
        "item_knn",
        "markov",
        "ease",
    ]
    found = call(dataset, "--names", "all", "--vectors", f"{root}/vectors")
    assert "content_knn" in {row["name"] for row in found["rows"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "content_knn"], "needs item vectors"),
        (["--names", "markof"], r"--names\[0\]\.name: got 'markof'.*markov"),
        (["--names", "{name: ease"], "expected names and commas"),
        (["--names", "3"], "expected names and commas"),
        (["--names", "content_knn", "--vectors", "{root}/short"], "holds 7 vectors.*20 items"),
    ],
)
def test_command_refuses_what_it_cannot_do(folders, arguments, message):
    dataset, root = folders
    result = run(dataset, *[part.replace("{root}", root) for part in arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_recent_popular_is_the_same_for_everyone_and_deterministic():
    first, second = (RecentPopular().fit(world()).scores(HISTORIES) for _ in range(2))
    assert np.array_equal(first, second) and (first == first[0]).all()
