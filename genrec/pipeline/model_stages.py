"""What does a run make of an index? Model, lists, calibration, baselines, each through the cache.

Which stage reads what is written here for everything after the index, as in
`genrec.pipeline.item_stages` for what comes before. What a stage does is in
`genrec.pipeline.stages` and `genrec.pipeline.calibrating`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genrec.artifacts import Artifact, fingerprint
from genrec.bundle import mode_name
from genrec.calibration import CALIBRATORS
from genrec.config import parse_component
from genrec.data import Catalog, Dataset
from genrec.data.interactions import SplitName
from genrec.evaluation import beyond_accuracy
from genrec.item_index import ItemIndex
from genrec.models.baselines import make_baselines
from genrec.pipeline import baseline_lists, calibrating, listing, stages
from genrec.pipeline.item_stages import ItemStages


class ModelStages(ItemStages):
    """Stages after the index of the catalogue."""

    def train(
        self,
        dataset: Dataset,
        index: ItemIndex,
        seed: int,
        catalog: Catalog | None = None,
        *,
        trainer: Any = None,
        what: str = "",
    ) -> Artifact:
        """Return the trained model.

        Args:
            dataset: what to train on.
            index: of its items.
            seed: of the run.
            catalog: the data set's with its vectors, if any.
            trainer: configuration; default the run's.
            what: distinguishes several models of a run in logs, timings and tracking.
        """
        model: Any = self.config.model
        trainer = self.config.trainer if trainer is None else trainer
        catalog = dataset.catalog if catalog is None else catalog
        determinants = {
            "dataset": dataset.interactions.fingerprint,
            "index": index.fingerprint,
            "model": self.config.model.to_dict(),
            "trainer": trainer.to_dict(),
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "seed": seed,
            **model.reads(catalog),
            **trainer.reads(catalog),
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
                trainer,
                seed=seed,
                key=key,
                accelerator=self.accelerator,
                catalog=catalog,
                tracking=self.config.tracking,
                tracking_folder=self.out / _joined(what, f"seed-{seed}"),
                run_name=_joined(self.config.name, what, f"seed-{seed}"),
                run_config={
                    **self.config.to_dict(),
                    "fingerprints": {
                        "dataset": dataset.fingerprint,
                        "index": index.fingerprint,
                    },
                    "seed": seed,
                },
            ),
            label=f"train ({_joined(what, f'seed {seed}', by=', ')})",
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
        what: str = "",
    ) -> Artifact:
        """Return the ranked lists of a split's users; `what` as for `train`."""
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
                "scoring": scoring,
            },
            lambda path: listing.make_lists(
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
            label=f"search {split}, {mode_name(masked)} ({_joined(what, f'seed {seed}', by=', ')})",
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
        """Return the baselines' per-user results and lists."""
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
                "depth": beyond_accuracy.DEPTH,
                **read,
            },
            lambda path: baseline_lists.baselines(
                path, dataset, options.baselines, options.ks, options.masked, catalog
            ),
        )


def _joined(*parts: str, by: str = "-") -> str:
    return by.join(part for part in parts if part)
