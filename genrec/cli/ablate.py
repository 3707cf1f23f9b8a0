"""`genrec ablate`: many variations of one run, one table."""

from __future__ import annotations

from pathlib import Path

import typer

from genrec.cli.common import CACHE, DEVICE, JSON, OVERRIDES, THREADS, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def ablate(
        config: Path = typer.Argument(help="YAML file, e.g. one of configs/ablations/."),
        overrides: list[str] = OVERRIDES,
        out: Path = typer.Option(None, "--out", help="Folder; default runs/ablations/<name>."),
        cache: Path = CACHE,
        jobs: int = typer.Option(1, "--jobs", "-j", min=1, help="Cells that run side by side."),
        device: str = DEVICE,
        threads: int = THREADS,
        dry_run: bool = typer.Option(False, "--dry-run", help="List the cells only."),
        as_json: bool = JSON,
    ) -> None:
        """Run every cell of an ablation and compare them on the same users.

        Finished cells and shared stages are reused; overrides hold for every cell.
        """
        from genrec.pipeline.ablation import load_ablation, run_ablation, variations

        loaded = load_ablation(config, overrides or [])
        if dry_run:
            for cell in variations(loaded):
                typer.echo(f"{cell.name}: {cell.settings}")
            return
        folder = out or Path("runs") / "ablations" / loaded.name
        found = run_ablation(loaded, folder, cache, jobs=jobs, threads=threads, device=device)
        if as_json:
            print_json(found)
        else:
            for part in [found, *found["others"]]:
                _print(part)
            typer.echo(f"ablation.md, ablation.html and every cell's run are in {folder}/.")
        if found["failed"]:
            typer.echo(f"failed: {', '.join(found['failed'])} (see log.txt of each)", err=True)
            raise typer.Exit(1)


def _print(found: dict) -> None:
    from genrec.evaluation.comparison_tables import modes, noise_sentence, result_table
    from genrec.evaluation.metrics import PRINTED

    for masked in modes(found):
        columns, rows = result_table(found, masked)
        seen = "left out" if masked else "kept in"
        what = f" ({found['what']})" if found.get("what") else ""
        print_table(f"{found['dataset']['name']}{what}: test, seen items {seen}", columns, rows)
        for metric in PRINTED:
            typer.echo(noise_sentence(found, metric, masked))
