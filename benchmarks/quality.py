"""How good is the default generator beside plain models of item ids? Pieces first, then the table.

A piece is one row (a system) with one seed on one data set: fitted, ranked over the whole catalogue
for every test user, with seen items kept in and left out. Each piece is a process of its own and
leaves two files, so that a long table can be made in any order and go on after a stop; the table is
made of whatever pieces there are (`benchmarks/quality_table.py`).

    python -m benchmarks.quality row ROW --data DATASET --seed 1
    python -m benchmarks.quality table
    python -m benchmarks.quality many --rows genrec,tiger --seeds 1,2,3 --data DATASET --minutes 9

Pieces go to docs/results/pieces (`--out` names another folder); they are part of the repository.

Shapes: U users, N items.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, quality_many, quality_pieces, quality_table
from benchmarks.quality_pieces import METRICS, SEEN, Values
from benchmarks.quality_rows import BASELINES, SOURCES, Order, row_names
from genrec import runtime
from genrec.artifacts import Artifact, write_json_atomic
from genrec.bundle import mode_name
from genrec.cli.common import DEFAULT_CACHE
from genrec.config import load_yaml
from genrec.configs_folder import find_config
from genrec.data import Dataset
from genrec.data.doctor import require_sound
from genrec.data.interactions import Examples
from genrec.errors import GenrecError, UserError
from genrec.evaluation import beyond_accuracy
from genrec.evaluation.beyond_accuracy import Surroundings
from genrec.evaluation.evaluator import DEFAULT_KS, evaluate_scores
from genrec.evaluation.runs import PROTOCOL
from genrec.item_index import ItemIndex
from genrec.models.baselines import TRAINED, Baseline, make_baselines
from genrec.pipeline import listing, results
from genrec.pipeline.run import LOCAL, Run

PIECES = Path("docs/results/pieces")
LOGS = Path("runs/quality")
_FIT_STAGES = ("embed", "tokenize", "index", "train")


@dataclass
class Piece:
    """What fitting and ranking found.

    Args:
        user_rows: (U,) of the test users.
        values: by mode, metric -> (U,).
        validation: NDCG@10 of all validation targets, seen items kept in.
        seconds_fit: wall time.
        seconds_rank: wall time by mode.
        lists: by mode, what the first ten places of all lists are like.
        details: anything else worth keeping (JSON).
    """

    user_rows: np.ndarray
    values: dict[str, Values]
    validation: float
    seconds_fit: float
    seconds_rank: dict[str, float]
    lists: dict[str, dict[str, float]]
    details: dict[str, Any]


# -- fitting and ranking ----------------------------------------------------------------------


def fit_baseline(settings: dict[str, Any], dataset: Dataset, seed: int) -> Piece:
    """Fit a baseline on the training interactions and rank the catalogue for all test users."""
    choice = {**settings, "seed": seed} if settings["name"] in TRAINED else settings
    (model,) = make_baselines([choice]).values()
    validation = dataset.interactions.examples("valid")
    begun = time.perf_counter()
    model.fit(dataset.interactions.training(), dataset.catalog, validation)
    seconds_fit = time.perf_counter() - begun
    test = dataset.interactions.examples("test")
    around = _surroundings(dataset)
    values, seconds, lists = {}, {}, {}
    for masked in SEEN:
        mode = mode_name(masked)
        begun = time.perf_counter()
        values[mode], rows_Uk = _ranked(model, test, masked)
        seconds[mode] = time.perf_counter() - begun
        lists[mode] = beyond_accuracy.list_figures(rows_Uk, around)
    shown = _ranked(model, validation, False)[0]["ndcg@10"]
    config = {"config": model.config.to_dict()}
    return Piece(test.user_rows, values, float(shown.mean()), seconds_fit, seconds, lists, config)


def _surroundings(dataset: Dataset) -> Surroundings:
    interactions = dataset.interactions
    return Surroundings(interactions.examples("test"), interactions.training().counts())


def _ranked(model: Baseline, examples: Examples, masked: bool) -> tuple[Values, np.ndarray]:
    """Return metrics per user, and the first places (U, k)."""
    rows_Uk = np.full((len(examples), beyond_accuracy.DEPTH), -1, np.int32)
    found = evaluate_scores(model.scores, examples, mask_seen=masked, out_rows=rows_Uk)
    return {name: found[name] for name in METRICS}, rows_Uk


def fit_generator(run: Run, dataset: Dataset) -> Piece:
    """Run the stages of `genrec run` up to the lists of the test users."""
    (seed,) = run.config.seeds
    catalog = run.embed(dataset)
    found = run.one_seed(dataset, catalog, seed)
    index = ItemIndex.load(found.index.path)
    valid = run.lists(dataset, index, found.model, "valid", False, seed)
    training = found.model.extra["training"]
    stages = {
        label: seconds
        for label, seconds in run.cache.seconds.items()
        if label.split(" (")[0] in _FIT_STAGES
    }
    train = f"train (seed {seed})"
    around = _surroundings(dataset)
    # From the cache, or gone on from a checkpoint: what its steps took is known all the same.
    stages[train] = max(stages[train], training["seconds"])
    return Piece(
        found.test[mode_name(False)].arrays["user_rows"],
        {mode: _listed(lists) for mode, lists in found.test.items()},
        float(listing.list_values(valid, DEFAULT_KS)["ndcg@10"].mean()),
        sum(stages.values()),
        {mode: _search_seconds(lists) for mode, lists in found.test.items()},
        {
            mode: beyond_accuracy.list_figures(listing.read_lists(lists)[0].rows, around)
            for mode, lists in found.test.items()
        },
        {
            "config": {k: v for k, v in run.config.to_dict().items() if k not in LOCAL},
            "stages": stages,
            "reused": sorted(label for label in stages if run.cache.reused[label]),
            "epochs": training["epochs"],
            "num_parameters": found.model.extra["num_parameters"],
            "search": {mode: listing.read_latency(lists) for mode, lists in found.test.items()},
        },
    )


def _listed(artifact: Artifact) -> Values:
    values = listing.list_values(artifact, DEFAULT_KS)
    return {name: values[name] for name in METRICS}


def _search_seconds(artifact: Artifact) -> float:
    told = listing.read_latency(artifact)
    return told["mean_ms"] * told["num_requests"] / 1000 if told else float("nan")


# -- pieces -----------------------------------------------------------------------------------


def make_piece(
    order: Order,
    out: Path,
    cache: Path,
    *,
    logs: Path = LOGS,
    device: str | None = None,
    again: bool = False,
) -> Path:
    """Make one piece, or find it finished; return its JSON file.

    Args:
        order: what is wanted; without a name, the data set's own is taken.
        out: folder of all pieces.
        cache: stage cache of runs.
        logs: folder of what training writes on its way.
        device: torch device name; None chooses.
        again: replace a finished piece.

    Raises:
        UserError: a finished piece is of other data or other settings.
        DataError: the doctor calls the data an error.
    """
    dataset = Run(order.config, out=out, cache=cache, device=device).dataset()
    order = replace(order, name=order.name or dataset.name)
    path = out / order.name / f"{order.row}-{order.seed}.json"
    if path.is_file() and not again:
        _check_same(path, order, dataset.fingerprint)
        return path
    require_sound(dataset)
    here = logs / order.name / f"{order.row}-{order.seed}"
    run = Run(order.config, out=here, cache=cache, device=device)
    with runtime.default_device(run.accelerator.device):
        if order.row in BASELINES:
            piece = fit_baseline(order.settings, dataset, order.seed)
        else:
            piece = fit_generator(run, dataset)
    _write(path, piece, order, dataset, run)
    return path


def _check_same(path: Path, order: Order, fingerprint: str) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    other_data = told["dataset"]["fingerprint"] != fingerprint
    if other_data or told["settings"] != json.loads(json.dumps(order.settings)):
        raise UserError(
            f"{path.name} in {path.parent.name}/ was made with other "
            f"{'data' if other_data else 'settings'}. Add --again to replace it, or --name for a "
            "data set of its own."
        )


def _write(path: Path, piece: Piece, order: Order, dataset: Dataset, run: Run) -> None:
    """Write the values and then the JSON: a piece with a JSON file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    quality_pieces.write_values(path.with_suffix(".parquet"), piece.user_rows, piece.values)
    protocol = results.protocol(run.config, dataset)
    write_json_atomic(
        path,
        {
            "row": order.row,
            "seed": order.seed,
            "dataset": {**results.dataset_facts(dataset), "name": order.name},
            "protocol": {key: protocol[key] for key in PROTOCOL},
            "test_users": quality_pieces.runs_of(piece.user_rows),
            "metrics": {
                mode: {metric: float(values[metric].mean()) for metric in METRICS}
                for mode, values in piece.values.items()
            },
            "validation_ndcg@10": piece.validation,
            "seconds_fit": piece.seconds_fit,
            "seconds_rank": piece.seconds_rank,
            "lists": piece.lists,
            "settings": order.settings,
            "details": piece.details,
            "command": order.command(dataset.name),
            "run_command": order.run_command,
            "machine": {**common.machine(), "device": str(run.accelerator.device)},
            "versions": runtime.versions(),
            "git": runtime.git_state(),
            "date": datetime.date.today().isoformat(),
        },
    )


# -- command line -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("row", help="make one piece")
    row.add_argument("row", choices=row_names(), metavar="ROW", help=", ".join(row_names()))
    data = row.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="a folder that `genrec prepare` wrote")
    data.add_argument("--source", choices=SOURCES, help="the data of this ready configuration")
    row.add_argument("--name", help="what the data set is called; default its own name")
    row.add_argument("--seed", type=int, default=0)
    row.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="stage cache of runs")
    row.add_argument("--device", help="cpu, cuda, ...; default the best at hand")
    row.add_argument("--threads", type=int, help="CPU threads")
    row.add_argument("--again", action="store_true", help="replace a finished piece")
    many = commands.add_parser("many", help="make pieces side by side until time is up")
    many.add_argument("--rows", required=True, help="names, comma-separated")
    many.add_argument("--seeds", default="1", help="comma-separated")
    many.add_argument("--data", type=Path, action="append", required=True, help="repeatable")
    many.add_argument("--minutes", type=float, required=True)
    many.add_argument("--processes", type=int, default=1)
    many.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="stage cache of runs")
    many.add_argument("--device", help="cpu, cuda, ...; default the best at hand")
    many.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    table = commands.add_parser("table", help="make the table of all pieces")
    table.add_argument("--write", type=Path, default=Path("docs/results"), help="folder")
    for command in (row, many):
        command.add_argument("--logs", type=Path, default=LOGS, help="what training writes")
    for command in (row, many, table):
        command.add_argument("--out", type=Path, default=PIECES, help="folder of the pieces")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make a piece, or the table; see the module's text."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.command == "table":
        for path in quality_table.write(arguments.out, arguments.write, row_names()):
            print(path)
        return
    if arguments.command == "many":
        _many(arguments)
        return
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    data = {"dataset": str(arguments.data)}
    if arguments.source:
        data = load_yaml(find_config(arguments.source))["data"]
    path = make_piece(
        Order(arguments.row, arguments.seed, data, arguments.name or ""),
        arguments.out,
        arguments.cache,
        logs=arguments.logs,
        device=arguments.device,
        again=arguments.again,
    )
    told = json.loads(path.read_text(encoding="utf-8"))
    keys = ("metrics", "validation_ndcg@10", "seconds_fit", "seconds_rank")
    print(path, json.dumps({key: told[key] for key in keys}, indent=2))


def _many(arguments: argparse.Namespace) -> None:
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = quality_many.pieces(arguments.rows.split(","), arguments.data, seeds)
    options = ["--out", str(arguments.out), "--cache", str(arguments.cache)]
    options += ["--logs", str(arguments.logs)]
    options += ["--threads", str(arguments.threads)]
    options += ["--device", arguments.device] if arguments.device else []
    limits = {"minutes": arguments.minutes, "processes": arguments.processes}
    for (row, folder, seed), what in quality_many.make(wanted, options, **limits):
        print(f"{row}, {folder.name}, seed {seed}: {what}")


if __name__ == "__main__":
    try:
        main()
    except GenrecError as error:
        raise SystemExit(str(error)) from None
