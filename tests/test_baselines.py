"""Counting baselines against brute force and hand-made worlds; the command; the leakage guards."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from genrec.data import Catalog, Dataset, Interactions
from genrec.data.splits import leave_one_out
from genrec.errors import UserError
from genrec.models.baselines import (
    BASELINES,
    COUNTING,
    Baseline,
    ItemKNN,
    Markov,
    MostPopular,
    counting,
    make_baselines,
)


def interactions_of(sequences: list[list[int]], num_items: int) -> Interactions:
    lengths = [len(s) for s in sequences]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.array([i for s in sequences for i in s], dtype=np.int32)
    splits = leave_one_out(offsets)
    return Interactions(rows, offsets, np.zeros(len(rows), np.int64), splits, num_items)


def random_world(seed: int, users: int = 30, items: int = 12) -> Interactions:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, items, rng.integers(3, 9)).tolist() for _ in range(users)]
    return interactions_of(sequences, items)


def training_sequences(interactions: Interactions) -> list[list[int]]:
    training = interactions.training()
    return [training.user(u).tolist() for u in range(training.num_users)]


def popularity_share(interactions: Interactions) -> np.ndarray:
    flat = [i for s in training_sequences(interactions) for i in s]
    return np.bincount(flat, minlength=interactions.num_items) / len(flat)


HISTORIES = [np.array([1, 2, 3]), np.array([0]), np.array([5, 5]), np.array([], dtype=np.int64)]


def test_most_popular_counts_training_only_and_ignores_the_history():
    world = random_world(0)
    scores = MostPopular().fit(world.training()).scores(HISTORIES)
    counts = Counter(i for s in training_sequences(world) for i in s)
    assert scores.shape == (4, 12) and scores.dtype == np.float64
    assert (scores == scores[0]).all()
    assert scores[0].tolist() == [counts[i] for i in range(12)]


@pytest.mark.parametrize("seed", range(3))
def test_markov_equals_brute_force(seed):
    world = random_world(seed)
    scores = Markov().fit(world.training()).scores(HISTORIES)
    followed = Counter()
    for sequence in training_sequences(world):
        followed.update(itertools.pairwise(sequence))
    share = popularity_share(world)
    for history, row in zip(HISTORIES, scores, strict=True):
        last = history[-1] if len(history) else None
        expected = [followed[(last, i)] + 1e-6 * share[i] for i in range(12)]
        assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_item_knn_equals_brute_force_stored_or_not(seed, stored, monkeypatch):
    if not stored:
        monkeypatch.setattr(counting, "_MAX_STORED", 0)
    world = random_world(seed)
    model = ItemKNN(ItemKNN.Config(history_length=2)).fit(world.training())
    assert (model._stored is not None) == stored
    users = [{u for u, s in enumerate(training_sequences(world)) if i in s} for i in range(12)]
    share = popularity_share(world)

    def cosine(i: int, j: int) -> float:
        if i == j or not users[i] or not users[j]:
            return 0.0
        return len(users[i] & users[j]) / math.sqrt(len(users[i]) * len(users[j]))

    for history, row in zip(HISTORIES, model.scores(HISTORIES), strict=True):
        expected = [
            sum(cosine(h, i) for h in history[-2:].tolist()) + 1e-6 * share[i] for i in range(12)
        ]
        assert row == pytest.approx(expected, rel=1e-12)


def test_item_knn_reads_twenty_items_of_history_by_default():
    world = random_world(0)
    model = ItemKNN().fit(world.training())
    recent = np.tile([1, 2, 3, 4], 5)
    longer = np.concatenate([[7, 8, 9], recent])
    assert np.array_equal(model.scores([recent]), model.scores([longer]))


def vectors_of(num_items: int) -> Catalog:
    rng = np.random.default_rng(7)
    return Catalog.from_vectors(rng.standard_normal((num_items, 5)))


def baseline(name: str) -> Baseline:
    """One that is quick to train, where it trains."""
    quick = {"name": "sasrec", "epochs": 3, "d_model": 16, "batch_targets": 64}
    (made,) = make_baselines([quick if name == "sasrec" else name]).values()
    return made


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_scores_like_its_histories_alone(name):
    model = baseline(name).fit(random_world(1).training(), vectors_of(12))
    together = model.scores(HISTORIES)
    alone = np.concatenate([model.scores([history]) for history in HISTORIES])
    assert together.shape == (4, 12) and together.dtype == np.float64
    exact = {"rtol": 1e-14} if name in COUNTING else {"rtol": 1e-4, "atol": 1e-6}
    assert np.allclose(together, alone, **exact)
    assert model.scores([]).shape == (0, 12)


@pytest.mark.parametrize("name", BASELINES)
def test_permuting_held_out_items_changes_nothing(name):
    world = random_world(2)
    shuffled = world.item_rows.copy()
    held_out = world.splits != 0
    shuffled[held_out] = np.random.default_rng(0).permutation(shuffled[held_out])
    other = Interactions(shuffled, world.offsets, world.timestamps, world.splits, 12)
    first = baseline(name).fit(world.training(), vectors_of(12))
    second = baseline(name).fit(other.training(), vectors_of(12))
    assert np.array_equal(first.scores(HISTORIES), second.scores(HISTORIES))


def test_held_out_interactions_unknown_rows_and_wrong_order_are_refused():
    world = random_world(0)
    with pytest.raises(UserError, match=r"60 validation or test interactions.*\.training\(\)"):
        MostPopular().fit(world)
    with pytest.raises(UserError, match="not fitted"):
        Markov().scores(HISTORIES)
    with pytest.raises(UserError, match=r"outside \[0, 12\)"):
        Markov().fit(world.training()).scores([np.array([12])])
    with pytest.raises(UserError, match="no training interactions"):
        MostPopular().fit(interactions_of([], 3))


def cli() -> typer.Typer:
    from genrec.cli import baselines as command

    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return app


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> str:
    """A ring: each item is followed by the next one, so Markov is perfect."""
    sequences = [[(start + i) % 20 for i in range(6)] for start in range(20)] * 3
    world = interactions_of(sequences, 20)
    world = replace(world, timestamps=np.tile(np.arange(1, 7), len(sequences)))
    catalog = Catalog(pl.DataFrame({"item_id": [f"i{n}" for n in range(20)]}))
    path = tmp_path_factory.mktemp("data") / "ring"
    Dataset(catalog, world, {"name": "ring"}).save(path)
    return str(path)


def test_command_prints_json_rows_masked_and_not(dataset_folder):
    result = CliRunner().invoke(cli(), ["baselines", dataset_folder, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["name"], row["masked"]) for row in found["rows"]] == [
        (name, masked) for masked in (True, False) for name in COUNTING
    ]
    markov = found["rows"][2]
    assert markov["recall@10"] == 1.0 and markov["ndcg@10"] == 1.0
    assert markov["vs_most_popular"]["ndcg@10"]["ci"][0] > 0
    assert "vs_most_popular" not in found["rows"][0]
    assert found["dataset"]["name"] == "ring" and found["protocol"]["split"] == "test"


def test_command_prints_a_table_and_validates_the_split(dataset_folder):
    result = CliRunner().invoke(cli(), ["baselines", dataset_folder, "--split", "valid"])
    assert result.exit_code == 0, result.output
    assert "markov" in result.stdout and "valid" in result.stdout
    wrong = CliRunner().invoke(cli(), ["baselines", dataset_folder, "--split", "train"])
    assert isinstance(wrong.exception, UserError)
    assert "expected 'test' or 'valid'" in str(wrong.exception)
