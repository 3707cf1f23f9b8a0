"""Bundle: the one folder that answers requests (catalogue, index, tokenizer, model, calibration).

It saves and loads the parts and checks that they belong together. How requests are answered is in
`genrec.recommender`; how the parts come about is in `genrec.pipeline`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from genrec.errors import MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models import BACKBONES
from genrec.models.base import Backbone
from genrec.weights import load_model_arrays, model_arrays

BASE_ENVIRONMENT = "GENREC_BASE"
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
    """Write weights and configuration; the index's fingerprint goes along.

    Of a model that stands on another one, what was trained is written, and which base it needs.
    """
    facts = model.facts()
    return save_artifact(
        path,
        kind="model",
        arrays=model_arrays(model),
        config=model.config.to_dict(),
        upstream={"index": index.fingerprint},
        extra={**(extra or {}), "backbone": facts} if facts else extra,
    )


def load_model(path: str | Path, index: ItemIndex, *, base: str | None = None) -> Backbone:
    """Read a model that was trained on this very index.

    Args:
        path: model artifact.
        index: the index.
        base: where the language model lies that the model stands on, if not where it was trained
            from; default $GENREC_BASE.

    Raises:
        ArtifactError: missing or damaged.
        MismatchError: trained on another index or another base (both fingerprints in the message).
    """
    artifact = load_artifact(path, kind="model")
    artifact.require_upstream("index", index.fingerprint)
    cls, config = parse_component(BACKBONES, artifact.config, path="model")
    facts = artifact.extra.get("backbone", {})
    if facts.get("fingerprint"):
        base = base or os.environ.get(BASE_ENVIRONMENT)
    runtime.seed_everything(0)
    model: Backbone = cls.for_saved(config, index, facts, base=base)
    load_model_arrays(model, _with_new_items(artifact, model, len(index)))
    return model.eval()


def history_of(artifact: Artifact) -> int:
    """Return how many items of a history a saved model reads at most."""
    config: Any = parse_component(BACKBONES, artifact.config, path="model")[1]
    limit: int = config.max_history
    return limit


def _with_new_items(artifact: Artifact, model: Backbone, num_items: int) -> dict[str, np.ndarray]:
    """Return a model's arrays; after `genrec tokenize --add`, with zeros for the added items."""
    arrays = dict(artifact.arrays)
    if "trained_on_index" not in artifact.extra:
        return arrays
    for name in set(model.item_tables) & set(arrays):
        added = num_items - len(arrays[name])
        arrays[name] = np.pad(arrays[name], ((0, added), (0, 0)))  # an index grows at its end
    return arrays


def save_calibration(
    path: Path,
    calibrators: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    width: int,
    scoring: Scoring = "renormalized",
    fitted: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write the fitted calibrators, one for each way of searching ("masked", "unmasked").

    Args:
        path: where to.
        calibrators: by mode; their states are JSON and stand in the manifest.
        config: the `calibration` section.
        width: beam width of the lists that they were fitted on.
        scoring: what the log-probabilities of these are among.
        fitted: by mode, on which lists, users and period.
    """
    return save_artifact(
        path,
        kind="calibration",
        config=config,
        extra={
            "width": width,
            "scoring": scoring,
            "modes": {name: c.state() for name, c in calibrators.items()},
            "fitted": dict(fitted or {}),
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


def load_bundle(path: str | Path, *, base: str | None = None) -> Bundle:
    """Read a bundle, checking every byte and that the parts fit.

    Args:
        path: the bundle.
        base: see `load_model`.
    """
    path = Path(path)
    artifact = load_artifact(path, kind="bundle")
    index = ItemIndex.load(path / "index")
    artifact.require_upstream("index", index.fingerprint)
    catalog = Catalog(pl.read_parquet(path / CATALOG))
    _check_catalog(catalog, index)
    calibrators, width, scoring = load_calibration(path / "calibration")
    model = load_model(path / "model", index, base=base)
    return Bundle(catalog, index, model, calibrators, width, scoring, artifact)


def merge_bundle(path: str | Path, out: str | Path, *, base: str | None = None) -> Artifact:
    """Write a bundle whose model holds all its weights, from one that stands on a language model.

    Args:
        path: the bundle.
        out: where to.
        base: see `load_model`.

    Raises:
        UserError: a model that stands on no other one, or that cannot be merged (virtual tokens).
    """
    path = Path(path)
    bundle = load_bundle(path, base=base)
    merge = getattr(bundle.model, "merged", None)
    if merge is None:
        raise UserError(
            f"merge: {str(path)!r} holds a {type(bundle.model).__name__}, which stands on no other "
            "model. Use the bundle as it is."
        )
    extra = load_artifact(path / "model", kind="model").extra
    kept = {name: value for name, value in extra.items() if name != "backbone"}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        merged = save_model(model, merge(), bundle.index, extra=kept)
        parts = {**bundle.artifact.extra.get("parts", {}), "model": merged.fingerprint}
        tokenizer = path / "tokenizer"
        return save_bundle(
            out,
            catalog=bundle.catalog,
            index=path / "index",
            tokenizer=tokenizer if tokenizer.is_dir() else None,
            model=model,
            calibration=path / "calibration",
            extra={
                **bundle.artifact.extra,
                "parts": parts,
                "merged_from": bundle.artifact.fingerprint,
            },
        )


def _check_catalog(catalog: Catalog, index: ItemIndex) -> None:
    if catalog.item_ids != list(index.item_ids):
        raise MismatchError(
            f"the catalogue ({len(catalog)} items, {catalog.fingerprint}) does not list the items "
            f"of the index ({len(index)} items, {index.fingerprint}) in its order. Use the "
            "catalogue that the index was built from."
        )
