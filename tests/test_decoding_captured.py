"""Searches of padded shapes: equal to plain ones, and fit to be recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.decoding import CSRIndex, Filters, beam_search
from genrec.decoding.captured import Bucket, CapturedSearch, bucket_of
from genrec.errors import UserError
from genrec.models.base import Batch, pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.pretrained_decoder import PretrainedDecoder
from genrec.testing import random_index
from genrec.testing.decoding import random_titles

INDEX = random_index(60, (5, 6, 4), seed=2)
TITLES = random_titles(50, num_words=6, num_levels=3, seed=2)
SMALL = dict(max_history=6, d_model=16, num_layers=2, num_heads=2, d_ff=32)
HISTORIES = [[1, 2, 3, 4], [], [7], [9, 8, 30, 31, 32, 33], [5, 5, 1, 2, 3, 4, 6]]
BOTH = pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])


def backbone(cls, index=INDEX):
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**SMALL), index)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 4.0 if cls is DecoderOnly else 1.5
    return model.eval()


def assert_same(got, expected):
    assert got.rows_Bk.tolist() == expected.rows_Bk.tolist()
    assert got.codes_BkL.tolist() == expected.codes_BkL.tolist()
    assert torch.allclose(got.logprobs_Bk, expected.logprobs_Bk, atol=1e-4)
    assert got.certified_B.tolist() == expected.certified_B.tolist()


def test_sizes_are_padded_to_powers_of_two():
    assert [bucket_of(n) for n in (0, 1, 2, 3, 4, 5, 33)] == [1, 1, 2, 4, 4, 8, 64]
    assert bucket_of(33, largest=50) == 50 and bucket_of(5, largest=50) == 8


@BOTH
@pytest.mark.parametrize("index", [INDEX, TITLES], ids=["codes", "titles"])
@pytest.mark.parametrize("scoring", ["renormalized", "level", "raw"])
def test_padded_searches_equal_plain_ones(cls, index, scoring):
    model, constraint = backbone(cls, index), CSRIndex.from_index(index)
    search = CapturedSearch(model, constraint, Batch, scoring=scoring, max_history=6)
    options = dict(width=7, k=5)
    expected = beam_search(
        model, pad_histories(HISTORIES, 6), constraint, scoring=scoring, **options
    )
    assert_same(search(HISTORIES, **options), expected)
    rows = [[int(r) for r in row[:2]] for row in expected.rows_Bk]
    rows[1] = []
    denied = beam_search(
        model,
        pad_histories(HISTORIES, 6),
        constraint,
        filters=Filters(exclude=rows),
        scoring=scoring,
        **options,
    )
    got = search(HISTORIES, exclude=[[*r, *r] for r in rows], **options)
    assert_same(got, denied)
    assert got.rows_Bk.tolist() != expected.rows_Bk.tolist()


def test_requests_and_columns_are_padded_to_the_bucket():
    seen = []

    def batch(history_BH):
        seen.append(tuple(history_BH.shape))
        return Batch(history_BH)

    search = CapturedSearch(
        backbone(DecoderOnly), CSRIndex.from_index(INDEX), batch, max_requests=4, max_history=6
    )
    beams = search(HISTORIES[:3], width=4, k=3)
    assert beams.rows_Bk.shape == (3, 3) and beams.codes_BkL.shape == (3, 3, 3)
    search(HISTORIES, width=4, k=3)  # five requests: four and one
    search([[]], width=4, k=3)
    assert seen == [(4, 4), (4, 6), (1, 6), (1, 1)]
    assert search.buckets == []  # nothing is recorded on a CPU
    search.warm_up([Bucket(2, 4, 8, 5, 5)])
    assert seen[-1] == (2, 4)
    search.clear()


def test_parts_of_a_large_batch_keep_their_order():
    model, constraint = backbone(DecoderOnly), CSRIndex.from_index(INDEX)
    whole = CapturedSearch(model, constraint, Batch, max_history=6)
    parts = CapturedSearch(model, constraint, Batch, max_requests=2, max_history=6)
    exclude = [[r] for r in range(5)]
    assert_same(
        parts(HISTORIES, width=6, k=6, exclude=exclude),
        whole(HISTORIES, width=6, k=6, exclude=exclude),
    )


def test_no_requests_give_an_empty_result():
    search = CapturedSearch(backbone(DecoderOnly), CSRIndex.from_index(INDEX), Batch)
    beams = search([], width=6, k=4)
    assert beams.rows_Bk.shape == (0, 4) and beams.codes_BkL.shape == (0, 4, 3)
    assert beams.num_proven_B.shape == (0,)


def test_views_of_the_catalogue_keep_their_rule():
    model, allowed_N = backbone(DecoderOnly), np.arange(60) % 2 == 0
    view = CSRIndex.from_index(INDEX).restricted(allowed_N)
    search = CapturedSearch(model, view, Batch, max_history=6)
    got = search(HISTORIES, width=30, k=8, exclude=[[0, 2]] * 5)
    rules = Filters(exclude=[[0, 2]] * 5)
    expected = beam_search(model, pad_histories(HISTORIES, 6), view, width=30, k=8, filters=rules)
    assert_same(got, expected)
    assert (got.rows_Bk % 2 == 0).all() and not np.isin(got.rows_Bk, [0, 2]).any()


class HostReads(TorchDispatchMode):
    """Records what a CUDA graph cannot hold: reads, data-dependent shapes, uploads."""

    names = frozenset(
        {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "lift_fresh"}
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        if name in self.names or masks:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_it_looks_for():
    values = torch.arange(4)
    with HostReads() as reads:
        int(values[0])
        values[values > 1]
        values.nonzero()
        torch.tensor([1, 2])
    assert reads.found == ["_local_scalar_dense", "index", "nonzero", "lift_fresh"]


@BOTH
@pytest.mark.parametrize("index", [INDEX, TITLES], ids=["codes", "titles"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_whole_search_reads_nothing_and_uploads_nothing(cls, index, autocast):
    model, constraint = backbone(cls, index), CSRIndex.from_index(index)
    search = CapturedSearch(model, constraint, Batch, autocast=autocast)
    constraint.positions(torch.tensor([0]))
    inputs = [torch.tensor([[3, 4, -1], [-1, -1, -1]]), torch.tensor([[1, 2], [-1, -1]])]
    with HostReads() as reads:
        search._search(inputs, Bucket(2, 3, 2, 7, 5))
    assert reads.found == []


def test_pretrained_models_take_ready_prompts():
    from test_decoding_pretrained import decoder

    model, index = decoder("llama"), random_index(50, (5, 6, 4), seed=2)
    constraint = CSRIndex.from_index(index)
    search = CapturedSearch(model, constraint, make_batch=lambda prompt_BT: prompt_BT)
    prompts = [[1, 2, 3], [4], [9, 8, 7, 6, 5]]
    expected = beam_search(model, prompts, constraint, width=6, k=6)
    assert isinstance(model, PretrainedDecoder)
    assert_same(search(prompts, width=6, k=6), expected)
    inputs = [torch.tensor([[3, 4, -1], [5, 6, 7]])]
    with HostReads() as reads:
        search._search(inputs, Bucket(2, 3, 0, 7, 5))
    # transformers' cache begins each layer with two empty tensors: nothing is copied.
    assert set(reads.found) <= {"lift_fresh"} and len(reads.found) <= 2 * 2


def test_bfloat16_lists_overlap():
    model, constraint = backbone(EncoderDecoder), CSRIndex.from_index(INDEX)
    plain = CapturedSearch(model, constraint, Batch, max_history=6)
    half = CapturedSearch(model, constraint, Batch, max_history=6, autocast=torch.bfloat16)
    expected, got = (search(HISTORIES, width=20, k=10) for search in (plain, half))
    assert got.logprobs_Bk.dtype == torch.float32
    shared = [
        len(set(a) & set(b))
        for a, b in zip(expected.rows_Bk.tolist(), got.rows_Bk.tolist(), strict=True)
    ]
    assert np.mean(shared) >= 8


def test_errors_say_what_to_do():
    model, constraint = backbone(DecoderOnly), CSRIndex.from_index(INDEX)
    with pytest.raises(UserError, match=r"max_requests: got 0"):
        CapturedSearch(model, constraint, Batch, max_requests=0)
    search = CapturedSearch(model, constraint, Batch)
    for options, words in (
        (dict(width=0, k=1), "width: got 0"),
        (dict(width=3, k=4), "k: got 4 with width 3"),
        (dict(width=3, k=3, exclude=[[1]]), "1 lists for 2 histories"),
        (dict(width=3, k=3, exclude=[[], [60]]), r"exclude\[1\].*0 <= row < 60"),
    ):
        with pytest.raises(UserError, match=words):
            search([[1], [2]], **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_replayed_graphs_equal_eager_searches(cls):
    model, index = backbone(cls).cuda(), CSRIndex.from_index(INDEX).to("cuda")
    search = CapturedSearch(model, index, Batch, max_history=6)
    for histories in (HISTORIES, HISTORIES[::-1], [[3, 1]]):
        for exclude in (None, [[1, 2]] * len(histories)):
            got = search(histories, width=7, k=5, exclude=exclude)
            expected = beam_search(
                model,
                pad_histories(histories, 6).to("cuda"),
                index,
                width=7,
                k=5,
                filters=None if exclude is None else Filters(exclude=exclude),
            )
            assert got.rows_Bk.tolist() == expected.rows_Bk.tolist()
    assert len(search.buckets) == 4
