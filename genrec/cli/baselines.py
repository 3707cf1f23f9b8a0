"""`genrec baselines`: what counting, linear and sequence models reach on a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genrec.cli.common import JSON, print_json, print_results

if TYPE_CHECKING:
    from genrec.data import Catalog, Dataset
    from genrec.models.baselines import Baseline, Choice

DatasetFolder = Annotated[Path, typer.Argument(help="Folder that `genrec prepare` wrote.")]
Split = Annotated[str, typer.Option("--split", help="test or valid.")]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--names",
        help="Which, e.g. ease,markov or '{name: ease, regularization: 500}'; may be repeated. "
        "Default: those that count. 'all': all but those that train (content_knn with --vectors).",
    ),
]
Vectors = Annotated[
    Path | None,
    typer.Option("--vectors", help="Folder that `genrec embed` wrote, for content_knn."),
]
ALL = "all"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("baselines")
    def baselines(
        dataset: DatasetFolder,
        split: Split = "test",
        names: Names = None,
        vectors: Vectors = None,
        as_json: bool = JSON,
    ) -> None:
        """Print baselines: full ranking, seen items left out and not."""
        found = _evaluate(dataset, split, names, vectors)
        if as_json:
            print_json(found)
        else:
            print_results(found)


def _choices(names: list[str] | None, vectors: Path | None) -> list[Choice]:
    """Return what was asked for; each --names is the inside of a YAML list."""
    import yaml

    from genrec.errors import UserError
    from genrec.models.baselines import BASELINES, COUNTING, TRAINED

    if not names:
        return list(COUNTING)
    left_out = {*TRAINED, *(() if vectors else ("content_knn",))}
    choices: list[Choice] = []
    for text in names:
        try:
            parts = yaml.safe_load(f"[{text.strip().removeprefix('[').removesuffix(']')}]")
        except yaml.YAMLError:
            parts = [None]
        for part in parts:
            if not isinstance(part, str | dict):
                raise UserError(
                    f"--names: got {text!r}, expected names and commas (ease,markov) or settings "
                    "in braces ('{name: ease, regularization: 500}')."
                )
            choices += [part] if part != ALL else [n for n in BASELINES if n not in left_out]
    return choices


def _with_vectors(data: Dataset, folder: Path | None) -> Catalog:
    from genrec.artifacts import load_artifact
    from genrec.errors import MismatchError
    from genrec.pipeline.stages import with_artifact

    if folder is None:
        return data.catalog
    artifact = load_artifact(folder, kind="vectors")
    vectors = artifact.arrays["vectors"]
    if len(vectors) != len(data.catalog):
        raise MismatchError(
            f"--vectors: {folder} holds {len(vectors)} vectors, the data set {data.name!r} has "
            f"{len(data.catalog)} items. Embed this data set: genrec embed."
        )
    return with_artifact(data.catalog, artifact)


def _fit(
    data: Dataset, choices: list[Choice], catalog: Catalog, split: str
) -> dict[str, tuple[Baseline, float]]:
    """Return fitted baselines and the seconds each took, by label."""
    import time

    from genrec.models.baselines import make_baselines

    training = data.interactions.training()
    validation = data.interactions.examples("valid") if split == "test" else ()
    fitted = {}
    for name, model in make_baselines(choices, path="--names").items():
        begun = time.perf_counter()
        model.fit(training, catalog, validation or None)
        fitted[name] = (model, time.perf_counter() - begun)
    return fitted


def _evaluate(
    path: Path, split: str, names: list[str] | None, vectors: Path | None
) -> dict[str, Any]:
    import time

    import numpy as np

    from genrec import runtime
    from genrec.bundle import mode_name
    from genrec.data import Dataset
    from genrec.data.doctor import require_sound
    from genrec.errors import DataError, UserError
    from genrec.evaluation import beyond_accuracy
    from genrec.evaluation.evaluator import DEFAULT_KS, evaluate_scores, summarise
    from genrec.models.baselines import MostPopular

    if split not in ("test", "valid"):
        raise UserError(f"--split: got {split!r}, expected 'test' or 'valid'.")
    choices = _choices(names, vectors)
    data = Dataset.load(path)
    require_sound(data)
    examples = data.interactions.examples(split)  # type: ignore[arg-type]
    if not len(examples):
        raise DataError(
            f"data set {data.name!r} has no {split} targets. Expected users with at least 3 "
            "interactions (leave-one-out); see `genrec doctor`."
        )
    begun = time.perf_counter()
    fitted = _fit(data, choices, _with_vectors(data, vectors), split)
    counts_N = data.interactions.training().counts()
    around = beyond_accuracy.Surroundings(examples, counts_N)
    rows: list[dict[str, Any]] = []
    likeness: dict[str, dict[str, Any]] = {}
    with runtime.progress("baselines", 2 * len(fitted) * len(examples)) as advance:
        for masked in (True, False):
            values, mode = {}, mode_name(masked)
            for name, (model, _) in fitted.items():
                top_Uk = np.full((len(examples), beyond_accuracy.DEPTH), -1, np.int32)
                values[name] = evaluate_scores(
                    model.scores,
                    examples,
                    ks=DEFAULT_KS,
                    mask_seen=masked,
                    on_progress=advance,
                    out_rows=top_Uk,
                )
                figures = beyond_accuracy.list_figures(top_Uk, around)
                likeness.setdefault(mode, {})[name] = figures
            popular = values.get(MostPopular.Config().name)
            for name, metrics in values.items():
                reference = None if metrics is popular else popular
                rows.append(summarise(name, split, masked, metrics, reference))
    settings = {name: model.config.to_dict() for name, (model, _) in fitted.items()}
    return {
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, **data.info},
        "protocol": {
            "split": split,
            "ranking": "full",
            "ties_of_scores": "expected_rank",
            "num_examples": len(examples),
        },
        "seeds": [],
        "baselines": settings,
        "rows": rows,
        "beyond_accuracy": {"k": beyond_accuracy.DEPTH, **likeness},
        "timing": {
            "seconds": round(time.perf_counter() - begun, 2),
            "fit": {name: round(seconds, 2) for name, (_, seconds) in fitted.items()},
        },
        "versions": runtime.versions(),
        "fingerprints": {"dataset": data.fingerprint},
    }
