"""Does the hierarchical backbone keep the contract, with codes only and with a choice of items?"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch

from genrec.bundle import load_model, save_model
from genrec.data import Catalog
from genrec.decoding import CSRIndex, beam_search, score_catalogue
from genrec.errors import ConfigError, MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models.base import pad_histories
from genrec.models.hierarchical import Hierarchical
from genrec.models.item_groups import NO_ITEM, ItemGroups
from genrec.pipeline.index_folder import _resign
from genrec.testing import brute_force_logprobs, random_index
from genrec.testing.decoding import random_titles
from genrec.testing.models import (
    HISTORIES,
    MAX_HISTORY,
    SIZES,
    BackboneContract,
    item_logprobs,
    small_codes,
    train,
    training_batch,
)

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48}


class TestItemsAfterOneCode(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {
        **SMALL,
        "item_vectors": False,
        "items_from": 1,
        "activation": "gelu",
        "repeat_bias": True,
    }
    test_gradient_reaches_every_parameter = None  # its batch repeats nothing at some distances


class TestOwnVectors(BackboneContract):
    """The table of own vectors has a row per item: no other catalogue can take the weights."""

    backbone = Hierarchical
    options: ClassVar = {**SMALL, "items_from": 2, "tie_embeddings": False}
    test_probabilities_of_all_codes_sum_to_one = None


class TestWholeCatalogue(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {
        **SMALL,
        "items_from": 0,
        "num_layers": 1,
        "attention_dropout": 0.1,
        "repeat_bias": True,
    }
    test_probabilities_of_all_codes_sum_to_one = None


def backbone(index: ItemIndex, **options) -> Hierarchical:
    torch.manual_seed(0)
    config = Hierarchical.Config(**{**SMALL, "max_history": MAX_HISTORY, "dropout": 0.0, **options})
    model = Hierarchical.from_index(config, index)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


CODES = random_index(40, (4, 5, 6), seed=1)
TITLES = random_titles(40, num_words=5, num_levels=3, seed=1)


@pytest.mark.parametrize("index", [CODES, TITLES], ids=["codes", "titles"])
@pytest.mark.parametrize("first", [0, 1, 2])
@torch.no_grad()
def test_items_below_a_prefix_share_its_probability(index, first):
    """Summed over what items add to a prefix, probabilities are 1: no code without an item."""
    model = backbone(index, items_from=first, softmax="trie")
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    logprobs_BN = item_logprobs(model, batch)
    if first == 0:
        torch.testing.assert_close(logprobs_BN.exp().sum(1), torch.ones(len(batch)))
    constraint = CSRIndex.from_index(index)
    found_BN = score_catalogue(model, batch, constraint)
    truth_BN = brute_force_logprobs(
        model, batch, index.codes, shared_vocabulary=index.shared_vocabulary
    )
    np.testing.assert_allclose(found_BN, truth_BN, atol=1e-4)
    torch.testing.assert_close(found_BN.exp().sum(1), torch.ones(len(batch)), atol=1e-4, rtol=0)
    beams = beam_search(model, batch, constraint, width=len(index), k=len(index))
    expected_BN = np.take_along_axis(truth_BN, beams.rows_Bk.numpy(), 1)
    np.testing.assert_allclose(beams.logprobs_Bk, expected_BN, atol=1e-4)


@torch.no_grad()
def test_from_level_zero_it_is_a_softmax_over_the_catalogue():
    """The plain twin: one product of the last position's output with all item vectors."""
    model = backbone(CODES, items_from=0)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    state = model.begin(batch)[1]
    vectors_ND = model.item_vectors(torch.arange(len(CODES)))
    plain_BN = (state.memory_RD @ vectors_ND.T).log_softmax(-1)
    torch.testing.assert_close(item_logprobs(model, batch), plain_BN, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_wide_search_does_not_hold_the_catalogue_once_per_beam():
    """Once the first code is chosen, the items below it are all that is carried on."""
    model = backbone(CODES, items_from=0)
    _, state = model.begin(pad_histories([[1, 2], [3]], MAX_HISTORY))
    assert state.scores_RC.shape == (2, len(CODES))
    parents_R = torch.arange(2).repeat_interleave(50)
    codes_R = torch.full((100,), int(CODES.codes[7, 0]))
    _, wide = model.step(codes_R, state, parents_R)
    assert wide.scores_RC.shape == (100, np.bincount(CODES.codes[:, 0]).max())
    kept = wide.items_RC[0][wide.scores_RC[0] > -torch.inf]
    assert sorted(kept.tolist()) == np.flatnonzero(CODES.codes[:, 0] == CODES.codes[7, 0]).tolist()


def test_item_dropout_forgets_own_vectors_in_training_only():
    model = backbone(CODES, items_from=1, item_dropout=0.5)
    batch = training_batch(model, [(3, 1, 4), (2, 6)])
    assert torch.equal(model.loss(batch).loss, model.loss(batch).loss)
    without = backbone(CODES, items_from=1, item_vectors=False).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    model.train()
    losses = {float(model.loss(batch).loss.detach()) for _ in range(20)}
    assert len(losses) > 10
    with torch.no_grad():
        model.own.weight.zero_()
        same = {float(model.loss(batch).loss) for _ in range(5)}
        assert len(same) == 1
        assert same.pop() == pytest.approx(float(without.loss(batch).loss), abs=1e-5)


@torch.no_grad()
def test_items_added_after_training_are_known_by_their_codes(tmp_path):
    index = ItemIndex(CODES.item_ids[:30], CODES.codes[:30], CODES.codebook_sizes)
    model = backbone(index, items_from=1)
    save_model(tmp_path / "old", model, index)
    grown = index.add(CODES.item_ids[30:], CODES.codes[30:])
    _resign(tmp_path / "old", tmp_path / "new", grown.fingerprint)
    loaded = load_model(tmp_path / "new", grown)
    rows = torch.arange(len(grown))
    assert torch.equal(loaded.item_vectors(rows)[:30], model.item_vectors(rows[:30]))
    from_codes = loaded.embedding(loaded.tokens_NL[30:]).sum(1)
    assert torch.equal(loaded.item_vectors(rows)[30:], from_codes)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    assert torch.equal(loaded.begin(batch)[0], model.begin(batch)[0])
    mass_B = score_catalogue(loaded, batch, CSRIndex.from_index(grown)).exp().sum(1)
    torch.testing.assert_close(mass_B, torch.ones(len(batch)), atol=1e-4, rtol=0)


def test_a_model_of_another_catalogue_is_not_padded(tmp_path):
    index = ItemIndex(CODES.item_ids[:30], CODES.codes[:30], CODES.codebook_sizes)
    save_model(tmp_path / "m", backbone(index, items_from=1), index)
    with pytest.raises(MismatchError):
        load_model(tmp_path / "m", CODES)


def test_a_table_and_single_vectors_are_the_same():
    model = backbone(CODES)
    few = torch.tensor([[3, 7], [0, 3]])
    many = few.repeat(40, 1)
    assert torch.equal(model.item_vectors(many)[:2], model.item_vectors(few))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_scores_by_group_by_product_and_by_item_are_the_same(first, monkeypatch):
    model = backbone(CODES, items_from=first)
    rows_M = torch.tensor([3, 1, 4, *[3] * 30, 20, 7, 3])  # one group many times: several units
    group_M = model.groups.group_N[rows_M]
    generator = torch.Generator().manual_seed(0)
    query_MD = torch.randn(len(rows_M), SMALL["d_model"], generator=generator)
    truth_MC = model._scores(query_MD, model.groups.below(group_M))
    found = [model._training_scores(query_MD, group_M)]
    monkeypatch.setattr(Hierarchical, "_scores_by_group", None)
    monkeypatch.setattr("genrec.models.item_choice.RUNS_BY_GROUP", ())
    for cost in (0, 10**6):
        monkeypatch.setattr("genrec.models.item_choice.GATHER_COST", cost)
        found.append(model._training_scores(query_MD, group_M))
    for scores_MC in found:
        torch.testing.assert_close(scores_MC, truth_MC, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_repeat_bias_speaks_of_seen_items_by_how_long_ago():
    index = random_index(40, (4, 5, 6), seed=1)
    model = backbone(index, items_from=1, repeat_bias=True)
    batch = pad_histories([(3, 8, 8, 1, 4, 7)], MAX_HISTORY)
    model.repeats.weight.zero_()
    before_N = item_logprobs(model, batch)[0]
    model.repeats.weight.copy_(torch.tensor([-1.0, -2.0, -3.0]))  # times 10: 1, 2-3, 4-7 ago
    after_N = item_logprobs(model, batch)[0]
    expected_N = before_N.double()
    for item, bias in ((7, -10.0), (4, -20.0), (1, -20.0), (8, -30.0 - 30.0), (3, -30.0)):
        expected_N[item] += bias
    group_N = torch.tensor(index.codes[:, 0])
    for group in range(4):  # the first code is chosen without the bias
        mine_N = group_N == group
        lost = expected_N[mine_N].logsumexp(0) - before_N.double()[mine_N].logsumexp(0)
        expected_N[mine_N] -= lost
    torch.testing.assert_close(after_N.double(), expected_N, atol=1e-3, rtol=1e-4)


def test_repeat_bias_learns_that_nobody_takes_an_item_twice():
    model = backbone(CODES, items_from=0, repeat_bias=True)
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(40)[: MAX_HISTORY + 1] for _ in range(64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, training_batch(model, sequences), steps=60, optimizer=optimizer)
    fresh = [rng.permutation(40)[:MAX_HISTORY] for _ in range(20)]
    logprobs_BN = item_logprobs(model, pad_histories(fresh, MAX_HISTORY)).detach()
    seen_BH = logprobs_BN.exp().gather(1, torch.from_numpy(np.stack(fresh)))
    assert float(seen_BH.sum(1).mean()) < 0.05  # 6 of 40 items: .15 by chance


@pytest.mark.parametrize("repeat_bias", [False, True])
@pytest.mark.parametrize("consumed_only", [False, True])
def test_with_all_items_as_negatives_the_loss_is_the_full_one(repeat_bias, consumed_only):
    options = {"items_from": 0, "repeat_bias": repeat_bias, "consumed_only": consumed_only}
    full = backbone(CODES, **options).train()
    full.meet_items(np.arange(len(CODES)) < 30)
    drawn = backbone(CODES, **options, num_negatives=40).train()
    drawn.load_state_dict(full.state_dict())
    batch = training_batch(full, [(3, 1, 4), (2, 6, 2, 9, 9, 2, 5), (7,)])
    torch.testing.assert_close(drawn.loss(batch).loss, full.loss(batch).loss)
    few = backbone(CODES, **options, num_negatives=20).train()
    few.load_state_dict(full.state_dict())
    values = [float(few.loss(batch).loss.detach()) for _ in range(400)]
    assert len(set(values)) > 300
    assert np.mean(values) == pytest.approx(float(full.loss(batch).loss.detach()), rel=0.1)
    torch.testing.assert_close(few.eval().loss(batch).loss, full.eval().loss(batch).loss)


def test_negatives_are_for_the_softmax_over_all_items():
    with pytest.raises(ConfigError, match=r"num_negatives: got 4 with items_from 1"):
        backbone(CODES, items_from=1, num_negatives=4)


class TestContentThatFades(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {**SMALL, "items_from": 1, "content": True, "content_half_at": 1.0}
    test_probabilities_of_all_codes_sum_to_one = None
    test_a_shared_vocabulary_means_the_same_at_every_level = None
    test_state_dict_round_trip = None

    def make(self, **changes) -> Hierarchical:
        model = super().make(**changes)
        num_items = len(model.tokens_NL)
        model.start_from(Catalog.from_vectors(vectors_of(num_items)))
        model.meet_items(np.arange(num_items) % 3)
        return model


class TestContent(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {**SMALL, "item_vectors": False, "items_from": 0, "content": True}
    test_probabilities_of_all_codes_sum_to_one = None

    test_a_shared_vocabulary_means_the_same_at_every_level = None  # both build models without
    test_state_dict_round_trip = None  # vectors; a round trip is below

    def make(self, **changes) -> Hierarchical:
        model = super().make(**changes)
        model.start_from(Catalog.from_vectors(vectors_of(len(model.tokens_NL))))
        with torch.no_grad():
            model.content.projection.weight.add_(0.2)
        return model


def vectors_of(num_items: int) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 2.0, (num_items, 7)).astype(np.float32)


def test_content_is_a_linear_map_of_standardized_vectors(tmp_path):
    model = backbone(CODES, items_from=1, content=True, item_vectors=False)
    vectors = vectors_of(len(CODES))
    model.start_from(Catalog.from_vectors(vectors, CODES.item_ids))
    known = model.content.vectors_NE
    assert float(known.mean(0).abs().max()) < 1e-5
    assert float(known.square().mean()) == pytest.approx(1.0, rel=1e-4)
    rows = torch.arange(len(CODES))
    codes_ND = model.embedding(model.tokens_NL).sum(1)
    expected = codes_ND + known @ model.content.projection.weight.T
    torch.testing.assert_close(model.item_vectors(rows), expected)
    save_model(tmp_path / "m", model, CODES)
    loaded = load_model(tmp_path / "m", CODES)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    with torch.no_grad():
        assert torch.equal(loaded.begin(batch)[0], model.begin(batch)[0])


@torch.no_grad()
def test_items_that_are_well_known_keep_less_of_their_content(tmp_path):
    settings = {"items_from": 1, "content": True, "item_vectors": False, "content_half_at": 2.0}
    model = backbone(CODES, **settings)
    with pytest.raises(UserError, match=r"has not taken in item vectors"):
        model.meet_items(np.ones(len(CODES), dtype=int))
    model.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    rows = torch.arange(len(CODES))
    codes_ND = model.embedding(model.tokens_NL).sum(1)
    whole_ND = model.item_vectors(rows) - codes_ND
    counts_N = np.arange(len(CODES)) % 5
    model.meet_items(counts_N)
    share_N1 = torch.tensor([2 / (2 + count) for count in counts_N.tolist()])[:, None]
    found_ND = model.item_vectors(rows) - codes_ND
    torch.testing.assert_close(found_ND, whole_ND * share_N1)
    some = torch.tensor([[4, 0], [7, 3]])
    model.train()
    torch.testing.assert_close(model.item_vectors(some), model.eval().item_vectors(some))
    save_model(tmp_path / "m", model, CODES)
    loaded = load_model(tmp_path / "m", CODES)
    assert torch.equal(loaded.item_vectors(rows), model.item_vectors(rows))
    loaded.meet_items((counts_N == 0) * 2, more=True)  # training goes on with what is new
    share_N1[counts_N == 0] = 0.5
    torch.testing.assert_close(loaded.content.share_N1, share_N1)


@torch.no_grad()
@pytest.mark.parametrize("consumed_only", [True, False])
def test_items_that_nobody_consumed_keep_what_joining_items_keep(consumed_only):
    settings = {"items_from": 1, "content": True, "content_half_at": 2.0}
    model = backbone(CODES, **settings, consumed_only=consumed_only)
    model.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    counts_N = np.arange(len(CODES))[::-1] % 5
    model.meet_items(counts_N)
    new = counts_N == 0
    shares_N = 2 / (2 + counts_N)
    mean = (counts_N * shares_N).sum() / counts_N.sum()  # over the interactions
    if consumed_only:
        mean = shares_N[~new].mean()  # over the items that someone consumed
    kept = model.content.share_N1[new].unique().tolist()
    assert kept == pytest.approx([mean if consumed_only else 1])
    model.describe(39, vectors_of(1))  # nobody consumed row 39: items with the mean do not move it
    assert float(model.content.share_N1[39]) == pytest.approx(mean)
    before = model.content.share_N1.clone()
    model.meet_items(np.where(new, 0, 50), more=True)  # training goes on without them
    assert torch.equal(model.content.share_N1[new], before[new])


def test_nobody_consumed_anything():
    settings = {"items_from": 1, "content": True, "content_half_at": 2.0, "consumed_only": True}
    model = backbone(CODES, **settings)
    model.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    model.meet_items(np.zeros(len(CODES), dtype=int))
    assert model.content.share_N1.unique().tolist() == [1.0]


@pytest.mark.parametrize("vectors", [None, vectors_of(39)], ids=["none", "too few"])
def test_content_wants_a_vector_per_item(vectors):
    model = backbone(CODES, content=True)
    table = pl.DataFrame({"item_id": list(CODES.item_ids)})
    catalog = Catalog(table) if vectors is None else Catalog.from_vectors(vectors)
    with pytest.raises(UserError, match=r"model\.content: got (none|39) item vectors"):
        model.start_from(catalog)


def test_content_leaves_out_what_interactions_made():
    vectors = vectors_of(len(CODES))
    catalog = Catalog.from_vectors(vectors, CODES.item_ids)
    model = backbone(CODES, content=True)
    model.start_from(catalog.with_vectors(vectors, range(4)))
    assert model.content.vectors_NE.shape == (len(CODES), 4)
    config = model.config
    assert config.reads(catalog.with_vectors(vectors, range(4))) != config.reads(catalog)


@torch.no_grad()
def test_without_vectors_that_describe_there_is_no_content(tmp_path, caplog):
    """Features made of interactions only: said aloud, and the model is one without content."""
    catalog = Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids)
    model = backbone(CODES, items_from=1, content=True, content_half_at=2.0)
    logger = logging.getLogger("genrec")
    logger.addHandler(caplog.handler)
    model.start_from(catalog.with_vectors(np.asarray(catalog.vectors), ()))
    logger.removeHandler(caplog.handler)
    assert "there is no content and the model does without" in caplog.text
    model.meet_items(np.arange(len(CODES)) % 3)
    plain = backbone(CODES, items_from=1)
    plain.load_state_dict(model.state_dict())  # the same weights, no more and no fewer
    rows = torch.arange(len(CODES))
    assert torch.equal(model.item_vectors(rows), plain.item_vectors(rows))
    save_model(tmp_path / "m", model, CODES)
    loaded = load_model(tmp_path / "m", CODES)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    assert torch.equal(loaded.begin(batch)[0], model.begin(batch)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_optimizer_leaves_no_table_of_earlier_weights(training):
    """Fused steps change weights in place and torch counts no new version of them."""
    model = backbone(CODES, items_from=1)
    rows, batch = torch.arange(len(CODES)), training_batch(model, [(3, 1, 4)])
    with torch.no_grad():
        before = model.item_vectors(rows).clone()
    optimizer = torch.optim.AdamW(model.train(training).parameters(), lr=0.1, fused=True)
    model.loss(batch).loss.backward()
    optimizer.step()
    if training:
        model.eval()
    expected = model.item_vectors(rows)  # with gradients no table is kept
    with torch.no_grad():
        torch.testing.assert_close(model.item_vectors(rows), expected)
    assert not torch.allclose(expected, before)


@torch.no_grad()
def test_items_that_training_does_not_know_have_no_vector_of_their_own(tmp_path):
    model = backbone(CODES, items_from=1)
    rows = torch.arange(len(CODES))
    with_own = model.item_vectors(rows).clone()
    consumed_N = np.ones(len(CODES), dtype=bool)
    consumed_N[[2, 5]] = False
    model.meet_items(consumed_N)
    found = model.item_vectors(rows)
    codes_ND = model.embedding(model.tokens_NL).sum(1)
    torch.testing.assert_close(found[[2, 5]], codes_ND[[2, 5]])
    assert torch.equal(found[consumed_N], with_own[consumed_N])
    assert not torch.allclose(found[[2, 5]], with_own[[2, 5]])
    save_model(tmp_path / "m", model, CODES)
    assert torch.equal(load_model(tmp_path / "m", CODES).item_vectors(rows), found)
    model.meet_items(np.arange(len(CODES)) == 2, more=True)
    assert (
        model.consumed_N1.flatten().tolist() == (consumed_N | (np.arange(len(CODES)) == 2)).tolist()
    )


@pytest.mark.parametrize("consumed_only", [True, False])
@pytest.mark.parametrize("choice", [{"items_from": 1}, {"items_from": 0, "num_negatives": 60}])
def test_items_that_nobody_consumed_are_no_negatives_where_asked(consumed_only, choice, tmp_path):
    model = backbone(CODES, **choice, content=True, consumed_only=consumed_only, dropout=0.0)
    model.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    model.meet_items(np.arange(len(CODES)) != 2)
    batch = training_batch(model, [(3, 1, 4, 1), (5, 9)])
    assert CODES.codes[2, 0] in CODES.codes[[1, 4, 9, 3, 5], 0]  # it would be a negative

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            return float(model.train().loss(batch).loss), float(model.eval().loss(batch).loss)

    before = losses()
    with torch.no_grad():
        model.content.vectors_NE[2] += 3.0
    after = losses()
    assert (after[0] == before[0]) == consumed_only  # training
    assert after[1] != before[1]  # whoever answers chooses among all items
    save_model(tmp_path / "m", model, CODES)
    assert torch.equal(load_model(tmp_path / "m", CODES).consumed_N1, model.consumed_N1)


def test_leaving_items_out_needs_a_choice_among_items():
    with pytest.raises(
        ConfigError, match=r"model\.consumed_only: got true without model\.items_from"
    ):
        backbone(CODES, consumed_only=True)


def test_content_that_was_not_given_says_so():
    model = backbone(CODES, content=True)
    with pytest.raises(UserError, match=r"model\.content: this model has not taken in"):
        model.loss(training_batch(model, [(3, 1, 4)]))


@pytest.mark.parametrize("spread", [1.0, 60.0, 1e30])
def test_logits_of_codes_are_logs_of_sums(spread):
    groups = ItemGroups(torch.tensor(CODES.codes), CODES.codebook_sizes, 1)
    items_MC = groups.below(torch.tensor([0, 3, 2, NO_ITEM]))
    generator = torch.Generator().manual_seed(0)
    scores_MC = spread * torch.randn(items_MC.shape, generator=generator)
    scores_MC = scores_MC.masked_fill(items_MC == NO_ITEM, -torch.inf)
    scores_MC[2, 1:] = -torch.inf  # one item left
    scores_MC.requires_grad_()
    logits_MK = groups.code_logits(scores_MC, items_MC, 1)
    is_code_MKC = groups.codes_NL[items_MC.clamp(min=0), 1][:, None] == torch.arange(5)[:, None]
    wide_MKC = scores_MC.detach().double()[:, None].masked_fill(~is_code_MKC, -torch.inf)
    torch.testing.assert_close(
        logits_MK.detach().double(), wide_MKC.logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    logits_MK[logits_MK > -torch.inf].sum().backward()
    share_MC = scores_MC.detach().double() - wide_MKC.logsumexp(-1).gather(
        1, groups.codes_NL[items_MC.clamp(min=0), 1]
    )
    expected_MC = share_MC.exp().nan_to_num(0.0)
    torch.testing.assert_close(scores_MC.grad.double(), expected_MC, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, 2])
def test_scores_by_slice_are_those_of_reading_every_vector(first):
    model = backbone(CODES, items_from=first)
    num_prefixes = len(model.groups.starts_G)
    prefixes = [n % num_prefixes for n in (3, 0, 3, 7, 1, 3, 0)]
    for wanted in ([], prefixes, [*prefixes, NO_ITEM, 0, NO_ITEM]):
        prefixes_R = torch.tensor(wanted, dtype=torch.int64)
        query_RD = torch.randn(len(wanted), model.config.d_model)
        items_RC = model.groups.below(prefixes_R)
        found_RC = model._scores_by_slice(query_RD, prefixes_R)
        assert found_RC.dtype == torch.float32
        torch.testing.assert_close(found_RC, model._scores(query_RD, items_RC))
        model.own.weight.add_(1.0)  # a kept table must follow
    model.bfloat16()
    query_RD = query_RD.bfloat16()
    found_RC = model._scores_by_slice(query_RD, prefixes_R)
    torch.testing.assert_close(
        found_RC, model._scores(query_RD, items_RC), atol=0.05, rtol=0.05, check_dtype=True
    )


@pytest.mark.parametrize("first", [0, 1])
def test_a_search_reads_slices_and_who_wants_gradients_reads_vectors(first, monkeypatch):
    model = backbone(CODES, items_from=first, repeat_bias=True)
    batch = pad_histories(HISTORIES, MAX_HISTORY)
    logprobs_BN = item_logprobs(model, batch)
    assert logprobs_BN.requires_grad
    monkeypatch.setattr(Hierarchical, "_scores", None)  # not on a search's way
    with torch.no_grad():
        torch.testing.assert_close(item_logprobs(model, batch), logprobs_BN.detach())


@torch.no_grad()
def test_kept_item_vectors_follow_every_change_of_the_weights():
    model = backbone(CODES, items_from=1, content=True)
    model.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    rows = torch.arange(len(CODES))
    for weight in (model.embedding.weight, model.own.weight, model.content.projection.weight):
        before = model.item_vectors(rows).clone()
        weight.add_(0.1 * torch.randn_like(weight))
        after = model.item_vectors(rows)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model._made(None))
    other = backbone(CODES, items_from=1, content=True)
    other.start_from(Catalog.from_vectors(vectors_of(len(CODES)), CODES.item_ids))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.item_vectors(rows), other.item_vectors(rows))


def test_repeat_bias_without_items_says_so():
    with pytest.raises(ConfigError, match=r"repeat_bias: got true without model\.items_from"):
        backbone(CODES, repeat_bias=True)


def test_items_from_a_level_that_is_not_there_says_so():
    with pytest.raises(ConfigError, match=r"items_from: got 3 .*at most 2"):
        backbone(CODES, items_from=3)


def test_groups_know_prefixes_of_any_length_without_overflow():
    """Twelve levels of a million codes: prefixes far beyond 64 bits."""
    rng = np.random.default_rng(0)
    codes_NL = torch.from_numpy(rng.integers(0, 10**6, (50, 12)))
    codes_NL[:20, :11] = codes_NL[0, :11]
    groups = ItemGroups(codes_NL, (10**6,) * 12, 11)
    prefixes_M = torch.zeros(50, dtype=torch.int64)
    for level in range(11):
        prefixes_M = groups.extend(prefixes_M, codes_NL[:, level], level)
    for row, items in enumerate(groups.below(prefixes_M).tolist()):
        assert sorted(set(items) - {NO_ITEM}) == (list(range(20)) if row < 20 else [row])
    assert torch.equal(groups.below(prefixes_M), groups.around(torch.arange(50)))
    nowhere = groups.extend(torch.tensor([0, NO_ITEM]), torch.tensor([123, 5]), 0)
    assert nowhere.tolist() == [NO_ITEM, NO_ITEM]
    assert (groups.below(nowhere) == NO_ITEM).all()


def test_sums_per_code_are_exact_for_scores_far_apart():
    codes_NL = torch.from_numpy(small_codes(24))
    groups = ItemGroups(codes_NL, SIZES, 0)
    scores_MC = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)) * 200
    scores_MC[1, 5:] = -torch.inf
    items_MC = groups.below(torch.zeros(3, dtype=torch.int64))
    found_MK = groups.code_logits(scores_MC, items_MC, 1)
    for m in range(3):
        for code in range(SIZES[1]):
            mine = scores_MC[m, codes_NL[items_MC[m], 1] == code].double()
            expected = float(mine.logsumexp(0))
            assert float(found_MK[m, code]) == pytest.approx(expected, rel=1e-6)
