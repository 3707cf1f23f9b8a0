"""Causal language models from Hugging Face, unmodified, in the constrained search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from genrec.decoding import (
    CSRIndex,
    Trie,
    beam_search,
    reference_beam_search,
    score_catalogue,
)
from genrec.decoding.hf import CatalogueLogitsProcessor, prefix_allowed_tokens_fn
from genrec.errors import UserError
from genrec.models.pretrained_decoder import PretrainedDecoder, add_code_tokens
from genrec.testing import StepModelContract, brute_force_logprobs, random_index, rank
from genrec.testing.decoding import random_titles

SIZES = (5, 6, 4)
WORDS = 20  # tokens of the model beside the codes
INDEX = random_index(50, SIZES, seed=2)
TITLES = random_titles(40, num_words=6, num_levels=3, seed=2)
HISTORIES = [[1, 2, 3, 4], [9], [7, 8], [9, 8, 3, 2, 1, 0]]
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


def family(name: str, **options):
    """Return a tiny random model of a family, without start token or padding token."""
    common = dict(vocab_size=WORDS, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common)
    elif name == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **common)
    elif name == "qwen3":
        config = transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, **common)
    else:
        config = transformers.Gemma2Config(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            attn_implementation="eager",
            final_logit_softcapping=3.0,
            sliding_window=64,
            **common,
        )
    for key, value in options.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def decoder(name="llama", index=INDEX, prompt=lambda history: [w % WORDS for w in history]):
    model = family(name)
    tokens = add_code_tokens(model, index.codebook_sizes, index.shared_vocabulary)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # scores far apart, of the new tokens too
                weight.normal_(0.0, 0.4)
    return PretrainedDecoder(model, prompt, tokens)


FAMILIES = pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2"])


class TestLlama(StepModelContract):
    def make(self):
        return decoder(), HISTORIES, HISTORIES[:1], SIZES


class TestGPT2(StepModelContract):
    def make(self):
        return decoder("gpt2"), HISTORIES, HISTORIES[:1], SIZES


class TestQwen3(StepModelContract):
    def make(self):
        return decoder("qwen3"), HISTORIES, HISTORIES[:1], SIZES


class TestGemma2(StepModelContract):
    def make(self):
        return decoder("gemma2"), HISTORIES, HISTORIES[:1], SIZES


@torch.no_grad()
def from_scratch(model: PretrainedDecoder, history, codes, level):
    """Return the logits after a prompt and codes by the model alone: no cache, mask or padding."""
    tokens = [int(model.code_tokens[n][code]) for n, code in enumerate(codes)]
    whole = torch.tensor([[*model.prompt(history), *tokens]])
    return model.model(input_ids=whole).logits[0, -1, model.code_tokens[level]]


@FAMILIES
@torch.no_grad()
def test_every_beam_equals_recomputing_it_from_scratch(name):
    model = decoder(name)
    logits_BK, state = model.begin(HISTORIES)
    rng = np.random.default_rng(0)
    prefixes = [[h] for h in range(len(HISTORIES))]
    for level in range(3):
        for logits_K, (request, *codes) in zip(logits_BK, prefixes, strict=True):
            expected_K = from_scratch(model, HISTORIES[request], codes, level)
            assert torch.allclose(logits_K, expected_K, atol=1e-4)
        if level == 2:
            break
        width = len(prefixes) // len(HISTORIES)
        parents_R = torch.tensor(
            [b * width + int(w) for b in range(4) for w in rng.integers(0, width, 5)]
        )
        codes_R = torch.from_numpy(rng.integers(0, SIZES[level], 20))
        prefixes = [
            [*prefixes[p], int(c)] for p, c in zip(parents_R.tolist(), codes_R, strict=True)
        ]
        logits_BK, state = model.step(codes_R, state, parents_R)


@FAMILIES
@torch.no_grad()
def test_several_levels_in_one_pass_equal_one_after_another(name):
    model = decoder(name)
    _, start = model.begin(HISTORIES)
    generator = torch.Generator().manual_seed(0)
    requests = torch.arange(4)
    codes = [torch.randint(0, SIZES[n], (4 * w,), generator=generator) for n, w in ((0, 3), (1, 5))]
    parents = [requests.repeat_interleave(3), requests.repeat_interleave(5) * 3]
    parents[1] = parents[1] + torch.randint(0, 3, (20,), generator=generator)
    logits, states = model.step_levels(codes, start, parents)
    first, state = model.step(codes[0], start, parents[0])
    second, _ = model.step(codes[1], state, parents[1])
    assert torch.allclose(logits[0], first, atol=1e-4)
    assert torch.allclose(logits[1], second, atol=1e-4)
    again, _ = model.step(codes[1], states[0], parents[1])
    assert torch.allclose(again, second, atol=1e-4)


EQUAL = [[1, 2, 3], [4, 5, 6], [7, 7, 0]]
RAGGED = [[1, 2, 3], [4], [7, 7]]


def theirs(model, index, width, processor, histories=EQUAL):
    """Ask `generate` for the same lists; it wants prompts padded on the left."""
    prompts = [model.prompt(history) for history in histories]
    longest = max(map(len, prompts))
    prompt = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    first = int(model.code_tokens[0][0])
    options = dict(first_token=first, prompt_length=prompt.shape[1])
    if processor:
        constraint = dict(
            logits_processor=transformers.LogitsProcessorList(
                [CatalogueLogitsProcessor(index, **options)]
            )
        )
    else:
        constraint = dict(prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(index, **options))
    output = model.model.generate(
        prompt,
        attention_mask=real,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=index.num_levels,
        renormalize_logits=True,
        length_penalty=0.0,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **constraint,
    )
    tokens = output.sequences[:, -index.num_levels :]
    codes = tokens - first - torch.from_numpy(np.asarray(index.level_offsets))
    rows = index.rows_of_codes(codes.numpy()).reshape(3, width)
    return rows, output.sequences_scores.view(3, width)


@FAMILIES
@pytest.mark.parametrize("index", [INDEX, TITLES], ids=["codes", "titles"])
@pytest.mark.parametrize("processor", [False, True])
@torch.no_grad()
def test_lists_equal_those_of_generate(name, index, processor):
    model = decoder(name, index)
    rows, scores = theirs(model, index, 6, processor)
    beams = beam_search(model, EQUAL, CSRIndex.from_index(index), width=6, k=6)
    assert beams.rows_Bk.tolist() == rows.tolist()
    assert torch.allclose(beams.logprobs_Bk, scores, atol=1e-4)


@FAMILIES
@torch.no_grad()
def test_ragged_prompts_equal_those_that_generate_pads_on_the_left(name):
    model = decoder(name)
    rows, scores = theirs(model, INDEX, 6, True, RAGGED)
    beams = beam_search(model, RAGGED, CSRIndex.from_index(INDEX), width=6, k=6)
    assert beams.rows_Bk.tolist() == rows.tolist()
    assert torch.allclose(beams.logprobs_Bk, scores, atol=1e-4)
    for request, history in enumerate(RAGGED):
        alone = beam_search(model, [history], CSRIndex.from_index(INDEX), width=6, k=6)
        assert torch.equal(alone.rows_Bk[0], beams.rows_Bk[request])


@pytest.mark.parametrize("scoring", ["renormalized", "level", "raw"])
@pytest.mark.parametrize("titles", [False, True])
def test_search_and_scores_equal_brute_force(titles, scoring):
    index = TITLES if titles else INDEX
    model, constraint = decoder("qwen3", index), CSRIndex.from_index(index)
    batch = HISTORIES[:2]
    truth_BN = brute_force_logprobs(
        model, batch, index.codes, scoring=scoring, shared_vocabulary=index.shared_vocabulary
    )
    scores_BN = score_catalogue(model, batch, constraint, scoring=scoring)
    assert np.allclose(scores_BN, truth_BN, atol=1e-4)
    count = len(index)
    whole = beam_search(model, batch, constraint, width=count, k=count, scoring=scoring)
    assert whole.certified_B.all()
    for b in range(len(batch)):
        assert whole.rows_Bk[b].tolist() == rank(truth_BN[b], count).tolist()
    fast = beam_search(model, batch, constraint, width=6, k=6, scoring=scoring)
    slow = reference_beam_search(
        model, batch, Trie.from_index(index), width=6, k=6, scoring=scoring
    )
    assert fast.rows_Bk.tolist() == slow.rows_Bk.tolist()
    assert torch.allclose(fast.logprobs_Bk, slow.logprobs_Bk, atol=1e-4)


def test_prompts_are_read_once_and_never_copied_per_beam():
    model = decoder()
    seen = []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    beam_search(model, HISTORIES, CSRIndex.from_index(INDEX), width=7, k=7, static_shapes=True)
    assert seen[0] == (4, 6) and all(shape[0] == 4 and shape[1] <= 7 for shape in seen[1:])


def test_only_the_levels_codes_get_logits():
    model = decoder()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    beam_search(model, HISTORIES, CSRIndex.from_index(INDEX), width=4, k=4)
    assert calls == []


def test_generation_config_is_never_read():
    model = decoder()
    plain = beam_search(model, HISTORIES, CSRIndex.from_index(INDEX), width=5, k=5)
    model.model.generation_config = None
    assert torch.equal(
        beam_search(model, HISTORIES, CSRIndex.from_index(INDEX), width=5, k=5).rows_Bk,
        plain.rows_Bk,
    )


@torch.no_grad()
def test_ready_prompts_and_scattered_code_tokens():
    model = decoder()
    prompts = model._prompts(HISTORIES)
    expected, _ = model.begin(HISTORIES)
    assert torch.equal(model.begin(prompts)[0], expected)
    wider = torch.nn.functional.pad(prompts, (0, 3), value=-1)
    assert torch.allclose(model.begin(wider)[0], expected, atol=1e-5)
    scattered = [tokens.flip(0) for tokens in model.code_tokens]
    flipped = PretrainedDecoder(model.model, model.prompt, scattered)
    assert torch.allclose(flipped.begin(HISTORIES)[0].flip(1), expected, atol=1e-5)


def test_peft_adapters_are_part_of_the_model():
    peft = pytest.importorskip("peft")
    base = family("llama")
    tokens = add_code_tokens(base, SIZES)
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with torch.no_grad():
        before = PretrainedDecoder(lora, list, tokens).begin([[1, 2]])[0]
        for name, weight in lora.named_parameters():
            if "lora" in name:
                weight.add_(1.0)
        after = PretrainedDecoder(lora, list, tokens).begin([[1, 2]])[0]
    assert not torch.allclose(before, after)


def test_bfloat16_weights_give_float32_logits():
    model = family("llama").bfloat16()
    tokens = add_code_tokens(model, SIZES)
    beams = beam_search(
        PretrainedDecoder(model, list, tokens), HISTORIES, CSRIndex.from_index(INDEX), width=5, k=5
    )
    assert beams.logprobs_Bk.dtype == torch.float32 and (beams.rows_Bk >= 0).all()


# Errors.


def test_errors_say_what_to_do():
    model = family("gpt2")
    with pytest.raises(UserError, match=r"code_tokens\[0\].*expected different ones.*20"):
        PretrainedDecoder(model, list, [[19, 20]])
    with pytest.raises(UserError, match=r"code_tokens\[1\]"):
        PretrainedDecoder(model, list, [[1, 2], [3, 3]])
    asked = PretrainedDecoder(model, list, [[1, 2], [3, 4]])
    with pytest.raises(UserError, match=r"no tokens for request 1.*BOS"):
        asked.begin([[1], []])
    with pytest.raises(UserError, match=r"32 tokens and 2 levels.*reads 32.*to 31 tokens"):
        asked.begin([[1] * 32])
    asked.begin([[1] * 31])
    flash = family("gpt2")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"attn_implementation='flash_attention_2'.*'sdpa'"):
        PretrainedDecoder(flash, list, [[1, 2]])
    with pytest.raises(UserError, match="AutoModelForCausalLM"):
        PretrainedDecoder(model.transformer, list, [[1, 2]])


def test_a_model_that_answers_otherwise_is_refused():
    model = family("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2 + 3)
    with pytest.raises(UserError, match="answers otherwise"):
        PretrainedDecoder(model, list, [[1, 2], [3, 4]])


def test_windows_of_attention_limit_the_prompt():
    model = family("gemma2", sliding_window=8)
    asked = PretrainedDecoder(model, list, [[1, 2], [3, 4]])
    with pytest.raises(UserError, match="attention window"):
        asked.begin([[1] * 8])
