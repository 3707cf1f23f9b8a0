"""The stages alone, artifacts by path: embed, tokenize, train, calibrate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from genrec.cli.common import (
    CACHE,
    CONFIG,
    DEVICE,
    JSON,
    OVERRIDES,
    load_config,
    print_json,
    print_results,
    print_table,
)
from genrec.cli.tokenize import tokenize

DATASET = typer.Argument(help="Folder that `genrec prepare` wrote.")
OUT = typer.Option(..., "--out", help="Folder to write.")
INDEX = typer.Option(..., "--index", help="Folder that `genrec tokenize` wrote.")
SEED = typer.Option(1, "--seed", help="Random seed.")


def _part(path: Path, name: str) -> Path:
    """Accept an artifact folder, or a folder that holds it under its name."""
    return path / name if (path / name).is_dir() else path


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(embed)
    app.command()(tokenize)
    app.command()(train)
    app.command()(calibrate)
    app.command()(evaluate)


def embed(
    dataset: Path = DATASET,
    overrides: list[str] = OVERRIDES,
    out: Path = OUT,
    config: Path = CONFIG,
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Turn items into vectors; a killed call goes on where it was, processes share the work."""
    from genrec.artifacts import load_artifact
    from genrec.data import Dataset
    from genrec.features import FEATURES
    from genrec.pipeline import stages
    from genrec.pipeline.processes import make_accelerator
    from genrec.runtime import default_device

    chosen = load_config(config, overrides, data=str(dataset)).features
    loaded, accelerator = Dataset.load(dataset), make_accelerator(device=device)
    extractor = stages.component(FEATURES, chosen)(chosen).for_catalog(loaded.catalog)
    resolved = extractor.resolve()
    together = stages.component(FEATURES, resolved)(resolved).shares_work
    if together or accelerator.is_main_process:
        with default_device(accelerator.device):
            stages.embed(
                out,
                loaded.catalog,
                resolved,
                interactions=loaded.interactions,
                accelerator=accelerator,
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        artifact = load_artifact(out, kind="vectors")
        num_items, width = artifact.arrays["vectors"].shape
        facts = {"items": num_items, "width": width, **resolved.to_dict()}
        _done(as_json, out, artifact.fingerprint, **facts)


def train(
    dataset: Path = DATASET,
    overrides: list[str] = OVERRIDES,
    index: Path = INDEX,
    out: Path = OUT,
    config: Path = CONFIG,
    seed: int = SEED,
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Train a generator on an index; a killed call goes on where it was when run again."""
    from genrec.artifacts import fingerprint, load_artifact
    from genrec.data import Dataset
    from genrec.data.doctor import require_sound
    from genrec.item_index import ItemIndex
    from genrec.pipeline import stages
    from genrec.pipeline.processes import make_accelerator

    resolved = load_config(config, overrides, data=str(dataset))
    loaded = Dataset.load(dataset)
    require_sound(loaded)
    item_index = ItemIndex.load(_part(index, "index"))
    accelerator = make_accelerator(device=device)
    where = [accelerator.device.type, accelerator.num_processes]
    model: Any = resolved.model
    trainer: Any = resolved.trainer
    reads = model.reads(loaded.catalog) | trainer.reads(loaded.catalog)
    parts = [model.to_dict(), trainer.to_dict(), seed, where, *([reads] if reads else [])]
    key = fingerprint(loaded.fingerprint, item_index.fingerprint, *parts)
    stages.train(
        out,
        loaded,
        item_index,
        resolved.model,
        resolved.trainer,
        seed=seed,
        key=key,
        accelerator=accelerator,
        tracking=resolved.tracking,
        tracking_folder=out.with_name(out.name + ".logs"),
        run_name=out.name,
        run_config=resolved.to_dict(),
    )
    if accelerator.is_main_process:
        artifact = load_artifact(out, kind="model")
        training = artifact.extra["training"]
        names = ("best_metric", "best_step", "steps", "epochs", "seconds")
        _done(as_json, out, artifact.fingerprint, **{name: training[name] for name in names})


def calibrate(
    dataset: Path = DATASET,
    overrides: list[str] = OVERRIDES,
    index: Path = INDEX,
    model: Path = typer.Option(..., "--model", help="Folder that `genrec train` wrote."),
    out: Path = typer.Option(..., "--out", help="Bundle folder to write."),
    config: Path = CONFIG,
    cache: Path = CACHE,
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Fit probabilities on the validation split and write the bundle that answers requests."""
    from genrec.artifacts import load_artifact
    from genrec.bundle import mode_name, save_bundle
    from genrec.item_index import ItemIndex
    from genrec.pipeline.run import Run

    run = Run(
        load_config(config, overrides, data=str(dataset)), out=out, cache=cache, device=device
    )
    loaded, index_path = run.dataset(), _part(index, "index")
    item_index, artifact = ItemIndex.load(index_path), load_artifact(model, kind="model")
    valid = {
        mode_name(masked): run.lists(loaded, item_index, artifact, "valid", masked, seed=0)
        for masked in run.config.evaluation.masked
    }
    calibration = run.calibrate(loaded, item_index, artifact, valid, seed=0)
    tokenizer = index / "tokenizer"
    bundle = save_bundle(
        out,
        catalog=loaded.catalog,
        index=index_path,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        model=model,
        calibration=calibration.path,
        extra={"dataset": {"name": loaded.name, "fingerprint": loaded.fingerprint}},
    )
    _done(as_json, out, bundle.fingerprint, **calibration.extra["modes"])


def evaluate(
    bundle: Path = typer.Argument(help="Bundle folder."),
    dataset: Path = DATASET,
    overrides: list[str] = OVERRIDES,
    out: Path = typer.Option(None, "--out", help="Also write results.json here."),
    config: Path = CONFIG,
    cache: Path = CACHE,
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Rank the whole catalogue for every test user, beside the baselines."""
    from genrec.artifacts import write_json_atomic
    from genrec.pipeline.run import Run

    resolved = load_config(config, overrides, data=str(dataset))
    run = Run(resolved, out=bundle.parent, cache=cache, device=device)
    results = run.evaluate_bundle(bundle)
    if out is not None:
        write_json_atomic(out, results)
    if as_json:
        print_json(results)
    else:
        print_results(results)


def _done(as_json: bool, out: Path, fingerprint: str, **facts: Any) -> None:
    if as_json:
        print_json({"path": str(out), "fingerprint": fingerprint, **facts})
        return
    rows = [[name, _short(value)] for name, value in facts.items()]
    print_table(f"{out} ({fingerprint[:12]})", ["", ""], rows)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_short(part) for part in value[:8]) + (" ..." if len(value) > 8 else "")
    return str(value)
