"""What a run found: results.json and per-user values (the report: `genrec.pipeline.reporting`).

Collects figures from artifacts; it trains and searches nothing.

Shapes: S seeds, U users.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from genrec import runtime
from genrec.artifacts import Artifact, atomic_file
from genrec.bundle import history_of, mode_name
from genrec.data import Dataset
from genrec.evaluation import beyond_accuracy, search_quality
from genrec.evaluation.beyond_accuracy import Surroundings
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.list_content import attributes_of
from genrec.models.baselines import label
from genrec.pipeline import baseline_lists, listing
from genrec.pipeline.calibration_figures import measure_calibration
from genrec.pipeline.indexing import OWN_CODES

if TYPE_CHECKING:
    from genrec.pipeline.config import RunConfig
    from genrec.pipeline.run import SeedRun

NAME = "genrec"
REFERENCE = "most_popular"

Values = dict[str, np.ndarray]


def assemble(
    config: RunConfig,
    dataset: Dataset,
    runs: Sequence[SeedRun],
    baselines: Artifact,
    vectors: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the content of results.json, but for timing and samples.

    Args:
        config: the run's configuration.
        dataset: what was evaluated on.
        runs: artifacts by seed.
        baselines: artifact of the baselines stage.
        vectors: (N, E) item vectors, where the run has some.
    """
    options = config.evaluation
    rows: list[dict[str, Any]] = []
    calibration: dict[str, Any] = {}
    around = Surroundings(
        dataset.interactions.examples("test"),
        dataset.interactions.training().counts(),
        attributes_of(dataset.catalog),
        vectors,
    )
    beyond: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for masked in options.masked:
        mode = mode_name(masked)
        systems: dict[str, Values] = {NAME: _seed_values(runs, mode, options.ks)}
        for name in map(label, options.baselines):
            systems[name] = baseline_lists.read_values(baselines, name, mode)
        reference = systems.get(REFERENCE)
        for name, values in systems.items():
            other = None if name == REFERENCE else reference
            row = summarise(
                name, "test", masked, values, other, num_samples=options.bootstrap_samples
            )
            rows.append(row)
        by_seed = [
            {
                "seed": run.seed,
                **measure_calibration(
                    run.calibration, mode, run.test[mode], dataset, run.levels.get(mode)
                ),
            }
            for run in runs
        ]
        calibration[mode] = by_seed
        row = next(r for r in rows if r["name"] == NAME and r["masked"] == masked)
        figures = _list_figures(runs, mode, around, options.ks)
        row |= {"certified": figures["certified"]}
        row[f"coverage@{beyond_accuracy.DEPTH}"] = figures["coverage"]
        beyond[mode] = {NAME: figures} | {
            name: beyond_accuracy.list_figures(
                baseline_lists.read_rows(baselines, name, mode), around
            )
            for name in map(label, options.baselines)
        }
        groups[mode] = {
            name: beyond_accuracy.group_tables(
                values, around, num_samples=options.bootstrap_samples
            )
            for name, values in systems.items()
        }
    first = calibration[mode_name(options.masked[0])][0]
    return {
        "dataset": dataset_facts(dataset),
        "protocol": protocol(config, dataset, runs[0].model),
        "seeds": [run.seed for run in runs],
        "rows": rows,
        "beyond_accuracy": {
            "k": beyond_accuracy.DEPTH,
            "attribute": None if around.attributes is None else around.attributes.name,
            **beyond,
        },
        "groups": groups,
        "calibration": {**first, "by_mode": calibration},
        "versions": runtime.versions(),
        "git": runtime.git_state(),
        "fingerprints": {
            "dataset": dataset.fingerprint,
            "index": [run.index.extra["index_fingerprint"] for run in runs],
            "model": [run.model.fingerprint for run in runs],
        },
        "config": config.to_dict(),
    }


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """Return name, fingerprint and counts of a data set."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "num_users": dataset.interactions.num_users,
        "num_items": len(dataset.catalog),
        "num_interactions": len(dataset.interactions),
    }


def protocol(config: RunConfig, dataset: Dataset, model: Artifact | None = None) -> dict[str, Any]:
    """Return everything that makes two results comparable or not.

    Args:
        config: of the run.
        dataset: that is evaluated on.
        model: says how much of a history it reads; None: that is left open.
    """
    info = dataset.info
    return {
        "split": info.get("split"),
        "ties": info.get("ties"),
        "duplicates": info.get("duplicates"),
        "filters": info.get("filters"),
        "ranking": "full catalogue",
        "hit": "item",
        "targets": "first interaction of the split, one per user",
        "test_history": "training and validation items",
        "max_history": None if model is None else history_of(model),
        "beam_width": config.decoding.width,
        "scoring": config.decoding.scoring,
        "masked": list(config.evaluation.masked),
        "baseline_ties": "expected rank",
        "selection": "validation NDCG@10, seen items kept in",
    }


def _seed_values(runs: Sequence[SeedRun], mode: str, ks: Sequence[int]) -> Values:
    """Return metric -> (S, U)."""
    by_seed = [listing.list_values(run.test[mode], ks) for run in runs]
    return {name: np.stack([values[name] for values in by_seed]) for name in by_seed[0]}


def _list_figures(
    runs: Sequence[SeedRun], mode: str, around: Surroundings, ks: Sequence[int]
) -> dict[str, Any]:
    """Return what the generator's lists of a mode are like, the mean over seeds."""
    figures, by_semantic_id = [], []
    for run in runs:
        lists = listing.read_lists(run.test[mode])[0]
        certified = search_quality.certified_share(lists.certified)
        found = beyond_accuracy.list_figures(lists.rows, around)
        figures.append({**found, "certified": certified})
        codes = run.index.arrays.get(OWN_CODES)
        if codes is not None and len(codes) == len(around.counts_N):
            known = replace(around, codes_NL=codes)
            by_semantic_id.append(beyond_accuracy.semantic_id_figures(lists.rows, known, ks))
    return {
        **beyond_accuracy.mean_of(figures),
        "semantic_id_level": beyond_accuracy.mean_of(by_semantic_id) if by_semantic_id else None,
    }


def latency(runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """Return what the search of the test users took, by seed and way of ranking."""
    return [
        {"seed": run.seed, "masked": mode == mode_name(True), **found}
        for run in runs
        for mode, lists in run.test.items()
        if (found := listing.read_latency(lists)) is not None
    ]


def training_curves(runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """Return what training logged, by seed: `seed` and `curve`, a list of points."""
    return [{"seed": run.seed, "curve": run.model.extra["training"]["curve"]} for run in runs]


def write_per_user(
    path: Path, config: RunConfig, runs: Sequence[SeedRun], baselines: Artifact
) -> None:
    """Write one line per (system, seed, mode, user) with its metrics; users are rows, not ids.

    One system of one mode is in memory at a time: parts are written and then streamed together.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        parts: list[Path] = []
        for table in _per_user_tables(config, runs, baselines):
            parts.append(Path(folder) / f"{len(parts)}.parquet")
            table.write_parquet(parts[-1])
        with atomic_file(path) as temporary:
            pl.scan_parquet(parts).sink_parquet(temporary)


def _per_user_tables(
    config: RunConfig, runs: Sequence[SeedRun], baselines: Artifact
) -> Iterator[pl.DataFrame]:
    options = config.evaluation
    for masked in options.masked:
        mode = mode_name(masked)
        users = runs[0].test[mode].arrays["user_rows"]
        for run in runs:
            values = listing.list_values(run.test[mode], options.ks)
            yield per_user_table(users, values, name=NAME, seed=run.seed, masked=masked)
        for name in map(label, options.baselines):
            values = baseline_lists.read_values(baselines, name, mode)
            yield per_user_table(users, values, name=name, seed=0, masked=masked)


def per_user_table(users: np.ndarray, values: Values, **flags: Any) -> pl.DataFrame:
    """Return a line per user with its metrics and the same flags (name, seed, masked)."""
    columns = {"user_row": users, **dict(sorted(values.items()))}
    return pl.DataFrame(columns).with_columns(**{k: pl.lit(v) for k, v in flags.items()})
