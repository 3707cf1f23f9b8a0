"""A whole run: strings the stages together through the cache and leaves results, report, bundle.

Which stage needs what is written here and nowhere else. Each stage's key holds the fingerprints of
what it reads and the part of the configuration that it uses, so that changing one key runs again
exactly what depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from genrec import runtime
from genrec.artifacts import (
    Artifact,
    file_checksum,
    fingerprint,
    load_artifact,
    read_manifest,
    write_json_atomic,
    write_text_atomic,
)
from genrec.bundle import mode_name, save_bundle
from genrec.calibration import CALIBRATORS
from genrec.config import parse_component
from genrec.data import Catalog, Dataset
from genrec.data.doctor import examine
from genrec.data.interactions import SplitName
from genrec.data.prepare import make_source, prepare
from genrec.data.source import Source
from genrec.errors import DataError
from genrec.features import FEATURES
from genrec.item_index import ItemIndex
from genrec.models.baselines import make_baselines
from genrec.pipeline import calibrating, reporting, results, sample_lists, stages
from genrec.pipeline.cache import StageCache
from genrec.pipeline.config import RunConfig
from genrec.pipeline.finished import FinishedRun
from genrec.tokenizers import TOKENIZERS

log = runtime.get_logger(__name__)

BARRIER_SECONDS = 6 * 3600
# Sections that say where things lie on this machine: not for a bundle that travels.
LOCAL = ("data", "tracking")


@dataclass
class SeedRun:
    """The artifacts of one seed."""

    seed: int
    index: Artifact
    model: Artifact
    test: dict[str, Artifact]
    calibration: Artifact
    tokenizer: Artifact | None = None
    levels: dict[str, Artifact] = field(default_factory=dict)


def make_accelerator(*, device: str | None = None) -> Accelerator:
    """Return the accelerator of this process; long stages of the first process do not time out."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=BARRIER_SECONDS))
    chosen = runtime.choose_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # accelerate takes the current one
    return Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=[waiting])


class Run:
    """One configuration on its way from raw files to a report.

    Args:
        config: checked configuration.
        out: run folder; gets bundle/, results.json, report.html, config.yaml, per_user.parquet.
        cache: folder of the stage cache.
        device: torch device name; None chooses.
    """

    def __init__(
        self, config: RunConfig, *, out: Path, cache: Path, device: str | None = None
    ) -> None:
        self.config, self.out = config, out
        self.features: dict[str, Any] = {}
        self.accelerator = make_accelerator(device=device)
        self.cache = StageCache(
            cache, self.accelerator.wait_for_everyone, self.accelerator.is_main_process
        )

    def execute(self, *, command: str = "") -> dict[str, Any]:
        """Run every stage that is not in the cache; return what results.json holds.

        Args:
            command: how this run was started, for the report.

        Raises:
            DataError: the data checks found errors.
        """
        with runtime.default_device(self.accelerator.device):
            return self._execute(command)

    def _execute(self, command: str) -> dict[str, Any]:
        begun = time.perf_counter()
        dataset = self.dataset()
        findings = self._check(dataset)
        catalog = self.embed(dataset)
        runs = [self.one_seed(dataset, catalog, seed) for seed in self.config.seeds]
        baselines = self.baselines(dataset)
        tokens = self.tokens(dataset, catalog, runs[0])
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_bundle(dataset, runs[0])
        found = self._results(dataset, runs, baselines, begun, catalog.vectors)
        found["features"] = self.features
        found["tokens"] = tokens
        found["doctor"] = [asdict(finding) for finding in findings]
        found["training"] = results.training_curves(runs)
        found["command"] = command
        shown = sample_lists.samples(self.out / "bundle", dataset)
        found["samples"] = [asdict(sample) for sample in shown]
        write_json_atomic(self.out / "results.json", found)
        write_text_atomic(self.out / "config.yaml", self.config.to_yaml())
        results.write_per_user(self.out / "per_user.parquet", self.config, runs, baselines)
        finished = FinishedRun(self.out, found, self.cache.root)
        reporting.write_run_report(finished, dataset=dataset, vectors=catalog.vectors)
        self.accelerator.wait_for_everyone()
        return found

    def _results(
        self,
        dataset: Dataset,
        runs: list[SeedRun],
        baselines: Artifact,
        begun: float,
        vectors: np.ndarray | None = None,
    ) -> dict[str, Any]:
        found = results.assemble(self.config, dataset, runs, baselines, vectors)
        found["timing"] = {
            "seconds": round(time.perf_counter() - begun, 2),
            "stages": self.cache.seconds,
            "reused": sorted(name for name, reused in self.cache.reused.items() if reused),
        }
        return found

    def evaluate_bundle(self, path: Path) -> dict[str, Any]:
        """Evaluate a finished bundle on the configured data set; return what results.json holds.

        Raises:
            MismatchError: the data set's items are not those of the bundle, in its order.
        """
        begun = time.perf_counter()
        dataset = self.dataset()
        load_artifact(path, kind="bundle")
        parts = {name: load_artifact(path / name, kind=name) for name in ("index", "model")}
        index = ItemIndex.load(path / "index")
        stages.check_index(dataset, index)
        lists = {
            mode_name(masked): self.lists(dataset, index, parts["model"], "test", masked, seed=0)
            for masked in self.config.evaluation.masked
        }
        calibration = load_artifact(path / "calibration", kind="calibration")
        run = SeedRun(
            parts["model"].extra.get("seed", 0),
            parts["index"],
            parts["model"],
            lists,
            calibration,
            levels=self.levels(dataset, index, parts["model"], lists, 0, calibration.config),
        )
        return self._results(dataset, [run], self.baselines(dataset), begun)

    # -- stages -------------------------------------------------------------------------------

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

    def _check(self, dataset: Dataset) -> list[Any]:
        findings = examine(dataset)
        for finding in findings:
            if finding.level != "info":
                log.warning("doctor: %s", finding.message)
        errors = [finding.message for finding in findings if finding.level == "error"]
        if errors:
            raise DataError("the data set has errors (see `genrec doctor`):\n" + "\n".join(errors))
        return findings

    def embed(self, dataset: Dataset) -> Catalog:
        """Return the catalogue with its vectors, or without where nothing reads any."""
        catalog = dataset.catalog
        wanted: Any = self.config.tokenizer
        needed = "vectors" in stages.component(TOKENIZERS, wanted)(wanted).needs
        if not needed and not self._baselines_need_vectors():
            log.info("embed: left out, tokenizer %s reads no vectors.", wanted.name)
            self.features = {"name": None}
            return catalog
        chosen: Any = self.config.features
        resolved = stages.component(FEATURES, chosen)(chosen).resolve()
        self.features = resolved.to_dict()
        extractor = stages.component(FEATURES, resolved)(resolved)
        key = {"catalog": catalog.fingerprint, "features": resolved.to_dict()}
        if read := extractor.reads(catalog):
            key["reads"] = read
        if extractor.needs_interactions:
            key["interactions"] = dataset.interactions.training().fingerprint
        artifact = self.cache.get(
            "vectors",
            "vectors",
            key,
            lambda path: stages.embed(
                path,
                catalog,
                resolved,
                interactions=dataset.interactions,
                accelerator=self.accelerator,
            ),
            label="embed",
            together=extractor.shares_work,
        )
        return stages.add_vectors(catalog, artifact)

    def one_seed(self, dataset: Dataset, catalog: Catalog, seed: int) -> SeedRun:
        """Run everything that depends on the seed."""
        tokenizer, index_artifact = self.tokenize(dataset, catalog, seed)
        index = ItemIndex.load(index_artifact.path)
        model = self.train(dataset, index, seed, catalog)
        alternation = getattr(self.config.tokenizer, "alternation", None)
        for number in range(1, 1 + (alternation.rounds if alternation else 0)):
            tokenizer = self.refine(dataset, catalog, tokenizer, index, model, number, seed)
            index_artifact = self.index(dataset, catalog, tokenizer, f"seed {seed}, {number}")
            index = ItemIndex.load(index_artifact.path)
            model = self.train(dataset, index, seed, catalog)
        lists: dict[str, dict[str, Artifact]] = {"valid": {}, "test": {}}
        for split in ("valid", "test"):
            for masked in self.config.evaluation.masked:
                found = self.lists(dataset, index, model, split, masked, seed)
                lists[split][mode_name(masked)] = found
        calibration = self.calibrate(dataset, index, model, lists["valid"], seed)
        levels = self.levels(dataset, index, model, lists["test"], seed)
        return SeedRun(seed, index_artifact, model, lists["test"], calibration, tokenizer, levels)

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
            },
            lambda path: stages.build_index(
                path,
                tokenizer,
                catalog,
                options,
                features=features,
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

    def tokens(self, dataset: Dataset, catalog: Catalog, run: SeedRun) -> dict[str, Any]:
        """Return collision and usage figures of one seed's index (docs/tokenizers.md)."""
        assert run.tokenizer is not None
        training = dataset.interactions.training()
        tokenizer, index = run.tokenizer, ItemIndex.load(run.index.path)
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

    def train(
        self, dataset: Dataset, index: ItemIndex, seed: int, catalog: Catalog | None = None
    ) -> Artifact:
        """Return the trained model; `catalog` is the data set's with its vectors, if any."""
        model: Any = self.config.model
        catalog = dataset.catalog if catalog is None else catalog
        determinants = {
            "dataset": dataset.interactions.fingerprint,
            "index": index.fingerprint,
            "model": self.config.model.to_dict(),
            "trainer": self.config.trainer.to_dict(),
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "seed": seed,
            **model.reads(catalog),
        }
        _, key = self.cache.place("model", determinants)
        return self.cache.get(
            "model",
            "model",
            determinants,
            lambda path: stages.train(
                path,
                dataset,
                index,
                self.config.model,
                self.config.trainer,
                seed=seed,
                key=key,
                accelerator=self.accelerator,
                catalog=catalog,
                tracking=self.config.tracking,
                tracking_folder=self.out / f"seed-{seed}",
                run_name=f"{self.config.name}-seed-{seed}",
                run_config={
                    **self.config.to_dict(),
                    "fingerprints": {
                        "dataset": dataset.fingerprint,
                        "index": index.fingerprint,
                    },
                    "seed": seed,
                },
            ),
            label=f"train (seed {seed})",
            together=True,
        )

    def lists(
        self,
        dataset: Dataset,
        index: ItemIndex,
        model: Artifact,
        split: SplitName,
        masked: bool,
        seed: int,
    ) -> Artifact:
        """Return the ranked lists of a split's users."""
        width, scoring = self.config.decoding.width, self.config.decoding.scoring
        return self.cache.get(
            "lists",
            "lists",
            {
                "model": model.fingerprint,
                "dataset": dataset.interactions.fingerprint,
                "split": split,
                "masked": masked,
                "width": width,
                **({} if scoring == "renormalized" else {"scoring": scoring}),
            },
            lambda path: stages.make_lists(
                path,
                dataset,
                index,
                model,
                split=split,
                masked=masked,
                width=width,
                scoring=scoring,
                batch_size=self.config.decoding.batch_size,
                accelerator=self.accelerator,
            ),
            label=f"search {split}, {mode_name(masked)} (seed {seed})",
            together=True,
        )

    def levels(
        self,
        dataset: Dataset,
        index: ItemIndex,
        model: Artifact,
        lists: Mapping[str, Artifact],
        seed: int,
        calibration: Mapping[str, Any] | None = None,
    ) -> dict[str, Artifact]:
        """Return, by mode, the level log-probabilities of lists; {} where nothing reads them.

        `calibration` is the section of a finished calibration; default the configured one.
        """
        section = dict(calibration or self.config.calibration.to_dict())
        cls, config = parse_component(CALIBRATORS, section, path="calibration")
        if "level_logprobs" not in cls(config).needs:
            return {}
        return {
            mode: self.cache.get(
                "levels",
                "levels",
                {"lists": found.fingerprint},
                lambda path, found=found: calibrating.score_levels(  # type: ignore[misc]
                    path, dataset, index, model, found
                ),
                label=f"levels {found.extra['split']}, {mode} (seed {seed})",
            )
            for mode, found in lists.items()
        }

    def calibrate(
        self,
        dataset: Dataset,
        index: ItemIndex,
        model: Artifact,
        valid: Mapping[str, Artifact],
        seed: int,
    ) -> Artifact:
        """Return the calibrators fitted on validation lists."""
        config, decoding = self.config.calibration, self.config.decoding
        levels = self.levels(dataset, index, model, valid, seed)
        return self.cache.get(
            "calibration",
            "calibration",
            {
                "lists": {mode: artifact.fingerprint for mode, artifact in valid.items()},
                "levels": {mode: artifact.fingerprint for mode, artifact in levels.items()},
                "calibration": config.to_dict(),
            },
            lambda path: calibrating.calibrate(
                path,
                valid,
                config,
                decoding.width,
                decoding.scoring,
                dataset=dataset,
                levels=levels,
            ),
            label=f"calibrate (seed {seed})",
        )

    def baselines(self, dataset: Dataset) -> Artifact:
        """Return the baselines' per-user results."""
        options = self.config.evaluation
        chosen = make_baselines(options.baselines)
        catalog, read = dataset.catalog, {}
        if self._baselines_need_vectors():
            catalog = self.embed(dataset)
            read["vectors"] = fingerprint(catalog.vectors)
        return self.cache.get(
            "baselines",
            "baselines",
            {
                "dataset": dataset.interactions.fingerprint,
                "baselines": {name: part.config.to_dict() for name, part in chosen.items()},
                "ks": list(options.ks),
                "masked": list(options.masked),
                **read,
            },
            lambda path: stages.baselines(
                path, dataset, options.baselines, options.ks, options.masked, catalog
            ),
        )

    def _baselines_need_vectors(self) -> bool:
        chosen = make_baselines(self.config.evaluation.baselines).values()
        return any(baseline.needs_vectors for baseline in chosen)

    def _write_bundle(self, dataset: Dataset, run: SeedRun) -> None:
        """Write the bundle of the first seed, unless it is there already."""
        assert run.tokenizer is not None
        parts = {
            "index": run.index,
            "tokenizer": run.tokenizer,
            "model": run.model,
            "calibration": run.calibration,
        }
        extra = {
            "name": self.config.name,
            "seed": run.seed,
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            "config": {k: v for k, v in self.config.to_dict().items() if k not in LOCAL},
            "parts": {name: part.fingerprint for name, part in parts.items()},
        }
        path = self.out / "bundle"
        same = ("parts", "dataset", "config")
        if path.exists():
            old = read_manifest(path)["extra"]
            if all(old.get(name) == extra[name] for name in same):
                return
        save_bundle(
            path,
            catalog=dataset.catalog,
            extra=extra,
            **{name: part.path for name, part in parts.items()},
        )
