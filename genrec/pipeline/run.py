"""A whole run: strings the stages together through the cache and leaves results, report, bundle.

The order of the stages and what a finished run writes are here; what each stage reads, and so the
keys of the cache, are in `genrec.pipeline.item_stages` and `genrec.pipeline.model_stages`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.artifacts import (
    Artifact,
    load_artifact,
    read_manifest,
    write_json_atomic,
    write_text_atomic,
)
from genrec.bundle import mode_name, save_bundle
from genrec.data import Catalog, Dataset
from genrec.data.doctor import require_sound
from genrec.item_index import ItemIndex
from genrec.pipeline import reporting, results, sample_lists, stages
from genrec.pipeline.finished import FinishedRun
from genrec.pipeline.model_stages import ModelStages
from genrec.pipeline.tracked_results import track_results

log = runtime.get_logger(__name__)

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


class Run(ModelStages):
    """One configuration on its way from raw files to a report.

    `out` gets bundle/, results.json, report.html, config.yaml and per_user.parquet.
    """

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
        findings = require_sound(dataset)
        catalog = self.embed(dataset)
        runs = [self.one_seed(dataset, catalog, seed) for seed in self.config.seeds]
        baselines = self.baselines(dataset)
        assert runs[0].tokenizer is not None
        tokens = self.tokens(dataset, catalog, runs[0].tokenizer, runs[0].index)
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
        track_results(self.config, self.out, found)
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
            "latency": results.latency(runs),
            "stages": self.cache.seconds,
            "reused": sorted(name for name, reused in self.cache.reused.items() if reused),
        }
        return found

    def evaluate_bundle(self, path: Path) -> dict[str, Any]:
        """Evaluate a finished bundle on the configured data set; return what results.json holds.

        Raises:
            DataError: the data checks found errors.
            MismatchError: the data set's items are not those of the bundle, in its order.
        """
        begun = time.perf_counter()
        dataset = self.dataset()
        require_sound(dataset)
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
