"""`genrec rerank`: what calibrated, rarer, varied or fairer lists of a finished run would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from genrec.cli.common import CACHE, DEVICE, JSON, print_json, print_table

COLUMNS = {
    "calibration_miss": "KL",
    "coverage": "cover",
    "long_tail_share": "tail",
    "diversity_attributes": "varied",
    "cost": "cost",
    "hits_lost": "hits",
}

LEGEND = (
    "w: strength; change, p: of NDCG against strength 0, paired over users; KL: of the history's\n"
    "shares from the list's; cover: share of the catalogue shown; tail: outside the most popular\n"
    "fifth; varied: Jaccard distance within a list; cost: score given up per list; hits: expected\n"
    "hits given up."
)


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def rerank(
        run: Path = typer.Argument(help="Run folder, e.g. runs/demo."),
        options: list[str] = typer.Argument(
            None, metavar="[KEY=VALUE]...", help="Settings of the method, e.g. smoothing=.05."
        ),
        method: str = typer.Option(
            "steck", "--method", help="steck, popularity, long_tail, mmr, xquad or exposure."
        ),
        by: str = typer.Option(
            None, "--by", help="Catalogue column that groups items, or: popularity."
        ),
        strengths: str = typer.Option("0,.2,.5,.8", "--strengths", help="One row each."),
        k: int = typer.Option(10, "-k", help="List length."),
        width: int = typer.Option(
            None, "--width", help="Candidates per list; default the bundle's beam width."
        ),
        keep_seen: bool = typer.Option(False, "--keep-seen", help="Keep seen items in."),
        dataset: Path = typer.Option(
            None, "--dataset", help="Prepared data set, where the cache does not hold it."
        ),
        cache: Path = CACHE,
        device: str = DEVICE,
        as_json: bool = JSON,
    ) -> None:
        """Re-rank the test lists of a finished run at several strengths; 0 changes nothing."""
        found = measure(
            run,
            method=method,
            by=by,
            strengths=_numbers(strengths),
            k=k,
            width=width,
            masked=not keep_seen,
            options=options or [],
            dataset=dataset,
            cache=cache,
            device=device,
        )
        if as_json:
            print_json(found)
        else:
            _print(found)


def measure(
    folder: Path,
    *,
    method: str,
    by: str | None,
    strengths: list[float],
    k: int,
    width: int | None,
    masked: bool,
    options: list[str],
    dataset: Path | None,
    cache: Path | None,
    device: str | None,
) -> dict[str, Any]:
    """Return the trade-off of a run as JSON; see `genrec.pipeline.reranking.trade_off`."""
    from genrec.calibration.lists import RERANKERS
    from genrec.config import apply_overrides
    from genrec.pipeline.finished import FinishedRun
    from genrec.pipeline.reranking import gather, trade_off
    from genrec.runtime import lookup

    lookup(RERANKERS, method, what="--method")
    finished = FinishedRun.open(folder, cache, dataset)
    inputs = gather(finished, by=by, masked=masked, width=width, device=device)
    rows = trade_off(inputs, method, strengths, k=k, options=apply_overrides({}, options))
    return {
        "run": str(folder),
        "dataset": finished.results["dataset"],
        "method": method,
        "by": by,
        "options": options,
        "k": k,
        "candidates": inputs.candidates.rows_UM.shape[1],
        "num_users": len(inputs.candidates),
        "masked": masked,
        "lists_from": inputs.source,
        "rows": rows,
    }


def _numbers(text: str) -> list[float]:
    from genrec.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--strengths: got {text!r}, expected numbers with commas, e.g. 0,.2,.5,.8."
        ) from None


def _print(found: dict[str, Any]) -> None:
    k, rows = found["k"], found["rows"]
    by = f" by {found['by']}" if found["by"] else ""
    seen = "left out" if found["masked"] else "kept in"
    title = (
        f"{found['dataset']['name']}: {found['method']}{by}, top {k} of {found['candidates']}, "
        f"{found['num_users']:,} users, seen items {seen}"
    )
    without = "cost" if rows[0]["hits_lost"] is not None else "hits_lost"
    shown = [n for n in COLUMNS if n != without and rows[0].get(n) is not None]
    heads = ["w", f"R@{k}", f"N@{k}", "change", "p", *(COLUMNS[n] for n in shown)]
    lines = []
    for row in rows:
        against = row["vs_unchanged"][f"ndcg@{k}"]
        lines.append(
            [
                f"{row['strength']:g}",
                _short(f"{row[f'recall@{k}']:.4f}"),
                _short(f"{row[f'ndcg@{k}']:.4f}"),
                _short(f"{against['difference']:+.4f}"),
                _short(f"{against['p']:.3f}"),
                *(_short(f"{row[name]:.3f}") for name in shown),
            ]
        )
    print_table(title, heads, lines)
    typer.echo(LEGEND)
    for row in rows:
        if "exposure" in row:
            shares = ", ".join(f"{share:.3f}" for share in row["exposure"]["shares"])
            typer.echo(
                f"strength {row['strength']:g}: exposure {shares} (no value last); "
                f"largest gap to the target {row['exposure']['gap']:.4f}"
            )


def _short(text: str) -> str:
    """Without the leading zero, so that a row fits 80 columns."""
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text
