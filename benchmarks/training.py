"""How many targets a second does our training loop reach, beside transformers' `Trainer`?

Both sides train copies of the same weights (`to_hugging_face`) on the same examples for one pass,
with the same batch size, AdamW settings, precision and longest history, one after the other in one
process on one thread. Timed is the loop alone: from the first forward pass to the last optimizer
step, without set-up and checkpoints. Before, both train the same batches in the same order without
dropout, and their losses must agree (the first within 1e-4, those after updates within 1e-4 of
their size).

Users have as many items as those of Amazon Beauty. "one sequence per user" means that both sides
predict every item of a user in one causal pass; "windows" that the peer reads one window per
target, as sliding-window recipes do.

Where the processor has bf16 instructions, more rows say what bf16 brings, and what our attention
brings beside torch's.

    python -m benchmarks.training [--quick] [--users N] [--runs N] [--json FILE]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from benchmarks.decoding import Size as Catalogue
from benchmarks.decoding import random_catalogue
from benchmarks.loops import (
    Clock,
    collate,
    their_rows,
    train_ours,
    train_theirs,
    windows_of,
)
from genrec.data.interactions import Interactions
from genrec.data.splits import leave_one_out
from genrec.models.base import FIRST_TOKEN, Backbone
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.optimization import cpu_has_bf16

# Lengths of Amazon Beauty's users (5-core, 22,363 users, mean 8.88): shares and their quantiles.
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
LENGTHS = (5, 5, 6, 9, 14, 21, 43, 98, 204)
MAX_HISTORY = 20  # TIGER's
CHECKED_STEPS = 3
TOLERANCE = 1e-4
BF16_TOLERANCE = 0.02  # of a loss, over all steps of an epoch


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
    tokens_NL = model.tokens_NL - FIRST_TOKEN
    found = type(model)(config, tokens_NL, model.codebook_sizes)
    found.load_state_dict(model.state_dict())
    return found


def same_training(model: Any, interactions: Interactions, size: Size) -> dict[str, float]:
    """Train both on the same batches and return the losses of the first step, and how they differ.

    After the first update rounding grows, so that later losses are compared relatively. The call
    also warms both sides up.
    """
    model = without_dropout(model)
    examples = _FirstBatches(interactions, model.training_unit, model.config.max_history)
    spans, batches = examples.plan(size.batch_size, 0, 0)
    rows = their_rows(model, examples, spans)
    ordered = [rows[i] for batch in batches for i in batch]
    ours = train_ours(model, examples, size.batch_size).losses
    theirs = train_theirs(model, ordered, size.batch_size, "sequential").losses
    relative = [abs(float(a / b) - 1) for a, b in zip(ours, theirs, strict=True)]
    return {
        "first_loss_ours": float(ours[0]),
        "first_loss_theirs": float(theirs[0]),
        "first_loss_difference": abs(float(ours[0] - theirs[0])),
        "relative_loss_difference_later": max(relative),
        "checked_steps": len(relative),
    }


@torch.no_grad()
def same_windows(model: Any, interactions: Interactions, size: Size) -> dict[str, float]:
    """Compare the loss of a batch of sequences with transformers' loss of all their windows."""
    model = without_dropout(model).eval()
    examples = _FirstBatches(interactions, model.training_unit, model.config.max_history)
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


# -- cases ------------------------------------------------------------------------------------


def case(
    name: str,
    baseline: str,
    model: Any,
    interactions: Interactions,
    size: Size,
    check: dict[str, float],
    *,
    sampling: str = "random",
    windows: bool = False,
    bf16: tuple[bool, bool] = (False, False),
) -> common.Row:
    """Time one model under both loops, given what `same_training` or `same_windows` found.

    `bf16` says of either side whether it multiplies in bf16; the check was made in fp32.
    """
    examples = TrainingExamples(interactions, model.training_unit, model.config.max_history)
    spans = examples.spans(0, 0)
    rows = their_rows(model, examples, spans)
    if windows:
        rows = windows_of(rows, model.num_levels)
    ours, theirs = alternate(
        lambda: train_ours(model, examples, size.batch_size, bf16=bf16[0]),
        lambda: train_theirs(model, rows, size.batch_size, sampling, bf16=bf16[1]),
        runs=size.runs,
    )
    targets = len(interactions)
    equal = all(value <= TOLERANCE for key, value in check.items() if "difference" in key)
    return rate_row(name, baseline, targets, ours, theirs, equal, **check, **_sizes(size, model))


def across(
    name: str, baseline: str, model: Any, theirs: Any, interactions: Interactions, size: Size
) -> common.Row:
    """Time a model under our loop and another one, on the same targets, under transformers'."""
    examples, other = (
        TrainingExamples(interactions, m.training_unit, m.config.max_history)
        for m in (model, theirs)
    )
    rows = their_rows(theirs, other, other.spans(0, 0))
    spans = examples.spans(0, 0)
    first, second = alternate(
        lambda: train_ours(model, examples, size.batch_size),
        lambda: train_theirs(theirs, rows, size.batch_size),
        runs=size.runs,
    )
    same_targets = int((spans.stop - spans.start).sum()) == len(rows) == len(interactions)
    sizes = _sizes(size, model) | {"their_model": theirs.config.to_dict()}
    return rate_row(name, baseline, len(interactions), first, second, same_targets, **sizes)


def torchs_attention(*tensors: Tensor, dropout: float = 0.0, **options: Any) -> Tensor:
    """What `attend` is everywhere but in training in bf16 on a CPU: the slow twin."""
    return F.scaled_dot_product_attention(*tensors, dropout_p=dropout, **options)


def attention(name: str, model: Any, interactions: Interactions, size: Size) -> common.Row:
    """Time our loop in bf16 beside itself with torch's attention; the losses must agree."""
    examples = TrainingExamples(interactions, model.training_unit, model.config.max_history)

    def with_torchs() -> Clock:
        with (
            mock.patch("genrec.models.t5.attend", torchs_attention),
            mock.patch("genrec.models.causal.attend", torchs_attention),
        ):
            return train_ours(model, examples, size.batch_size, bf16=True)

    ours, theirs = alternate(
        lambda: train_ours(model, examples, size.batch_size, bf16=True),
        with_torchs,
        runs=size.runs,
    )
    pairs = zip(ours[0].losses, theirs[0].losses, strict=True)
    apart = max(abs(float(a / b) - 1) for a, b in pairs)
    targets, same = len(interactions), apart <= BF16_TOLERANCE
    sizes = _sizes(size, model) | {"largest_relative_loss_difference": apart}
    return rate_row(name, "torch's attention", targets, ours, theirs, same, **sizes)


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
    """Return a fresh model, 4 codes of 256 an item, with transformers' softmax over all tokens."""
    index = random_catalogue(Catalogue(12_101, 256, 1, 1, 1, 1))
    torch.manual_seed(0)
    options = {"softmax": "vocabulary", **options}
    return cls.from_index(cls.Config(max_history=MAX_HISTORY, **options), index)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--users", type=int, help="number of users of every case")
    parser.add_argument("--runs", type=int, help="timed runs of each side")
    arguments = parser.parse_args(argv)
    os.environ["GENREC_PROGRESS"] = "0"
    common.one_thread()
    t5, causal = Size(200, 64, 2), Size(500, 64, 2, {"d_model": 128, "num_layers": 8, "d_ff": 512})
    if arguments.quick:
        small = {"d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 128}
        t5, causal = Size(96, 32, 2, {**small, "d_kv": 32}), Size(192, 32, 2, small)
    if arguments.users:
        users = arguments.users
        t5, causal = (
            replace(s, num_users=users, batch_size=min(s.batch_size, max(1, users // 3)))
            for s in (t5, causal)
        )
    if arguments.runs:
        t5, causal = (replace(s, runs=arguments.runs) for s in (t5, causal))
    return common.report(cases(t5, causal), arguments.json)


def cases(t5: Size, causal: Size) -> list[common.Row]:
    """Return all rows; see the module's text."""
    num_items = 12_101
    users, more_users = (beauty_like(size.num_users, num_items) for size in (t5, causal))
    plain = make_model(EncoderDecoder, dropout=0.0, **t5.model)
    dropping = make_model(EncoderDecoder, dropout=0.1, **t5.model)
    decoder = make_model(DecoderOnly, dropout=0.0, **causal.model)
    one, three = same_training(plain, users, t5), same_training(dropping, users, t5)
    four = same_training(decoder, more_users, causal)
    six = same_windows(decoder, users, causal)
    # As in configs/genrec.yaml, but for content: 128 wide, whatever the others' size.
    options: dict[str, Any] = {"d_model": 128, "activation": "gelu", "items_from": 1}
    items = make_model(Hierarchical, dropout=0.0, softmax="level", **options)
    dropping_items = make_model(Hierarchical, dropout=0.5, softmax="level", **options)
    name, grouped = "encoder_decoder", "hf_trainer, group_by_length"
    whole, by_length = "decoder_only, one sequence per user", "group_by_length"
    mixed = []
    if cpu_has_bf16():
        both, alone = (True, True), (True, False)
        mixed = [
            attention(f"{name}, bf16", plain, users, t5),
            attention(f"{name}, dropout 0.1, bf16", dropping, users, t5),
            attention("decoder_only, bf16", decoder, more_users, causal),
            case(f"{name}, bf16", "hf_trainer, fp32", plain, users, t5, one, bf16=alone),
            case(f"{name}, bf16", "hf_trainer, bf16", plain, users, t5, one, bf16=both),
            case(
                f"{name}, dropout 0.1, bf16",
                "hf_trainer, fp32",
                dropping,
                users,
                t5,
                three,
                bf16=alone,
            ),
        ]
    return [
        *mixed,
        case(name, "hf_trainer", plain, users, t5, one),
        case(name, grouped, plain, users, t5, one, sampling=by_length),
        case(f"{name}, dropout 0.1", "hf_trainer", dropping, users, t5, three),
        case(whole, "hf_trainer", decoder, more_users, causal, four),
        case(whole, grouped, decoder, more_users, causal, four, sampling=by_length),
        case("decoder_only", "hf_trainer, windows", decoder, users, causal, six, windows=True),
        across("hierarchical", "hf_trainer, encoder_decoder", items, plain, users, t5),
        across(
            "hierarchical, dropout",
            "hf_trainer, encoder_decoder, dropout 0.1",
            dropping_items,
            dropping,
            users,
            t5,
        ),
    ]


if __name__ == "__main__":
    main()
