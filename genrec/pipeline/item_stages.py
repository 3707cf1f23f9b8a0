"""What does a run make of its items? Data set, vectors, tokenizer, index, each through the cache.

The key of each stage holds the fingerprints of what it reads and the part of the configuration that
it uses, so that changing one key runs again exactly what depends on it. Networks and lists are in
`genrec.pipeline.model_stages`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.artifacts import Artifact, file_checksum, fingerprint
from genrec.data import Catalog, Dataset
from genrec.data.prepare import make_source, prepare
from genrec.data.source import Source
from genrec.features import FEATURES
from genrec.features.base import FeatureExtractor
from genrec.item_index import ItemIndex
from genrec.models.baselines import make_baselines
from genrec.pipeline import stages
from genrec.pipeline.cache import StageCache
from genrec.pipeline.config import RunConfig
from genrec.pipeline.processes import make_accelerator
from genrec.tokenizers import TOKENIZERS

log = runtime.get_logger(__name__)


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    return fingerprint(*(part for pair in sorted(arrays.items()) for part in pair))


class ItemStages:
    """Stages up to the index of the catalogue.

    Args:
        config: checked configuration.
        out: run folder.
        cache: folder of the stage cache.
        device: torch device name; None chooses.
    """

    def __init__(
        self, config: RunConfig, *, out: Path, cache: Path, device: str | None = None
    ) -> None:
        self.config, self.out = config, out
        self.features: dict[str, Any] = {}
        self.fitted_features: dict[str, np.ndarray] = {}
        self.accelerator = make_accelerator(device=device)
        self.cache = StageCache(
            cache, self.accelerator.wait_for_everyone, self.accelerator.is_main_process
        )

    def dataset(self) -> Dataset:
        """Load the prepared data set, preparing it first where a source is configured."""
        if self.config.data.dataset is not None:
            return Dataset.load(self.config.data.dataset)
        assert self.config.source is not None
        source, options = make_source(self.config.source.to_dict()), self.config.data.prepare
        artifact = self.cache.get(
            "dataset",
            "dataset",
            {
                "source": self.config.source.to_dict()["name"],
                "options": source.options(),
                "files": self._checksums(source),
                "prepare": options.to_dict(),
            },
            lambda path: prepare(source, options, path),
            label="prepare",
        )
        return Dataset.load(artifact.path)

    @staticmethod
    def _checksums(source: Source) -> dict[str, str]:
        for file in source.files():
            file.check()
        return {file.name: file_checksum(file.path) for file in source.files()}

    def embed(self, dataset: Dataset) -> Catalog:
        """Return the catalogue with its vectors, or without where nothing reads any."""
        catalog = dataset.catalog
        wanted: Any = self.config.tokenizer
        model: Any = self.config.model
        needed = "vectors" in stages.component(TOKENIZERS, wanted)(wanted).needs
        needed = needed or model.needs_vectors
        if not needed and not self._baselines_need_vectors():
            log.info("embed: left out, %s and %s read no vectors.", wanted.name, model.name)
            self.features, self.fitted_features = {"name": None}, {}
            return catalog
        chosen: Any = self.config.features
        extractor = stages.component(FEATURES, chosen)(chosen).for_catalog(catalog)
        resolved = extractor.resolve()
        self.features = resolved.to_dict()
        vectors = self._vectors(dataset, resolved, "embed")
        self.fitted_features = stages.fitted_features(vectors)
        return stages.add_vectors(catalog, vectors)

    def _vectors(self, dataset: Dataset, resolved: Any, label: str) -> Artifact:
        """Return the vectors of an extractor; the parts of a fusion are artifacts of their own.

        So texts are read once, whatever else they are put together with.
        """
        extractor: FeatureExtractor = stages.component(FEATURES, resolved)(resolved)
        key = {"catalog": dataset.catalog.fingerprint, "features": resolved.to_dict()}
        if read := extractor.reads(dataset.catalog):
            key["reads"] = read
        if extractor.needs_interactions:
            key["interactions"] = dataset.interactions.training().fingerprint

        def build(path: Path) -> None:
            parts = [
                self._vectors(dataset, part.config, f"{label} ({part.config.name})")
                for part in extractor.parts
            ]
            stages.embed(
                path,
                dataset.catalog,
                resolved,
                interactions=dataset.interactions,
                accelerator=self.accelerator,
                parts=[part.arrays["vectors"] for part in parts],
            )

        together = extractor.shares_work or bool(extractor.parts)
        return self.cache.get("vectors", "vectors", key, build, label=label, together=together)

    def _baselines_need_vectors(self) -> bool:
        chosen = make_baselines(self.config.evaluation.baselines).values()
        return any(baseline.needs_vectors for baseline in chosen)

    def tokenize(self, dataset: Dataset, catalog: Catalog, seed: int) -> tuple[Artifact, Artifact]:
        """Return the fitted tokenizer and the index of the catalogue."""
        config = stages.with_seed(self.config.tokenizer, seed)
        upstream = {
            "catalog": catalog.fingerprint,
            "interactions": dataset.interactions.training().fingerprint,
        }
        if catalog.vectors is not None:
            upstream["vectors"] = fingerprint(catalog.vectors)
        tokenizer = self.cache.get(
            "tokenizer",
            "tokenizer",
            {**upstream, "tokenizer": config.to_dict()},
            lambda path: stages.fit_tokenizer(
                path, catalog, dataset.interactions, config, upstream
            ),
            label=f"tokenize (seed {seed})",
        )
        return tokenizer, self.index(dataset, catalog, tokenizer, f"seed {seed}")

    def index(
        self, dataset: Dataset, catalog: Catalog, tokenizer: Artifact, label: str
    ) -> Artifact:
        """Return the index that a tokenizer gives the catalogue."""
        options, features = self.config.index, dict(self.features)
        fitted = dict(self.fitted_features)
        return self.cache.get(
            "index",
            "index",
            {
                "catalog": catalog.fingerprint,
                "vectors": None if catalog.vectors is None else fingerprint(catalog.vectors),
                "interactions": dataset.interactions.training().fingerprint,
                "tokenizer": tokenizer.fingerprint,
                "options": options.to_dict(),
                "features": features,
                **({"fitted": _fingerprint(fitted)} if fitted else {}),
            },
            lambda path: stages.build_index(
                path,
                tokenizer,
                catalog,
                options,
                features=features,
                fitted=fitted,
                interactions=dataset.interactions,
            ),
            label=f"index ({label})",
        )

    def refine(
        self,
        dataset: Dataset,
        catalog: Catalog,
        tokenizer: Artifact,
        index: ItemIndex,
        model: Artifact,
        number: int,
        seed: int,
    ) -> Artifact:
        """Return a tokenizer whose generator has learned from the recommender (IDGenRec)."""
        return self.cache.get(
            "tokenizer",
            "tokenizer",
            {"tokenizer": tokenizer.fingerprint, "model": model.fingerprint, "round": number},
            lambda path: stages.refine_tokenizer(
                path, tokenizer, index, model, catalog, dataset.interactions, number
            ),
            label=f"alternate (seed {seed}, {number})",
        )

    def tokens(
        self, dataset: Dataset, catalog: Catalog, tokenizer: Artifact, built: Artifact
    ) -> dict[str, Any]:
        """Return collision and usage figures of an index (docs/tokenizers.md)."""
        training, index = dataset.interactions.training(), ItemIndex.load(built.path)
        figures = self.cache.get(
            "tokens",
            "tokens",
            {
                "tokenizer": tokenizer.fingerprint,
                "index": index.fingerprint,
                "interactions": training.fingerprint,
            },
            lambda path: stages.write_token_figures(path, tokenizer, index, catalog, training),
        )
        return dict(figures.extra)
