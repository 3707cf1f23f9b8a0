"""`genrec run`: every stage of a configuration."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from genrec.cli.common import (
    CACHE,
    DEVICE,
    JSON,
    OVERRIDES,
    THREADS,
    print_json,
    print_results,
    print_table,
)

if TYPE_CHECKING:
    from genrec.pipeline.config import RunConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def run(
        config: Path = typer.Argument(help="YAML file, e.g. configs/demo.yaml."),
        overrides: list[str] = OVERRIDES,
        out: Path = typer.Option(None, "--out", help="Run folder; default runs/<name>."),
        cache: Path = CACHE,
        device: str = DEVICE,
        threads: int = THREADS,
        dry_run: bool = typer.Option(False, "--dry-run", help="Print the resolved config only."),
        as_json: bool = JSON,
    ) -> None:
        """Run all stages of CONFIG: data to report. Finished stages are reused.

        For several processes: accelerate launch -m genrec run CONFIG.
        """
        from genrec.pipeline.config import load_run_config

        resolved = load_run_config(config, overrides or [])
        if dry_run:
            typer.echo(resolved.to_yaml(), nl=False)
            return
        folder = out or Path("runs") / resolved.name
        results = execute(resolved, folder, cache, device, threads)
        if results and as_json:
            print_json(results)
        elif results:
            print_results(results)
            if resolved.incremental is None:
                typer.echo(f"Bundle, results.json and report.html are in {folder}/.")
                return
            _print_comparison(results["comparison"])
            typer.echo(f"results.json and comparison.md, .json and .html are in {folder}/.")


def _print_comparison(found: dict[str, Any]) -> None:
    from genrec.evaluation.comparison_tables import modes, result_table

    for masked in modes(found):
        seen = "left out" if masked else "kept in"
        print_table(f"paired, seen items {seen}", *result_table(found, masked))
    rows = [[n, f"{c['steps']:.0f}", f"{c['seconds']:.1f}"] for n, c in found["training"].items()]
    print_table("training", ["", "steps", "seconds"], rows)


def execute(
    config: RunConfig, out: Path, cache: Path, device: str | None, threads: int | None = None
) -> dict:
    """Run a checked configuration; returns {} on processes other than the first."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from genrec.pipeline.incremental import IncrementalRun
    from genrec.pipeline.run import Run

    command = "genrec " + shlex.join(sys.argv[1:])
    made = Run if config.incremental is None else IncrementalRun
    return made(config, out=out, cache=cache, device=device).execute(command=command)
