"""In which order are steps, validations and checkpoints made, and where does a killed run go on?

One loop for every backbone, every number of processes, laptop or GPU. What a loss is belongs to the
trainer; how a step is made belongs to `step`.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from genrec import runtime
from genrec.errors import ConfigError, TrainingError
from genrec.models.base import Backbone
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.checkpoints import (
    latest_checkpoint,
    load_optimizer,
    optimizer_arrays,
    parts_of,
    save_checkpoint,
)
from genrec.trainers.optimization import learning_rate, warn_of_slow_precision
from genrec.trainers.place import Place
from genrec.trainers.sharding import load_whole_arrays, whole_arrays
from genrec.trainers.step import STOPS, Part, Stepper
from genrec.trainers.tracking import Trackers
from genrec.trainers.validation import Validator
from genrec.weights import load_model_arrays, model_arrays

if TYPE_CHECKING:
    from genrec.trainers.base import Trainer

log = runtime.get_logger(__name__)


class Run:
    """One call of `Trainer.fit`: the loop's moving parts.

    Args:
        trainer: gives the loss and the options.
        model: what is validated and kept. It is also what trains, but for weights in shards
            (FSDP2): then a sharded copy trains, and the model gets its whole weights when they are
            looked at.
        examples: training data.
        validator: or None.
        accelerator: decides devices and processes.
        folder: of checkpoints.
        key: fingerprint of everything that determines the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: Backbone,
        examples: TrainingExamples,
        validator: Validator | None,
        accelerator: Accelerator,
        folder: Path,
        key: str,
    ) -> None:
        self.trainer, self.config, self.seed = trainer, trainer.config, trainer.seed
        self.examples, self.validator, self.accelerator = examples, validator, accelerator
        self.folder, self.key = folder, key
        self.place = Place()
        self.best: dict[str, np.ndarray] = {}
        warn_of_slow_precision(self.config, accelerator.device)
        self.model = model
        shards = accelerator.distributed_type == DistributedType.FSDP
        if shards and not trainer.trains_shards:
            raise ConfigError(
                f"trainer.name: got {self.config.name!r} with weights in shards (FSDP), which it "
                "cannot train. Launch with DDP (configs/accelerate/ddp-8gpu.yaml)."
            )
        self.trained = copy.deepcopy(model) if shards else model
        self.trained.checkpoint_gradients(self.config.gradient_checkpointing)
        self.learner = trainer.learner(self.trained)
        self.batch_size = examples.batch_size(self.config, self.seed)
        _, batches = examples.plan(self.batch_size, self.seed, 0)
        total_steps = max(1, len(batches) * self.config.epochs)
        self.stepper = Stepper(trainer, self.learner, accelerator, total_steps)

    # -- the loop -----------------------------------------------------------------------------

    def train(self, trackers: Trackers) -> None:
        """Run epochs until the last one or until validation stops getting better."""
        for epoch in range(self.place.epoch, self.config.epochs):
            if self.place.stopped:
                break
            self._epoch(epoch, trackers)
        if self.best:
            load_model_arrays(self.model, self.best)
        else:
            if self.stepper.average is not None:
                self.stepper.average.apply()
            self._show()
        self.trained.checkpoint_gradients(False)
        trackers.summary(
            {"best_ndcg@10": self.place.best_metric, "best_step": self.place.best_step}
        )

    def _epoch(self, epoch: int, trackers: Trackers) -> None:
        spans, batches = self.examples.plan(self.batch_size, self.seed, epoch)
        first = self.place.batch
        done: list[torch.Tensor] = []  # what steps returned since the last checkpoint
        begun = time.perf_counter()
        self.stepper.wrapped.train()
        with runtime.progress(f"epoch {epoch + 1}/{self.config.epochs}", len(batches)) as advance:
            advance(first)
            for number in range(first, len(batches)):
                parts = self._my_share(spans, batches[number])
                done.append(self.stepper.step(parts, self.place.step))
                self.place.step += 1
                self.place.batch = number + 1
                advance(1)
                if self._checkpoint_due(done, last=number + 1 == len(batches)):
                    self._count(done, epoch, time.perf_counter() - begun)
                    self._save()
                    self._leave_if_asked()
                    done, begun = [], time.perf_counter()
        self._count(done, epoch, time.perf_counter() - begun)
        self._close_epoch(epoch, trackers)
        self._save()
        self._leave_if_asked()

    def _my_share(self, spans: Spans, chosen: np.ndarray) -> list[Part]:
        """Cut a global batch into this process's accumulation parts."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = []
        for piece in np.array_split(chosen, self.config.accumulation):
            mine = piece[rank::world]
            # Every process joins every collective: one without a share computes any row, times 0.
            rows = mine if len(mine) else chosen[:1]
            batch = self.trainer.make_batch(self.examples, spans, rows, self.place)
            batch = batch.to(self.accelerator.device)
            parts.append(Part(batch, 1.0 if len(mine) else 0.0))
        return parts

    def _count(self, done: list[torch.Tensor], epoch: int, seconds: float) -> None:
        """Add finished steps to the epoch's figures; the one place that waits for the device.

        Stops at a NaN loss: the checkpoint before it is the last good one.
        """
        self.place.epoch_seconds += seconds
        self.place.seconds += seconds
        if not done:
            return
        values = torch.stack(done).cpu()
        bad = (~torch.isfinite(values[:, 0])).nonzero()
        if len(bad):
            first = self.place.batch - len(done) + int(bad[0]) + 1
            raise TrainingError(
                f"training: the loss became {float(values[bad[0, 0], 0])} in epoch {epoch + 1}, "
                f"batch {first}. Lower trainer.learning_rate (now {self.config.learning_rate}); "
                f"the last good checkpoint is kept in {self.folder.name}/."
            )
        sums = values.sum(0).tolist()
        del sums[STOPS]
        self.place.count(sums)

    # -- end of an epoch ----------------------------------------------------------------------

    def _close_epoch(self, epoch: int, trackers: Trackers) -> None:
        place = self.place
        loss, speed, figures = place.close_epoch()
        values: dict[str, float] = {
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": learning_rate(self.config, place.step - 1, self.stepper.total_steps),
            "targets_per_second": speed,
        }
        values |= self.trainer.report(dict(zip(self.trainer.figures, figures, strict=True)))
        last = epoch + 1 == self.config.epochs
        if self.validator and (last or (epoch + 1) % self.config.validate_every == 0):
            values |= self._validate(self.validator)
        place.curve.append({"step": place.step, **values})
        trackers.log(place.step, values)
        log.info(
            "epoch %d: %s",
            epoch + 1,
            ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "epoch"),
        )

    def _validate(self, validator: Validator) -> dict[str, float]:
        average = self.stepper.average
        with average.applied() if average is not None else nullcontext():
            self._show()
            found = validator(self.model, self.accelerator)
            if self.place.judge(found["ndcg@10"], self.config.patience):
                self.best = model_arrays(self.model)
        return {f"valid/{name}": value for name, value in found.items()}

    def _show(self) -> None:
        """Give the model the weights that train, where it has not got them anyway."""
        if self.trained is not self.model:
            load_model_arrays(self.model, whole_arrays(self.trained))

    # -- checkpoints --------------------------------------------------------------------------

    def resume(self) -> int | None:
        """Restore the newest checkpoint of this run; return its step, or None."""
        artifact = latest_checkpoint(self.folder, key=self.key)
        if artifact is None:
            return None
        self.place = Place(**artifact.extra["place"])
        parts = parts_of(artifact)
        load_whole_arrays(self.trained, parts["model"])
        load_optimizer(self.stepper.optimizer.optimizer, parts["optimizer"])
        self.best = parts.get("best", {})
        if self.stepper.average is not None:
            self.stepper.average.load(parts["average"])
        for name, module in self.trainer.helpers(self.learner).items():
            load_whole_arrays(module, parts[name])
        log.info("resumed at step %d from %s", self.place.step, artifact.path.name)
        return self.place.step

    def _save(self) -> None:
        # Whole arrays of shards are gathered: every process takes part, the first one writes.
        parts = {
            "model": whole_arrays(self.trained),
            "best": self.best,
            "optimizer": optimizer_arrays(self.stepper.optimizer.optimizer),
        }
        if self.stepper.average is not None:
            parts["average"] = self.stepper.average.arrays()
        for name, module in self.trainer.helpers(self.learner).items():
            parts[name] = whole_arrays(module)
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder,
                step=self.place.step,
                parts=parts,
                place={"place": vars(self.place)},
                key=self.key,
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _checkpoint_due(self, done: list[torch.Tensor], *, last: bool) -> bool:
        if last:
            return False  # the end of the epoch writes one anyway
        every = self.config.checkpoint_every
        return bool(every and self.place.step % every == 0) or self._told_to_stop(done)

    def _told_to_stop(self, done: list[torch.Tensor]) -> bool:
        """Whether a process got SIGTERM; all processes answer alike.

        Several processes look at the step before the last one, whose figures are there without
        waiting for the device.
        """
        if self.accelerator.num_processes == 1:
            return self.trainer.stop.asked
        return len(done) > 1 and bool(done[-2][STOPS])

    def _leave_if_asked(self) -> None:
        asked = torch.tensor(float(self.trainer.stop.asked), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item():
            log.warning("SIGTERM: checkpoint at step %d; run again to go on.", self.place.step)
            raise SystemExit(0)
