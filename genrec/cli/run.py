"""`genrec run`: every stage of a configuration."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

from genrec.cli.common import CACHE, DEVICE, JSON, OVERRIDES, THREADS, print_json, print_results


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
            typer.echo(f"Bundle, results.json and report.html are in {folder}/.")


def execute(
    config: object, out: Path, cache: Path, device: str | None, threads: int | None = None
) -> dict:
    """Run a checked configuration; returns {} on processes other than the first."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from genrec.pipeline.run import Run

    command = "genrec " + shlex.join(sys.argv[1:])
    return Run(config, out=out, cache=cache, device=device).execute(command=command)  # type: ignore[arg-type]
