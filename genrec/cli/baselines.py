"""`genrec baselines`: what simple counting reaches on a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genrec.cli.common import JSON, print_json, print_results

DatasetFolder = Annotated[Path, typer.Argument(help="Folder that `genrec prepare` wrote.")]
Split = Annotated[str, typer.Option("--split", help="test or valid.")]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("baselines")
    def baselines(
        dataset: DatasetFolder,
        split: Split = "test",
        as_json: bool = JSON,
    ) -> None:
        """Print most popular, item-kNN and Markov: full ranking, seen items left out and not."""
        found = _evaluate(dataset, split)
        if as_json:
            print_json(found)
        else:
            print_results(found)


def _evaluate(path: Path, split: str) -> dict[str, Any]:
    import time

    from genrec import runtime
    from genrec.data import Dataset
    from genrec.errors import DataError, UserError
    from genrec.evaluation.evaluator import DEFAULT_KS, evaluate_scores, summarise
    from genrec.models.baselines import BASELINES, COUNTING, MostPopular

    if split not in ("test", "valid"):
        raise UserError(f"--split: got {split!r}, expected 'test' or 'valid'.")
    data = Dataset.load(path)
    examples = data.interactions.examples(split)  # type: ignore[arg-type]
    if not len(examples):
        raise DataError(
            f"data set {data.name!r} has no {split} targets. Expected users with at least 3 "
            "interactions (leave-one-out); see `genrec doctor`."
        )
    training = data.interactions.training()
    rows = []
    begun = time.perf_counter()
    models = {name: runtime.load_object(BASELINES[name])().fit(training) for name in COUNTING}
    with runtime.progress("baselines", 2 * len(models) * len(examples)) as advance:
        for masked in (True, False):
            values = {
                name: evaluate_scores(
                    model.scores, examples, ks=DEFAULT_KS, mask_seen=masked, on_progress=advance
                )
                for name, model in models.items()
            }
            popular = values[MostPopular.Config().name]
            for name, metrics in values.items():
                reference = None if metrics is popular else popular
                rows.append(summarise(name, split, masked, metrics, reference))
    return {
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, **data.info},
        "protocol": {
            "split": split,
            "ranking": "full",
            "ties_of_scores": "expected_rank",
            "num_examples": len(examples),
        },
        "seeds": [],
        "rows": rows,
        "timing": {"seconds": round(time.perf_counter() - begun, 2)},
        "versions": runtime.versions(),
        "fingerprints": {"dataset": data.fingerprint},
    }
