"""`genrec audit`: does anything that is fitted know the held-out items?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from genrec.cli.common import DEVICE, JSON, OVERRIDES, THREADS, print_json, print_table


class _Items(StrEnum):
    random = "random"
    permuted = "permuted"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def audit(
        config: Path = typer.Argument(help="YAML file, e.g. configs/demo.yaml."),
        overrides: list[str] = OVERRIDES,
        items: _Items = typer.Option(
            _Items.random,
            "--items",
            help="Held-out items become random ones (finds counting too), or are permuted.",
        ),
        users: int = typer.Option(256, "--users", min=2, help="Users of the short training."),
        device: str = DEVICE,
        threads: int = THREADS,
        as_json: bool = JSON,
    ) -> None:
        """Fit every stage of CONFIG twice: with the held-out items as they are, and replaced.

        A stage whose arrays change has seen what it must not see; it is named, and the exit status
        is 1. Nothing is taken from the stage cache, so this takes as long as fitting twice (the
        generator trains for one or two epochs only).
        """
        found = _audit(config, overrides or [], items.value, users, device, threads)
        if as_json:
            print_json(found)
        else:
            _print(found)
        if not found["passed"]:
            typer.echo(f"failed: {', '.join(found['leaks'])}", err=True)
            raise typer.Exit(1)


def _audit(
    config: Path,
    overrides: list[str],
    items: Any,
    users: int,
    device: str | None,
    threads: int | None,
) -> dict[str, Any]:
    from genrec.pipeline.config import load_run_config

    loaded = load_run_config(config, overrides)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from genrec.pipeline.audit import audit

    return audit(loaded, items=items, users=users, device=device)


def _print(found: dict[str, Any]) -> None:
    print_table("", ["check", "verdict"], [[c["name"], c["verdict"]] for c in found["checks"]])
    for check in found["checks"]:
        typer.echo(f"{check['name']}: {check['detail']}")
