"""Two training loops with one clock: ours, and transformers' `Trainer` on the same weights.

Both train a copy of a model for one pass over the same examples and say how long the loop took,
from the first forward pass to the end of the last step, without set-up and checkpoints. Sizes,
cases and what is compared with what are in `benchmarks.training`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from transformers.trainer_pt_utils import get_length_grouped_indices

from genrec.models.base import IGNORED, PAD, START, Backbone, Batch, LossOutput
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.trainers.base import Trainer
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.tracking import Trackers

MEGABATCH = 50  # batches that transformers sorts by length together, given 200 or more

Example = dict[str, list[int]]


@dataclass
class Clock:
    """Seconds from the first step to the end of the last, and how full the batches were."""

    begun: tuple[float, float] | None = None
    cpu: float = 0.0
    wall: float = 0.0
    places: int = 0
    filled: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)

    def step(self, places: int, filled: torch.Tensor) -> None:
        """Note a step, its batch's token places and how many of them hold a token."""
        if self.begun is None:
            self.begun = time.process_time(), time.perf_counter()
        self.places += places
        self.filled += int(filled)

    def stop(self) -> None:
        """Note the end of the last step."""
        assert self.begun is not None
        self.cpu = time.process_time() - self.begun[0]
        self.wall = time.perf_counter() - self.begun[1]


# -- our side ---------------------------------------------------------------------------------


class Ours(Trainer):
    """Our trainer with a clock at the door of the loss."""

    clock: Clock
    num_levels: int

    def compute_loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
        """Compute the loss as ever."""
        rows, levels = batch.history_BH, self.num_levels
        places = len(rows) * (1 + rows.shape[1] * levels)  # START, then the items
        self.clock.step(places, len(rows) + levels * (rows >= 0).sum())
        output = super().compute_loss(model, batch)
        self.clock.losses.append(output.loss.detach())
        return output


class _StopsClock:
    """A tracker: the loop logs right after the last step of an epoch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.clock.stop()

    def summary(self, values: dict[str, Any]) -> None:
        pass

    def finish(self) -> None:
        pass


def train_ours(
    model: Backbone, examples: TrainingExamples, batch_size: int, *, bf16: bool = False
) -> Clock:
    """Train a copy for one epoch."""
    config = Trainer.Config(
        epochs=1,
        batch_size=batch_size,
        schedule="constant",
        warmup=0.0,
        patience=1,
        precision="bf16" if bf16 else "fp32",
    )
    trainer = Ours(config, seed=0)
    trainer.clock, trainer.num_levels = Clock(), model.num_levels
    with tempfile.TemporaryDirectory(prefix="genrec-benchmark-") as folder:
        trainer.fit(
            copy.deepcopy(model),
            examples,
            None,
            accelerator=Accelerator(cpu=True),
            folder=Path(folder),
            key="benchmark",
            open_trackers=lambda step: Trackers([_StopsClock(trainer.clock)]),
        )
    return trainer.clock


# -- their side -------------------------------------------------------------------------------


class Theirs(transformers.Trainer):
    """transformers' trainer with the same clock."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Compute the loss as ever."""
        mask = inputs["attention_mask"]
        self.clock.step(mask.numel(), mask.sum())
        loss: Any = super().compute_loss(model, inputs, *args, **options)
        self.clock.losses.append(loss.detach())
        return loss


class _StopsTheirs(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_end(self, *args: Any, **options: Any) -> None:
        self.clock.stop()


def train_theirs(
    model: EncoderDecoder | DecoderOnly,
    rows: list[Example],
    batch_size: int,
    sampling: str = "random",
    *,
    bf16: bool = False,
) -> Clock:
    """Train the same weights for one epoch with transformers' loop.

    Its loss is the mean over tokens and ours over items, so that its gradients are num_levels times
    smaller: its clipping and AdamW's epsilon are divided by that.

    Args:
        model: its weights are copied.
        rows: the examples.
        batch_size: rows of a batch.
        sampling: "random"; "group_by_length"; "sequential", in the order of `rows`.
        bf16: its mixed precision.
    """
    ours = Trainer.Config()
    if sampling == "group_by_length":
        # The order of its sampler, with the megabatches of a full data set, not of this sample.
        lengths = [len(row["input_ids"]) for row in rows]
        torch.manual_seed(0)
        order = get_length_grouped_indices(lengths, batch_size, MEGABATCH)
        rows = [rows[i] for i in order]
    with tempfile.TemporaryDirectory(prefix="genrec-benchmark-") as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=bf16,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="random" if sampling == "random" else "sequential",
            learning_rate=ours.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=ours.weight_decay,
            adam_beta2=0.98,
            adam_epsilon=1e-8 / model.num_levels,
            max_grad_norm=ours.clip / model.num_levels,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        network = model.to_hugging_face()
        trainer = Theirs(network, arguments, data_collator=collate, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.clock = clock = Clock()
        trainer.add_callback(_StopsTheirs(clock))
        trainer.train()
    clock.losses = [loss * model.num_levels for loss in clock.losses]
    return clock


def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch."""
    ids = _padded([row["input_ids"] for row in rows], PAD)
    return {
        "input_ids": ids,
        "attention_mask": ids != PAD,
        "labels": _padded([row["labels"] for row in rows], IGNORED),
    }


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


def their_rows(model: Backbone, examples: TrainingExamples, spans: Spans) -> list[Example]:
    """Return our examples as transformers wants them, tokenised beforehand."""
    tokens_NL = model.tokens_NL.numpy()
    rows = []
    for start, stop in zip(spans.start.tolist(), spans.stop.tolist(), strict=True):
        tokens = tokens_NL[examples.flat[start:stop]].reshape(-1).tolist()
        if examples.unit == "target":
            cut = len(tokens) - model.num_levels
            rows.append({"input_ids": [START, *tokens[:cut]], "labels": tokens[cut:]})
        else:
            rows.append({"input_ids": [START, *tokens], "labels": [IGNORED, *tokens]})
    return rows


def windows_of(rows: list[Example], num_levels: int) -> list[Example]:
    """Cut sequences into one window per target: what is before it, and the loss on it alone."""
    found = []
    for row in rows:
        for stop in range(1 + num_levels, len(row["input_ids"]) + 1, num_levels):
            seen = [IGNORED] * (stop - num_levels)
            labels = seen + row["labels"][stop - num_levels : stop]
            found.append({"input_ids": row["input_ids"][:stop], "labels": labels})
    return found
