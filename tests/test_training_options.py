"""Options of training: what each changes, what it leaves, and that exactness stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from genrec.artifacts import load_artifact
from genrec.data import Catalog
from genrec.data.interactions import Interactions
from genrec.data.synthetic import ring
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError, TrainingError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch, LossOutput, pad_histories
from genrec.models.batch import IGNORED, choice_nll
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.models.parallel import Parallel
from genrec.trainers.averaging import Average
from genrec.trainers.base import Trainer, TrainResult
from genrec.trainers.batching import TrainingExamples
from genrec.trainers.objectives import Learner, ObjectivesConfig, contrast
from genrec.trainers.validation import Validator
from genrec.trainers.weighting import DAY, WeightingConfig, target_weights
from genrec.weights import model_arrays

DATASET = ring(num_items=12, num_users=20, length=8)
CODES = np.array([(i // 4, i % 4) for i in range(12)])
INDEX = ItemIndex(tuple(DATASET.catalog.item_ids), CODES, (3, 4))
SMALL = {"max_history": 4, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16}
CLASSES = [DecoderOnly, EncoderDecoder, Hierarchical, Parallel]
VECTORS = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
CATALOG = DATASET.catalog.with_vectors(VECTORS)
BARE = Catalog(DATASET.catalog.table)
ALL = {"user_text": 0.5, "item_text": 0.25, "reconstruction": 1.0, "num_negatives": 5}


def make_model(cls: type[Backbone] = DecoderOnly, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return cls.from_index(cls.Config(**{**SMALL, "dropout": 0.0, **options}), INDEX)


def fit(
    folder: Path,
    model: Backbone,
    *,
    cls: type[Trainer] = Trainer,
    validate: bool = False,
    catalog: Any = CATALOG,
    **options: Any,
) -> TrainResult:
    config = Trainer.Config(**{"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, **options})
    trainer = cls(config, seed=0)
    trainer.start(model, INDEX, catalog)
    validator = Validator(
        DATASET.interactions.examples("valid"),
        CSRIndex.from_index(INDEX),
        num_users=10,
        width=12,
        seed=0,
    )
    return trainer.fit(
        model,
        trainer.examples(model, DATASET.interactions.training()),
        validator if validate else None,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        key="key",
    )


def equal(a: Backbone, b: Backbone) -> bool:
    one, two = model_arrays(a), model_arrays(b)
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


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


# -- averaging --------------------------------------------------------------------------------


def test_the_average_is_the_formula_and_leaves_frozen_weights_alone() -> None:
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    average = Average(module, decay=0.9)
    expected = None
    for step in range(1, 4):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.update(step)
        decay = 0.0 if step == 1 else min(0.9, step / (step + 9))
        expected = step if expected is None else decay * expected + (1 - decay) * step
    assert list(average.arrays()) == ["weight"]
    np.testing.assert_allclose(average.arrays()["weight"], expected, rtol=1e-6)
    bias = module.bias.clone()
    with average.applied():
        np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-6)
    assert (module.weight == 3.0).all() and torch.equal(module.bias, bias)


def test_the_average_is_validated_and_kept_and_training_goes_on_from_the_weights(
    tmp_path: Path,
) -> None:
    plain, averaged = make_model(), make_model()
    fit(tmp_path / "plain", plain, validate=True, patience=9)
    fit(tmp_path / "averaged", averaged, validate=True, patience=9, average=0.5)
    arrays = {}
    for name in ("plain", "averaged"):
        (found,) = (tmp_path / name / "checkpoints").iterdir()
        arrays[name] = load_artifact(found, kind="checkpoint").arrays
    weight = "embedding.weight"
    for part in ("model", "optimizer"):  # the average has no influence on the steps
        names = [n for n in arrays["plain"] if n.startswith(f"{part}/")]
        assert names
        assert all(np.array_equal(arrays["plain"][n], arrays["averaged"][n]) for n in names)
    kept = model_arrays(averaged)[weight]
    assert np.array_equal(kept, arrays["averaged"][f"best/{weight}"])
    assert not np.array_equal(kept, arrays["averaged"][f"model/{weight}"])
    without = make_model()
    fit(tmp_path / "without", without, average=0.5)
    (found,) = (tmp_path / "without" / "checkpoints").iterdir()
    last = load_artifact(found, kind="checkpoint").arrays[f"average/{weight}"]
    assert np.array_equal(model_arrays(without)[weight], last)


@pytest.mark.parametrize("options", [{"average": 0.9}, {"average": 0.9, "objectives": ALL}])
def test_a_killed_run_with_average_and_objectives_resumes_exactly(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, "checkpoint_every": 2, "validate": True}
    options["objectives"] = ObjectivesConfig(**options.get("objectives", {}))
    whole = make_model(dropout=0.1)
    expected = fit(tmp_path / "whole", whole, **options)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", make_model(dropout=0.1), cls=killed_at(7), **options)
    model = make_model(seed=99, dropout=0.1)
    result = fit(tmp_path / "cut", model, **options)
    assert result.resumed_from and equal(model, whole)
    assert [c["loss"] for c in result.curve] == [c["loss"] for c in expected.curve]


# -- weights of targets -----------------------------------------------------------------------


def interactions(times: list[int]) -> Interactions:
    rows = np.array([0, 0, 0, 0, 1, 2], np.int32)
    offsets, splits = np.array([0, 4, 6]), np.zeros(6, np.uint8)
    return Interactions(rows, offsets, np.array(times, np.int64), splits, 3)


def test_weights_are_the_formulas() -> None:
    training = interactions([0, 0, 0, int(DAY), int(2 * DAY), int(2 * DAY)])
    assert target_weights(training, WeightingConfig()) is None
    popular = np.array([4.0, 4, 4, 4, 1, 1]) ** -0.5
    found = target_weights(training, WeightingConfig(inverse_popularity=0.5))
    np.testing.assert_allclose(found, popular / popular.mean(), rtol=1e-6)
    old = np.array([0.25, 0.25, 0.25, 0.5, 1, 1])
    found = target_weights(training, WeightingConfig(half_life=1.0))
    np.testing.assert_allclose(found, old / old.mean(), rtol=1e-6)
    both = target_weights(training, WeightingConfig(half_life=1.0, inverse_popularity=0.5))
    np.testing.assert_allclose(both, popular * old / (popular * old).mean(), rtol=1e-6)
    long = target_weights(training, WeightingConfig(half_life=1e12))
    np.testing.assert_allclose(long, 1.0, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"half_life: got 1.0 days for .* the same time"):
        target_weights(interactions([5] * 6), WeightingConfig(half_life=1.0))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_loss_is_the_weighted_mean_of_the_targets(cls: type[Backbone]) -> None:
    options = {"items_from": 1} if cls is Hierarchical else {}
    model = make_model(cls, **options).eval()
    training = DATASET.interactions.training()
    weights = np.random.default_rng(0).uniform(0, 2, len(training)).astype(np.float32)
    examples = TrainingExamples(training, model.training_unit, 4, weights)
    spans, batches = examples.plan(7, seed=0, epoch=0)
    batch = examples.batch(spans, batches[0])
    assert batch.weights is not None
    output = model.loss(batch)
    ones = model.loss(Batch(batch.history_BH, batch.target_B, torch.ones_like(batch.weights)))
    plain = model.loss(Batch(batch.history_BH, batch.target_B))
    torch.testing.assert_close(ones.loss, plain.loss)
    assert int(ones.normalizer) == int(plain.num_targets) == int(output.num_targets)
    # One target at a time, by weights that are 0 but for one.
    total = torch.zeros(())
    valid = (batch.history_BH >= 0) if model.training_unit == "sequence" else batch.target_B >= 0
    assert valid is not None
    for place in valid.nonzero():
        one = torch.zeros_like(batch.weights)
        one[tuple(place)] = 1.0
        alone = model.loss(Batch(batch.history_BH, batch.target_B, one)).loss_sum
        total = total + batch.weights[tuple(place)] * alone
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.normalizer, batch.weights[valid].sum())
    torch.testing.assert_close(output.loss, total / batch.weights[valid].sum())


def test_weights_follow_their_items_when_a_history_is_cut() -> None:
    batch = pad_histories([[1, 2, 3], [4]], 9)
    weighted = Batch(batch.history_BH, weights=torch.tensor([[1.0, 2, 3], [4, 0, 0]])).last(2)
    assert weighted.history_BH.tolist() == [[2, 3], [4, -1]]
    assert weighted.weights is not None and weighted.weights.tolist() == [[2, 3], [4, 0]]


@pytest.mark.parametrize("cls", [DecoderOnly, EncoderDecoder])
def test_accumulation_is_exact_with_weights_and_objectives(
    cls: type[Backbone], tmp_path: Path
) -> None:
    results = []
    for parts in (1, 8):
        model = make_model(cls)
        result = fit(
            tmp_path / str(parts),
            model,
            accumulation=parts,
            batch_size=20,
            weights=WeightingConfig(inverse_popularity=1.0),
            objectives=ObjectivesConfig(**ALL),
        )
        results.append((model_arrays(model), result.curve))
    (one, curve_one), (eight, curve_eight) = results
    for name in ("loss", "train/user_text", "train/next_item"):
        np.testing.assert_allclose(
            [c[name] for c in curve_one], [c[name] for c in curve_eight], rtol=1e-4
        )
    for name in one:
        np.testing.assert_allclose(one[name], eight[name], atol=5e-4, err_msg=name)


def test_small_weights_do_not_shrink_the_step(tmp_path: Path) -> None:
    """A batch's weights may sum to less than 1; the mean is what counts."""
    models = [make_model(), make_model()]
    for number, (model, weight) in enumerate(zip(models, (1.0, 2.0**-20), strict=True)):
        training = DATASET.interactions.training()
        weights = np.full(len(training), weight, np.float32)
        Trainer(Trainer.Config(epochs=1, batch_size=8), seed=0).fit(
            model,
            TrainingExamples(training, "sequence", 4, weights),
            None,
            accelerator=Accelerator(cpu=True),
            folder=tmp_path / str(number),
            key="key",
        )
    one, two = map(model_arrays, models)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4)


# -- shape of the loss ------------------------------------------------------------------------


def test_smoothing_is_the_formula_over_what_can_be_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.0], [0.5, 0.1, 0.2, 0.3], [1.0, 1, 1, 1]])
    target = torch.tensor([1, 3, IGNORED])
    logprobs = [logits[0, [0, 1, 3]].log_softmax(0), logits[1].log_softmax(0)]
    expected = sum(
        0.9 * -row[place] + 0.1 * -row.mean() for row, place in zip(logprobs, (1, 3), strict=True)
    )
    found = choice_nll(logits, target, None, smoothing=0.1)
    torch.testing.assert_close(found, expected)
    library = F.cross_entropy(logits[1:], target[1:], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(choice_nll(logits[1:], target[1:], None, smoothing=0.1), library)
    plain = F.cross_entropy(logits, target, reduction="sum")
    assert torch.equal(choice_nll(logits, target, None), plain)
    weighted = choice_nll(logits, target, torch.tensor([2.0, 0.0, 5.0]))
    torch.testing.assert_close(weighted, -2.0 * logprobs[0][1])
    leaf = logits.clone().requires_grad_()
    choice_nll(leaf, target, None, smoothing=0.1).backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("softmax", ["level", "vocabulary", "trie"])
@pytest.mark.parametrize("cls", CLASSES)
def test_options_of_the_loss_start_from_the_plain_one(cls: type[Backbone], softmax: str) -> None:
    batch = pad_histories([[1, 2], [3]], 5, targets=[4, 5])
    plain = make_model(cls, softmax=softmax).train()
    same = make_model(cls, softmax=softmax, label_smoothing=0.0, loss_temperature=1.0).train()
    assert torch.equal(plain.loss(batch).loss, same.loss(batch).loss)
    smoothed = make_model(cls, softmax=softmax, label_smoothing=0.2).train()
    sharp = make_model(cls, softmax=softmax, loss_temperature=0.5).train()
    for other in (smoothed, sharp):
        assert not torch.equal(plain.loss(batch).loss, other.loss(batch).loss)
        assert torch.equal(plain.eval().loss(batch).loss, other.eval().loss(batch).loss)
        assert torch.equal(plain.begin(batch)[0], other.begin(batch)[0])
        assert torch.isfinite(other.train().loss(batch).loss)
        plain.train()


def test_the_temperature_divides_training_logits() -> None:
    """LETTER's loss: cross-entropy of z / tau."""
    batch = pad_histories([[3]], 5)
    model = make_model(loss_temperature=0.5).train()
    logits, state = model.begin(pad_histories([[]], 4))
    second, _ = model.step(torch.tensor([0]), state, torch.tensor([0]))
    expected = F.cross_entropy(logits / 0.5, torch.tensor([0]))
    expected = expected + F.cross_entropy(second / 0.5, torch.tensor([3]))
    torch.testing.assert_close(model.loss(batch).loss, expected)


# -- objectives -------------------------------------------------------------------------------


def test_contrast_is_infonce_without_the_own_item() -> None:
    states, own = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    drawn = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    same = torch.tensor([[False, True]])
    found = contrast(states, own, drawn, same_MX=same, temperature=0.5)
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0.0)))
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_objectives_add_their_weighted_sums(cls: type[Backbone]) -> None:
    model, config = make_model(cls).eval(), ObjectivesConfig(**ALL)
    learner = Learner(model, config, torch.from_numpy(VECTORS), seed=0)
    batch = pad_histories([[1, 2], [3]], 5, targets=[4, 5])
    negatives = config.negatives(12, seed=0, step=3)
    assert len(negatives) == 5 and torch.equal(negatives, config.negatives(12, 0, 3))
    assert not torch.equal(negatives, config.negatives(12, 0, 4))
    batch = Batch(batch.history_BH, batch.target_B, negatives=negatives)
    output, plain = learner(batch), model.loss(batch)
    assert output.figures is not None
    next_item, user, item, text = output.figures
    torch.testing.assert_close(next_item, plain.loss_sum.detach())
    expected = plain.loss_sum + 0.5 * user + 0.25 * item + 1.0 * text
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.loss, expected / plain.num_targets)
    rows = torch.tensor([4, 5]) if model.training_unit == "target" else torch.tensor([1, 2, 3])
    made = learner.heads.reconstruction(model.item_representations(rows))
    cosines = F.cosine_similarity(made, torch.from_numpy(VECTORS)[rows])
    torch.testing.assert_close(text, (1 - cosines).sum().detach())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.heads.parameters())


def test_objectives_are_learned_and_without_them_nothing_changes(tmp_path: Path) -> None:
    plain, zero, model = make_model(), make_model(), make_model()
    fit(tmp_path / "plain", plain, catalog=BARE)
    fit(tmp_path / "zero", zero, objectives=ObjectivesConfig())
    assert equal(plain, zero)
    curve = fit(tmp_path / "on", model, epochs=6, objectives=ObjectivesConfig(**ALL)).curve
    for name in ("next_item", "user_text", "item_text", "reconstruction"):
        assert curve[-1][f"train/{name}"] < curve[0][f"train/{name}"]
    assert not equal(plain, model)
    assert model_arrays(model).keys() == model_arrays(plain).keys()  # heads are thrown away


def test_objectives_read_only_what_was_made_without_interactions(tmp_path: Path) -> None:
    objectives = ObjectivesConfig(**ALL)
    texts = DATASET.catalog.with_vectors(VECTORS[:, :4])
    fused = DATASET.catalog.with_vectors(VECTORS, content_columns=range(4))
    one, other = make_model(), make_model()
    fit(tmp_path / "texts", one, catalog=texts, objectives=objectives)
    fit(tmp_path / "fused", other, catalog=fused, objectives=objectives)
    assert equal(one, other)
    config = Trainer.Config(objectives=objectives)
    assert config.reads(texts) == config.reads(fused) != config.reads(CATALOG)
    none = DATASET.catalog.with_vectors(VECTORS, content_columns=())
    with pytest.raises(ConfigError, match=r"got no item vectors made without interactions"):
        fit(tmp_path / "none", make_model(), catalog=none, objectives=objectives)


def test_objectives_without_what_they_need_are_refused(tmp_path: Path) -> None:
    objectives = ObjectivesConfig(reconstruction=1.0)
    with pytest.raises(ConfigError, match=r"trainer\.objectives: got no item vectors"):
        fit(tmp_path, make_model(), catalog=BARE, objectives=objectives)

    class Silent(DecoderOnly):
        def loss(self, batch: Batch) -> LossOutput:
            output = super().loss(batch)
            return LossOutput.of(output.loss_sum, output.num_targets)

        def item_representations(self, rows: torch.Tensor) -> torch.Tensor:
            return Backbone.item_representations(self, rows)

    with pytest.raises(ConfigError, match="a Silent has no vectors of items"):
        fit(tmp_path, make_model(Silent), objectives=objectives)
    Silent.item_representations = DecoderOnly.item_representations  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="a Silent does not hand out the states"):
        fit(tmp_path, make_model(Silent), objectives=ObjectivesConfig(user_text=1.0))


# -- memory and compiling ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DecoderOnly, EncoderDecoder, Hierarchical, Parallel])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(cls: type[Backbone]) -> None:
    batch = pad_histories([[1, 2, 3, 4], [3, 5]], 5, targets=[4, 5])
    kept, gradients = [], []
    for enabled in (False, True):
        model = make_model(cls, dropout=0.3).train()
        model.checkpoint_gradients(enabled)
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(batch).loss
        kept.append(sum(saved))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_checkpointing_trains_the_same_and_is_off_afterwards(tmp_path: Path) -> None:
    plain, less = make_model(dropout=0.1), make_model(dropout=0.1)
    fit(tmp_path / "plain", plain, epochs=1)
    fit(tmp_path / "less", less, epochs=1, gradient_checkpointing=True)
    assert equal(plain, less)
    assert not any(getattr(module, "forgets", False) for module in less.modules())


def test_a_backbone_that_cannot_checkpoint_says_so() -> None:
    with pytest.raises(ConfigError, match="got true for a DecoderOnly, which cannot"):
        Backbone.checkpoint_gradients(make_model(), True)


def test_compiled_training_gives_the_same(tmp_path: Path) -> None:
    plain, compiled = make_model(), make_model()
    one = fit(tmp_path / "plain", plain, epochs=1, batch_size=20)
    two = fit(tmp_path / "compiled", compiled, epochs=1, batch_size=20, compile="eager")
    assert one.curve[0]["loss"] == pytest.approx(two.curve[0]["loss"], rel=1e-5)
    weights = model_arrays(compiled)
    for name, array in model_arrays(plain).items():
        np.testing.assert_allclose(array, weights[name], atol=1e-4)


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise ValueError("no kernel for this")

    model = make_model()
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: real(self, backend=fails)
    )
    with pytest.raises(TrainingError, match=r"trainer\.compile: .*'inductor' failed: .*no kernel"):
        fit(tmp_path, model, epochs=1, compile="inductor")
