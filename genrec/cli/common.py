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
THREADS = typer.Option(
    None, "--threads", min=1, help="CPU threads of each process; small models are fastest with 1."
)
JSON = typer.Option(False, "--json", help="Print JSON instead of tables.")
CONFIG = typer.Option(
    None, "--config", "-c", help="Configuration file; default: built-in defaults."
)


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        show_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(escape, row))  # a title such as "[Rec]" is no markup
    Console().print(table)


def print_results(results: dict[str, Any]) -> None:
    """Print the headline table of a results.json, masked and unmasked."""
    dataset = results["dataset"]
    seeds = len(results["seeds"])
    who = f" ({seeds} seed{'s' * (seeds > 1)})" if seeds else ""
    columns = ["", "Recall@10 (95%)", "NDCG@10 (95%)", "R@10 over popular"]
    for masked in dict.fromkeys(row["masked"] for row in results["rows"]):
        seen = "seen items left out" if masked else "seen items kept in"
        split = results["rows"][0]["split"]
        title = f"{dataset['name']}: {split}, full ranking, {seen}{who}"
        rows = [_row(row) for row in results["rows"] if row["masked"] == masked]
        print_table(title, columns, rows)
        _print_likeness(results, masked)


def _print_likeness(results: dict[str, Any], masked: bool) -> None:
    """Print what the lists of every system are like beside accuracy, where that is known."""
    from genrec.evaluation.beyond_accuracy import PRINTED, printed

    known = results.get("beyond_accuracy") or {}
    systems = known.get("masked" if masked else "unmasked") or {}
    rows = [[name, *printed(figures)] for name, figures in systems.items()]
    if rows:
        print_table(f"the first {known['k']} places of the lists", ["", *PRINTED.values()], rows)


def _row(row: dict[str, Any]) -> list[str]:
    versus = row.get("vs_most_popular", {}).get("recall@10")
    return [
        row["name"],
        _with_interval(row["recall@10"], row["recall@10_ci"]),
        _with_interval(row["ndcg@10"], row["ndcg@10_ci"]),
        "" if versus is None else _with_interval(versus["difference"], versus["ci"], "+"),
    ]


def _with_interval(value: float, ci: list[float], sign: str = "") -> str:
    low, high = (_short(part, ".3f") for part in ci)
    return f"{_short(value, f'{sign}.4f')} [{low}, {high}]"


def _short(value: float, form: str) -> str:
    """Without the leading zero, so that a row fits 80 columns."""
    return f"{value:{form}}".replace("0.", ".", 1)


def load_config(config: Path | None, overrides: list[str] | None, **fixed: Any) -> Any:
    """Return a checked RunConfig from an optional file, overrides and fixed top-level values."""
    from genrec.config import apply_overrides, load_yaml
    from genrec.pipeline.config import check_run_config

    data = load_yaml(config) if config else {}
    return check_run_config(apply_overrides({**data, **fixed}, overrides or []))
