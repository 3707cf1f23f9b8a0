"""The stages one by one: each takes artifacts or arrays, writes one artifact, and knows no cache.

`genrec.pipeline.run` strings them together; the commands of the same names call them alone.
Lists are in `genrec.pipeline.listing`, baselines in `genrec.pipeline.baseline_lists`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from genrec import runtime
from genrec.artifacts import Artifact, save_artifact
from genrec.bundle import build_model, load_model, save_model
from genrec.config import StrictConfig, parse_component
from genrec.data import Catalog, Dataset, Interactions
from genrec.decoding import CSRIndex
from genrec.errors import MismatchError, UserError
from genrec.features import FEATURES
from genrec.features.base import Block, FeatureExtractor, Workplace
from genrec.item_index import ItemIndex
from genrec.models.scratch import ScratchBackbone
from genrec.pipeline import indexing
from genrec.pipeline.indexing import IndexConfig
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.diagnostics.figures import diagnose
from genrec.trainers import TRAINERS
from genrec.trainers.tracking import Trackers, TrackingConfig, open_trackers
from genrec.trainers.validation import Validator

log = runtime.get_logger(__name__)


def component(registry: Mapping[str, str], config: Any) -> Any:
    """Return the class registered under a checked configuration's name."""
    return runtime.lookup(registry, config.name, what="name")


def with_seed(config: StrictConfig, seed: int) -> StrictConfig:
    """Return a configuration whose own `seed`, where it has one, is moved by the run's seed."""
    own = getattr(config, "seed", None)
    return config if own is None else config.model_copy(update={"seed": own + seed})


# -- vectors and index ------------------------------------------------------------------------


def embed(
    path: Path,
    catalog: Catalog,
    config: Any,
    *,
    interactions: Interactions | None = None,
    accelerator: Accelerator | None = None,
    parts: Sequence[np.ndarray] = (),
) -> None:
    """Write the vectors of a catalogue (artifact "vectors"); several processes share the work.

    Finished parts lie in `<path>.work` until the vectors are written; a killed call goes on from
    there.

    Args:
        path: where to.
        catalog: items.
        config: a resolved configuration of an extractor.
        interactions: of the data set; their training part is read where the extractor needs it.
        accelerator: the processes that call this; None: this one alone.
        parts: vectors of the extractor's parts, where they are made already.
    """
    extractor: FeatureExtractor = component(FEATURES, config)(config)
    work, upstream = path.with_name(f"{path.name}.work"), {"catalog": catalog.fingerprint}
    place = Workplace(work)
    if accelerator is not None and (extractor.shares_work or parts):
        ranks = (accelerator.process_index, accelerator.num_processes)
        place = Workplace(work, *ranks, accelerator.wait_for_everyone)
    training = None
    if extractor.needs_interactions and interactions is not None:
        training = interactions.training()
        upstream["interactions"] = training.fingerprint
    if parts:
        vectors = extractor.join(catalog, parts, training)
    else:
        vectors = extractor.embed(catalog, training, place)
    place.barrier()  # all have read the parts before the first process removes them
    if place.index == 0:
        save_artifact(
            path,
            kind="vectors",
            arrays={"vectors": np.asarray(vectors, np.float32), **extractor.fitted()},
            config=config.to_dict(),
            upstream=upstream,
            extra={"blocks": [asdict(block) for block in extractor.blocks]},
        )
        shutil.rmtree(work, ignore_errors=True)


def add_vectors(catalog: Catalog, vectors: Artifact) -> Catalog:
    """Return the catalogue with vectors that were made from it; it knows which are content.

    Raises:
        MismatchError: made from another catalogue (both fingerprints).
    """
    vectors.require_upstream("catalog", catalog.fingerprint)
    return with_artifact(catalog, vectors)


def with_artifact(catalog: Catalog, vectors: Artifact) -> Catalog:
    """Return the catalogue with the vectors of an artifact, one per item, and which are content."""
    vectors_NE = vectors.arrays["vectors"]
    extractor_type, config = parse_component(FEATURES, vectors.config, path="features")
    blocks = [Block(**block) for block in vectors.extra.get("blocks", ())]
    columns = extractor_type(config).content_columns(vectors_NE.shape[1], blocks)
    return catalog.with_vectors(vectors_NE, columns)


def fitted_features(vectors: Artifact) -> dict[str, np.ndarray]:
    """Return what the extractor fitted when it made these vectors."""
    return {name: array for name, array in vectors.arrays.items() if name != "vectors"}


def fit_tokenizer(
    path: Path, catalog: Catalog, interactions: Interactions, config: Any, upstream: dict[str, str]
) -> None:
    """Fit a tokenizer on training interactions and write it (artifact "tokenizer")."""
    tokenizer = component(TOKENIZERS, config)(config)
    tokenizer.fit(catalog, interactions.training()).save(path, upstream=upstream)


def refine_tokenizer(
    path: Path,
    tokenizer: Artifact,
    index: ItemIndex,
    model: Artifact,
    catalog: Catalog,
    interactions: Interactions,
    number: int,
) -> None:
    """Train a textual tokenizer's generator through a recommender and write it ("tokenizer")."""
    from genrec.tokenizers.textual import Textual  # imports transformers' T5
    from genrec.trainers.alternation import refine

    fitted = ItemTokenizer.load(tokenizer.path)
    if not isinstance(fitted, Textual):
        raise UserError(f"alternation: {fitted.name!r} has no generator; expected textual ids.")
    network = load_model(model.path, index)
    if not isinstance(network, ScratchBackbone):
        raise UserError(
            f"alternation: got a {type(network).__name__}, expected a backbone with a token table "
            "of its own. Set model.name=encoder_decoder or model.name=decoder_only."
        )
    better, loss = refine(fitted, index, network, catalog, interactions, number=number)
    log.info("round %d: the generator's loss is %.3f nats per target", number, loss)
    better.save(path, upstream={"tokenizer": tokenizer.fingerprint, "model": model.fingerprint})


def build_index(
    path: Path,
    tokenizer: Artifact,
    catalog: Catalog,
    options: IndexConfig,
    *,
    features: Mapping[str, Any] | None = None,
    fitted: Mapping[str, np.ndarray] | None = None,
    interactions: Interactions | None = None,
) -> None:
    """Write the index of a catalogue, with what placing new items takes (artifact "index")."""
    training = None if interactions is None else interactions.training()
    built = indexing.build(
        ItemTokenizer.load(tokenizer.path),
        catalog,
        options,
        features=features,
        fitted=fitted,
        interactions=training,
    )
    built.save(path, upstream={"tokenizer": tokenizer.fingerprint})


def write_token_figures(
    path: Path,
    tokenizer: Artifact,
    index: ItemIndex,
    catalog: Catalog,
    interactions: Interactions,
) -> None:
    """Write the collision and usage figures of an index (artifact "tokens").

    Args:
        path: where to.
        tokenizer: fitted.
        index: built with it.
        catalog: all items, with vectors where the tokenizer reads them.
        interactions: training interactions, for agreement with co-occurrence.
    """
    figures = diagnose(ItemTokenizer.load(tokenizer.path), index, catalog, interactions)
    save_artifact(path, kind="tokens", upstream={"index": index.fingerprint}, extra=figures)


# -- training ---------------------------------------------------------------------------------


def train(
    path: Path,
    dataset: Dataset,
    index: ItemIndex,
    model_config: StrictConfig,
    trainer_config: Any,
    *,
    seed: int,
    key: str,
    accelerator: Accelerator,
    catalog: Catalog | None = None,
    tracking: TrackingConfig | None = None,
    tracking_folder: Path | None = None,
    run_name: str = "train",
    run_config: Mapping[str, Any] | None = None,
) -> None:
    """Train a generator and write it (artifact "model"); every process takes part.

    `catalog` is that of the data set with vectors, for models that start from them.

    Checkpoints lie in `<path>.work` until the model is written; a killed call goes on from there.
    """
    check_index(dataset, index)
    trainer = component(TRAINERS, trainer_config)(trainer_config, seed=seed)
    training = dataset.interactions.training()
    model_config = trainer.sized(model_config, training)
    model = build_model(model_config.to_dict(), index, seed=seed)
    model.meet_users(training.user_names, np.diff(training.offsets) > 0)
    trainer.start(model, index, dataset.catalog if catalog is None else catalog)
    counts_N = np.bincount(training.item_rows, minlength=len(index))
    model.meet_items(counts_N, more=trainer.goes_on)
    model.to(accelerator.device)
    constraint = CSRIndex.from_index(index).to(accelerator.device)
    examples = trainer.examples(model, training)
    validation = dataset.interactions.examples("valid")
    validator = (
        Validator(
            validation,
            constraint,
            num_users=trainer_config.validation_users,
            width=trainer_config.validation_width,
            seed=seed,
        )
        if len(validation)
        else None
    )
    work = path.with_name(path.name + ".work")

    def trackers(resumed: int | None) -> Trackers:
        if tracking is None or tracking_folder is None:
            return Trackers([])
        return open_trackers(
            tracking,
            tracking_folder,
            name=run_name,
            config=dict(run_config or {}),
            resume_step=resumed,
        )

    result = trainer.fit(
        model,
        examples,
        validator,
        accelerator=accelerator,
        folder=work,
        key=key,
        open_trackers=trackers,
    )
    if accelerator.is_main_process:
        extra = {
            "training": asdict(result),
            "trainer": trainer_config.to_dict(),
            "seed": seed,
            "dataset": dataset.fingerprint,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        save_model(path, model, index, extra=extra)
        shutil.rmtree(work, ignore_errors=True)


def check_index(dataset: Dataset, index: ItemIndex) -> None:
    """Raise `MismatchError` unless the index lists the items of the data set in its order."""
    if dataset.catalog.item_ids != list(index.item_ids):
        raise MismatchError(
            f"the index ({len(index)} items, {index.fingerprint}) does not list the items of data "
            f"set {dataset.name!r} ({len(dataset.catalog)} items, {dataset.fingerprint}) in its "
            "order. Build the index from this data set: `genrec tokenize`."
        )
