"""How is one optimizer step made, whatever the number of processes and of accumulation parts?

The loss of a global batch is the weighted mean over its targets: gradients of sums are added up
and divided by the global sum of weights once. It knows no epochs, checkpoints and validation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from genrec.errors import TrainingError
from genrec.models.base import Batch
from genrec.trainers.averaging import Average
from genrec.trainers.optimization import learning_rate, make_optimizer

if TYPE_CHECKING:
    from genrec.trainers.base import Trainer

NUM_TOTALS = 4  # loss, weight, targets, processes that got SIGTERM; the trainer's figures follow
STOPS = 3


@dataclass
class Part:
    """A piece of a global batch and what its loss counts (0 for a stand-in)."""

    batch: Batch
    weight: float


class Stepper:
    """A module that learns, its optimizer and the average of its weights.

    Args:
        trainer: gives the loss.
        learner: what is trained; wrapped by accelerate here.
        accelerator: decides devices and processes.
        total_steps: of the whole run, for the schedule.
    """

    def __init__(
        self, trainer: Trainer, learner: torch.nn.Module, accelerator: Accelerator, total_steps: int
    ) -> None:
        self.trainer, self.config, self.seed = trainer, trainer.config, trainer.seed
        self.accelerator, self.total_steps = accelerator, total_steps
        # Buffers are constants (the items' tokens, rotary tables): DistributedDataParallel need not
        # send them to the other processes at every step.
        learner._ddp_params_and_buffers_to_ignore = [name for name, _ in learner.named_buffers()]  # type: ignore[assignment]
        if self.config.compile:
            learner.compile(backend=self.config.compile, dynamic=True)
        self.wrapped, self.optimizer = accelerator.prepare(
            learner, make_optimizer(learner, self.config)
        )
        decay = self.config.average
        self.average = Average(learner, decay) if decay is not None else None

    def step(self, parts: list[Part], number: int) -> torch.Tensor:
        """Make one optimizer step.

        Args:
            parts: this process's accumulation parts of the batch.
            number: how many steps were made before.

        Returns:
            sum of losses, sum of weights, number of targets, processes that got SIGTERM and sums
            of the trainer's figures; over all processes, float64.
        """
        self._set_learning_rate(number)
        self._seed_step(number)
        shape = NUM_TOTALS + len(self.trainer.figures)
        totals = torch.zeros(shape, dtype=torch.float64, device=self.accelerator.device)
        totals[STOPS] = float(self.trainer.stop.asked)
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            context: AbstractContextManager[Any] = (
                nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            )
            with context, self._autocast():
                totals += part.weight * self._backward(part)
        totals = self.accelerator.reduce(totals, "sum")
        weight = torch.where(totals[1] > 0, totals[1], 1.0)
        gradients = [p.grad for p in self.wrapped.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (self.accelerator.num_processes / weight).float())
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(number + 1)
        return totals

    def _backward(self, part: Part) -> torch.Tensor:
        """Add a part's gradients; return its sums in the order of `step`."""
        try:
            output = self.trainer.compute_loss(self.wrapped, part.batch)
            self.accelerator.backward(output.loss_sum * part.weight)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        except Exception as error:
            if self.config.compile and _is_from_compiling(error):
                raise self._not_compiled(error) from error
            raise
        zero = torch.zeros((), device=self.accelerator.device)
        sums = [output.loss_sum, output.normalizer, output.num_targets, zero]
        totals = torch.stack([torch.as_tensor(x).to(zero).detach().double() for x in sums])
        if output.figures is None:
            return totals
        return torch.cat([totals, output.figures.detach().to(totals)])

    def _seed_step(self, number: int) -> None:
        """Dropout is a function of (seed, step, process), so that resuming needs no RNG state."""
        numbers = [self.seed, number, self.accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    def _set_learning_rate(self, number: int) -> None:
        rate = learning_rate(self.config, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _out_of_memory(self) -> TrainingError:
        return TrainingError(
            f"training: out of memory with trainer.batch_size={self.config.batch_size} and "
            f"trainer.accumulation={self.config.accumulation}. Double the accumulation (same "
            "result, less memory), set trainer.gradient_checkpointing=true or lower the batch size."
        )

    def _not_compiled(self, error: Exception) -> TrainingError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2])[:300]
        return TrainingError(
            f"trainer.compile: torch.compile with backend {self.config.compile!r} failed: {said} "
            "Expected a model and a machine that it supports. Set trainer.compile=null."
        )


def _is_from_compiling(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
