"""Does every registered backbone keep the contract, and does each equal its library twin?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from genrec.errors import ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.models import BACKBONES
from genrec.models.base import FIRST_TOKEN, Batch, keep, pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.models.layers import attend, relative_buckets
from genrec.models.parallel import Parallel
from genrec.runtime import load_object
from genrec.testing.models import (
    HISTORIES,
    MAX_HISTORY,
    SIZES,
    BackboneContract,
    greedy_items,
    item_logprobs,
    small_codes,
)

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48}


@pytest.fixture
def index() -> ItemIndex:
    codes = small_codes()
    return ItemIndex(tuple(f"i{n}" for n in range(len(codes))), codes, SIZES)


class TestEncoderDecoder(BackboneContract):
    backbone = EncoderDecoder
    options: ClassVar = {**SMALL, "d_kv": 8}


class TestEncoderDecoderWithOptions(BackboneContract):
    backbone = EncoderDecoder
    options: ClassVar = {
        **SMALL,
        "d_kv": 8,
        "activation": "gated-gelu",
        "recency_embeddings": True,
        "tie_embeddings": False,
        "attention_dropout": 0.1,
    }


class TestDecoderOnly(BackboneContract):
    backbone = DecoderOnly
    options: ClassVar = SMALL


class TestDecoderOnlyWithOptions(BackboneContract):
    backbone = DecoderOnly
    options: ClassVar = {
        **SMALL,
        "num_layers": 1,
        "activation": "gelu",
        "item_positions": True,
        "level_embeddings": True,
        "tie_embeddings": False,
        "attention_dropout": 0.1,
    }


class TestHierarchical(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {**SMALL, "item_vectors": False}


class TestParallel(BackboneContract):
    backbone = Parallel
    options: ClassVar = SMALL


@torch.no_grad()
def test_parallel_heads_score_an_item_by_its_codes_alone(index):
    """RPG's item score: the sum of the codes' log-probabilities, whatever the other codes are."""
    torch.manual_seed(0)
    model = Parallel.from_index(Parallel.Config(**SMALL, init_std=0.5), index).eval()
    batch = pad_histories([[3, 1, 4], []], MAX_HISTORY)
    logits, state = model.begin(batch)
    levels = [logits.log_softmax(-1)]
    for level in range(1, len(SIZES)):
        codes = torch.randint(0, SIZES[level - 1], (2,))
        logits, state = model.step(codes, state, torch.arange(2))
        levels.append(logits.log_softmax(-1))
    codes_NL = torch.tensor(index.codes).long()
    expected_BN = sum(part[:, codes_NL[:, level]] for level, part in enumerate(levels))
    torch.testing.assert_close(item_logprobs(model, batch), expected_BN)
    assert expected_BN.std() > 0.1


def test_every_registered_backbone_is_under_contract(root):
    files = (root / "tests").glob("test_models*.py")
    written = "\n".join(path.read_text(encoding="utf-8") for path in files)
    classes = {name: path.partition(":")[2] for name, path in BACKBONES.items()}
    missing = [n for n, cls in classes.items() if f"    backbone = {cls}\n" not in written]
    assert not missing, f"add a BackboneContract subclass for {missing}"


@pytest.mark.parametrize("name", BACKBONES)
def test_registry_name_is_the_config_name(name):
    assert load_object(BACKBONES[name]).Config.model_fields["name"].default == name


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only", "hierarchical", "parallel"])
def test_vocabulary_softmax_spreads_over_other_levels(name, index):
    cls = load_object(BACKBONES[name])
    torch.manual_seed(0)
    level = cls.from_index(cls.Config(**SMALL, dropout=0.0), index)
    whole = cls.from_index(cls.Config(**SMALL, dropout=0.0, softmax="vocabulary"), index)
    whole.load_state_dict(level.state_dict())
    batch = pad_histories([[1, 2], [3]], 5, targets=[4, 5])
    assert whole.loss(batch).loss > level.loss(batch).loss + 1.0
    assert torch.equal(whole.begin(batch)[0], level.begin(batch)[0])


def test_decoder_only_can_skip_the_first_item(index):
    config = DecoderOnly.Config(**SMALL, predict_first=False)
    model = DecoderOnly.from_index(config, index).eval()
    every = DecoderOnly.from_index(DecoderOnly.Config(**SMALL), index).eval()
    every.load_state_dict(model.state_dict())
    sequences, firsts = pad_histories([[1, 2, 3], [4, 5]], 9), pad_histories([[1], [4]], 9)
    output = model.loss(sequences)
    assert int(output.num_targets) == 3
    expected = every.loss(sequences).loss_sum - every.loss(firsts).loss_sum
    torch.testing.assert_close(output.loss_sum, expected, atol=1e-4, rtol=0)
    assert int(model.loss(firsts).num_targets) == 0


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_encoder_decoder_equals_transformers_t5(index, activation):
    torch.manual_seed(0)
    config = EncoderDecoder.Config(**SMALL, d_kv=8, max_history=40, activation=activation)
    model = EncoderDecoder.from_index(config, index).eval()
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, len(index), n) for n in (40, 0, 7, 1)]  # beyond max_distance
    batch = pad_histories(histories, 40, targets=[3, 1, 4, 1])
    target_tokens_BL = model.tokens_NL[batch.target_B]
    tokens_BT, visible_BT = model.prompt(batch.history_BH)
    with torch.no_grad():
        logits_BLV = model.to_hugging_face()(
            input_ids=tokens_BT,
            attention_mask=visible_BT.long(),
            decoder_input_ids=torch.nn.functional.pad(target_tokens_BL[:, :-1], (1, 0)),
        ).logits
        _compare_levels(model, batch, logits_BLV, target_tokens_BL)


def test_decoder_only_equals_transformers_llama(index):
    torch.manual_seed(0)
    config = DecoderOnly.Config(**SMALL, init_std=0.3, rope_theta=500.0)
    model = DecoderOnly.from_index(config, index).eval()
    batch = pad_histories(HISTORIES, MAX_HISTORY, targets=[3, 1, 4, 1, 5])
    target_tokens_BL = model.tokens_NL[batch.target_B]
    tokens_BT, visible_BT = model.prompt(batch.history_BH)
    lengths_B = visible_BT.sum(1)
    # The target's tokens directly behind each ragged prompt.
    tokens_BT = torch.nn.functional.pad(tokens_BT, (0, len(SIZES)))
    places_BL = lengths_B[:, None] + torch.arange(len(SIZES))
    tokens_BT = tokens_BT.scatter(1, places_BL, target_tokens_BL)
    with torch.no_grad():
        logits_BTV = model.to_hugging_face()(input_ids=tokens_BT).logits
        logits_BLV = logits_BTV[torch.arange(len(batch))[:, None], places_BL - 1]
        _compare_levels(model, batch, logits_BLV, target_tokens_BL)


def _compare_levels(model, batch, logits_BLV, target_tokens_BL):
    """Our begin/step logits along the targets' paths equal the library's full forward."""
    rows = torch.arange(len(batch))
    codes_BL = target_tokens_BL - model.level_offsets_L
    logits, state = model.begin(batch)
    for level, size in enumerate(SIZES):
        first = int(model.level_offsets_L[level])
        theirs = logits_BLV[:, level, first : first + size]
        torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
        assert theirs.std() > 0.1
        if level + 1 < len(SIZES):
            logits, state = model.step(codes_BL[:, level], state, rows)


EXPORTED = ["encoder_decoder", "decoder_only"]


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_models_generate_the_same_items(name, index):
    """The library's own `generate` works on the export, without settings of ours."""
    cls = load_object(BACKBONES[name])
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**SMALL), index).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(3.0)
    batch = pad_histories([[1, 2], [3, 9], [7, 7]], MAX_HISTORY)
    tokens_BT, visible_BT = model.prompt(batch.history_BH)
    starts = [*model.level_offsets_L.tolist(), model.num_tokens]
    prompt_length = 1 if name == "encoder_decoder" else tokens_BT.shape[1]

    def allowed(_, prefix):
        level = len(prefix) - prompt_length
        return list(range(starts[level], starts[level + 1]))

    found = model.to_hugging_face().generate(
        tokens_BT,
        attention_mask=visible_BT.long(),
        max_new_tokens=len(SIZES),
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
    )[:, prompt_length:]
    with torch.no_grad():
        assert torch.equal(found - model.level_offsets_L, greedy_items(model, batch))


@pytest.mark.parametrize(
    ("cls", "options", "told"),
    [
        (EncoderDecoder, {"recency_embeddings": True}, "recency_embeddings=false"),
        (EncoderDecoder, {"tie_embeddings": False}, "tie_embeddings=true"),
        (DecoderOnly, {"activation": "gelu"}, "activation='swiglu'"),
        (DecoderOnly, {"item_positions": True}, "all these options off"),
    ],
)
def test_what_the_library_cannot_express_is_refused(cls, options, told, index):
    model = cls.from_index(cls.Config(**{**SMALL, **options}), index)
    with pytest.raises(UserError, match=told):
        model.to_hugging_face()


@given(
    num_buckets=st.sampled_from([8, 32]),
    max_distance=st.sampled_from([20, 128]),
    bidirectional=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_buckets_equal_transformers(num_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 300)
    theirs = T5Attention._relative_position_bucket(
        distances, bidirectional, num_buckets, max_distance
    )
    assert torch.equal(
        relative_buckets(distances, num_buckets, max_distance, bidirectional), theirs
    )


@pytest.mark.parametrize("kind", ["visible", "bias", "causal"])
def test_attention_that_trains_in_bf16_equals_the_library_in_fp32(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), (1, 3, 5, 5), (2, 3, 5, 8)]
    *inputs, bias, gradient = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    visible = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        query, keys, values, learned = (
            x.to(dtype).detach().requires_grad_() for x in (*inputs, bias)
        )
        mask = {"visible": visible, "bias": learned, "causal": None}[kind]
        output = attend(query, keys, values, mask, is_causal=kind == "causal", scale=0.5)
        output.backward(gradient.to(dtype))
        learning = [query, keys, values, *([learned] if kind == "bias" else [])]
        found.append([output, *(x.grad for x in learning)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.allclose(ours.float(), theirs, atol=0.05)
        assert theirs.abs().max() > 0.5  # of a size that the tolerance does not hide


def test_attention_uses_the_library_but_for_training_in_bf16_on_a_cpu(monkeypatch) -> None:
    calls: list[torch.dtype] = []
    library = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *rest, **options):
        calls.append(query.dtype)
        return library(query, *rest, **options)

    monkeypatch.setattr("genrec.models.layers.F.scaled_dot_product_attention", counted)
    low = torch.randn(1, 2, 3, 4).bfloat16()
    plain = attend(low, low, low, is_causal=True)
    assert not calls
    assert attend(low, low, low, dropout=1.0).abs().max() == 0
    with torch.no_grad():  # and the same default scale
        assert torch.allclose(plain, attend(low, low, low, is_causal=True), atol=0.05)
    attend(low.float(), low.float(), low.float())
    assert calls == [torch.bfloat16, torch.float32]


@given(
    st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=4),
    st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_collating_and_cutting_keep_the_last_items(histories, limit):
    batch = pad_histories(histories, limit)
    cut = keep(pad_histories(histories, 99).history_BH, limit)
    assert batch.history_BH.dtype == torch.int64
    for history, padded, again in zip(histories, batch.history_BH, cut, strict=True):
        kept = history[-limit:]
        assert padded.tolist() == kept + [-1] * (len(padded) - len(kept))
        assert [row for row in again.tolist() if row >= 0] == kept
    assert batch.history_BH.shape[1] == max(1, max(len(h[-limit:]) for h in histories))


def test_a_batch_moves_with_and_without_targets():
    batch = pad_histories([[1], [2, 3], []], 4, targets=[4, 5, 6]).to("meta")
    assert batch.history_BH.device.type == batch.target_B.device.type == "meta"
    assert pad_histories([[1], []], 4).to("cpu").target_B is None
    assert len(Batch(torch.zeros(3, 1))) == 3


def test_level_offsets_come_from_the_index(index):
    model = DecoderOnly.from_index(DecoderOnly.Config(**SMALL), index)
    assert np.array_equal(model.tokens_NL.numpy(), index.tokens(FIRST_TOKEN))
    assert model.num_tokens == FIRST_TOKEN + index.num_tokens


def test_tokens_that_do_not_fit_are_refused(index):
    config = DecoderOnly.Config(**SMALL)
    with pytest.raises(UserError, match=r"got shape \(24, 2\), expected \(items, 3\)"):
        DecoderOnly(config, torch.from_numpy(index.tokens())[:, :2], SIZES)
    with pytest.raises(UserError, match="not bare codes"):
        DecoderOnly(config, torch.from_numpy(index.codes.astype(np.int64)), SIZES)


def test_heads_that_do_not_divide_the_width_are_refused(index):
    config = DecoderOnly.Config(d_model=32, num_heads=3)
    with pytest.raises(ConfigError, match=r"model\.num_heads: got 3 heads for d_model 32"):
        DecoderOnly.from_index(config, index)


def test_training_needs_targets(index):
    model = EncoderDecoder.from_index(EncoderDecoder.Config(**SMALL), index)
    with pytest.raises(UserError, match="without target_B"):
        model.loss(pad_histories([[1]], 3))


@pytest.mark.parametrize("changes", [{"dropout": 1.0}, {"num_layers": 0}, {"hidden": 3}])
def test_config_ranges(changes):
    with pytest.raises(ValidationError):
        DecoderOnly.Config(**changes)


def test_searches_do_not_copy_the_prompt(index):
    """The state holds one copy of keys and values per request, however wide the search is."""
    for name, part in (("decoder_only", "prompt"), ("encoder_decoder", "cross")):
        cls = load_object(BACKBONES[name])
        model = cls.from_index(cls.Config(**SMALL), index).eval()
        with torch.no_grad():
            _, state = model.begin(pad_histories([[1, 2], [3]], 5))
            parents_R = torch.arange(2).repeat_interleave(50)
            _, wide = model.step(torch.zeros(100, dtype=torch.int64), state, parents_R)
        for before, after in zip(getattr(state, part), getattr(wide, part), strict=True):
            assert after[0] is before[0] and after[0].shape[0] == 2
