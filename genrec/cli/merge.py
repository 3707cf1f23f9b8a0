"""`genrec merge`: a bundle without adapters and without a base, from one with them."""

from __future__ import annotations

from pathlib import Path

import typer

from genrec.cli.common import JSON, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def merge(
        bundle: Path = typer.Argument(help="Bundle, e.g. runs/lora/bundle."),
        out: Path = typer.Option(..., "--out", help="Bundle folder to write."),
        base: str = typer.Option(
            None, "--base", help="Where the language model lies, if it has moved."
        ),
        as_json: bool = JSON,
    ) -> None:
        """Write a bundle with all weights in one: it needs neither the base nor peft."""
        from genrec.bundle import merge_bundle

        artifact = merge_bundle(bundle, out, base=base)
        if as_json:
            print_json({"bundle": str(out), "fingerprint": artifact.fingerprint})
        else:
            typer.echo(f"merged: {out} ({artifact.fingerprint[:12]})")
