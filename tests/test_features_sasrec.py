"""Does SASRec look back only, are its losses the formulas, does it learn what can be learned?"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from genrec.config import parse
from genrec.data import Interactions
from genrec.data.interactions import Examples
from genrec.data.synthetic import planted, planted_transitions, ring
from genrec.errors import ConfigError, TrainingError, UserError
from genrec.evaluation.evaluator import evaluate_scores
from genrec.features.sasrec import SASRec, SASRecConfig
from genrec.features.sasrec_network import (
    Network,
    binary_cross_entropy,
    dropout,
)
from genrec.features.sasrec_training import (
    Sequences,
    _averaged,
    batches,
    score,
    validate,
    windows,
)

SMALL = SASRecConfig(d_model=16, num_layers=1, max_history=8, learning_rate=5e-3, epochs=20)
BOTH_NORMS = pytest.mark.parametrize("pre_norm", [True, False])


def network(num_items: int = 20, **changes) -> Network:
    torch.manual_seed(0)
    return Network(num_items, SMALL.model_copy(update=changes)).eval()


# -- network ----------------------------------------------------------------------------------


@BOTH_NORMS
def test_the_future_and_the_padding_change_nothing(pre_norm):
    net = network(num_layers=2, pre_norm=pre_norm)
    items = torch.randint(20, (3, 8))
    with torch.no_grad():
        whole = net(items)
        changed = items.clone()
        changed[:, 5:] = torch.randint(20, (3, 3))
        assert torch.equal(net(changed)[:, :5], whole[:, :5])
        assert torch.allclose(net(items[:, :5]), whole[:, :5], atol=1e-6)
        past = items.clone()
        past[:, 0] = (past[:, 0] + 1) % 20
        assert not torch.allclose(net(past)[:, 7], whole[:, 7], atol=1e-4)


def test_losses_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    hidden, items = (torch.randn(n, 4, generator=generator) for n in (5, 9))
    targets = torch.tensor([0, 3, 3, 8, 1])
    logits = hidden @ items.T
    negatives = torch.tensor([[1, 2], [0, 1], [4, 5], [0, 7], [2, 6]])
    sigmoid = torch.sigmoid(logits)
    rows = torch.arange(5)
    expected = -torch.log(sigmoid[rows, targets])
    expected = expected - torch.log(1 - sigmoid[rows[:, None], negatives]).mean(1)
    found = binary_cross_entropy(hidden, items, targets, negatives)
    assert torch.allclose(found, expected.mean(), atol=1e-6)


@pytest.mark.parametrize("repeat_bias", [False, True])
def test_with_all_items_as_negatives_the_sampled_loss_is_the_full_one(repeat_bias):
    items, targets = torch.randint(6, (3, 6)), torch.randint(6, (3, 6))
    losses = []
    for loss, more in (("softmax", {}), ("sampled_softmax", {"num_negatives": 20})):
        net = network(loss=loss, repeat_bias=repeat_bias, **more)
        if repeat_bias:
            with torch.no_grad():
                net.repeats.weight.copy_(torch.linspace(-0.2, 0.1, len(net.repeats.weight)))
        losses.append(net.loss(items, targets, torch.Generator()))
    assert torch.allclose(losses[0], losses[1], atol=1e-5)


def test_repeat_bias_is_the_same_in_training_and_in_scores():
    net = network(repeat_bias=True)
    plain = network(repeat_bias=False)
    with torch.no_grad():
        net.repeats.weight.copy_(torch.tensor([-0.1, -0.2, -0.3, -0.4][: len(net.repeats.weight)]))
        plain.load_state_dict(net.state_dict(), strict=False)
        history = np.array([4, 7, 4, 2])
        scores = torch.cat(list(score(net, [history])))[0]
        bare = torch.cat(list(score(plain, [history])))[0]
        expected = bare.clone()
        for place, item in enumerate(history.tolist()):
            expected[item] -= {1: 1.0, 2: 2.0, 3: 2.0, 4: 3.0}[len(history) - place]
        assert torch.allclose(scores, expected, atol=1e-5)
        target = torch.full((1, 4), -1)
        target[0, 3] = 7
        found = net.loss(torch.tensor([history.tolist()]), target, torch.Generator())
        assert torch.allclose(found, -scores.log_softmax(-1)[7], atol=1e-5)


def test_repeat_bias_needs_a_softmax():
    with pytest.raises(ValidationError, match="repeat_bias needs the loss softmax"):
        SASRecConfig(loss="bce", repeat_bias=True)


def test_places_without_a_target_do_not_count():
    net, generator = network(), torch.Generator()
    items, targets = torch.randint(20, (2, 6)), torch.randint(20, (2, 6))
    targets[1, 3:] = -1
    whole = net.loss(items, targets, generator)
    items[1, 3:] = 0
    assert torch.allclose(net.loss(items, targets, generator), whole)
    parts = [net.loss(items[:1], targets[:1], generator)] * 6
    parts += [net.loss(items[1:, :3], targets[1:, :3], generator)] * 3
    assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_dropout_keeps_the_mean_drops_the_share_and_rests_at_inference():
    torch.manual_seed(0)
    ones = torch.ones(1001, 100)  # 100,100 entries: no multiple of four per row
    kept = dropout(ones, 0.3, True)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (kept == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert (kept == 0).float().mean(0).std() < 0.03  # no pattern along rows
    assert torch.equal(dropout(ones, 0.3, False), ones)


def test_scores_with_a_temperature_are_cosines_divided_by_it():
    net = network(temperature=0.1)
    items = torch.randint(20, (2, 6))
    with torch.no_grad():
        hidden, weight = net(items), net.items.weight
        cosine = torch.nn.functional.cosine_similarity(hidden[:, :, None], weight, dim=-1)
        found = net.queries(hidden) @ net.item_outputs().T
        assert torch.allclose(found, cosine / 0.1, atol=1e-4)
        targets = torch.randint(20, (2, 6))
        full = torch.nn.functional.cross_entropy(cosine.flatten(0, 1) / 0.1, targets.flatten())
        assert torch.allclose(net.loss(items, targets, torch.Generator()), full, atol=1e-4)
        plain = network()
        assert torch.equal(plain.queries(hidden), hidden)
        assert torch.equal(plain.item_outputs(), plain.items.weight)


# -- batches ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_every_target_is_in_exactly_one_window_and_batch(lengths, longest, most, seed):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = Sequences(np.arange(offsets[-1]), offsets)
    rng = np.random.default_rng(seed)
    starts, inputs = windows(sequences, longest, rng)
    assert inputs.min() >= 1 and inputs.max() <= longest
    targets = np.concatenate([np.arange(s, s + n) + 1 for s, n in zip(starts, inputs, strict=True)])
    firsts = set(offsets[:-1].tolist())
    assert sorted(targets) == [i for i in range(offsets[-1]) if i not in firsts]
    assert len(targets) == sequences.num_targets
    found = list(batches(inputs, most, rng))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(inputs)))
    assert all(len(part) * inputs[part].max() <= most or len(part) == 1 for part in found)


# -- learning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce"])
def test_every_loss_learns_the_ring(loss):
    data = ring(num_items=12, num_users=96, length=8).interactions
    more = {"bce": {"num_negatives": 4}, "sampled_softmax": {"num_negatives": 6}}.get(loss, {})
    config = SMALL.model_copy(update={"loss": loss, "dropout": 0.1, "batch_targets": 64, **more})
    model = SASRec(config).fit(data.training(), data.examples("valid"))
    found = evaluate_scores(model.scores, data.examples("test"), ks=(1, 10), mask_seen=False)
    assert found["recall@1"].mean() == 1.0
    assert model.history[-1]["ndcg@10"] == 1.0


def test_every_epoch_is_told_also_without_a_terminal(caplog):
    data = ring(num_items=12, num_users=24, length=6).interactions
    config = SMALL.model_copy(update={"epochs": 2})
    with caplog.at_level(logging.INFO, logger="genrec"):
        SASRec(config).fit(data.training(), data.examples("valid"))
    told = [record.getMessage() for record in caplog.records]
    for epoch in (1, 2):
        assert any(f"epoch {epoch}, loss" in line and "ndcg@10" in line for line in told)


def test_a_model_of_cosines_learns_the_ring_and_has_vectors_of_length_one():
    data = ring(num_items=12, num_users=96, length=8).interactions
    changes = {"temperature": 0.1, "dropout": 0.0, "batch_targets": 64, "epochs": 60}
    config = SMALL.model_copy(update=changes)
    model = SASRec(config).fit(data.training(), data.examples("valid"))
    found = evaluate_scores(model.scores, data.examples("test"), ks=(1,), mask_seen=False)
    assert found["recall@1"].mean() == 1.0
    assert np.linalg.norm(model.item_vectors(), axis=1) == pytest.approx(np.ones(12), rel=1e-5)
    scores = model.scores([np.array([3, 4])])
    assert np.abs(scores).max() <= 10 + 1e-4


def test_averaged_weights_follow_the_steps_and_are_the_ones_kept():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    shown = _averaged(net, optimizer, 0.75)
    seen = []
    for _ in range(3):
        net.items.weight.grad = torch.ones_like(net.items.weight)
        optimizer.step()
        seen.append(net.items.weight.detach().clone())
    expected = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    assert torch.allclose(shown.items.weight, expected, atol=1e-6)
    data = ring(num_items=12, num_users=24, length=6).interactions
    config = SMALL.model_copy(update={"epochs": 3, "batch_targets": 32, "average": 0.9})
    model = SASRec(config).fit(data.training(), data.examples("valid"))
    valid = data.examples("valid")
    again = validate(model._network, valid.histories(), valid.target_rows)
    assert again["ndcg@10"] == pytest.approx(max(line["ndcg@10"] for line in model.history))


@BOTH_NORMS
def test_on_planted_data_it_comes_near_the_best_possible(pre_norm):
    data = planted(num_items=64, num_users=600, branching=3, seed=1)
    law = planted_transitions(data.catalog)
    examples = data.interactions.examples("test")
    last = np.array([examples.history(i)[-1] for i in range(len(examples))])
    best = np.sort(law, axis=1)[:, -10:].sum(1)[last].mean()
    config = SMALL.model_copy(update={"pre_norm": pre_norm, "max_history": 12})
    model = SASRec(config).fit(data.interactions.training())
    found = evaluate_scores(model.scores, examples, ks=(10,), mask_seen=False)
    assert found["recall@10"].mean() > 0.8 * best
    leaves = model.item_vectors()
    assert leaves.shape == (64, 16) and leaves.dtype == np.float32


def test_the_seed_fixes_everything_and_leaves_torch_alone():
    data = ring(num_items=12, num_users=24, length=6).interactions.training()
    config = SMALL.model_copy(update={"epochs": 2})
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = SASRec(config).fit(data)
    assert torch.equal(torch.random.get_rng_state(), before)
    second = SASRec(config).fit(data)
    assert np.array_equal(first.item_vectors(), second.item_vectors())
    assert first.history == second.history
    other = SASRec(config.model_copy(update={"seed": 1})).fit(data)
    assert not np.array_equal(first.item_vectors(), other.item_vectors())


def test_the_best_epoch_is_kept_and_training_stops():
    data = planted(num_items=64, num_users=100, branching=3).interactions
    config = SMALL.model_copy(update={"patience": 2, "epochs": 60, "learning_rate": 2e-2})
    valid = data.examples("valid")
    model = SASRec(config).fit(data.training(), valid)
    best = max(model.history, key=lambda line: line["ndcg@10"])
    assert len(model.history) == best["epoch"] + 2 < 60
    found = evaluate_scores(model.scores, valid, ks=(10,), mask_seen=False)
    assert found["ndcg@10"].mean() == pytest.approx(best["ndcg@10"], abs=1e-3)
    assert found["recall@10"].mean() == pytest.approx(best["recall@10"], abs=1e-3)


def test_scores_of_a_batch_are_those_of_its_histories_alone():
    data = planted(num_items=64, num_users=50, branching=3).interactions.training()
    model = SASRec(SMALL.model_copy(update={"epochs": 1})).fit(data)
    histories = [np.array([3]), np.array([], dtype=np.int64), np.arange(20), np.array([1, 2])]
    together = model.scores(histories)
    assert together.shape == (4, 64) and together.dtype == np.float64
    alone = np.concatenate([model.scores([history]) for history in histories])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together[2], model.scores([np.arange(12, 20)])[0], atol=1e-5)
    popular = np.argsort(data.counts(), kind="stable")
    assert np.array_equal(np.argsort(together[1], kind="stable"), popular)
    assert model.scores([]).shape == (0, 64)


def test_validation_is_ndcg_over_the_whole_catalogue():
    net = network()
    histories = [np.arange(n) for n in (1, 5, 3, 8)]
    targets = np.array([4, 9, 0, 19])

    def scores(part: list[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            rows = [net(torch.from_numpy(h)[None])[0, -1] @ net.items.weight.T for h in part]
        return torch.stack(rows).numpy()

    examples = Examples.of(np.arange(4), targets, histories)
    expected = evaluate_scores(scores, examples, ks=(10,), mask_seen=False)
    found = validate(net, histories, targets)
    for name in ("ndcg@10", "recall@10"):
        assert found[name] == pytest.approx(expected[name].mean(), abs=1e-6)


# -- refusals ---------------------------------------------------------------------------------


def test_unusable_settings_and_data_are_clear_errors():
    with pytest.raises(ConfigError, match=r"d_model=10 is no multiple of num_heads=4"):
        parse(SASRecConfig, {"d_model": 10, "num_heads": 4}, path="sasrec")
    with pytest.raises(UserError, match="not fitted"):
        SASRec().scores([np.array([0])])
    lone = Interactions(
        np.arange(3, dtype=np.int32), np.arange(4), np.zeros(3), np.zeros(3, np.uint8), 3
    )
    with pytest.raises(TrainingError, match="no user has two training interactions"):
        SASRec().fit(lone)


def test_a_loss_that_is_no_number_stops_with_the_remedy():
    data = ring(num_items=12, num_users=24, length=6).interactions.training()
    config = SMALL.model_copy(update={"learning_rate": float("inf")})
    with pytest.raises(TrainingError, match=r"Lower sasrec\.learning_rate"):
        SASRec(config).fit(data)
