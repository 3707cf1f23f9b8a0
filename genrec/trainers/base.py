"""The training loop: one for every backbone, every number of processes, laptop or GPU.

It optimises, validates, stops early, writes checkpoints and resumes exactly. What a loss is belongs
to `compute_loss`; where examples come from belongs to `batching`.

The loss of a global batch is the mean over its targets, whatever the number of processes or of
accumulation steps: gradients of sums are added up and divided by the global number of targets once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field

from genrec import runtime
from genrec.config import StrictConfig
from genrec.errors import TrainingError
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.checkpoints import latest_checkpoint, restore, save_checkpoint
from genrec.trainers.optimization import learning_rate, make_optimizer, warn_of_slow_precision
from genrec.trainers.tracking import Trackers
from genrec.trainers.validation import Validator
from genrec.weights import load_model_arrays, model_arrays

log = runtime.get_logger(__name__)


@dataclass
class TrainResult:
    """What a finished training leaves behind; the model itself holds the best weights."""

    best_metric: float
    best_step: int
    steps: int
    epochs: int
    curve: list[dict[str, float]]
    seconds: float
    resumed_from: int | None = None


@dataclass
class _Place:
    """Where a run is; everything here is JSON and goes into the checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_metric: float = -1.0
    best_step: int = 0
    bad_validations: int = 0
    stopped: bool = False
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_targets: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Part:
    """A piece of a global batch and what its loss counts (0 for a stand-in)."""

    batch: Batch
    weight: float


class Trainer:
    """Next-item likelihood with early stopping on validation NDCG@10.

    Args:
        config: hyper-parameters.
        seed: of shuffling, cutting and dropout.
    """

    class Config(StrictConfig):
        """Hyper-parameters of a training run."""

        name: Literal["next_item"] = "next_item"
        epochs: int = Field(default=20, ge=1)
        """Passes over the training data at most."""
        batch_size: int = Field(default=64, ge=1)
        """Examples of one optimizer step, over all processes: users' stretches for causal
        backbones, (history, target) pairs for encoder-decoders."""
        accumulation: int = Field(default=1, ge=1)
        """Parts that a batch is computed in, one after the other, to save memory."""
        learning_rate: float = Field(default=1e-3, gt=0)
        """Peak learning rate of AdamW."""
        weight_decay: float = Field(default=0.01, ge=0)
        """AdamW weight decay of matrices (not of norms and biases)."""
        warmup: float = Field(default=0.05, ge=0, le=1)
        """Share of all steps with linear warm-up."""
        schedule: Literal["cosine", "constant"] = "cosine"
        """Learning rate after warm-up; cosine falls to a tenth of the peak."""
        clip: float = Field(default=1.0, gt=0)
        """Largest norm of the gradient of the mean loss."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """bf16: autocast of matrix products; weights stay fp32."""
        validate_every: int = Field(default=1, ge=1)
        """Epochs between validations."""
        patience: int = Field(default=5, ge=1)
        """Validations without a better NDCG@10 after which training stops."""
        validation_users: int = Field(default=1000, ge=1)
        """Users of the fixed validation sample."""
        validation_width: int = Field(default=20, ge=1)
        """Beam width of validation."""
        checkpoint_every: int = Field(default=0, ge=0)
        """Optimizer steps between checkpoints beside the one after each epoch; 0 = only those."""
        keep_checkpoints: int = Field(default=1, ge=1)
        """Newest checkpoints kept while training."""

    def __init__(self, config: Config, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._stop_requested = False

    def compute_loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
        """Return the loss of a batch; `model` may be wrapped for several processes."""
        return model(batch)

    def fit(
        self,
        model: Backbone,
        examples: TrainingExamples,
        validator: Validator | None,
        *,
        accelerator: Accelerator,
        folder: Path,
        key: str,
        open_trackers: Callable[[int | None], Trackers] = lambda step: Trackers([]),
    ) -> TrainResult:
        """Train in place; on return the model holds the weights of the best validation.

        Args:
            model: backbone on any device; moved by accelerate.
            examples: training data.
            validator: None trains for all epochs and keeps the last weights.
            accelerator: decides devices and processes.
            folder: gets `checkpoints/`; a checkpoint of the same `key` there is resumed.
            key: fingerprint of everything that determines the run.
            open_trackers: called with the step resumed from, or None.

        Raises:
            TrainingError: nothing to train on, NaN loss, or out of memory.
            SystemExit: 0, after SIGTERM and a checkpoint.
        """
        if not len(examples.flat):
            raise TrainingError(
                "training: got no training interactions, expected at least one user with history. "
                "Check the split with `genrec doctor`."
            )
        if not any(weight.requires_grad for weight in model.parameters()):
            return self._nothing_to_train(model, validator, accelerator, open_trackers)
        run = _Run(self, model, examples, validator, accelerator, folder / "checkpoints", key)
        resumed = run.resume()
        trackers = open_trackers(resumed)
        with _on_sigterm(self):
            try:
                run.train(trackers)
            finally:
                trackers.finish()
        return run.result(resumed)

    def _nothing_to_train(
        self,
        model: Backbone,
        validator: Validator | None,
        accelerator: Accelerator,
        open_trackers: Callable[[int | None], Trackers],
    ) -> TrainResult:
        """Validate a model that stays as it is (zero-shot) and say so."""
        log.warning(
            "no weight of this %s trains (model.tuning.mode=frozen?): 0 steps are made, and what "
            "follows measures the model as it came. Choose another mode to train it.",
            type(model).__name__,
        )
        model.to(accelerator.device)
        found = validator(model, accelerator) if validator else {}
        values = {f"valid/{name}": value for name, value in found.items()}
        trackers = open_trackers(None)
        trackers.log(0, values)
        trackers.finish()
        best = found.get("ndcg@10", -1.0)
        return TrainResult(best, 0, 0, 0, [{"step": 0, **values}] if values else [], 0.0)


class _Run:
    """One call of `fit`: the loop's moving parts."""

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
        self.place = _Place()
        self.best: dict[str, np.ndarray] = {}
        warn_of_slow_precision(self.config, accelerator.device)
        optimizer = make_optimizer(model, self.config)
        self.model: Backbone = model
        # Buffers are constants (the items' tokens, rotary tables): DistributedDataParallel need not
        # send them to the other processes at every step.
        model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()]  # type: ignore[assignment]
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        _, batches = examples.plan(self.config.batch_size, self.seed, 0)
        self.total_steps = max(1, len(batches) * self.config.epochs)

    # -- the loop -----------------------------------------------------------------------------

    def train(self, trackers: Trackers) -> None:
        """Run epochs until the last one or until validation stops getting better."""
        for epoch in range(self.place.epoch, self.config.epochs):
            if self.place.stopped:
                break
            self._epoch(epoch, trackers)
        if self.best:
            load_model_arrays(self.model, self.best)
        trackers.summary(
            {"best_ndcg@10": self.place.best_metric, "best_step": self.place.best_step}
        )

    def _epoch(self, epoch: int, trackers: Trackers) -> None:
        spans, batches = self.examples.plan(self.config.batch_size, self.seed, epoch)
        first = self.place.batch
        done: list[torch.Tensor] = []  # what `_step` returned since the last checkpoint
        begun = time.perf_counter()
        self.wrapped.train()
        with runtime.progress(f"epoch {epoch + 1}/{self.config.epochs}", len(batches)) as advance:
            advance(first)
            for number in range(first, len(batches)):
                done.append(self._step(self._my_share(spans, batches[number])))
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
        loss, targets, _ = values.sum(0).tolist()
        self.place.epoch_loss += loss
        self.place.epoch_targets += targets

    def _step(self, parts: list[_Part]) -> torch.Tensor:
        """Make one optimizer step.

        Returns:
            sum of losses, number of targets, processes that got SIGTERM; over all processes, (3,).
        """
        self._set_learning_rate()
        self._seed_step()
        totals = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        totals[2] = float(self.trainer._stop_requested)
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            context: AbstractContextManager[Any] = (
                nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            )
            with context, self._autocast():
                try:
                    output = self.trainer.compute_loss(self.wrapped, part.batch)
                    self.accelerator.backward(output.loss_sum * part.weight)
                except torch.OutOfMemoryError as error:
                    raise self._out_of_memory() from error
            count = torch.as_tensor(output.num_targets, device=totals.device)
            sums = torch.stack([output.loss_sum.detach().double(), count.double()])
            totals[:2] += part.weight * sums
        totals = self.accelerator.reduce(totals, "sum")
        scale = (self.accelerator.num_processes / totals[1].clamp(min=1)).float()
        gradients = [p.grad for p in self.wrapped.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.place.step += 1
        return totals

    def _my_share(self, spans: Spans, chosen: np.ndarray) -> list[_Part]:
        """Cut a global batch into this process's accumulation parts."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = []
        for piece in np.array_split(chosen, self.config.accumulation):
            mine = piece[rank::world]
            # Every process joins every collective: one without a share computes any row, times 0.
            rows = mine if len(mine) else chosen[:1]
            batch = self.examples.batch(spans, rows).to(self.accelerator.device)
            parts.append(_Part(batch, 1.0 if len(mine) else 0.0))
        return parts

    def _seed_step(self) -> None:
        """Dropout is a function of (seed, step, process), so that resuming needs no RNG state."""
        numbers = [self.seed, self.place.step, self.accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _set_learning_rate(self) -> None:
        rate = learning_rate(self.config, self.place.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # -- end of an epoch ----------------------------------------------------------------------

    def _close_epoch(self, epoch: int, trackers: Trackers) -> None:
        place = self.place
        values: dict[str, float] = {
            "epoch": epoch + 1,
            "loss": place.epoch_loss / max(place.epoch_targets, 1.0),
            "learning_rate": learning_rate(self.config, place.step - 1, self.total_steps),
            "targets_per_second": place.epoch_targets / max(place.epoch_seconds, 1e-9),
        }
        place.epoch, place.batch = epoch + 1, 0
        place.epoch_loss = place.epoch_targets = place.epoch_seconds = 0.0
        last = epoch + 1 == self.config.epochs
        if self.validator and (last or (epoch + 1) % self.config.validate_every == 0):
            found = self.validator(self.model, self.accelerator)
            values |= {f"valid/{name}": value for name, value in found.items()}
            self._judge(found["ndcg@10"])
        place.curve.append({"step": place.step, **values})
        trackers.log(place.step, values)
        log.info(
            "epoch %d: %s",
            epoch + 1,
            ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "epoch"),
        )

    def _judge(self, metric: float) -> None:
        if metric > self.place.best_metric:
            self.place.best_metric, self.place.best_step = metric, self.place.step
            self.place.bad_validations = 0
            self.best = model_arrays(self.model)
            return
        self.place.bad_validations += 1
        self.place.stopped = self.place.bad_validations >= self.config.patience

    # -- checkpoints --------------------------------------------------------------------------

    def resume(self) -> int | None:
        """Restore the newest checkpoint of this run; return its step, or None."""
        artifact = latest_checkpoint(self.folder, key=self.key)
        if artifact is None:
            return None
        self.place = _Place(**artifact.extra["place"])
        self.best = restore(artifact, self.model, self.optimizer.optimizer)
        log.info("resumed at step %d from %s", self.place.step, artifact.path.name)
        return self.place.step

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
            return self.trainer._stop_requested
        return len(done) > 1 and bool(done[-2][2])

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder,
                step=self.place.step,
                model=self.model,
                optimizer=self.optimizer.optimizer,
                best=self.best,
                place={"place": vars(self.place)},
                key=self.key,
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _leave_if_asked(self) -> None:
        asked = torch.tensor(float(self.trainer._stop_requested), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item():
            log.warning("SIGTERM: checkpoint at step %d; run again to go on.", self.place.step)
            raise SystemExit(0)

    def _out_of_memory(self) -> TrainingError:
        return TrainingError(
            f"training: out of memory with trainer.batch_size={self.config.batch_size} and "
            f"trainer.accumulation={self.config.accumulation}. Double the accumulation (same "
            "result, less memory) or lower the batch size."
        )

    def result(self, resumed: int | None) -> TrainResult:
        """Return the figures of the run."""
        place = self.place
        return TrainResult(
            place.best_metric,
            place.best_step or place.step,
            place.step,
            place.epoch,
            place.curve,
            place.seconds,
            resumed,
        )


class _on_sigterm:
    """While active, SIGTERM asks the loop to write a checkpoint and leave with status 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous: Any = None

    def __enter__(self) -> None:
        def ask(signum: int, frame: Any) -> None:
            self.trainer._stop_requested = True

        try:
            self.previous = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: the caller handles signals
            self.previous = None

    def __exit__(self, *error: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
