"""`genrec compare`: is one run better than another, and is that more than chance?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genrec.cli.common import JSON, print_json, print_table

if TYPE_CHECKING:
    from genrec.evaluation.runs import Cell

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN RUN...",
        help="Folders of finished runs; FOLDER:SYSTEM for a baseline, e.g. runs/demo:item_knn.",
    ),
]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", "-m", help="Default recall@10 and ndcg@10.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file too.")]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def compare(
        runs: Runs,
        metric: Metrics = None,
        out: Out = None,
        as_json: bool = JSON,
    ) -> None:
        """Test every RUN against the first, user by user.

        Bootstrap interval, bootstrap and sign-flip p (Holm over the table), and the smallest
        difference that these users would show. Runs on other data or under another protocol are
        refused; several seeds are averaged per user. History length, beam width and scoring are
        settings of a model: they may differ and are shown, as is what a request took.
        """
        found = _compare(runs, metric)
        if out is not None:
            from genrec.artifacts import write_json_atomic

            write_json_atomic(out, found)
        if as_json:
            print_json(found)
        else:
            _print(found)


def _compare(runs: list[str], metrics: list[str] | None) -> dict[str, Any]:
    from genrec.errors import UserError
    from genrec.evaluation.comparison import compare
    from genrec.evaluation.metrics import PRINTED
    from genrec.evaluation.runs import read_cell

    if len(runs) < 2:
        raise UserError(
            f"compare: got {len(runs)} run, expected at least two, e.g. genrec compare runs/a "
            "runs/b, or a run and its baseline: genrec compare runs/a:item_knn runs/a."
        )
    cells = _named_apart([read_cell(source) for source in runs], runs)
    chosen = tuple(dict.fromkeys(metrics or PRINTED))
    found = compare(cells, metrics=chosen, same_seeds=False)
    found["metrics"] = list(chosen)
    found["seeds"] = {cell.name: list(cell.results["seeds"]) for cell in cells}
    return found


def _named_apart(cells: list[Cell], sources: list[str]) -> list[Cell]:
    """Return the cells under their folders' names, or under what was typed where two are alike."""
    from dataclasses import replace

    from genrec.errors import UserError

    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        names = sources
    if len(set(names)) < len(names):
        raise UserError("compare: a run is named twice. Name each run once.")
    return [replace(cell, name=name) for cell, name in zip(cells, names, strict=True)]


def _print(found: dict[str, Any]) -> None:
    from genrec.evaluation.comparison_tables import (
        likeness_table,
        modes,
        noise_sentence,
        paired_table,
        search_table,
    )

    split = next(row["split"] for row in found["cells"][0]["rows"])
    for masked in modes(found):
        seen = "left out" if masked else "kept in"
        for metric in found["metrics"]:
            title = f"{found['dataset']['name']}: {split}, seen items {seen}, {metric}"
            print_table(title, *paired_table(found, metric, masked))
            typer.echo(noise_sentence(found, metric, masked))
        columns, rows = likeness_table(found, masked)
        if rows:
            print_table(f"lists, seen items {seen}", columns, rows)
    columns, rows = search_table(found)
    if rows:
        print_table("search (ms per request)", columns, rows)
