"""The search on tiny random backbones: step contract, brute force, transformers' generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.decoding import CSRIndex, Filters, beam_search, score_candidates, score_catalogue
from genrec.decoding.hf import CatalogueLogitsProcessor, prefix_allowed_tokens_fn
from genrec.errors import UserError
from genrec.models.base import FIRST_TOKEN, START, pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.testing import StepModelContract, brute_force_logprobs, random_index, rank

SIZES = (5, 6, 4)
SMALL = dict(max_history=6, d_model=16, num_layers=2, num_heads=2, d_ff=32)
INDEX = random_index(50, SIZES, seed=2)
HISTORIES = [[1, 2, 3, 4], [], [7], [9, 8, 30, 31, 32, 33]]


def backbone(cls):
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**SMALL), INDEX)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # spread the scores
                weight *= 4.0 if cls is DecoderOnly else 1.5
    return model.eval()


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


@pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
def test_exhaustive_beam_and_scores_equal_brute_force(cls):
    model, constraint = backbone(cls), CSRIndex.from_index(INDEX)
    batch = pad_histories(HISTORIES, 6)
    truth_BN = brute_force_logprobs(model, batch, INDEX.codes)
    assert np.allclose(np.exp(truth_BN).sum(1), 1, atol=1e-4)
    beams = beam_search(model, batch, constraint, width=50, k=50)
    assert np.allclose(score_catalogue(model, batch, constraint), truth_BN, atol=1e-4)
    for b in range(len(HISTORIES)):
        assert beams.rows_Bk[b].tolist() == rank(truth_BN[b], 50).tolist()
        assert np.allclose(beams.logprobs_Bk[b], np.sort(truth_BN[b])[::-1], atol=1e-4)


@pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
def test_ragged_batches_equal_single_requests(cls):
    model, constraint = backbone(cls), CSRIndex.from_index(INDEX)
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


def generate(model, prompt_BT, prompt_length, beam, **constraint):
    with torch.no_grad():
        return model.to_hugging_face().generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
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


@pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
@pytest.mark.parametrize("kind", ["processor", "prefix_fn"])
def test_lists_equal_transformers_generate(cls, kind):
    model, beam = backbone(cls), 7
    histories = [[1, 2, 3], [9, 8, 7], [40, 41, 42]]
    batch = pad_histories(histories, 6)
    prompt_BT = torch.nn.functional.pad(
        model.tokens_NL[batch.history_BH].flatten(1), (1, 0), value=START
    )
    prompt_length = 1 if cls is EncoderDecoder else prompt_BT.shape[1]
    place = dict(first_token=FIRST_TOKEN, prompt_length=prompt_length)
    if kind == "processor":
        constraint = {"logits_processor": [CatalogueLogitsProcessor(INDEX, **place)]}
    else:
        constraint = {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(INDEX, **place)}
    output = generate(model, prompt_BT, prompt_length, beam, **constraint)
    codes = output.sequences[:, -3:] - model.level_offsets_L
    rows = INDEX.rows_of_codes(codes.numpy()).reshape(3, beam)
    beams = beam_search(model, batch, CSRIndex.from_index(INDEX), width=beam, k=beam)
    assert rows.tolist() == beams.rows_Bk.tolist()
    scores = output.sequences_scores.view(3, beam)
    assert torch.allclose(scores, beams.logprobs_Bk, atol=1e-4)


def test_processor_and_prefix_function_allow_the_same_tokens():
    place = dict(first_token=9, prompt_length=2)
    processor = CatalogueLogitsProcessor(INDEX, **place)
    allowed_tokens = prefix_allowed_tokens_fn(INDEX, **place)
    tokens_NL = torch.from_numpy(INDEX.tokens(9))
    for level in range(3):
        input_ids = torch.cat([torch.zeros(50, 2, dtype=torch.int64), tokens_NL[:, :level]], 1)
        scores = processor(input_ids, torch.zeros(50, 9 + sum(SIZES) + 4))
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
