"""Going on with training: earlier views of the data, what an update learns, three models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from accelerate import Accelerator

from genrec.artifacts import Artifact, load_artifact
from genrec.bundle import history_of
from genrec.cli import main
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.interactions import TEST, TRAIN, VALID
from genrec.data.periods import as_of, earlier_times
from genrec.errors import ConfigError, DataError, TrainingError, UserError
from genrec.evaluation.runs import read_cell
from genrec.item_index import ItemIndex
from genrec.models.hierarchical import Hierarchical
from genrec.pipeline import stages
from genrec.pipeline.config import check_run_config
from genrec.pipeline.incremental import SYSTEMS
from genrec.trainers.base import Trainer
from genrec.trainers.incremental import Incremental

NUM_ITEMS = 30


def make_dataset(num_users: int = 60, length: int = 12) -> Dataset:
    """Every user steps through a ring of items, all at the same pace, from time 1 on."""
    starts = np.arange(num_users) % NUM_ITEMS
    rows = (starts[:, None] + np.arange(length)).flatten() % NUM_ITEMS
    times = np.tile(np.arange(1, length + 1), num_users).astype(np.int64)
    splits = np.where(times > length - 1, TEST, np.where(times > length - 2, VALID, TRAIN))
    offsets = np.arange(num_users + 1, dtype=np.int64) * length
    events = Interactions(rows.astype(np.int32), offsets, times, splits.astype(np.uint8), NUM_ITEMS)
    titles = [f"Ring item {i}" for i in range(NUM_ITEMS)]
    ids = [str(i) for i in range(NUM_ITEMS)]
    catalog = Catalog(pl.DataFrame({"item_id": ids, "title": titles}))
    info = {"name": "ring by time", "split": {"name": "global_time"}}
    return Dataset(catalog, events, info, "ring")


def test_an_earlier_data_set_has_only_what_was_known_then() -> None:
    dataset = make_dataset()
    valid_from, ends = earlier_times(dataset, 0.6, 0.2)
    earlier = as_of(dataset, valid_from, ends)
    events, mine = dataset.interactions, earlier.interactions
    assert valid_from < ends <= events.training().timestamps.max()
    assert mine.timestamps.max() < ends and len(mine) == int((events.timestamps < ends).sum())
    assert (mine.splits == np.where(mine.timestamps < valid_from, TRAIN, VALID)).all()
    assert mine.num_users == events.num_users and earlier.catalog is dataset.catalog
    assert mine.user(3).tolist() == events.user(3)[: len(mine.user(3))].tolist()
    assert earlier.fingerprint not in (dataset.fingerprint, as_of(dataset, 1, ends).fingerprint)
    assert not len(mine.examples("test"))


def test_what_cannot_be_looked_at_earlier_is_refused() -> None:
    dataset = make_dataset()
    by_user = replace(dataset, info={"name": "x", "split": {"name": "leave_one_out"}})
    with pytest.raises(ConfigError, match="got split 'leave_one_out', expected 'global_time'"):
        earlier_times(by_user, 0.5, 0.1)
    with pytest.raises(DataError, match="nothing to train on"):
        earlier_times(dataset, 0.05, 0.1)


class Model:
    """What `examples` asks of a model."""

    training_unit = "target"

    reads_times = False

    class config:
        max_history = 2
        truncation = "last"

    def user_rows(self, users):
        return None


@pytest.mark.parametrize("replay", [0.0, 0.5, 1.0])
def test_an_update_learns_what_is_new_and_replays_whole_users(replay: float) -> None:
    training = make_dataset(40).interactions.training()
    config = Incremental.Config(start_from="x", new_from=8, replay=replay)
    found = Incremental(config, seed=3).examples(Model(), training)  # type: ignore[arg-type]
    spans = found.spans(0, 0)
    targets = np.bincount(found.flat[spans.stop - 1], minlength=NUM_ITEMS)
    num_new = int((training.timestamps >= 8).sum())
    if replay == 0.0:
        new = training.item_rows[training.timestamps >= 8]
        assert targets.tolist() == np.bincount(new, minlength=NUM_ITEMS).tolist()
        assert len(found.flat) == num_new + 40 * Model.config.max_history  # read, not learned
    assert len(spans) == num_new if replay == 0.0 else len(spans) > num_new
    assert (len(spans) == len(training)) == (replay == 1.0)
    again = Incremental(config, seed=3).examples(Model(), training)  # type: ignore[arg-type]
    assert np.array_equal(again.flat, found.flat)
    model = Model()
    model.training_unit = "sequence"
    stretches = Incremental(config, seed=3).examples(model, training)  # type: ignore[arg-type]
    spans = stretches.spans(0, 1)
    assert stretches.weights is not None
    assert all(stretches.weights[a:b].any() for a, b in zip(spans.start, spans.stop, strict=True))


def test_nothing_new_and_no_model_are_named(tmp_path: Path) -> None:
    training = make_dataset().interactions.training()
    config = Incremental.Config(start_from=str(tmp_path), new_from=99)
    with pytest.raises(TrainingError, match="after all 600 training interactions"):
        Incremental(config, seed=1).examples(Model(), training)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no trained model"):
        config.reads(make_dataset().catalog)


def test_an_update_forgets_no_item_that_the_model_knew(tmp_path: Path) -> None:
    """Also where the data hold the new interactions alone."""
    everything = make_dataset()
    codes = np.stack(np.divmod(np.arange(NUM_ITEMS), 5), axis=1).astype(np.int32)
    index = ItemIndex(everything.catalog.item_ids, codes, (6, 5))
    model = Hierarchical.Config(d_model=8, num_layers=1, d_ff=8, num_heads=2, items_from=1)

    def trained(name: str, dataset: Dataset, trainer: Trainer.Config) -> torch.Tensor:
        stages.train(
            tmp_path / name, dataset, index, model, trainer, seed=1, key=name,
            accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        arrays = load_artifact(tmp_path / name, kind="model").arrays
        return torch.from_numpy(arrays["consumed_N1"]).flatten()

    def of_users(wanted: slice) -> Dataset:
        events, length = everything.interactions, 12
        kept = slice(wanted.start * length, wanted.stop * length)
        mine = Interactions(
            events.item_rows[kept],
            np.arange(wanted.stop - wanted.start + 1, dtype=np.int64) * length,
            events.timestamps[kept],
            events.splits[kept],
            NUM_ITEMS,
        )
        return replace(everything, interactions=mine)

    first = trained("old", of_users(slice(0, 6)), Trainer.Config(epochs=1))
    assert 0 < first.sum() < NUM_ITEMS
    going_on = Incremental.Config(epochs=1, start_from=str(tmp_path / "old"), new_from=1)
    after = trained("new", of_users(slice(20, 26)), going_on)
    assert (after | first).equal(after) and after.sum() > first.sum()


def test_an_update_reads_as_much_as_the_model_was_made_for(tmp_path: Path) -> None:
    """Also where the rule would give the new data longer histories."""
    everything = make_dataset()
    codes = np.stack(np.divmod(np.arange(NUM_ITEMS), 5), axis=1).astype(np.int32)
    index = ItemIndex(everything.catalog.item_ids, codes, (6, 5))
    model = Hierarchical.Config(
        d_model=8, num_layers=1, d_ff=8, num_heads=2, items_from=1, repeat_bias=True,
        max_history=8, halve_history_to=2,
    )  # fmt: skip

    def trained(name: str, dataset: Dataset, trainer: Trainer.Config) -> Artifact:
        stages.train(
            tmp_path / name, dataset, index, model, trainer, seed=1, key=name,
            accelerator=Accelerator(cpu=True),
        )  # fmt: skip
        return load_artifact(tmp_path / name, kind="model")

    events = everything.interactions
    place_M = np.arange(len(events)) - events.offsets[events.user_rows]
    first_M = place_M < 4  # the first four of each user
    counts = np.bincount(events.user_rows[first_M], minlength=events.num_users)
    early = Interactions(
        events.item_rows[first_M],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        events.timestamps[first_M],
        np.full(int(first_M.sum()), TRAIN, events.splits.dtype),
        NUM_ITEMS,
    )
    short = replace(everything, interactions=early)
    artifact = trained("old", short, Trainer.Config(epochs=1))
    assert history_of(artifact) == 4 and artifact.config["halve_history_to"] is None
    assert history_of(trained("fresh", everything, Trainer.Config(epochs=1))) == 8
    going_on = Incremental.Config(epochs=1, start_from=str(tmp_path / "old"), new_from=1)
    assert history_of(trained("new", everything, going_on)) == 4


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


def settings(dataset: Path) -> dict:
    return {
        "name": "inc",
        "seeds": [1, 2],
        "data": {"dataset": str(dataset)},
        "features": {"name": "lsa", "num_dimensions": 8},
        "tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 8},
        "model": {
            "name": "decoder_only",
            "max_history": 4,
            "d_model": 16,
            "num_layers": 1,
            "num_heads": 2,
            "d_ff": 32,
        },
        "trainer": {"epochs": 2, "batch_size": 32, "validation_width": 10},
        "decoding": {"width": 12},
        "evaluation": {"bootstrap_samples": 100, "masked": [True]},
        "incremental": {"old_share": 0.6, "update": {"epochs": 1, "replay": 0.5}},
    }


def test_one_command_compares_stale_updated_and_retrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset().save(tmp_path / "data")
    file = tmp_path / "inc.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "data"), sort_keys=False))
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    run(["run", str(file), *arguments])
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*SYSTEMS, "paired", "steps", "markov"))
    results = json.loads((out / "results.json").read_text())
    assert {row["name"] for row in results["rows"]} > set(SYSTEMS)
    training = results["incremental"]["training"]
    assert training["updated"]["steps"] < training["retrained"]["steps"]
    assert training["stale"]["steps"] < training["retrained"]["steps"]
    models = results["fingerprints"]["model"]
    assert len({found for name in SYSTEMS for found in models[name]}) == 6
    compared = json.loads((out / "comparison.json").read_text())
    assert [cell["name"] for cell in compared["cells"]] == list(SYSTEMS)
    test = compared["cells"][1]["rows"][0]["vs_reference"]["ndcg@10"]
    assert test["ci"][0] <= test["difference"] <= test["ci"][1] and "p_holm" in test
    assert "| updated |" in (out / "comparison.md").read_text()
    assert read_cell(f"{out}:updated").values("ndcg@10", True).shape == (2, 60)
    run(["run", str(file), *arguments, "--json"])
    again = json.loads(capsys.readouterr().out)
    ran = set(again["timing"]["stages"]) - set(again["timing"]["reused"])
    assert not ran and again["rows"] == results["rows"]


def test_the_section_is_checked_before_anything_runs() -> None:
    data = settings(Path("somewhere"))
    assert check_run_config(data).to_dict()["incremental"]["old_share"] == 0.6
    data["incremental"]["update"] = {"replays": 0.5}
    with pytest.raises(ConfigError, match=r"incremental.update.replays.*Did you mean 'replay'"):
        check_run_config(data)
    data["incremental"] = {}
    data["trainer"] = {"name": "preference", "start_from": "x"}
    with pytest.raises(ConfigError, match=r"trainer.name: got 'preference'"):
        check_run_config(data)
    plain = settings(Path("somewhere"))
    del plain["incremental"]
    assert "incremental" not in check_run_config(plain).to_dict()


def test_the_ready_file_is_complete(root: Path) -> None:
    text = (root / "configs" / "incremental.yaml").read_text()
    found = check_run_config(yaml.safe_load(text))
    assert found.incremental is not None and "genrec run configs/incremental.yaml" in text
