"""What is a model worth that is not up to date? Stale, updated and retrained on the same users.

The stale model is trained as it would have been at an earlier time, the updated one goes on from it
with what came since, the retrained one begins anew with everything. All three have the index of the
earlier time, because an update cannot change what a code means. They are compared on test users.

Shapes: S seeds, U users.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec import runtime
from genrec.artifacts import Artifact, write_json_atomic, write_text_atomic
from genrec.bundle import mode_name
from genrec.data import Dataset
from genrec.data.periods import as_of, earlier_times
from genrec.errors import ConfigError
from genrec.evaluation import beyond_accuracy
from genrec.evaluation.beyond_accuracy import Surroundings
from genrec.evaluation.comparison import compare
from genrec.evaluation.comparison_page import to_html
from genrec.evaluation.comparison_tables import to_markdown
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.runs import PER_USER, RESULTS, Cell
from genrec.item_index import ItemIndex
from genrec.models.baselines import label
from genrec.pipeline import baseline_lists, listing, results
from genrec.pipeline.config import RunConfig, update_trainer
from genrec.pipeline.model_stages import ModelStages
from genrec.pipeline.tracked_results import track_results

log = runtime.get_logger(__name__)

STALE, UPDATED, RETRAINED = "stale", "updated", "retrained"
SYSTEMS = (STALE, UPDATED, RETRAINED)


@dataclass(frozen=True)
class Trained:
    """One model of one seed, with its test lists by mode."""

    seed: int
    model: Artifact
    test: dict[str, Artifact]


class IncrementalRun(ModelStages):
    """The three models of a configuration with a section `incremental`.

    `out` gets results.json, per_user.parquet, config.yaml, comparison.json, .md and .html.
    """

    def execute(self, *, command: str = "") -> dict[str, Any]:
        """Run every stage that is not in the cache; return what results.json holds.

        Args:
            command: how this run was started.

        Raises:
            ConfigError: a data set that is not split by time.
        """
        with runtime.default_device(self.accelerator.device):
            return self._execute(command)

    def _execute(self, command: str) -> dict[str, Any]:
        begun, dataset = time.perf_counter(), self.dataset()
        chosen = self.config.incremental
        if chosen is None:
            raise ConfigError("incremental: got no such section, expected one.")
        times = earlier_times(dataset, chosen.old_share, chosen.valid_fraction)
        earlier = as_of(dataset, *times)
        trained: dict[str, list[Trained]] = {name: [] for name in SYSTEMS}
        for seed in self.config.seeds:
            for name, made in self._one_seed(dataset, earlier, times[0], seed).items():
                trained[name].append(made)
        baselines = self.baselines(dataset)
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        self.out.mkdir(parents=True, exist_ok=True)
        found = self._results(dataset, trained, baselines)
        found["incremental"] |= {"valid_from": times[0], "ends": times[1]}
        found["timing"] = {
            "seconds": round(time.perf_counter() - begun, 2),
            "stages": self.cache.seconds,
            "reused": sorted(name for name, reused in self.cache.reused.items() if reused),
        }
        found["command"] = command
        self._write(found, trained, baselines)
        track_results(self.config, self.out, found)
        self.accelerator.wait_for_everyone()
        return found

    def _one_seed(
        self, dataset: Dataset, earlier: Dataset, new_from: int, seed: int
    ) -> dict[str, Trained]:
        """Return the three models of a seed, each with its lists for the test users."""
        catalog = self.embed(earlier)
        _, artifact = self.tokenize(earlier, catalog, seed)
        index = ItemIndex.load(artifact.path)
        models = {STALE: self.train(earlier, index, seed, catalog, what=STALE)}
        assert self.config.incremental is not None
        trainer = update_trainer(
            self.config.trainer,
            self.config.incremental,
            start_from=str(models[STALE].path),
            new_from=new_from,
        )
        models[UPDATED] = self.train(dataset, index, seed, catalog, trainer=trainer, what=UPDATED)
        models[RETRAINED] = self.train(dataset, index, seed, catalog, what=RETRAINED)
        return {
            name: Trained(
                seed,
                model,
                {
                    mode_name(masked): self.lists(
                        dataset, index, model, "test", masked, seed, what=name
                    )
                    for masked in self.config.evaluation.masked
                },
            )
            for name, model in models.items()
        }

    # -- results ------------------------------------------------------------------------------

    def _results(
        self, dataset: Dataset, trained: Mapping[str, list[Trained]], baselines: Artifact
    ) -> dict[str, Any]:
        options = self.config.evaluation
        around = Surroundings(
            dataset.interactions.examples("test"), dataset.interactions.training().counts()
        )
        rows: list[dict[str, Any]] = []
        likeness: dict[str, dict[str, Any]] = {}
        for masked in options.masked:
            mode = mode_name(masked)
            figures = likeness.setdefault(mode, {})
            systems = {name: _values(trained[name], mode, options.ks) for name in SYSTEMS}
            for name in SYSTEMS:
                lists = [listing.read_lists(run.test[mode])[0].rows for run in trained[name]]
                figures[name] = beyond_accuracy.mean_of(
                    [beyond_accuracy.list_figures(each, around) for each in lists]
                )
            for name in map(label, options.baselines):
                systems[name] = baseline_lists.read_values(baselines, name, mode)
                top_Uk = baseline_lists.read_rows(baselines, name, mode)
                figures[name] = beyond_accuracy.list_figures(top_Uk, around)
            popular = systems.get(results.REFERENCE)
            for name, values in systems.items():
                other = None if values is popular else popular
                samples = options.bootstrap_samples
                rows.append(summarise(name, "test", masked, values, other, num_samples=samples))
        return {
            "dataset": results.dataset_facts(dataset),
            "protocol": results.protocol(self.config, dataset, trained[STALE][0].model),
            "seeds": list(self.config.seeds),
            "rows": rows,
            "beyond_accuracy": {"k": beyond_accuracy.DEPTH, **likeness},
            "incremental": {"training": {name: _cost(trained[name]) for name in SYSTEMS}},
            "versions": runtime.versions(),
            "git": runtime.git_state(),
            "fingerprints": {
                "dataset": dataset.fingerprint,
                "model": {name: [r.model.fingerprint for r in trained[name]] for name in SYSTEMS},
            },
            "config": self.config.to_dict(),
        }

    def _write(
        self, found: dict[str, Any], trained: Mapping[str, list[Trained]], baselines: Artifact
    ) -> None:
        """Write the results, the values per user, and the paired comparison of the three."""
        per_user = _per_user(self.config, trained, baselines)
        write_json_atomic(self.out / RESULTS, found)
        write_text_atomic(self.out / "config.yaml", self.config.to_yaml())
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            per_user.write_parquet(Path(folder) / PER_USER)
            (Path(folder) / PER_USER).replace(self.out / PER_USER)
        cells = [Cell(name, {}, found, per_user, name) for name in SYSTEMS]
        compared = compare(cells, reference=STALE)
        compared["baselines"] = [r for r in compared["baselines"] if r["name"] not in SYSTEMS]
        compared |= {"name": self.config.name, "training": found["incremental"]["training"]}
        found["comparison"] = compared
        write_json_atomic(self.out / "comparison.json", compared)
        text = to_markdown(compared) + "\n" + cost_text(compared["training"])
        write_text_atomic(self.out / "comparison.md", text)
        write_text_atomic(self.out / "comparison.html", to_html(compared))


def cost_text(training: Mapping[str, Mapping[str, float]]) -> str:
    """Return what the three trainings took, as a Markdown table."""
    lines = ["## Training", "", "| | steps | seconds |", "|---|---|---|"]
    lines += [f"| {n} | {c['steps']:.0f} | {c['seconds']:.1f} |" for n, c in training.items()]
    return "\n".join(lines) + "\n"


def _values(runs: list[Trained], mode: str, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return metric -> (S, U)."""
    by_seed = [listing.list_values(run.test[mode], ks) for run in runs]
    return {name: np.stack([values[name] for values in by_seed]) for name in by_seed[0]}


def _cost(runs: list[Trained]) -> dict[str, float]:
    """Return steps and seconds of training, means over seeds."""
    told = [run.model.extra["training"] for run in runs]
    return {name: float(np.mean([each[name] for each in told])) for name in ("steps", "seconds")}


def _per_user(
    config: RunConfig, trained: Mapping[str, list[Trained]], baselines: Artifact
) -> pl.DataFrame:
    """Return one line per (system, seed, mode, user), as a run does."""
    tables = []
    for masked in config.evaluation.masked:
        mode = mode_name(masked)
        users = trained[STALE][0].test[mode].arrays["user_rows"]
        for name in SYSTEMS:
            for run in trained[name]:
                values = listing.list_values(run.test[mode], config.evaluation.ks)
                flags = {"name": name, "seed": run.seed, "masked": masked}
                tables.append(results.per_user_table(users, values, **flags))
        for name in map(label, config.evaluation.baselines):
            values = baseline_lists.read_values(baselines, name, mode)
            tables.append(results.per_user_table(users, values, name=name, seed=0, masked=masked))
    return pl.concat(tables)
