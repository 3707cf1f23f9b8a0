"""Is an ensemble the mean of its members' probabilities, and trained as each would be alone?"""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from genrec.bundle import build_model, load_model, save_model
from genrec.config import load_yaml, parse_component
from genrec.data import Catalog
from genrec.decoding import CSRIndex, Filters, beam_search
from genrec.errors import ConfigError
from genrec.item_index import ItemIndex
from genrec.models import BACKBONES
from genrec.models.base import pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.ensemble import Ensemble
from genrec.testing.models import (
    HISTORIES,
    MAX_HISTORY,
    SIZES,
    BackboneContract,
    item_logprobs,
    small_codes,
    training_batch,
)

SMALL = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "max_history": MAX_HISTORY}
KINDS = [
    {"name": "decoder_only", **SMALL},
    {"name": "encoder_decoder", **SMALL, "d_kv": 16},
    {"name": "hierarchical", **SMALL, "items_from": 1, "repeat_bias": True},
    {"name": "parallel", **SMALL},
]


class TestEnsemble(BackboneContract):
    backbone = Ensemble
    options: ClassVar = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}

    def configure(self, **options):
        return Ensemble.Config(size=2, of={"name": "decoder_only", **options})


class TestEnsembleOfTargets(BackboneContract):
    """Members that learn one target at a time."""

    backbone = Ensemble
    options: ClassVar = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64}

    def configure(self, **options):
        return Ensemble.Config(size=2, of={"name": "encoder_decoder", **options})


@pytest.fixture
def index():
    codes = small_codes()
    return ItemIndex([f"i{n}" for n in range(len(codes))], codes, SIZES)


def ensemble(index, kind, size=3):
    """Return an ensemble whose members disagree."""
    torch.manual_seed(0)
    model = Ensemble.from_index(Ensemble.Config(size=size, of={**kind, "dropout": 0.0}), index)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["name"])
@torch.no_grad()
def test_probabilities_are_the_mean_of_the_members(index, kind):
    model = ensemble(index, kind)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    of_members = torch.stack([item_logprobs(member, batch) for member in model.members])
    assert (of_members[0] - of_members[1]).abs().max() > 0.3
    expected_BN = of_members.exp().mean(0).log()
    torch.testing.assert_close(item_logprobs(model, batch), expected_BN, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["name"])
@torch.no_grad()
def test_raw_probabilities_are_the_mean_of_the_members(index, kind):
    model = ensemble(index, kind)
    batch, csr = pad_histories(HISTORIES, MAX_HISTORY), CSRIndex.from_index(index)
    found = beam_search(model, batch, csr, width=24, k=24, scoring="raw")
    of_members = torch.stack(
        [
            by_row(beam_search(member, batch, csr, width=24, k=24, scoring="raw"))
            for member in model.members
        ]
    )
    expected_BN = of_members.exp().mean(0).log()
    torch.testing.assert_close(by_row(found), expected_BN, atol=1e-4, rtol=0)
    # The view of "raw" left the model as it was.
    assert not model.spans_vocabulary
    assert not any(member.spans_vocabulary for member in model.members)


def by_row(beams):
    """Return log-probabilities of all items, (B, N)."""
    result = torch.full(beams.rows_Bk.shape, torch.nan)
    return result.scatter(1, beams.rows_Bk, beams.logprobs_Bk)


def test_each_member_learns_as_it_would_alone(index):
    """Its gradient is what it would be alone, over the number of members."""
    model = ensemble(index, KINDS[0], size=2).train()
    alone = DecoderOnly.from_index(model.members[0].config, index).train()
    alone.load_state_dict(model.members[0].state_dict())
    batch = training_batch(alone, [(3, 1, 4), (2, 6)])
    for module in (model, alone):
        module(batch).loss.backward()
    learned = dict(alone.named_parameters())
    for name, weight in model.members[0].named_parameters():
        torch.testing.assert_close(2 * weight.grad, learned[name].grad)
    assert not torch.equal(model.members[0].embedding.weight, model.members[1].embedding.weight)


@torch.no_grad()
def test_its_loss_is_below_the_mean_of_its_members(index):
    model = ensemble(index, KINDS[0])
    batch = training_batch(model, [(3, 1, 4), (2, 6), (5, 5, 1, 0)])
    own = model.loss(batch)
    members = torch.stack([member.loss(batch).loss for member in model.members]).mean()
    assert own.loss < members - 0.01
    torch.testing.assert_close(model.train().loss(batch).loss, members)


@torch.no_grad()
def test_times_and_weights_reach_the_members(index):
    kind = {"name": "hierarchical", **SMALL, "time_features": "gap_recency"}
    model = ensemble(index, kind)
    assert model.reads_times
    batch = training_batch(model, [(3, 1, 4), (2, 6)])
    day = 86_400
    times = torch.tensor([[10 * day, 11 * day, 40 * day], [5 * day, 6 * day, 0]])
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    full = replace(batch, times_BH=times, weights=weights)
    model.members[1].load_state_dict(model.members[0].state_dict())
    model.members[2].load_state_dict(model.members[0].state_dict())
    own, alone = model.loss(full), model.members[0].loss(full)
    torch.testing.assert_close(own.loss_sum, alone.loss_sum, atol=1e-4, rtol=0)
    torch.testing.assert_close(own.normalizer, alone.normalizer)
    assert int(own.num_targets) == int(alone.num_targets) == 5


@torch.no_grad()
def test_saved_and_loaded_with_its_items_and_users(index, tmp_path):
    section = {
        "name": "ensemble",
        "size": 2,
        "of": {**KINDS[2], "user_tokens": "learned", "content": True},
    }
    model = build_model(section, index, seed=4).eval()
    vectors_NE = np.random.default_rng(0).normal(size=(len(index), 5)).astype(np.float32)
    model.start_from(Catalog.from_vectors(vectors_NE, index.item_ids))
    model.meet_users(["ann", "bob"], np.array([True, True]))
    model.meet_items(np.arange(24) > 3)
    save_model(tmp_path / "model", model, index)
    loaded = load_model(tmp_path / "model", index)
    assert [name for name in loaded.item_tables if name.endswith("consumed_N1")] == [
        "members.0.consumed_N1",
        "members.1.consumed_N1",
    ]
    assert loaded.user_rows(["bob", None]).tolist() == model.user_rows(["bob", None]).tolist()
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    assert torch.equal(item_logprobs(loaded, batch), item_logprobs(model, batch))
    assert loaded.config == model.config


@pytest.mark.parametrize("scoring", ["renormalized", "level", "raw"])
@torch.no_grad()
def test_beams_without_an_item_are_no_trouble(index, scoring):
    """One allowed item and a wide beam: all other beams fill up, and stay without probability."""
    model = ensemble(index, KINDS[2])
    batch, csr = pad_histories(HISTORIES, MAX_HISTORY), CSRIndex.from_index(index)
    allowed = Filters(allow=[np.array([5])] * len(HISTORIES))
    options = {"width": 24, "k": 3, "scoring": scoring}
    found = beam_search(model, batch, csr, filters=allowed, **options)
    everything = by_row(beam_search(model, batch, csr, **{**options, "k": 24}))
    assert found.rows_Bk[:, 0].tolist() == [5] * len(HISTORIES)
    torch.testing.assert_close(found.logprobs_Bk[:, 0], everything[:, 5], atol=1e-4, rtol=0)


def test_ready_configuration_is_the_default_generator_three_times(root):
    default, ready = (load_yaml(root / "configs" / f"{n}.yaml") for n in ("genrec", "ensemble"))
    expected = {"name": "ensemble", "size": 3, "of": default["model"]}
    assert ready == {**default, "name": "ensemble", "model": expected}


def test_members_must_be_trained_from_random_weights():
    cases = {
        r"^model\.of\.name: got 'pretrained_causal', .*random weights": {
            "name": "pretrained_causal",
            "source": "somewhere",
        },
        r"^model\.of\.name: got 'ensemble', .*random weights": {"name": "ensemble", "of": KINDS[0]},
        r"^model\.of\.name: got 'nope'": {"name": "nope"},
        r"^model\.of\.d_modell: unknown key": {**KINDS[0], "d_modell": 3},
    }
    for message, of in cases.items():
        with pytest.raises(ConfigError, match=message):
            parse_component(BACKBONES, {"name": "ensemble", "of": of}, path="model")
    with pytest.raises(ConfigError, match=r"^model\.of: missing"):
        parse_component(BACKBONES, {"name": "ensemble"}, path="model")


def test_it_has_no_hidden_states(index):
    model = ensemble(index, KINDS[0])
    for call in (model.code_scores, lambda hidden, _: model.vocabulary_scores(hidden)):
        with pytest.raises(ConfigError, match="no hidden states"):
            call(torch.zeros(1, 32), 0)
