"""Bundle: the one folder that answers requests (catalogue, index, tokenizer, model, calibration).

It saves and loads the parts and checks that they belong together. How requests are answered is in
`genrec.recommender`; how the parts come about is in `genrec.pipeline`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec import runtime
from genrec.artifacts import (
    Artifact,
    atomic_directory,
    load_artifact,
    save_artifact,
    write_artifact,
)
from genrec.calibration import CALIBRATORS
from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.dataset import CATALOG
from genrec.decoding.protocol import Scoring
from genrec.errors import MismatchError
from genrec.item_index import ItemIndex
from genrec.models import BACKBONES
from genrec.models.base import Backbone
from genrec.weights import load_model_arrays, model_arrays

MASKED, UNMASKED = "masked", "unmasked"


def mode_name(exclude_seen: bool) -> str:
    """Return the name under which a calibrator for this way of searching is kept."""
    return MASKED if exclude_seen else UNMASKED


def build_model(section: Mapping[str, Any], index: ItemIndex, *, seed: int) -> Backbone:
    """Return a backbone with fresh weights for an index.

    Args:
        section: the `model` section of a configuration.
        index: gives the tokens.
        seed: of the initial weights.
    """
    cls, config = parse_component(BACKBONES, dict(section), path="model")
    runtime.seed_everything(seed)
    return cls.from_index(config, index)


def save_model(
    path: Path, model: Backbone, index: ItemIndex, *, extra: Mapping[str, Any] | None = None
) -> Artifact:
    """Write weights and configuration; the index's fingerprint goes along."""
    return save_artifact(
        path,
        kind="model",
        arrays=model_arrays(model),
        config=model.config.to_dict(),
        upstream={"index": index.fingerprint},
        extra=extra,
    )


def load_model(path: str | Path, index: ItemIndex) -> Backbone:
    """Read a model that was trained on this very index.

    Raises:
        ArtifactError: missing or damaged.
        MismatchError: trained on another index (both fingerprints in the message).
    """
    artifact = load_artifact(path, kind="model")
    artifact.require_upstream("index", index.fingerprint)
    model = build_model(artifact.config, index, seed=0)
    load_model_arrays(model, artifact.arrays)
    return model.eval()


def save_calibration(
    path: Path,
    calibrators: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    width: int,
    scoring: Scoring = "renormalized",
) -> Artifact:
    """Write the fitted calibrators, one for each way of searching ("masked", "unmasked")."""
    return save_artifact(
        path,
        kind="calibration",
        config=config,
        extra={
            "width": width,
            "scoring": scoring,
            "modes": {name: c.state() for name, c in calibrators.items()},
        },
    )


def load_calibration(path: str | Path) -> tuple[dict[str, Any], int, Scoring]:
    """Return the calibrators by mode, and the beam width and scoring that they were fitted at."""
    artifact = load_artifact(path, kind="calibration")
    cls, config = parse_component(CALIBRATORS, artifact.config, path="calibration")
    extra = artifact.extra
    modes = {n: cls(config).load_state(state) for n, state in extra["modes"].items()}
    return modes, extra["width"], extra.get("scoring", "renormalized")


@dataclass(frozen=True)
class Bundle:
    """The loaded parts."""

    catalog: Catalog
    index: ItemIndex
    model: Backbone
    calibrators: dict[str, Any]
    width: int
    scoring: Scoring
    artifact: Artifact


def save_bundle(
    path: str | Path,
    *,
    catalog: Catalog,
    index: Path,
    tokenizer: Path | None,
    model: Path,
    calibration: Path,
    extra: Mapping[str, Any] | None = None,
) -> Artifact:
    """Copy the parts into one checksummed folder, atomically.

    Args:
        path: where to.
        catalog: items in the index's row order.
        index: index artifact.
        tokenizer: tokenizer artifact, for coding new items; optional.
        model: model artifact; must be trained on `index`.
        calibration: calibration artifact.
        extra: facts to record (data set, seed, ...).
    """
    loaded = ItemIndex.load(index)
    load_artifact(model, kind="model").require_upstream("index", loaded.fingerprint)
    _check_catalog(catalog, loaded)
    parts = {"index": index, "tokenizer": tokenizer, "model": model, "calibration": calibration}
    with atomic_directory(path) as folder:
        for name, source in parts.items():
            if source is not None:
                shutil.copytree(source, folder / name, copy_function=shutil.copyfile)
        catalog.table.write_parquet(folder / CATALOG)
        manifest = write_artifact(
            folder, kind="bundle", upstream={"index": loaded.fingerprint}, extra=extra
        )
    return Artifact(Path(path), manifest)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle, checking every byte and that the parts fit."""
    path = Path(path)
    artifact = load_artifact(path, kind="bundle")
    index = ItemIndex.load(path / "index")
    artifact.require_upstream("index", index.fingerprint)
    catalog = Catalog(pl.read_parquet(path / CATALOG))
    _check_catalog(catalog, index)
    calibrators, width, scoring = load_calibration(path / "calibration")
    model = load_model(path / "model", index)
    return Bundle(catalog, index, model, calibrators, width, scoring, artifact)


def _check_catalog(catalog: Catalog, index: ItemIndex) -> None:
    if catalog.item_ids != list(index.item_ids):
        raise MismatchError(
            f"the catalogue ({len(catalog)} items, {catalog.fingerprint}) does not list the items "
            f"of the index ({len(index)} items, {index.fingerprint}) in its order. Use the "
            "catalogue that the index was built from."
        )
