"""`genrec tokenize`: fit a tokenizer and build an index, or add items to an index that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from genrec.cli.common import CONFIG, DEVICE, JSON, OVERRIDES, load_config, print_json


def tokenize(
    dataset: Path = typer.Argument(
        None, help="Folder that `genrec prepare` wrote (not with --add)."
    ),
    overrides: list[str] = OVERRIDES,
    vectors: Path = typer.Option(
        None, "--vectors", help="Folder that `genrec embed` wrote; with --add also a file."
    ),
    out: Path = typer.Option(
        None, "--out", help="Folder to write; with --add the default is the folder of --index."
    ),
    config: Path = CONFIG,
    seed: int = typer.Option(1, "--seed", help="Random seed."),
    add: Path = typer.Option(
        None, "--add", help="New items: csv, tsv, parquet or jsonl with a column item_id."
    ),
    index: Path = typer.Option(
        None, "--index", help="With --add: bundle, or folder that `genrec tokenize` wrote."
    ),
    skip: bool = typer.Option(False, "--skip", help="With --add: leave out what cannot be placed."),
    device: str = DEVICE,
    as_json: bool = JSON,
) -> None:
    """Fit a tokenizer and give every item its codes, or code new items (--add)."""
    from genrec.runtime import choose_device, default_device

    with default_device(choose_device(device)):
        if add is not None:
            report = _add(
                dataset, overrides, add=add, index=index, vectors=vectors, out=out, skip=skip
            )
        else:
            report = _fit(dataset, overrides, vectors=vectors, out=out, config=config, seed=seed)
    if as_json:
        print_json(report)
        return
    from genrec.cli.tokens import print_added, print_token_report

    if add is not None:
        print_added(report)
    else:
        typer.echo(f"{report['path']} (index {report['fingerprint'][:12]})")
        print_token_report(report)


def _fit(
    dataset: Path | None,
    overrides: list[str] | None,
    *,
    vectors: Path | None,
    out: Path | None,
    config: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Write OUT/tokenizer and OUT/index; return the figures of the index."""
    from genrec.artifacts import fingerprint, load_artifact
    from genrec.data import Dataset
    from genrec.errors import UserError
    from genrec.item_index import ItemIndex
    from genrec.pipeline import stages
    from genrec.tokenizers import TOKENIZERS
    from genrec.tokenizers.base import ItemTokenizer
    from genrec.tokenizers.diagnostics.figures import diagnose

    if dataset is None or out is None:
        raise UserError(
            "tokenize: got no data set or no --out. Expected `genrec tokenize DATASET --vectors "
            "DIR --out DIR`, or `genrec tokenize --add ITEMS --index DIR`."
        )
    resolved = load_config(config, overrides, data=str(dataset))
    loaded, features, fitted = Dataset.load(dataset), None, None
    catalog, training = loaded.catalog, loaded.interactions.training()
    chosen = stages.with_seed(resolved.tokenizer, seed)
    upstream = {"catalog": catalog.fingerprint, "interactions": training.fingerprint}
    needs = stages.component(TOKENIZERS, chosen)(chosen).needs
    if vectors is None and "vectors" in needs:
        raise UserError(
            f"tokenize: tokenizer {resolved.tokenizer.name!r} needs item vectors. Give --vectors "
            "DIR, the folder that `genrec embed` wrote."
        )
    if vectors is not None and "vectors" in needs:
        artifact = load_artifact(vectors, kind="vectors")
        catalog, features = stages.add_vectors(catalog, artifact), artifact.config
        fitted = stages.fitted_features(artifact)
        upstream["vectors"] = fingerprint(catalog.vectors)
    stages.fit_tokenizer(out / "tokenizer", catalog, loaded.interactions, chosen, upstream)
    tokenizer = load_artifact(out / "tokenizer", kind="tokenizer")
    stages.build_index(
        out / "index",
        tokenizer,
        catalog,
        resolved.index,
        features=features,
        fitted=fitted,
        interactions=loaded.interactions,
    )
    built = ItemIndex.load(out / "index")
    figures = diagnose(ItemTokenizer.load(tokenizer.path), built, catalog, training)
    return {
        "path": str(out),
        "fingerprint": built.fingerprint,
        "policy": resolved.index.collisions,
        **figures,
    }


def _add(
    dataset: Path | None,
    overrides: list[str] | None,
    *,
    add: Path,
    index: Path | None,
    vectors: Path | None,
    out: Path | None,
    skip: bool,
) -> dict[str, Any]:
    from genrec.errors import UserError
    from genrec.pipeline.growth import add_items
    from genrec.pipeline.index_folder import read_items

    if index is None or dataset is not None or overrides:
        raise UserError(
            "tokenize --add: expected `genrec tokenize --add ITEMS --index DIR`, with neither a "
            "data set nor overrides: the tokenizer and the policy of the index are frozen."
        )
    return add_items(index, read_items(add), vectors=vectors, out=out, skip=skip)
