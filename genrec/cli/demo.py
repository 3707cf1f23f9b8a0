"""`genrec demo`: the whole way on MovieLens-100K, in minutes on a laptop."""

from __future__ import annotations

from pathlib import Path

import typer

from genrec.cli.common import CACHE, DEVICE, THREADS, print_results

# On 2 cores 11,500 targets a second with one thread, 9,500 at best with two: docs/log.md.
DEMO_THREADS = 1


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def demo(
        data: Path = typer.Option(
            None,
            "--data",
            help="MovieLens folder or archive that you have; default: fetched with pip.",
        ),
        out: Path = typer.Option(Path("runs/demo"), "--out", help="Run folder."),
        quick: bool = typer.Option(
            False, "--quick", help="One seed and a short training: shows the way, not the quality."
        ),
        cache: Path = CACHE,
        device: str = DEVICE,
        threads: int = THREADS,
    ) -> None:
        """Train and evaluate on MovieLens-100K and print example recommendations."""
        from genrec import assets
        from genrec.cli.run import execute
        from genrec.config import load_yaml
        from genrec.configs_folder import find_config
        from genrec.pipeline.config import check_run_config

        settings = load_yaml(find_config("demo-quick" if quick else "demo"))
        if data is not None:
            settings["data"]["source"] = {"name": "movielens", "path": str(data)}
        else:
            settings["data"]["source"]["path"] = str(assets.find_or_fetch("ml-100k"))
        results = execute(check_run_config(settings), out, cache, device, threads or DEMO_THREADS)
        if not results:
            return
        print_results(results)
        print_samples(results["samples"])
        typer.echo(
            f"\nBundle, results.json and report.html (open it in a browser) are in {out}/. Ask:\n"
            f"  genrec recommend {out}/bundle --history 50,181,174 -k 10"
        )


def print_samples(samples: list[dict]) -> None:
    """Print example users: their last items and the recommended titles with probabilities."""
    for sample in samples:
        last = " > ".join(item["title"] or item["item_id"] for item in sample["history"])
        typer.echo(f"\n{sample['label']}, last items: {last}")
        for place, item in enumerate(sample["recommended"], start=1):
            mark = "  <- what came next" if item["is_target"] else ""
            title = item["title"] or item["item_id"]
            typer.echo(f"  {place}. {item['probability']:6.2%}  {title}{mark}")
