"""Baselines with settings inside runs and audits: rows, files, cache keys, vectors on demand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.data import Catalog
from genrec.data.synthetic import ring
from genrec.errors import UserError
from genrec.evaluation.evaluator import evaluate_scores
from genrec.evaluation.runs import read_cell
from genrec.models.baselines import make_baselines
from genrec.pipeline import baseline_lists
from genrec.pipeline.audit import audit
from genrec.pipeline.config import load_run_config
from genrec.pipeline.run import Run

EASE = "ease(regularization=5)"
CHOICES = "evaluation.baselines=[most_popular, {name: ease, regularization: 5}, content_knn]"


def make_run(config: Path, out: Path, *overrides: str) -> Run:
    return Run(load_run_config(config, overrides), out=out, cache=out / "cache", device="cpu")


def test_vectors_are_made_for_content_knn_where_the_tokenizer_reads_none(
    small_config: Path, tmp_path: Path
) -> None:
    bare = make_run(small_config, tmp_path, "tokenizer={name: sequential}")
    assert bare.embed(bare.dataset()).vectors is None
    run = make_run(small_config, tmp_path, "tokenizer={name: sequential}", CHOICES)
    dataset = run.dataset()
    artifact, catalog = run.baselines(dataset), run.embed(dataset)
    assert catalog.vectors is not None
    events = dataset.interactions
    for name, model in make_baselines(run.config.evaluation.baselines).items():
        model.fit(events.training(), catalog)
        values = evaluate_scores(model.scores, events.examples("test"), mask_seen=True)
        for metric, expected in values.items():
            assert np.array_equal(artifact.arrays[f"{name}/masked/{metric}"], expected)


def test_settings_and_vectors_are_part_of_the_cache_key(small_config: Path, tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        run = make_run(small_config, tmp_path, *overrides)
        return str(run.baselines(run.dataset()).path)

    first = fingerprint(CHOICES)
    assert fingerprint(CHOICES) == first
    assert fingerprint(CHOICES.replace("5", "6")) != first
    assert fingerprint(CHOICES, "features.num_dimensions=4") != first
    counted = "evaluation.baselines=[markov]"
    assert fingerprint(counted) == fingerprint(counted, "features.num_dimensions=4")


def test_a_run_tells_baselines_apart_by_their_settings(
    small_config: Path, small_cache: Path, tmp_path: Path
) -> None:
    config = load_run_config(small_config, [CHOICES])
    found = Run(config, out=tmp_path / "run", cache=small_cache, device="cpu").execute()
    named = [row["name"] for row in found["rows"] if row["masked"]]
    assert named[1:] == ["most_popular", EASE, "content_knn"]
    users = pl.read_parquet(tmp_path / "run" / "per_user.parquet")
    assert set(named) == set(users["name"].unique())
    assert EASE in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert read_cell(f"{tmp_path / 'run'}:{EASE}").system == EASE


def test_the_audit_fits_baselines_with_their_settings_and_vectors(small_config: Path) -> None:
    trained = "{name: sasrec, epochs: 2, d_model: 8, num_layers: 1}"
    chosen = f"evaluation.baselines=[{{name: ease, regularization: 5}}, content_knn, {trained}]"
    options = ["tokenizer={name: sequential}", "evaluation.masked=[true]", chosen]
    found = audit(load_run_config(small_config, options), users=20, device="cpu")
    checks = {c["name"]: c for c in found["checks"] if c["name"].startswith("baseline")}
    assert [check["verdict"] for check in checks.values()] == ["ok"] * 3
    assert "other validation and test items" in checks[f"baseline {EASE}"]["detail"]
    (sasrec,) = (check for name, check in checks.items() if "sasrec" in name)
    assert "other test items" in sasrec["detail"]


def test_a_run_without_any_vectors_says_what_content_knn_needs(tmp_path: Path) -> None:
    dataset = ring(num_items=12, num_users=24, length=6)
    dataset = replace(dataset, catalog=Catalog(dataset.catalog.table))
    with pytest.raises(UserError, match="content_knn: needs item vectors"):
        baseline_lists.baselines(tmp_path / "out", dataset, ["content_knn"], (10,), (True,))
    assert not (tmp_path / "out").exists()
