"""A whole run: what it leaves, what it reuses, what it runs again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import load_artifact, read_manifest
from genrec.bundle import load_bundle
from genrec.configs_folder import find_config
from genrec.data import Catalog, Dataset
from genrec.data.synthetic import ring
from genrec.errors import MismatchError
from genrec.evaluation import metrics
from genrec.pipeline.config import load_run_config
from genrec.pipeline.finished import FinishedRun
from genrec.pipeline.listing import read_lists
from genrec.pipeline.run import Run
from genrec.recommender import Recommender


def execute(config: Path, out: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    run = Run(load_run_config(config, overrides), out=out, cache=cache, device="cpu")
    return run.execute(command="test")


def ran(results: dict[str, Any]) -> set[str]:
    timing = results["timing"]
    return {name.split(" (")[0] for name in set(timing["stages"]) - set(timing["reused"])}


def test_a_run_leaves_results_report_and_bundle(small_run: Path) -> None:
    names = {path.name for path in small_run.iterdir()}
    assert names >= {"bundle", "results.json", "report.html", "config.yaml", "per_user.parquet"}
    results = json.loads((small_run / "results.json").read_text())
    keys = {"dataset", "protocol", "seeds", "rows", "calibration", "timing", "versions"}
    assert keys <= set(results) and results["fingerprints"]["dataset"]
    found = {(row["name"], row["masked"]) for row in results["rows"]}
    names = {"genrec", "most_popular", "item_knn", "markov"}
    assert found == {(name, masked) for name in names for masked in (True, False)}
    for row in results["rows"]:
        assert row["split"] == "test" and 0 <= row["recall@10"] <= 1
        low, high = row["recall@10_ci"]
        assert low <= row["recall@10"] <= high
    calibration = results["calibration"]
    assert {"ece_before", "ece_after", "actual_hits_ci"} <= set(calibration)
    assert calibration["after"]["bins"] and set(calibration["by_mode"]) == {"masked", "unmasked"}
    report = (small_run / "report.html").read_text(encoding="utf-8")
    assert all(title in report for title in ("Do the probabilities hold?", "Use of codes"))
    latency = results["timing"]["latency"]
    assert [line["masked"] for line in latency] == [True, False]
    assert all(0 < line["p50_ms"] <= line["p95_ms"] <= line["p99_ms"] for line in latency)
    assert all(line["batch_p50_ms"] > line["p50_ms"] for line in latency)
    assert latency[0]["batch_size"] == 64 and latency[0]["device"].startswith("cpu, ")
    assert set(results["beyond_accuracy"]["masked"]) == names
    lines = (small_run / "seed-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [1, 2, None]


def test_results_equal_what_the_lists_say(small_run: Path, small_cache: Path) -> None:
    """Recomputed from the stored lists by the plainest code there is."""
    results = json.loads((small_run / "results.json").read_text())
    modes = set()
    for path in filter(Path.is_dir, (small_cache / "lists").iterdir()):  # latencies lie beside
        artifact = load_artifact(path, kind="lists")
        of_this_run = artifact.upstream["model"] in results["fingerprints"]["model"]
        if artifact.extra["split"] != "test" or not of_this_run:
            continue  # other tests use the same cache
        modes.add(artifact.extra["masked"])
        lists, targets = read_lists(artifact)
        hits = [t in row[:10] for t, row in zip(targets.tolist(), lists.rows.tolist(), strict=True)]
        row = next(
            r
            for r in results["rows"]
            if r["name"] == "genrec" and r["masked"] == artifact.extra["masked"]
        )
        assert row["recall@10"] == pytest.approx(np.mean(hits))
        assert (np.diff(lists.logprobs, axis=1)[lists.rows[:, 1:] >= 0] <= 0).all()
    assert modes == {False, True}


def test_results_say_what_the_codes_are_like(small_run: Path) -> None:
    tokens = json.loads((small_run / "results.json").read_text())["tokens"]
    assert tokens["index"]["num_distinct"] == tokens["num_items"] == 184
    correlation = tokens["cooccurrence"]["correlation"]
    assert -1 <= correlation <= 1 and tokens["index"]["cooccurrence"]["num_pairs"] > 0


def test_per_user_values_average_to_the_table(small_run: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    table = pl.read_parquet(small_run / "per_user.parquet")
    for row in results["rows"]:
        part = table.filter(pl.col("name") == row["name"], pl.col("masked") == row["masked"])
        assert part["ndcg@10"].mean() == pytest.approx(row["ndcg@10"])
        assert len(part) == row["num_users"]


def test_a_model_with_content_gets_vectors_that_no_tokenizer_reads(
    small_config: Path, tmp_path: Path
) -> None:
    """And its bundle answers without the extractor."""
    model = "{name: hierarchical, items_from: 1, content: true, repeat_bias: true, max_history: 6, "
    model += "d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32}"
    tokenizer = "tokenizer={name: random, base: 8}"
    results = execute(
        small_config, tmp_path / "r", tmp_path / "cache", tokenizer, f"model={model}",
        "trainer.epochs=1", "trainer.batch_targets=100",
    )  # fmt: skip
    assert {"embed", "train"} <= ran(results)
    model_folder = load_artifact(tmp_path / "r" / "bundle" / "model", kind="model")
    bundle = load_bundle(tmp_path / "r" / "bundle")
    known_NE = bundle.model.content.vectors_NE  # type: ignore[union-attr]
    assert model_folder.extra["backbone"]["vector_width"] == known_NE.shape[1]
    assert len(known_NE) == len(bundle.index) and float(known_NE.abs().sum()) > 0
    answer = Recommender.from_pretrained(tmp_path / "r" / "bundle").recommend(
        [[bundle.index.item_ids[3]]], k=5
    )
    assert len(set(answer.item_ids[0])) == 5


def test_the_default_generator_needs_no_texts(tmp_path: Path) -> None:
    """Its features are then those of interactions, and it has no content; results say so."""
    rings = ring(num_items=24, num_users=40, length=6)
    silent = Catalog(rings.catalog.table.select("item_id"))
    Dataset(silent, rings.interactions, rings.info).save(tmp_path / "data")
    results = execute(
        find_config("genrec"), tmp_path / "r", tmp_path / "cache", f"data={tmp_path / 'data'}",
        "seeds=[1]", "model.d_model=8", "model.d_ff=8", "trainer.epochs=1", "decoding.width=12",
        "evaluation.baselines=[markov]",
    )  # fmt: skip
    features = results["features"]
    assert [part["name"] for part in features["parts"]] == ["collaborative"]
    assert "No item has a text" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    extra = load_artifact(tmp_path / "r" / "bundle" / "model", kind="model").extra
    assert extra["backbone"]["vector_width"] == 0
    # Of short histories it reads 50 items, not the 200 of the file; the results say so.
    assert results["protocol"]["max_history"] == 50
    answer = Recommender.from_pretrained(tmp_path / "r" / "bundle").recommend([["3"]], k=5)
    assert len(set(answer.item_ids[0])) == 5


def test_a_finished_run_takes_lists_of_its_own_scoring(
    small_run: Path, small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FinishedRun.open(small_run, small_cache)
    own = run.lists(True)
    assert own is not None and own.extra["scoring"] == "renormalized"
    other = {**read_manifest(own.path)}
    other["extra"] = {**other["extra"], "scoring": "raw"}
    found = [(Path("other"), other), (own.path, read_manifest(own.path))]
    monkeypatch.setattr(FinishedRun, "_cached", lambda self, stage: iter(found))
    again = run.lists(True)
    assert again is not None and again.path == own.path


def test_masked_lists_never_hold_seen_items(
    small_cache: Path, ring_dataset: Path, small_run: Path
) -> None:
    dataset = Dataset.load(ring_dataset)
    histories = dataset.interactions.examples("test").histories()
    wanted = {"split": "test", "masked": True, "width": 12, "scoring": "renormalized"}
    checked = 0
    for path in filter(Path.is_dir, (small_cache / "lists").iterdir()):  # latencies lie beside
        artifact = load_artifact(path, kind="lists")
        if artifact.extra == wanted:
            lists, _ = read_lists(artifact)
            for rows, history in zip(lists.rows, histories, strict=True):
                assert not set(rows.tolist()) & set(history.tolist())
            checked += 1
    assert checked


def test_a_second_run_reuses_everything_and_gives_the_same(
    small_run: Path, small_config: Path, small_cache: Path, tmp_path: Path
) -> None:
    results = execute(small_config, tmp_path / "again", small_cache)
    assert ran(results) == set()
    first = json.loads((small_run / "results.json").read_text())
    assert results["rows"] == first["rows"] and results["fingerprints"] == first["fingerprints"]
    assert results["timing"]["latency"] == first["timing"]["latency"]  # of the search that was run
    assert results["beyond_accuracy"] == first["beyond_accuracy"]


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("evaluation.ks=[1, 10]", {"baselines"}),
        ("calibration={name: temperature, max_temperature: 19.5}", {"calibrate"}),
        (
            "decoding.width=11",
            {
                "search valid, masked",
                "search valid, unmasked",
                "search test, masked",
                "search test, unmasked",
                "calibrate",
            },
        ),
        ("decoding.batch_size=7", set()),
        ("tracking.tags=[x]", set()),
    ],
)
def test_changing_one_key_runs_exactly_what_depends_on_it(
    override: str,
    stages: set[str],
    small_run: Path,
    small_config: Path,
    small_cache: Path,
    tmp_path: Path,
) -> None:
    assert ran(execute(small_config, tmp_path / "r", small_cache, override)) == stages


def test_changing_the_trainer_keeps_the_index(
    small_run: Path, small_config: Path, small_cache: Path, tmp_path: Path
) -> None:
    found = ran(execute(small_config, tmp_path / "r", small_cache, "trainer.epochs=1"))
    assert "train" in found and not found & {"embed", "tokenize", "index", "baselines"}


def test_a_stand_in_for_the_sentence_encoder_is_said(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genrec.features import sentence_encoder

    monkeypatch.setattr(sentence_encoder, "available", lambda *_: "it is not installed")
    config = tmp_path / "c.yaml"
    text = small_config.read_text()
    start, end = text.index("features:"), text.index("tokenizer:")
    config.write_text(text[:start] + "features: auto\n" + text[end:])
    results = execute(config, tmp_path / "r", tmp_path / "cache", "trainer.epochs=1")
    assert results["features"]["name"] == "lsa"
    assert "no sentence encoder is installed" in (tmp_path / "r" / "report.html").read_text()


def test_the_same_seed_from_scratch_gives_the_same_weights(
    small_run: Path, small_config: Path, tmp_path: Path
) -> None:
    first = json.loads((small_run / "results.json").read_text())
    fresh = execute(small_config, tmp_path / "r", tmp_path / "cache")
    assert fresh["rows"] == first["rows"]
    one = load_artifact(small_run / "bundle" / "model", kind="model")
    two = load_artifact(tmp_path / "r" / "bundle" / "model", kind="model")
    assert all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_a_damaged_cache_entry_is_made_again(
    small_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    execute(small_config, tmp_path / "r", cache, "trainer.epochs=1")
    (path,) = (cache / "vectors").iterdir()
    (path / "arrays.safetensors").write_bytes(b"broken")
    with caplog.at_level("WARNING", logger="genrec"):
        results = execute(small_config, tmp_path / "r", cache, "trainer.epochs=1")
    assert ran(results) == {"embed"} and "damaged" in caplog.text


def test_a_bundle_is_evaluated_alone_with_the_same_figures(
    small_run: Path, small_config: Path, small_cache: Path, tmp_path: Path
) -> None:
    first = json.loads((small_run / "results.json").read_text())
    run = Run(load_run_config(small_config), out=tmp_path, cache=tmp_path / "cache", device="cpu")
    assert run.evaluate_bundle(small_run / "bundle")["rows"] == first["rows"]


def test_a_bundle_meets_the_wrong_data_set(
    small_run: Path, small_config: Path, tmp_path: Path
) -> None:
    ring(num_items=20, num_users=40, length=8).save(tmp_path / "other")
    config = load_run_config(small_config, [f"data={tmp_path / 'other'}"])
    run = Run(config, out=tmp_path, cache=tmp_path / "cache", device="cpu")
    with pytest.raises(MismatchError, match=r"index \(184 items, \w+\).*20 items, \w+"):
        run.evaluate_bundle(small_run / "bundle")


def test_wandb_offline_gets_a_run_without_raw_user_ids(
    small_config: Path, small_cache: Path, small_run: Path, tmp_path: Path
) -> None:
    import wandb

    execute(
        small_config,
        tmp_path / "r",
        small_cache,
        "tracking.wandb=offline",
        "tracking.group=test",
        "trainer.learning_rate=0.002",
    )
    files = list((tmp_path / "r" / "seed-1" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and b"learning_rate" in files[0].read_bytes()
    (of_results,) = (tmp_path / "r" / "results" / "wandb").glob("offline-run-*/run-*.wandb")
    wandb.teardown()  # its service writes the last run after `finish` has returned
    logged = of_results.read_bytes()
    assert b"genrec/masked/ndcg@10" in logged and b"markov/unmasked/recall@10" in logged
    assert b"calibration/ece_after" in logged and b"small-results" in logged


def test_permuting_held_out_items_changes_nothing_that_was_fitted(
    small_config: Path, ring_dataset: Path, small_run: Path, small_cache: Path, tmp_path: Path
) -> None:
    """Leakage: vectors, tokenizer, index and training loss see training interactions only."""
    from dataclasses import replace

    dataset = Dataset.load(ring_dataset)
    events = dataset.interactions
    rows = events.item_rows.copy()
    held_out = events.splits > 0
    rows[held_out] = np.random.default_rng(0).permutation(rows[held_out])
    replace(dataset, interactions=replace(events, item_rows=rows)).save(tmp_path / "d")
    results = execute(small_config, tmp_path / "r", small_cache, f"data={tmp_path / 'd'}")
    assert not ran(results) & {"embed", "tokenize", "index"}
    log = [json.loads(x) for x in (tmp_path / "r/seed-1/metrics.jsonl").read_text().splitlines()]
    old = [json.loads(x) for x in (small_run / "seed-1/metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in log[:2]] == [x["loss"] for x in old[:2]]


def test_metrics_of_padded_lists_are_those_of_short_ones() -> None:
    rows = np.array([[3, 1, -1, -1]])
    assert metrics.list_metrics(rows, np.array([1]), (2, 4))["recall@4"] == [1.0]
