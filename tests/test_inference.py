"""A search puts the model into eval mode and leaves it in the mode that it had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.decoding import CSRIndex
from genrec.inference import evaluating, level_logprobs, search
from genrec.item_index import ItemIndex
from genrec.models.decoder_only import DecoderOnly
from genrec.testing.models import SIZES, small_codes

INDEX = ItemIndex(tuple(f"i{n}" for n in range(24)), small_codes(), SIZES)
CONSTRAINT = CSRIndex.from_index(INDEX)
HISTORIES = [np.array([1, 2, 3]), np.array([4])]


def model(dropout: float = 0.5) -> DecoderOnly:
    torch.manual_seed(0)
    size = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 24, "dropout": dropout}
    return DecoderOnly.from_index(DecoderOnly.Config(**size), INDEX)


def modes(network: torch.nn.Module) -> list[bool]:
    return [part.training for part in network.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_a_search_drops_nothing_out_and_leaves_the_mode(training):
    network = model().train(training)
    before = modes(network)
    found = search(network, CONSTRAINT, HISTORIES, width=24, k=5)
    parts = level_logprobs(network, CONSTRAINT, HISTORIES, found.rows)
    assert modes(network) == before
    expected = search(model().eval(), CONSTRAINT, HISTORIES, width=24, k=5)
    assert np.array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    np.testing.assert_allclose(parts.sum(-1), found.logprobs, atol=1e-5)


def test_a_part_in_training_mode_is_noticed():
    network = model().eval()
    list(network.modules())[-1].train()
    with evaluating(network):
        assert not any(modes(network))
    assert not network.training


def test_the_mode_comes_back_after_an_error():
    network = model().train()
    with pytest.raises(RuntimeError, match="out of memory"), evaluating(network):
        assert not any(modes(network))
        raise RuntimeError("out of memory")
    assert all(modes(network))
