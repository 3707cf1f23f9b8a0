"""Does a model that chooses among consumed items say how likely the others are?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from genrec.bundle import load_model, save_model
from genrec.data.synthetic import ring
from genrec.decoding import CSRIndex, beam_search, score_catalogue
from genrec.item_index import ItemIndex
from genrec.models.base import Batch, pad_histories
from genrec.models.ensemble import Ensemble
from genrec.models.hierarchical import Hierarchical
from genrec.models.new_items import NewItemBias
from genrec.testing import random_index
from genrec.trainers.base import Trainer
from genrec.trainers.batching import TrainingExamples
from genrec.trainers.validation import Validator

CODES = random_index(40, (4, 5, 6), seed=1)
NEW = [2, 5, 11, 12, 30]
OPTIONS = {
    "d_model": 32,
    "num_layers": 1,
    "num_heads": 2,
    "d_ff": 48,
    "max_history": 6,
    "dropout": 0.0,
    "consumed_only": True,
}


def counts(index: ItemIndex = CODES) -> np.ndarray:
    return ~np.isin(np.arange(len(index)), NEW)


def backbone(**options) -> Hierarchical:
    torch.manual_seed(0)
    model = Hierarchical.from_index(Hierarchical.Config(**{**OPTIONS, **options}), CODES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.meet_items(counts())
    return model.eval()


def targets(*, new: int, others: int, seed: int = 0) -> list[Batch]:
    """Return two batches of requests whose targets are so many new items, and so many others."""
    rng = np.random.default_rng(seed)
    known = np.flatnonzero(counts())
    rows = np.concatenate([rng.choice(NEW, new), rng.choice(known, others)])
    histories = [rng.choice(known, rng.integers(0, 6)) for _ in rows]
    batches = []
    for chosen in np.array_split(rng.permutation(len(rows)), 2):
        batch = pad_histories([histories[i] for i in chosen], 6)
        batches.append(replace(batch, target_B=torch.from_numpy(rows[chosen])))
    return batches


def share_of_new(log_odds_P: torch.Tensor) -> float:
    return float(log_odds_P.double().sigmoid().mean())


@pytest.mark.parametrize("new", [0, 3, 40, 57, 60])
def test_as_many_new_targets_are_expected_as_there_were(new):
    log_odds_P = 3 * torch.randn(60, generator=torch.Generator().manual_seed(0)) - 1
    bias = NewItemBias()
    bias.fit(log_odds_P, torch.arange(60) < new)
    assert share_of_new(log_odds_P + bias.value_1) == pytest.approx((new + 0.5) / 61, abs=1e-5)


def test_targets_chosen_among_one_kind_tell_nothing():
    log_odds_P = torch.tensor([0.3, -1.0, torch.inf, -torch.inf, -0.4])
    is_new_P = torch.tensor([True, False, True, False, False])
    bias, alone = NewItemBias(), NewItemBias()
    bias.fit(log_odds_P, is_new_P)
    alone.fit(log_odds_P[[0, 1, 4]], is_new_P[[0, 1, 4]])
    assert torch.equal(bias.value_1, alone.value_1)
    bias.fit(log_odds_P[2:4], is_new_P[2:4])
    assert float(bias.value_1) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("items_from", [0, 1, 2])
@pytest.mark.parametrize("repeat_bias", [False, True])
def test_the_bias_makes_the_targets_likeliest(items_from, repeat_bias):
    model = backbone(items_from=items_from, repeat_bias=repeat_bias)
    batches = targets(new=9, others=191)
    model.meet_targets(iter(batches))
    fitted = float(model.new_items.value_1)
    constraint = CSRIndex.from_index(CODES)

    def nll(value: float) -> float:
        model.new_items.value_1.fill_(value)
        total = 0.0
        for batch in batches:
            scores_BN = score_catalogue(model, batch.histories(), constraint)
            total -= float(scores_BN.gather(1, batch.target_B[:, None]).sum())
        return total

    assert nll(fitted) < min(nll(fitted - 0.2), nll(fitted + 0.2), nll(0.0))
    for batch in batches:
        mass_B = score_catalogue(model, batch.histories(), constraint).exp().sum(1)
        torch.testing.assert_close(mass_B, torch.ones(len(batch)), atol=1e-4, rtol=0)
    if items_from == 0:  # one choice among all: the mass itself is what was fitted
        model.new_items.value_1.fill_(fitted)
        parts = [score_catalogue(model, b.histories(), constraint).exp()[:, NEW] for b in batches]
        assert float(torch.cat(parts).sum(1).mean()) == pytest.approx(9.5 / 201, abs=1e-5)


@torch.no_grad()
def test_fitting_again_does_not_build_on_the_last_time():
    model, batches = backbone(items_from=1), targets(new=5, others=60)
    model.meet_targets(batches)
    first = float(model.new_items.value_1)
    model.meet_targets(batches)
    assert first != 0.0
    assert float(model.new_items.value_1) == pytest.approx(first, abs=1e-5)


@torch.no_grad()
def test_search_loss_and_a_saved_model_know_the_bias(tmp_path):
    model = backbone(items_from=1)
    batch = pad_histories([(1, 3, 4)], 6)
    sequence = pad_histories([(1, 3, 4, NEW[0])], 6)
    before = float(model.loss(sequence).loss_sum), float(model.train().loss(sequence).loss_sum)
    model.eval().new_items.value_1.fill_(-3.0)
    after = float(model.loss(sequence).loss_sum)
    assert after > before[0]
    assert float(model.train().loss(sequence).loss_sum) == before[1]  # training does not use it
    model.eval()
    constraint = CSRIndex.from_index(CODES)
    exact_N = score_catalogue(model, batch, constraint)[0]
    beams = beam_search(model, batch, constraint, width=len(CODES), k=len(CODES))
    torch.testing.assert_close(beams.logprobs_Bk[0], exact_N[beams.rows_Bk[0]])
    save_model(tmp_path / "m", model, CODES)
    loaded = load_model(tmp_path / "m", CODES)
    assert torch.equal(score_catalogue(loaded, batch, constraint)[0], exact_N)


def test_without_consumed_only_targets_change_nothing():
    model = backbone(items_from=1, consumed_only=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.meet_targets(targets(new=5, others=60))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_members_of_an_ensemble_learn_it_each():
    member = {"name": "hierarchical", **OPTIONS, "items_from": 1}
    torch.manual_seed(3)
    model = Ensemble.from_index(Ensemble.Config(size=2, of=member), CODES).eval()
    model.meet_items(counts())
    model.meet_targets(iter(targets(new=5, others=60)))
    values = [float(one.new_items.value_1) for one in model.members]
    assert 0.0 not in values
    assert values[0] != values[1]


def test_training_learns_it_from_the_validation_targets(tmp_path: Path):
    dataset = ring(num_items=16, num_users=10, length=8)
    codes = np.array([(i // 4, i % 4) for i in range(16)])
    index = ItemIndex(tuple(dataset.catalog.item_ids), codes, (4, 4))
    counts_N = dataset.interactions.training().counts()
    examples = dataset.interactions.examples("valid")
    target_rows = np.asarray(examples.target_rows)
    assert np.flatnonzero(counts_N == 0).tolist() == [15]  # a target of validation alone
    in_group = np.flatnonzero(target_rows // 4 == 3)
    assert sorted(target_rows[in_group]) == [12, 13, 14, 15]
    torch.manual_seed(0)
    model = Hierarchical.from_index(Hierarchical.Config(**{**OPTIONS, "items_from": 1}), index)
    model.meet_items(counts_N)
    constraint = CSRIndex.from_index(index)
    Trainer(Trainer.Config(epochs=2, batch_size=8), seed=0).fit(
        model,
        TrainingExamples(dataset.interactions.training(), "sequence", 6),
        Validator(examples, constraint, num_users=100, width=12, seed=0),
        accelerator=Accelerator(cpu=True),
        folder=tmp_path,
        key="key",
    )
    batch = pad_histories([examples.history(i) for i in in_group], 6)
    group_BC = score_catalogue(model.eval(), batch, constraint)[:, 12:].exp()
    found = float((group_BC[:, 3] / group_BC.sum(1)).mean())
    assert found == pytest.approx((1 + 0.5) / (4 + 1), abs=1e-4)
