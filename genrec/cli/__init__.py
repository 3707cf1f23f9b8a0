"""The command line: one file per command group; it parses, calls the layers below and prints.

Nothing heavy is imported before a command runs, so that `genrec --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from genrec import __version__
from genrec.cli import (
    ablate,
    ask,
    audit,
    baselines,
    compare,
    data,
    demo,
    inspect,
    merge,
    recommend,
    report,
    rerank,
    run,
    stages,
)
from genrec.errors import GenrecError
from genrec.runtime import process_index

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        typer.echo(f"genrec {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """Return the Typer application with every command."""
    app = typer.Typer(
        name="genrec",
        help="Generative recommendation built around item tokenization.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Print the version."
        ),
        quiet: bool = typer.Option(False, "--quiet", "-q", help="Warnings and results only."),
    ) -> None:
        """Generative recommendation built around item tokenization."""
        _set_up_logging(quiet)

    for group in (
        demo,
        run,
        data,
        stages,
        recommend,
        rerank,
        report,
        inspect,
        baselines,
        ablate,
        ask,
        compare,
        audit,
        merge,
    ):
        group.register(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; user errors print one message and exit with status 2."""
    # Waiting threads that spin slow a shared machine down several times; set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        build_app()(args=arguments, standalone_mode=True)
    except GenrecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted: finished stages and checkpoints are kept.", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _set_up_logging(quiet: bool) -> None:
    logger = logging.getLogger("genrec")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if process_index() != 0:  # the first process speaks for all
        logger.setLevel(logging.ERROR)
    logger.handlers[:] = [_Handler()]
    logger.propagate = False


class _Handler(logging.Handler):
    """Writes to whatever standard error is now (tests and progress bars replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)
