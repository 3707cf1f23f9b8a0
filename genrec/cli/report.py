"""`genrec report`: one page about a finished run, or about several side by side."""

from __future__ import annotations

from pathlib import Path

import typer

from genrec.cli.common import CACHE


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def report(
        runs: list[Path] = typer.Argument(help="Run folders, e.g. runs/demo."),
        out: Path = typer.Option(
            None, "--out", help="HTML file; default report.html in the run (here for several)."
        ),
        reference: str = typer.Option(
            None, "--reference", help="Several: name of the run that others are tested against."
        ),
        dataset: Path = typer.Option(
            None, "--dataset", help="Prepared data set, where the cache does not hold it."
        ),
        cache: Path = CACHE,
    ) -> None:
        """Write one HTML file, without outside references, about RUN or several RUNs."""
        typer.echo(write(runs, out=out, reference=reference, dataset=dataset, cache=cache))


def write(
    folders: list[Path],
    *,
    out: Path | None = None,
    reference: str | None = None,
    dataset: Path | None = None,
    cache: Path | None = None,
) -> str:
    """Write the report and return a sentence that says where it is.

    Raises:
        ArtifactError: a folder without a finished run.
        MismatchError: runs, or a data set, that do not belong together.
        UserError: a reference for one run.
    """
    from genrec.errors import UserError
    from genrec.pipeline.finished import FinishedRun
    from genrec.pipeline.reporting import REPORT, write_run_report, write_runs_report

    runs = [FinishedRun.open(folder, cache, dataset) for folder in folders]
    if len(runs) == 1:
        if reference is not None:
            raise UserError("--reference: got one run, expected at least two to compare.")
        path = write_run_report(runs[0], out=out)
        return f"The report is {path}."
    path = out or Path(REPORT)
    write_runs_report(runs, path, reference=reference)
    return f"The report of {len(runs)} runs is {path}."
