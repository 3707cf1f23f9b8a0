"""The loop: learns a known world, resumes exactly, splits batches exactly, fails clearly."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from genrec.artifacts import load_artifact
from genrec.data.synthetic import ring
from genrec.decoding import CSRIndex
from genrec.errors import ArtifactError, MismatchError, TrainingError
from genrec.inference import search
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.trainers import optimization
from genrec.trainers.base import Trainer, TrainResult
from genrec.trainers.batching import TrainingExamples
from genrec.trainers.optimization import learning_rate
from genrec.trainers.tracking import JsonLinesTracker, Trackers
from genrec.trainers.validation import Validator
from genrec.weights import load_model_arrays, model_arrays

DATASET = ring(num_items=12, num_users=36, length=8)
CODES = np.array([(i // 4, i % 4) for i in range(12)])
INDEX = ItemIndex(tuple(DATASET.catalog.item_ids), CODES, (3, 4))
SMALL = {"max_history": 4, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}


def make_model(cls: type[Backbone] = DecoderOnly, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return cls.from_index(cls.Config(**{**SMALL, "dropout": 0.1, **options}), INDEX)


def make_validator() -> Validator:
    constraint = CSRIndex.from_index(INDEX)
    examples = DATASET.interactions.examples("valid")
    return Validator(examples, constraint, num_users=100, width=12, seed=0)


def fit(
    folder: Path,
    model: Backbone,
    *,
    cls: type[Trainer] = Trainer,
    seed: int = 0,
    validate: bool = True,
    trackers: Any = None,
    **options: Any,
) -> TrainResult:
    config = Trainer.Config(**{"epochs": 3, "batch_size": 8, "learning_rate": 5e-3, **options})
    examples = TrainingExamples(
        DATASET.interactions.training(), model.training_unit, model.config.max_history
    )
    return cls(config, seed=seed).fit(
        model,
        examples,
        make_validator() if validate else None,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        key="key",
        **({"open_trackers": trackers} if trackers else {}),
    )


def equal(a: Backbone, b: Backbone) -> bool:
    one, two = model_arrays(a), model_arrays(b)
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


def test_the_ring_world_is_learned_completely(tmp_path: Path) -> None:
    model = make_model(dropout=0.0)
    result = fit(tmp_path, model, epochs=40, patience=40, validate_every=8)
    assert result.best_metric > 0.99
    examples = DATASET.interactions.examples("test")
    lists = search(model, CSRIndex.from_index(INDEX), examples.histories(), width=12, k=1)
    assert (lists.rows[:, 0] == examples.target_rows).all() and lists.certified.all()


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    models = [make_model() for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        fit(tmp_path / str(number), model, seed=seed)
    assert equal(models[0], models[1]) and not equal(models[0], models[2])


class Killed(BaseException):
    """Stands for a process that ends between two statements."""


def killed_at(step: int) -> type[Trainer]:
    class Mortal(Trainer):
        calls = 0

        def compute_loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
            Mortal.calls += 1
            if Mortal.calls > step:
                raise Killed
            return super().compute_loss(model, batch)

    return Mortal


@pytest.mark.parametrize("step", [1, 7, 13, 16])
def test_a_killed_run_resumes_to_bit_identical_weights(step: int, tmp_path: Path) -> None:
    """Dropout is on; checkpoints lie inside and between epochs (12 steps an epoch... and 2)."""
    options: dict[str, Any] = {"checkpoint_every": 2, "epochs": 2}
    whole = make_model()
    expected = fit(tmp_path / "whole", whole, **options)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", make_model(), cls=killed_at(step), **options)
    model = make_model(seed=99)  # other initial weights: all must come from the checkpoint
    if step == 1:  # nothing was saved yet: the same start is needed
        model = make_model()
    result = fit(tmp_path / "cut", model, **options)
    assert (result.resumed_from is not None) == (step > 1)
    assert equal(model, whole)
    assert [c["loss"] for c in result.curve][1:] == [c["loss"] for c in expected.curve][1:]
    assert result.best_metric == expected.best_metric and result.steps == expected.steps


def test_a_checkpoint_of_another_run_is_refused_with_both_keys(tmp_path: Path) -> None:
    fit(tmp_path, make_model(), epochs=1)
    (found,) = (tmp_path / "checkpoints").iterdir()
    trainer = Trainer(Trainer.Config(epochs=2), seed=0)
    model = make_model()
    examples = TrainingExamples(DATASET.interactions.training(), "sequence", 4)
    with pytest.raises(MismatchError, match=r"run key.*run given here is other"):
        trainer.fit(
            model,
            examples,
            None,
            accelerator=Accelerator(cpu=True),
            folder=tmp_path,
            key="other",
        )
    (found / "arrays.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="damaged"):
        fit(tmp_path, make_model(), epochs=2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    fit(tmp_path, make_model(), epochs=4, keep_checkpoints=2)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("cls", [DecoderOnly, EncoderDecoder])
def test_accumulation_changes_memory_not_the_result(cls: type[Backbone], tmp_path: Path) -> None:
    results = []
    for parts in (1, 8):
        model = make_model(cls, dropout=0.0)
        result = fit(
            tmp_path / str(parts), model, accumulation=parts, validate=False, batch_size=36
        )
        results.append((model_arrays(model), [c["loss"] for c in result.curve]))
    (one, losses_one), (eight, losses_eight) = results
    np.testing.assert_allclose(losses_one, losses_eight, rtol=1e-5)
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], atol=2e-4, err_msg=name)


def test_the_reported_loss_is_the_mean_over_targets(tmp_path: Path) -> None:
    model = make_model(dropout=0.0)
    examples = TrainingExamples(DATASET.interactions.training(), "sequence", 4)
    spans, batches = examples.plan(1000, 0, 0)
    with torch.no_grad():
        expected = float(model.loss(examples.batch(spans, batches[0])).loss)
    result = fit(tmp_path, model, epochs=1, batch_size=1000, validate=False)
    assert result.curve[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_nan_loss_stops_with_the_batch_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    class Broken(Trainer):
        calls = 0

        def compute_loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
            output = super().compute_loss(model, batch)
            Broken.calls += 1
            if Broken.calls == 12:
                return LossOutput(output.loss, output.loss_sum * float("nan"), output.num_targets)
            return output

    with pytest.raises(
        TrainingError, match=r"loss became nan in epoch 2, batch 3\. Lower trainer\.learning_rate"
    ):
        fit(tmp_path, make_model(), cls=Broken, epochs=4)
    (found,) = (tmp_path / "checkpoints").iterdir()
    arrays = load_artifact(found, kind="checkpoint").arrays
    assert all(np.isfinite(a).all() for name, a in arrays.items() if name.startswith("model/"))


def test_sigterm_writes_a_checkpoint_and_leaves_with_status_0(tmp_path: Path) -> None:
    class Asked(Trainer):
        calls = 0

        def compute_loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
            Asked.calls += 1
            if Asked.calls == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().compute_loss(model, batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        fit(tmp_path, make_model(), cls=Asked)
    assert left.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    (found,) = (tmp_path / "checkpoints").iterdir()
    assert found.name == "step-000000003"
    whole, resumed = make_model(), make_model(seed=5)
    fit(tmp_path / "whole", whole)
    fit(tmp_path, resumed)
    assert equal(whole, resumed)


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    kept: list[dict[str, np.ndarray]] = []

    class Scripted(Validator):
        def __call__(self, model: Backbone, accelerator: Accelerator) -> dict[str, float]:
            kept.append(model_arrays(model))
            return {"ndcg@10": next(scores)}

    model = make_model()
    examples = TrainingExamples(DATASET.interactions.training(), "sequence", 4)
    validator = Scripted(
        DATASET.interactions.examples("valid"),
        CSRIndex.from_index(INDEX),
        num_users=5,
        width=5,
        seed=0,
    )
    config = Trainer.Config(epochs=5, patience=2, batch_size=16)
    result = Trainer(config, seed=0).fit(
        model, examples, validator, accelerator=Accelerator(cpu=True), folder=tmp_path, key="k"
    )
    assert result.best_metric == 0.5 and len(kept) == 4
    now = model_arrays(model)
    assert all(np.array_equal(now[name], kept[1][name]) for name in now)


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    empty = ring(num_items=12, num_users=1, length=8).interactions
    examples = TrainingExamples(empty.training(), "sequence", 4)
    examples.flat = examples.flat[:0]
    with pytest.raises(TrainingError, match="no training interactions"):
        Trainer(Trainer.Config(), seed=0).fit(
            make_model(),
            examples,
            None,
            accelerator=Accelerator(cpu=True),
            folder=tmp_path,
            key="k",
        )


@pytest.mark.parametrize("unit", ["target", "sequence"])
def test_an_epoch_predicts_every_position_once(unit: Any) -> None:
    training = DATASET.interactions.training()
    examples = TrainingExamples(training, unit, max_history=3)
    for epoch in range(3):
        spans, batches = examples.plan(7, seed=1, epoch=epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(spans)))
        assert max(map(len, batches)) <= 7
        assert ((spans.stop - spans.start) <= 4).all()
        targets = []
        for start, stop in zip(spans.start, spans.stop, strict=True):
            targets.extend(range(start, stop) if unit == "sequence" else [stop - 1])
        assert sorted(targets) == list(range(len(training)))


def test_batch_targets_says_how_many_targets_a_batch_holds_on_average() -> None:
    training = DATASET.interactions.training()
    for unit, most in (("sequence", 4), ("target", 4)):
        examples = TrainingExamples(training, unit, most)  # type: ignore[arg-type]
        assert examples.batch_size(Trainer.Config(batch_size=7), 0) == 7
        config = Trainer.Config(batch_size=7, batch_targets=60, min_steps=0)
        size = examples.batch_size(config, 0)
        spans, batches = examples.plan(size, 0, 0)
        length = spans.stop - spans.start if unit == "sequence" else np.ones(len(spans))
        per_example = float(length.mean())
        assert size * per_example == pytest.approx(60, abs=per_example / 2 + 1e-9)
        assert max(len(batch) for batch in batches) == size
    few = TrainingExamples(training, "sequence", 4).batch_size(Trainer.Config(batch_targets=1), 0)
    assert few == 1


@pytest.mark.parametrize("unit", ["sequence", "target"])
def test_batch_targets_are_halved_until_all_epochs_hold_enough_steps(unit: str) -> None:
    training = DATASET.interactions.training()
    examples = TrainingExamples(training, unit, 4)  # type: ignore[arg-type]

    def size(**options: int) -> int:
        return examples.batch_size(Trainer.Config(batch_targets=64, **options), 0)

    steps = len(training) * 10 // 64  # of ten epochs
    assert size(epochs=10, min_steps=steps) == size(epochs=10, min_steps=0)
    halved = Trainer.Config(batch_targets=32, min_steps=0)
    assert size(epochs=10, min_steps=steps + 1) == examples.batch_size(halved, 0)
    assert size(epochs=20, min_steps=steps + 1) == size(min_steps=0)
    assert size(epochs=1, min_steps=10**9) == 1  # a target a step is the least


def test_batches_hold_what_their_spans_say() -> None:
    training = DATASET.interactions.training()
    for unit in ("target", "sequence"):
        examples = TrainingExamples(training, unit, max_history=3)  # type: ignore[arg-type]
        spans, batches = examples.plan(5, seed=1, epoch=0)
        batch = examples.batch(spans, batches[0])
        for row, place in enumerate(batches[0]):
            rows = training.item_rows[spans.start[place] : spans.stop[place]]
            history = rows if unit == "sequence" else rows[:-1]
            found = batch.history_BH[row].tolist()
            assert found == history.tolist() + [-1] * (len(found) - len(history))
            if batch.target_B is not None:
                assert batch.target_B[row] == rows[-1]


def test_plans_depend_on_seed_and_epoch_only() -> None:
    examples = TrainingExamples(DATASET.interactions.training(), "target", 3)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(examples.plan(4, seed, epoch)[1]).tolist()

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = Trainer.Config(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1.0) and 0.1 <= rates[-1] < 0.11
    constant = Trainer.Config(learning_rate=1.0, warmup=0.0, schedule="constant")
    assert {learning_rate(constant, step, 100) for step in range(100)} == {1.0}


def test_the_json_lines_tracker_drops_what_will_be_written_again(tmp_path: Path) -> None:
    import json

    path = tmp_path / "metrics.jsonl"
    tracker = Trackers([JsonLinesTracker(path)])
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step})
    tracker.summary({"best": 1})
    tracker.finish()
    again = JsonLinesTracker(path, resume_step=2)
    again.log(3, {"loss": 30})
    again.finish()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 30}]


def test_the_json_lines_tracker_survives_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    JsonLinesTracker(path, resume_step=2).finish()
    assert path.read_text(encoding="utf-8") == '{"step": 1, "loss": 2.0}\n'


def test_slow_bf16_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Where the processor has no bf16 instructions training works, but much slower than fp32."""
    monkeypatch.setattr(logging.getLogger("genrec"), "propagate", True)
    config = Trainer.Config(precision="bf16")
    for fast, words in ((True, ""), (False, "trainer.precision=fp32")):
        caplog.clear()
        monkeypatch.setattr(optimization, "cpu_has_bf16", lambda fast=fast: fast)
        optimization.warn_of_slow_precision(config, torch.device("cpu"))
        assert (words in caplog.text) if words else not caplog.records


def test_weights_that_do_not_fit_are_refused() -> None:
    model = make_model()
    arrays = model_arrays(model)
    name = next(iter(arrays))
    with pytest.raises(ArtifactError, match=f"missing .*{name}"):
        load_model_arrays(model, {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ArtifactError, match="other shape"):
        load_model_arrays(model, {**arrays, name: arrays[name][:1]})
