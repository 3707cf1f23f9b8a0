"""How many targets a second does our training loop reach, beside transformers' `Trainer`?

Both sides train copies of the same weights (`to_hugging_face`) on the same examples for one pass,
with the same batch size, AdamW settings, precision and longest history, one after the other in one
process on one thread. Timed is the loop alone: from the first forward pass to the last optimizer
step, without set-up and checkpoints. Before, both train the same batches in the same order without
dropout, and their losses must agree.

Users have as many items as those of Amazon Beauty. "one sequence per user" means that both sides
predict every item of a user in one causal pass; "windows" that the peer reads one window per
target, as sliding-window recipes do.

    python -m benchmarks.training [--quick] [--users N] [--json FILE]
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks import common
from benchmarks.decoding import Size as Catalogue
from benchmarks.decoding import random_catalogue
from genrec.data.interactions import Interactions
from genrec.data.splits import leave_one_out
from genrec.models.base import IGNORED, PAD, START, Backbone, Batch, LossOutput
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.trainers.base import Trainer
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.tracking import Trackers

# Lengths of Amazon Beauty's users (5-core, 22,363 users, mean 8.88): shares and their quantiles.
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
LENGTHS = (5, 5, 6, 9, 14, 21, 43, 98, 204)
MAX_HISTORY = 20  # TIGER's
CHECKED_STEPS = 3
TOLERANCE = 1e-4
MEGABATCH = 50  # batches that transformers sorts by length together, given 200 or more

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Size:
    """What a case runs on."""

    num_users: int
    batch_size: int
    runs: int
    model: dict[str, Any] = field(default_factory=dict)


def beauty_like(num_users: int, num_items: int, seed: int = 0) -> Interactions:
    """Return training interactions of users as long as Beauty's, with random items."""
    rng = np.random.default_rng(seed)
    shares = (rng.permutation(num_users) + 0.5) / num_users
    lengths = np.interp(shares, SHARES, LENGTHS).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = rng.integers(0, num_items, offsets[-1]).astype(np.int32)
    times = np.zeros(len(rows), np.int64)
    return Interactions(rows, offsets, times, leave_one_out(offsets), num_items).training()


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


def train_ours(model: Backbone, examples: TrainingExamples, size: Size) -> Clock:
    """Train a copy for one epoch."""
    config = Trainer.Config(
        epochs=1, batch_size=size.batch_size, schedule="constant", warmup=0.0, patience=1
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
        loss = super().compute_loss(model, inputs, *args, **options)
        self.clock.losses.append(loss.detach())
        return loss


class _StopsTheirs(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_end(self, *args: Any, **options: Any) -> None:
        self.clock.stop()


def train_theirs(
    model: EncoderDecoder | DecoderOnly, rows: list[Example], size: Size, sampling: str = "random"
) -> Clock:
    """Train the same weights for one epoch with transformers' loop.

    Its loss is the mean over tokens and ours over items, so that its gradients are num_levels times
    smaller: its clipping and AdamW's epsilon are divided by that.

    Args:
        model: its weights are copied.
        rows: the examples.
        size: batch size.
        sampling: "random"; "group_by_length"; "sequential", in the order of `rows`.
    """
    ours = Trainer.Config()
    if sampling == "group_by_length":
        # The order of its sampler, with the megabatches of a full data set, not of this sample.
        lengths = [len(row["input_ids"]) for row in rows]
        torch.manual_seed(0)
        order = get_length_grouped_indices(lengths, size.batch_size, MEGABATCH)
        rows = [rows[i] for i in order]
    with tempfile.TemporaryDirectory(prefix="genrec-benchmark-") as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=size.batch_size,
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
        trainer = Theirs(network, arguments, data_collator=collate, train_dataset=rows)  # type: ignore[arg-type]
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


# -- are both sides the same? -----------------------------------------------------------------


class _FirstBatches(TrainingExamples):
    """The first full batches of the plan in which something comes before a target.

    Attention to START alone has gradients that are rounding errors, and AdamW makes steps of full
    size of them: losses would differ after the first update.
    """

    def plan(self, batch_size: int, seed: int, epoch: int) -> tuple[Spans, list[np.ndarray]]:
        spans, batches = super().plan(batch_size, seed, epoch)
        lengths = spans.stop - spans.start
        full = [b for b in batches if len(b) == batch_size and lengths[b].max() > 1]
        return spans, full[:CHECKED_STEPS]


def without_dropout(model: Backbone) -> Any:
    """Return a copy that drops nothing; it may replace the model where losses are compared."""
    config = model.config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    tokens_NL = model.tokens_NL - model.tokens_NL.new_tensor(2)
    found = type(model)(config, tokens_NL, model.codebook_sizes)
    found.load_state_dict(model.state_dict())
    return found


def same_training(model: Backbone, interactions: Interactions, size: Size) -> dict[str, float]:
    """Train both on the same batches and return the losses of the first step, and how they differ.

    It also warms both sides up.
    """
    model = without_dropout(model)
    examples = _FirstBatches(interactions, model.training_unit, _history(model))
    spans, batches = examples.plan(size.batch_size, 0, 0)
    rows = their_rows(model, examples, spans)
    ordered = [rows[i] for batch in batches for i in batch]
    ours = train_ours(model, examples, size).losses
    theirs = train_theirs(model, ordered, size, "sequential").losses
    differences = [abs(float(a - b)) for a, b in zip(ours, theirs, strict=True)]
    return {
        "first_loss_ours": float(ours[0]),
        "first_loss_theirs": float(theirs[0]),
        "first_loss_difference": differences[0],
        f"loss_difference_within_{len(differences)}_steps": max(differences),
    }


@torch.no_grad()
def same_windows(model: Backbone, interactions: Interactions, size: Size) -> dict[str, float]:
    """Compare the loss of a batch of sequences with transformers' loss of all their windows."""
    model = without_dropout(model).eval()
    examples = _FirstBatches(interactions, model.training_unit, _history(model))
    spans, batches = examples.plan(size.batch_size, 0, 0)
    rows = [their_rows(model, examples, spans)[i] for i in batches[0]]
    ours = float(model.loss(examples.batch(spans, batches[0])).loss)
    windows = collate(windows_of(rows, model.num_levels))
    theirs = float(model.to_hugging_face()(**windows).loss) * model.num_levels
    return {
        "first_loss_ours": ours,
        "first_loss_theirs": theirs,
        "first_loss_difference": abs(ours - theirs),
    }


def _history(model: Backbone) -> int:
    """Return the history of training examples, so that both units see 20 items before a target."""
    return model.config.max_history


# -- cases ------------------------------------------------------------------------------------


def case(
    name: str,
    baseline: str,
    model: Any,
    interactions: Interactions,
    size: Size,
    *,
    sampling: str = "random",
    windows: bool = False,
) -> common.Row:
    """Time one model under both loops."""
    check = same_windows if windows else same_training
    found = check(model, interactions, size)
    examples = TrainingExamples(interactions, model.training_unit, _history(model))
    spans = examples.spans(0, 0)
    rows = their_rows(model, examples, spans)
    if windows:
        rows = windows_of(rows, model.num_levels)
    ours, theirs = alternate(
        lambda: train_ours(model, examples, size),
        lambda: train_theirs(model, rows, size, sampling),
        runs=size.runs,
    )
    targets = len(interactions)
    equal = all(value <= TOLERANCE for key, value in found.items() if "difference" in key)
    return rate_row(name, baseline, targets, ours, theirs, equal, **found, **_sizes(size, model))


def _sizes(size: Size, model: Backbone) -> dict[str, Any]:
    return {
        "batch_size": size.batch_size,
        "users": size.num_users,
        "max_history": model.config.max_history,
        "parameters": sum(p.numel() for p in model.parameters()),
        "model": model.config.to_dict(),
    }


def alternate(
    ours: Callable[[], Clock], theirs: Callable[[], Clock], *, runs: int
) -> tuple[list[Clock], list[Clock]]:
    """Run both sides in turn; each times itself, without its set-up."""
    found: tuple[list[Clock], list[Clock]] = ([], [])
    for run in range(runs):
        for side in (0, 1) if run % 2 == 0 else (1, 0):
            found[side].append((ours, theirs)[side]())
    return found


def rate_row(
    name: str,
    baseline: str,
    targets: int,
    ours: list[Clock],
    theirs: list[Clock],
    equal: bool,
    **details: Any,
) -> common.Row:
    """Compare targets per CPU second; wall seconds go to the details."""
    timings = []
    for side, clocks in (("ours", ours), ("theirs", theirs)):
        timing = common.Timing.of([c.cpu for c in clocks], [c.wall for c in clocks])
        timings.append(timing)
        details[f"{side}_targets_per_wall_s"] = targets / timing.wall
        details[f"{side}_cpu_s"] = [c.cpu for c in clocks]
        details[f"{side}_wall_s"] = [c.wall for c in clocks]
        details[f"{side}_steps"] = len(clocks[0].losses)
        details[f"{side}_filled_share"] = clocks[0].filled / clocks[0].places
    first, second = timings
    rates = targets / first.cpu, targets / second.cpu
    details |= {"targets": targets, "wall_ratio": second.wall / first.wall, "runs": first.runs}
    return common.Row(
        name, baseline, *rates, rates[0] / rates[1], "targets/s", equal, details=details
    )


def make_model(cls: type[Backbone], **options: Any) -> Any:
    """Return a fresh model for 4 codes of 256 per item, with transformers' softmax over all tokens."""
    index = random_catalogue(Catalogue(12_101, 256, 1, 1, 1, 1))
    torch.manual_seed(0)
    config = cls.Config(max_history=MAX_HISTORY, softmax="vocabulary", **options)
    return cls.from_index(config, index)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--users", type=int, help="number of users of every case")
    arguments = parser.parse_args(argv)
    os.environ["GENREC_PROGRESS"] = "0"
    common.one_thread()
    t5, causal = Size(200, 64, 2), Size(500, 64, 2, {"d_model": 128, "num_layers": 8, "d_ff": 512})
    if arguments.quick:
        small = {"d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 128}
        t5, causal = Size(96, 32, 2, {**small, "d_kv": 32}), Size(192, 32, 2, small)
    if arguments.users:
        t5, causal = (
            replace(
                s, num_users=arguments.users, batch_size=min(s.batch_size, arguments.users // 3)
            )
            for s in (t5, causal)
        )
    return common.report(cases(t5, causal, quick=arguments.quick), arguments.json)


def cases(t5: Size, causal: Size, *, quick: bool) -> list[common.Row]:
    """Return all rows; see the module's text."""
    num_items = 12_101
    users, more_users = (beauty_like(size.num_users, num_items) for size in (t5, causal))
    plain = make_model(EncoderDecoder, dropout=0.0, **t5.model)
    dropping = make_model(EncoderDecoder, dropout=0.1, **t5.model)
    decoder = make_model(DecoderOnly, dropout=0.0, **causal.model)
    name, grouped = "encoder_decoder", "hf_trainer, group_by_length"
    one = "decoder_only, one sequence per user"
    return [
        case(name, "hf_trainer", plain, users, t5),
        case(name, grouped, plain, users, t5, sampling="group_by_length"),
        case(f"{name}, dropout 0.1", "hf_trainer", dropping, users, t5),
        case(one, "hf_trainer", decoder, more_users, causal),
        case(one, grouped, decoder, more_users, causal, sampling="group_by_length"),
        case("decoder_only", "hf_trainer, windows", decoder, users, causal, windows=True),
    ]


if __name__ == "__main__":
    main()
