"""The loss `softmax: trie`: the distribution over the catalogue that the search also uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.decoding import CSRIndex, score_catalogue
from genrec.errors import ConfigError, UserError
from genrec.item_index import END
from genrec.models.base import Batch, pad_histories
from genrec.models.catalogue_tree import CatalogueTree
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.testing import brute_force_logprobs, random_index
from genrec.testing.decoding import random_titles

SMALL = dict(max_history=5, d_model=16, num_layers=1, num_heads=2, d_ff=32, dropout=0.0)
CODES = random_index(30, (4, 5, 3), seed=1)
TITLES = random_titles(30, num_words=4, num_levels=3, seed=1)
FORMS = pytest.mark.parametrize("index", [CODES, TITLES], ids=["codes", "titles"])
BOTH = pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
HISTORY = [3, 7, 1]


def backbone(cls, index, **options):
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**SMALL, **{"softmax": "trie", **options}), index)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 4.0 if cls is DecoderOnly else 1.5
    return model.eval()


def last_item_nll(model, history, num_items):
    """Return -log p of every item after `history`, from `loss` alone, (N,)."""
    losses = []
    for row in range(num_items):
        if model.training_unit == "target":
            batch = pad_histories([history], 5, targets=[row])
            losses.append(model.loss(batch).loss_sum)
        else:  # the earlier items cost the same whatever follows
            whole = model.loss(pad_histories([[*history, row]], 6)).loss_sum
            losses.append(whole - model.loss(pad_histories([history], 6)).loss_sum)
    return torch.stack(losses)


@BOTH
@FORMS
@torch.no_grad()
def test_probabilities_of_the_catalogue_sum_to_one_and_are_those_of_the_search(cls, index):
    model = backbone(cls, index)
    nll_N = last_item_nll(model, HISTORY, len(index))
    assert float((-nll_N).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    batch = pad_histories([HISTORY], 5)
    scores_N = score_catalogue(model, batch, CSRIndex.from_index(index))[0]
    assert torch.allclose(-nll_N, scores_N, atol=1e-4)
    truth_N = brute_force_logprobs(
        model, batch, index.codes, shared_vocabulary=index.shared_vocabulary
    )[0]
    assert np.allclose(-nll_N, truth_N, atol=1e-4)


@BOTH
@torch.no_grad()
def test_other_softmaxes_lose_mass(cls):
    """The three losses differ, and each has more competitors than the one before."""
    losses = {}
    for softmax in ("trie", "level", "vocabulary"):
        model = backbone(cls, CODES, softmax=softmax)
        losses[softmax] = last_item_nll(model, HISTORY, len(CODES))
    # Equal where every code has items below it, as near as two ways of summing come.
    assert (losses["trie"] <= losses["level"] + 1e-5).all()
    assert losses["trie"].sum() < losses["level"].sum() - 1.0
    assert (losses["level"] < losses["vocabulary"]).all()


def brute_force_loss(model, logits_ML, rows):
    """Return the summed loss of items from each level's logits, by looking at every item."""
    codes_NL = (model.tokens_NL - model.level_offsets_L).tolist()
    total = torch.zeros(())
    for m, row in enumerate(rows):
        for level in range(model.num_levels):
            prefix = codes_NL[row][:level]
            if model.shared_vocabulary and level and prefix[-1] == END:
                break
            children = sorted({c[level] for c in codes_NL if c[:level] == prefix})
            logits_K = logits_ML[level][m]
            total = total + logits_K[children].logsumexp(0) - logits_K[codes_NL[row][level]]
    return total


@FORMS
def test_loss_and_gradient_equal_a_loop_over_items(index):
    model = backbone(DecoderOnly, index)
    rows = [0, 4, 4, 11, 29 % len(index)]
    hidden = torch.randn(len(rows), index.num_levels, 16, generator=torch.manual_seed(3))
    valid_M = torch.tensor([True, True, False, True, True])
    found = []
    for fast in (True, False):
        model.zero_grad()
        hidden_MLD = hidden.clone().requires_grad_()
        if fast:
            rows_M = torch.tensor(rows).masked_fill(~valid_M, -1)
            loss = model.items_nll(hidden_MLD, rows_M, valid_M).loss_sum
        else:
            kept = [m for m in range(len(rows)) if valid_M[m]]
            logits = [model.level_logits(hidden_MLD[kept, n], n) for n in range(index.num_levels)]
            loss = brute_force_loss(model, logits, [rows[m] for m in kept])
        loss.backward()
        found.append((loss.detach(), hidden_MLD.grad, model.embedding.weight.grad.clone()))
    for fast, slow in zip(*found, strict=True):
        assert torch.isfinite(fast).all() and torch.allclose(fast, slow, atol=1e-5)
    assert found[0][0] > 0 and not found[0][1][2].any()  # what is not valid gets no gradient


def test_a_prefix_with_one_item_left_costs_nothing():
    model = backbone(DecoderOnly, random_index(1, (7, 3)))
    output = model.loss(pad_histories([[0, 0, 0]], 5))
    assert float(output.loss.detach()) == 0.0 and int(output.num_targets) == 3
    output.loss.backward()
    grad = model.embedding.weight.grad
    assert torch.isfinite(grad).all() and not grad.any()


@BOTH
def test_nothing_to_predict_is_zero_with_finite_gradients(cls):
    model = backbone(cls, CODES)
    loss = model.loss(Batch(torch.full((2, 3), -1), torch.full((2,), -1))).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_look_up_reads_nothing_back_from_the_device():
    model = backbone(DecoderOnly, CODES)
    hidden_MLD, rows_M = torch.randn(4, 3, 16), torch.tensor([0, 5, -1, 7])
    with HostReads() as reads:
        model.items_nll(hidden_MLD, rows_M, rows_M >= 0)
    assert reads.found == []


def test_the_tree_is_no_part_of_the_weights_and_moves_with_the_model():
    model, plain = backbone(DecoderOnly, CODES), backbone(DecoderOnly, CODES, softmax="level")
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    buffers = dict(model.to("meta").named_buffers())
    assert all(buffer.device.type == "meta" for buffer in buffers.values())


def test_memory_is_as_documented():
    index = random_index(2000, (256, 256, 256, 256), seed=0)
    tokens_NL = torch.from_numpy(index.tokens())
    tree = CatalogueTree(tokens_NL, torch.tensor([0, 256, 512, 768]))
    num_bytes = sum(b.numel() * b.element_size() for b in tree.buffers())
    assert num_bytes <= 20 * 2000 * 4


def test_errors_name_the_setting():
    with pytest.raises(UserError, match=r"softmax: got 'trie' for a catalogue of 0 items"):
        CatalogueTree(torch.empty((0, 3), dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises((ConfigError, ValueError), match="softmax"):
        DecoderOnly.Config(softmax="tree")
