"""Preference tuning: the formulas, what it starts from, and that it raises what it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from genrec.artifacts import Artifact
from genrec.bundle import build_model, load_model, save_model
from genrec.data.synthetic import ring
from genrec.decoding import CSRIndex, beam_search
from genrec.errors import ArtifactError, ConfigError, MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, pad_histories
from genrec.models.catalogue_tree import CatalogueTree
from genrec.pipeline.config import load_run_config
from genrec.pipeline.run import Run
from genrec.testing.language_models import tiny_language_model
from genrec.trainers.base import Trainer, TrainResult
from genrec.trainers.place import Place
from genrec.trainers.preference import (
    Preference,
    PreferenceLearner,
    item_logprobs,
    preference_loss,
)
from genrec.trainers.trained import find_model
from genrec.weights import model_arrays

DATASET = ring(num_items=12, num_users=20, length=8)
CODES = np.array([(i // 4, i % 4) for i in range(12)])
INDEX = ItemIndex(tuple(DATASET.catalog.item_ids), CODES, (3, 4))
SIZES = {"max_history": 4, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16}
SECTIONS = {
    "decoder_only": {},
    "encoder_decoder": {"d_kv": 8},
    "hierarchical": {"items_from": 1},
    "parallel": {},
}


def make_model(name: str = "decoder_only", seed: int = 0, **options: Any) -> Backbone:
    section = {"name": name, **SIZES, **SECTIONS[name], "dropout": 0.1, **options}
    model = build_model(section, INDEX, seed=seed)
    with torch.no_grad():  # initial scores are nearly equal
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    save_model(path, make_model(), INDEX)
    return path


def make_trainer(start: Path, model: Backbone, **options: Any) -> Preference:
    defaults = {"epochs": 1, "batch_size": 20, "learning_rate": 3e-3}
    config = Preference.Config(**{"start_from": str(start), **defaults, **options})
    trainer = Preference(config, seed=0)
    trainer.start(model, INDEX, DATASET.catalog)
    return trainer


def fit(folder: Path, trainer: Trainer, model: Backbone) -> TrainResult:
    examples = trainer.examples(model, DATASET.interactions.training())
    accelerator = Accelerator(cpu=True)
    return trainer.fit(model, examples, None, accelerator=accelerator, folder=folder, key="key")


def test_one_rejected_item_is_dpo_and_several_are_the_softmax() -> None:
    chosen, rejected = torch.tensor([0.3]), torch.tensor([[-0.2]])
    there = torch.tensor([[True]])
    dpo = -math.log(1 / (1 + math.exp(-(0.3 + 0.2))))
    assert float(preference_loss(chosen, rejected, there)) == pytest.approx(dpo)
    several = torch.tensor([[-0.2, 0.5, 9.0]])
    there = torch.tensor([[True, True, False]])
    inner = math.log(math.exp(-0.2 - 0.3) + math.exp(0.5 - 0.3))
    expected = -math.log(1 / (1 + math.exp(inner)))
    assert float(preference_loss(chosen, several, there)) == pytest.approx(expected)


def test_rejected_items_that_are_not_there_leave_no_gradient() -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    there = torch.tensor([[False, False], [True, False]])
    loss_B = preference_loss(chosen, rejected, there)
    torch.testing.assert_close(loss_B, torch.full((2,), math.log(2)))
    loss_B.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == [0.0, -0.5]
    assert rejected.grad.tolist() == [[0, 0], [0.5, 0]]


@pytest.mark.parametrize("name", SECTIONS)
@torch.no_grad()
def test_probabilities_are_those_of_the_search(name: str) -> None:
    model = make_model(name)
    tree = CatalogueTree(model.tokens_NL, model.level_offsets_L)
    batch = pad_histories([[1, 2, 3], []], 4)
    every = torch.arange(12).expand(2, -1)
    found = item_logprobs(model, tree, batch, every)
    torch.testing.assert_close(found.logsumexp(1), torch.zeros(2), atol=1e-5, rtol=0)
    beams = beam_search(model, batch, CSRIndex.from_index(INDEX), width=12, k=12)
    torch.testing.assert_close(found.gather(1, beams.rows_Bk), beams.logprobs_Bk)


@pytest.mark.parametrize(("num", "expected"), [(1, math.log(2)), (3, math.log(4))])
def test_the_loss_starts_at_its_constant_although_the_model_has_dropout(
    num: int, expected: float, start: Path
) -> None:
    model = make_model(seed=5, dropout=0.5)
    trainer = make_trainer(start, model, num_negatives=num)
    assert all(
        np.array_equal(a, find_model(start).arrays[n]) for n, a in model_arrays(model).items()
    )
    examples = trainer.examples(model, DATASET.interactions.training())
    learner = trainer.learner(model).train()
    assert not model.training
    spans, batches = examples.plan(20, 0, 0)
    batch = trainer.make_batch(examples, spans, batches[0], Place())
    output = learner(batch)
    assert float(output.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert int(output.num_targets) == len(batch) and output.figures is not None
    assert output.figures.abs().max() < 1e-4  # no margin yet, nothing is preferred


def test_rejected_items_are_other_items_and_follow_the_choice_not_the_batch(start: Path) -> None:
    model = make_model()
    trainer = make_trainer(start, model, num_negatives=3)
    examples = trainer.examples(model, DATASET.interactions.training())
    trainer.learner(model)
    spans, batches = examples.plan(20, 0, 0)
    rows = batches[0]
    whole = trainer.make_batch(examples, spans, rows, Place())
    assert whole.target_B is not None and whole.negatives is not None
    assert whole.negatives.shape == (len(rows), 3)
    assert not (whole.negatives == whole.target_B[:, None]).any()
    assert all(len(set(row)) == 3 for row in whole.negatives.tolist())
    part = trainer.make_batch(examples, spans, rows[3:5], Place())
    assert part.negatives is not None and torch.equal(part.negatives, whole.negatives[3:5])
    later = trainer.make_batch(examples, spans, rows, Place(epoch=1))
    assert later.negatives is not None and not torch.equal(later.negatives, whole.negatives)
    many = make_trainer(start, model, num_negatives=20)
    many.learner(model)
    padded = many.make_batch(examples, spans, rows[:2], Place()).negatives
    assert padded is not None and (padded >= 0).sum(1).tolist() == [11, 11]


@pytest.mark.parametrize("name", SECTIONS)
def test_it_raises_the_margin_and_leaves_the_reference(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "start", make_model(name), INDEX)
    model = make_model(name, seed=3)
    trainer = make_trainer(tmp_path / "start", model, epochs=4, num_negatives=2, beta=0.5)
    result = fit(tmp_path / "fit", trainer, model)
    first, last = result.curve[0], result.curve[-1]
    assert last["loss"] < first["loss"] < math.log(3) + 0.05
    assert last["train/margin"] > first["train/margin"]
    assert last["train/accuracy"] > 0.6
    kept = model_arrays(trainer._reference)
    before = find_model(tmp_path / "start").arrays
    assert all(np.array_equal(kept[n], before[n]) for n in before)
    assert not all(np.array_equal(a, before[n]) for n, a in model_arrays(model).items())


def test_the_likelihood_can_be_kept_beside_it(start: Path) -> None:
    model = make_model()
    batch = pad_histories([[1, 2], [3]], 4, targets=[4, 5])
    batch = type(batch)(batch.history_BH, batch.target_B, negatives=torch.tensor([[1], [2]]))
    config = Preference.Config(start_from=str(start), likelihood=0.5)
    learner = PreferenceLearner(model, make_model(), config)
    plain = PreferenceLearner(model, make_model(), Preference.Config(start_from=str(start)))
    assert batch.target_B is not None
    logprobs = item_logprobs(model, plain.tree, batch, batch.target_B[:, None])
    expected = plain(batch).loss_sum - 0.5 * logprobs.sum()
    torch.testing.assert_close(learner(batch).loss_sum, expected)


def test_accumulation_and_resuming_are_exact(start: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Mortal(Preference):
        calls = 0

        def compute_loss(self, model: Any, batch: Any) -> Any:
            Mortal.calls += 1
            if Mortal.calls > 5:
                raise Killed
            return super().compute_loss(model, batch)

    found = {}
    for name, options in (("whole", {}), ("parts", {"accumulation": 4})):
        model = make_model()
        trainer = make_trainer(start, model, checkpoint_every=2, batch_size=30, **options)
        fit(tmp_path / name, trainer, model)
        found[name] = model_arrays(model)
    for weight, array in found["whole"].items():
        np.testing.assert_allclose(array, found["parts"][weight], atol=3e-4, err_msg=weight)
    model = make_model()
    options = {"start_from": str(start), "epochs": 1, "batch_size": 30, "learning_rate": 3e-3}
    mortal = Mortal(Preference.Config(**options, checkpoint_every=2), seed=0)
    mortal.start(model, INDEX, DATASET.catalog)
    Mortal.calls = 2  # leaves after three steps
    with pytest.raises(Killed):
        fit(tmp_path / "cut", mortal, model)
    model = make_model(seed=8)
    trainer = make_trainer(start, model, checkpoint_every=2, batch_size=30)
    result = fit(tmp_path / "cut", trainer, model)
    assert result.resumed_from == 2
    assert all(np.array_equal(a, found["whole"][n]) for n, a in model_arrays(model).items())


def test_what_does_not_fit_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.start_from: no trained model at"):
        make_trainer(tmp_path, make_model())
    other = ItemIndex(INDEX.item_ids, CODES[::-1].copy(), (3, 4))
    save_model(tmp_path / "other", make_model(), other)
    with pytest.raises(MismatchError, match=other.fingerprint):
        make_trainer(tmp_path / "other", make_model())
    with pytest.raises(ArtifactError, match="the weights do not fit this model"):
        make_trainer(start, make_model(d_model=32))
    model = make_model()
    trainer = make_trainer(start, model, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="got true for preference tuning"):
        trainer.learner(model)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_language_models_learn_preferences_through_their_adapters(
    family: Any, tmp_path: Path
) -> None:
    source = str(tiny_language_model(tmp_path / family, family))
    name = "pretrained_seq2seq" if family == "t5" else "pretrained_causal"
    section = {"name": name, "source": source, "max_history": 4, "tuning": {"mode": "lora"}}
    save_model(tmp_path / "start", build_model(section, INDEX, seed=0), INDEX)
    model = build_model(section, INDEX, seed=1)
    trainer = make_trainer(tmp_path / "start", model, num_negatives=2, beta=1.0, epochs=2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    curve = fit(tmp_path / "fit", trainer, model).curve
    assert curve[-1]["train/margin"] > curve[0]["train/margin"]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_a_second_stage_runs_from_a_finished_run(
    small_run: Path, small_config: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(small_config.read_text())
    trainer = {"name": "preference", "start_from": str(small_run), "epochs": 1}
    config["trainer"] = {**trainer, "num_negatives": 2, "validation_users": 8}
    config["evaluation"] = {**config.get("evaluation", {}), "baselines": []}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    Run(load_run_config(path), out=out, cache=tmp_path / "cache", device="cpu").execute()
    index = ItemIndex.load(out / "bundle" / "index")
    first, second = (find_model(run) for run in (small_run, out))
    assert isinstance(first, Artifact) and first.fingerprint != second.fingerprint
    assert second.extra["trainer"]["name"] == "preference"
    assert load_model(second.path, index).config == load_model(first.path, index).config


def test_the_start_decides_the_key(start: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", make_model(seed=7), INDEX)
    keys = [
        Preference.Config(start_from=str(path)).reads(DATASET.catalog)
        for path in (start, tmp_path / "model")
    ]
    assert keys[0] != keys[1] and set(keys[0]) == {"start_from"}
