"""What several commands share: options, printing of tables and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

DEFAULT_CACHE = Path("runs/.cache")

OVERRIDES = typer.Argument(
    None, metavar="[KEY.PATH=VALUE]...", help="Overrides, e.g. tokenizer.num_levels=4."
)
CACHE = typer.Option(DEFAULT_CACHE, "--cache", help="Folder of the stage cache.")
DEVICE = typer.Option(None, "--device", help="cpu, cuda, cuda:1, ...; default the best at hand.")
JSON = typer.Option(False, "--json", help="Print JSON instead of tables.")
CONFIG = typer.Option(
    None, "--config", "-c", help="Configuration file; default: built-in defaults."
)


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_results(results: dict[str, Any]) -> None:
    """Print the headline table of a results.json, masked and unmasked."""
    dataset = results["dataset"]
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    who = f" (genrec: seeds {seeds})" if seeds else ""
    for masked in dict.fromkeys(row["masked"] for row in results["rows"]):
        seen = "seen items left out" if masked else "seen items kept in"
        split = results["rows"][0]["split"]
        title = f"{dataset['name']}: {split}, full ranking, {seen}{who}"
        rows = [_row(row) for row in results["rows"] if row["masked"] == masked]
        print_table(
            title, ["", "R@10", "95% interval", "N@10", "95% interval", "R@10 - popular"], rows
        )


def _row(row: dict[str, Any]) -> list[str]:
    versus = row.get("vs_most_popular", {}).get("recall@10")
    difference = "" if versus is None else f"{versus['difference']:+.4f} {_interval(versus['ci'])}"
    return [
        row["name"],
        f"{row['recall@10']:.4f}",
        _interval(row["recall@10_ci"]),
        f"{row['ndcg@10']:.4f}",
        _interval(row["ndcg@10_ci"]),
        difference,
    ]


def _interval(ci: list[float]) -> str:
    return f"[{ci[0]:.4f}, {ci[1]:.4f}]"


def load_config(config: Path | None, overrides: list[str] | None, **fixed: Any) -> Any:
    """Return a checked RunConfig from an optional file, overrides and fixed top-level values."""
    from genrec.config import apply_overrides, load_yaml
    from genrec.pipeline.config import check_run_config

    data = load_yaml(config) if config else {}
    return check_run_config(apply_overrides({**data, **fixed}, overrides or []))
