"""The search on tiny random backbones: step contract, brute force, transformers' generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.decoding import (
    CSRIndex,
    Filters,
    Trie,
    beam_search,
    reference_beam_search,
    score_candidates,
    score_catalogue,
)
from genrec.decoding.hf import CatalogueLogitsProcessor, prefix_allowed_tokens_fn
from genrec.errors import UserError
from genrec.models.base import FIRST_TOKEN, PAD, START, Batch, pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.testing import StepModelContract, brute_force_logprobs, random_index, rank
from genrec.testing.decoding import allowed_mask, random_titles
from genrec.testing.models import recomputed_nll

SIZES = (5, 6, 4)
SMALL = dict(max_history=6, d_model=16, num_layers=2, num_heads=2, d_ff=32)
INDEX = random_index(50, SIZES, seed=2)
TITLES = random_titles(50, num_words=6, num_levels=3, seed=2)
FORMS = pytest.mark.parametrize("index", [INDEX, TITLES], ids=["codes", "titles"])
BOTH = pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
KINDS = {
    "encoder_decoder": (EncoderDecoder, {}),
    "decoder_only": (DecoderOnly, {}),
    "hierarchical": (Hierarchical, {}),
    "hierarchical, all items": (Hierarchical, {"items_from": 0}),
    "hierarchical, items of a code": (Hierarchical, {"items_from": 1}),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
SPREAD = {EncoderDecoder: 1.5, DecoderOnly: 4.0, Hierarchical: 4.0}
HISTORIES = [[1, 2, 3, 4], [], [7], [9, 8, 30, 31, 32, 33]]


def backbone(cls, index=INDEX, **options):
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**SMALL, **options), index)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # spread the scores
                weight *= SPREAD[cls]
    return model.eval()


def of_kind(kind, index=INDEX):
    cls, options = KINDS[kind]
    return backbone(cls, index, **options)


class TestEncoderDecoder(StepModelContract):
    def make(self):
        model = backbone(EncoderDecoder)
        batch, first = pad_histories(HISTORIES, 6), pad_histories(HISTORIES[:1], 6)
        return model, batch, first, SIZES


class TestDecoderOnly(StepModelContract):
    def make(self):
        model = backbone(DecoderOnly)
        batch, first = pad_histories(HISTORIES, 6), pad_histories(HISTORIES[:1], 6)
        return model, batch, first, SIZES


@EVERY
@FORMS
@pytest.mark.parametrize("scoring", ["renormalized", "level", "raw"])
def test_exhaustive_beam_and_scores_equal_brute_force(kind, index, scoring):
    model, constraint = of_kind(kind, index), CSRIndex.from_index(index)
    batch = pad_histories(HISTORIES, 6)
    truth_BN = brute_force_logprobs(
        model, batch, index.codes, scoring=scoring, shared_vocabulary=index.shared_vocabulary
    )
    if scoring == "renormalized":
        assert np.allclose(np.exp(truth_BN).sum(1), 1, atol=1e-4)
    beams = beam_search(model, batch, constraint, width=50, k=50, scoring=scoring)
    scores_BN = score_catalogue(model, batch, constraint, scoring=scoring)
    assert np.allclose(scores_BN, truth_BN, atol=1e-4)
    for b in range(len(HISTORIES)):
        assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], 50).tolist()
        assert np.allclose(beams.logprobs_Bk[b], np.sort(truth_BN[b])[::-1], atol=1e-4)
    filters = Filters(exclude=[[1, 2, 3, 4], None, np.arange(25), []], allow=[None, [5, 6]] * 2)
    left_BN = allowed_mask(filters, len(HISTORIES), len(index))
    found = beam_search(model, batch, constraint, width=50, k=50, filters=filters, scoring=scoring)
    for b, rows in enumerate(found.rows_Bk.tolist()):
        expected = [row for row in rank(truth_BN[b], 50).tolist() if left_BN[b, row]]
        assert rows == [*expected, *[-1] * (50 - len(expected))]
        assert np.allclose(found.logprobs_Bk[b, : len(expected)], truth_BN[b, expected], atol=1e-4)


@EVERY
@FORMS
@torch.no_grad()
def test_scores_equal_the_loss_which_caches_nothing(kind, index):
    model, history = of_kind(kind, index), HISTORIES[0]
    batch = pad_histories([history], 6)
    scores_N = score_catalogue(model, batch, CSRIndex.from_index(index), scoring="level")[0]
    for item in range(0, 50, 7):
        expected = float(recomputed_nll(model, history, item))
        assert float(scores_N[item]) == pytest.approx(-expected, abs=2e-3)


@EVERY
@FORMS
def test_fast_equals_reference_on_networks(kind, index):
    model, batch = of_kind(kind, index), pad_histories(HISTORIES, 6)
    filters = Filters(exclude=[[1, 2], None, [3], []])
    for scoring in ("renormalized", "level", "raw"):
        options = dict(width=6, k=6, filters=filters, scoring=scoring)
        fast = beam_search(model, batch, CSRIndex.from_index(index), **options)
        slow = reference_beam_search(model, batch, Trie.from_index(index), **options)
        assert fast.rows_Bk.tolist() == slow.rows_Bk.tolist()
        assert torch.allclose(fast.logprobs_Bk, slow.logprobs_Bk, atol=1e-4)


@BOTH
def test_raw_scores_are_log_probabilities_over_the_whole_vocabulary(cls):
    """Teacher forcing by transformers, unconstrained: what the model says by itself."""
    model = backbone(cls)
    batch = pad_histories([[1, 2, 3]], 6)
    scores_N = score_catalogue(model, batch, CSRIndex.from_index(INDEX), scoring="raw")[0]
    prompt_T = torch.nn.functional.pad(
        model.tokens_NL[batch.history_BH].flatten(1), (1, 0), value=START
    )
    theirs, tokens_NL = model.to_hugging_face(), model.tokens_NL
    with torch.no_grad():
        if cls is EncoderDecoder:
            start = torch.full((50, 1), theirs.config.decoder_start_token_id)
            decoder_NL = torch.cat([start, tokens_NL[:, :-1]], 1)
            logits = theirs(input_ids=prompt_T.expand(50, -1), decoder_input_ids=decoder_NL).logits
        else:
            everything = torch.cat([prompt_T.expand(50, -1), tokens_NL[:, :-1]], 1)
            logits = theirs(input_ids=everything).logits[:, -3:]
    expected_NL = logits.log_softmax(-1).gather(2, tokens_NL[..., None])[..., 0]
    assert torch.allclose(scores_N, expected_NL.sum(1), atol=1e-4)
    level_N = score_catalogue(model, batch, CSRIndex.from_index(INDEX), scoring="level")[0]
    assert (scores_N < level_N).all()
    assert model.over_vocabulary().embedding is model.embedding and not model.spans_vocabulary


@EVERY
def test_ragged_batches_equal_single_requests(kind):
    model, constraint = of_kind(kind), CSRIndex.from_index(INDEX)
    filters = Filters(exclude=[np.array(history, dtype=int) for history in HISTORIES])
    together = beam_search(
        model, pad_histories(HISTORIES, 6), constraint, width=8, k=8, filters=filters
    )
    for b, history in enumerate(HISTORIES):
        alone = beam_search(
            model,
            pad_histories([history], 6),
            constraint,
            width=8,
            k=8,
            filters=Filters(exclude=[np.array(history, dtype=int)]),
        )
        assert alone.rows_Bk[0].tolist() == together.rows_Bk[b].tolist()
        assert torch.allclose(alone.logprobs_Bk[0], together.logprobs_Bk[b], atol=1e-5)
        assert not set(history) & set(together.rows_Bk[b].tolist())
    scores = score_candidates(
        model, pad_histories(HISTORIES[:1], 6), constraint, together.rows_Bk[:1]
    )
    assert torch.isfinite(scores).all()


def generate(model, prompt_BT, beam, **constraint):
    with torch.no_grad():
        return model.to_hugging_face().generate(
            prompt_BT,
            attention_mask=(prompt_BT != PAD).long(),
            num_beams=beam,
            num_return_sequences=beam,
            max_new_tokens=3,
            renormalize_logits=True,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **constraint,
        )


@BOTH
@FORMS
@pytest.mark.parametrize("kind", ["processor", "prefix_fn"])
def test_lists_equal_transformers_generate(cls, kind, index):
    model, beam = backbone(cls, index), 7
    histories = [[1, 2, 3], [9, 8, 7], [40, 41, 42]]
    batch = pad_histories(histories, 6)
    prompt_BT = torch.nn.functional.pad(
        model.tokens_NL[batch.history_BH].flatten(1), (1, 0), value=START
    )
    prompt_length = 1 if cls is EncoderDecoder else prompt_BT.shape[1]
    place = dict(first_token=FIRST_TOKEN, prompt_length=prompt_length)
    if kind == "processor":
        constraint = {"logits_processor": [CatalogueLogitsProcessor(index, **place)]}
    else:
        constraint = {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(index, **place)}
    output = generate(model, prompt_BT, beam, **constraint)
    codes = output.sequences[:, -3:] - model.level_offsets_L
    rows = index.rows_of_codes(codes.numpy()).reshape(3, beam)
    beams = beam_search(model, batch, CSRIndex.from_index(index), width=beam, k=beam)
    assert rows.tolist() == beams.rows_Bk.tolist()
    scores = output.sequences_scores.view(3, beam)
    assert torch.allclose(scores, beams.logprobs_Bk, atol=1e-4)


@BOTH
def test_padding_on_either_side_changes_nothing(cls):
    """Our batches pad on the right, as wide as you like; generate pads a causal LM on the left."""
    model, beam, constraint = backbone(cls), 7, CSRIndex.from_index(INDEX)
    histories = [[1, 2, 3], [9], [40, 41]]
    narrow = pad_histories(histories, 6)
    wide = Batch(torch.nn.functional.pad(narrow.history_BH, (0, 3), value=-1))
    beams = beam_search(model, narrow, constraint, width=beam, k=beam)
    padded = beam_search(model, wide, constraint, width=beam, k=beam)
    assert torch.equal(padded.rows_Bk, beams.rows_Bk)
    assert torch.allclose(padded.logprobs_Bk, beams.logprobs_Bk, atol=1e-5)
    prompts = [[START, *model.tokens_NL[history].flatten().tolist()] for history in histories]
    longest = max(map(len, prompts))
    left = cls is DecoderOnly
    fill = [[PAD] * (longest - len(prompt)) for prompt in prompts]
    pairs = zip(fill, prompts, strict=True)
    prompt_BT = torch.tensor([f + p if left else p + f for f, p in pairs])
    place = dict(first_token=FIRST_TOKEN, prompt_length=longest if left else 1)
    processor = CatalogueLogitsProcessor(INDEX, **place)
    output = generate(model, prompt_BT, beam, logits_processor=[processor])
    codes = output.sequences[:, -3:] - model.level_offsets_L
    rows = INDEX.rows_of_codes(codes.numpy()).reshape(3, beam)
    assert rows.tolist() == beams.rows_Bk.tolist()


@FORMS
def test_processor_and_prefix_function_allow_the_same_tokens(index):
    place = dict(first_token=9, prompt_length=2)
    processor = CatalogueLogitsProcessor(index, **place)
    allowed_tokens = prefix_allowed_tokens_fn(index, **place)
    tokens_NL = torch.from_numpy(index.tokens(9))
    for level in range(3):
        input_ids = torch.cat([torch.zeros(50, 2, dtype=torch.int64), tokens_NL[:, :level]], 1)
        scores = processor(input_ids, torch.zeros(50, 9 + index.num_tokens + 4))
        for n in range(50):
            assert torch.nonzero(scores[n] == 0).flatten().tolist() == allowed_tokens(
                0, input_ids[n]
            )
        assert torch.isinf(scores).any()
    too_long = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(UserError, match=r"got 3 tokens.*max_new_tokens=3"):
        processor(too_long, torch.zeros(1, 40))
    with pytest.raises(UserError, match=r"got 3 tokens.*max_new_tokens=3"):
        allowed_tokens(0, too_long[0])
