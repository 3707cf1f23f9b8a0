"""Which layers read item positions: softmax attention, or HSTU's pointwise attention?

HSTU (Zhai et al. 2024): SiLU instead of softmax, a gate instead of a feed-forward block, learned
biases by distance and by time. Dense, without kernels of its own. It knows neither codes nor
losses.

Shapes: B requests, H history items, T = 1 + H positions, h heads, d width of a head, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import ConfigError
from genrec.models.base import START
from genrec.models.causal import NORM_EPS, CausalConfig, CausalLayer, prefill
from genrec.models.layers import Forgetful, merge_heads, module_list, split_heads
from genrec.models.request_features import (
    NUM_TIME_BUCKETS,
    Reading,
    RequestFeaturesBackbone,
    time_buckets,
)

BIAS_STD = 0.02


class ItemPositionsConfig(CausalConfig):
    """Settings of a causal transformer in which an item is one position."""

    attention: Literal["softmax", "hstu"] = "softmax"
    """Layers: Llama's, or HSTU's (pointwise attention, no feed-forward block: `d_ff` and
    `activation` are not used, nor is RoPE)."""
    time_bias: bool = False
    """Let HSTU's attention scores depend on the time between two items (128 logarithmic buckets).
    Data without times read as unknown."""


class HSTULayer(Forgetful):
    """Hierarchical sequential transduction unit; equations 1 to 3 of Zhai et al. 2024.

    A = SiLU(Q K^T + bias of distance + bias of time) / n, output x + W(norm(A V) * U). n is the
    longest sequence, a constant, so that padding changes nothing.

    Args:
        config: widths, heads, dropout, and whether time counts.
    """

    def __init__(self, config: ItemPositionsConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        width, self.max_positions = config.d_model, config.max_history + 1
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.uvqk = nn.Linear(width, 4 * width, bias=False)
        self.mixed_norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.out = nn.Linear(width, width, bias=False)
        self.distance_bias = nn.Parameter(BIAS_STD * torch.randn(self.max_positions))
        if config.time_bias:
            self.time_bias = nn.Parameter(BIAS_STD * torch.randn(1 + NUM_TIME_BUCKETS))

    def forward(self, x_BTD: Tensor, buckets_BTT: Tensor | None) -> Tensor:
        """Return the layer's output for every position, (B, T, D).

        Args:
            x_BTD: at most max_history + 1 positions.
            buckets_BTT: int64 bucket of the time between query (row) and key; for `time_bias`.
        """
        gate, value, query, key = F.silu(self.uvqk(self.norm(x_BTD))).chunk(4, -1)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        scores_BhTT = query @ key.transpose(2, 3) + self._bias(x_BTD.shape[1], buckets_BTT)
        weights_BhTT = (F.silu(scores_BhTT) / self.max_positions).tril()
        weights_BhTT = F.dropout(weights_BhTT, self.attention_dropout, self.training)
        mixed_BTD = self.mixed_norm(merge_heads(weights_BhTT.to(value.dtype) @ value))
        return x_BTD + self.out(F.dropout(mixed_BTD * gate, self.dropout, self.training))

    def _bias(self, length: int, buckets_BTT: Tensor | None) -> Tensor:
        """Return what is added to the scores, (1 or B, 1, T, T); anything above the diagonal."""
        places_T = torch.arange(length, device=self.distance_bias.device)
        bias = self.distance_bias[(places_T[:, None] - places_T).clamp(min=0)][None]
        if buckets_BTT is not None:
            bias = bias + self.time_bias[buckets_BTT]
        return bias.unsqueeze(1)


class ItemPositionsBackbone(RequestFeaturesBackbone):
    """A backbone that reads START and one position per item.

    Constructors of leaves call `make_layers`, and `complete` for max_history + 1 positions.
    """

    config: ItemPositionsConfig
    layers: Sequence[CausalLayer] | Sequence[HSTULayer]

    def make_layers(self) -> None:
        """Make the layers that the configuration asks for.

        Raises:
            ConfigError: `time_bias` without `attention: hstu`.
        """
        config = self.config
        if config.time_bias and config.attention != "hstu":
            raise ConfigError(
                "model.time_bias: got true with model.attention=softmax, whose layers have no such "
                "bias. Set model.attention=hstu, or model.time_features=gap for softmax."
            )
        numbers = range(config.num_layers)
        if config.attention == "hstu":
            self.layers = module_list(HSTULayer(config) for _ in numbers)
        else:
            self.layers = module_list(CausalLayer(config) for _ in numbers)

    @property
    def reads_times(self) -> bool:
        """Whether times change what it answers; see `Backbone.reads_times`."""
        return self.config.time_bias or super().reads_times

    def read_all(self, reading: Reading) -> Tensor:
        """Return the last layer's output for every position, (B, T, D)."""
        x_BTD, buckets_BTT = self._embed(reading), self._buckets(reading)
        length = x_BTD.shape[1]
        for layer in self.layers:
            if isinstance(layer, HSTULayer):
                x_BTD = layer(x_BTD, buckets_BTT)
            else:
                x_BTD, _ = layer(x_BTD, self.cos[:length], self.sin[:length])
        return x_BTD

    def read_last(self, reading: Reading) -> Tensor:
        """Return the last layer's output for the last position of each history, (B, D)."""
        visible_BT = F.pad(reading.items_BH >= 0, (1, 0), value=True)
        causal = [layer for layer in self.layers if isinstance(layer, CausalLayer)]
        if causal:
            return prefill(causal, self._embed(reading), (self.cos, self.sin), visible_BT)[0]
        last_B11 = (visible_BT.sum(1) - 1)[:, None, None]
        x_BTD = self.read_all(reading)
        return x_BTD.gather(1, last_B11.expand(-1, 1, x_BTD.shape[-1]))[:, 0]

    def _embed(self, reading: Reading) -> Tensor:
        """Return START and the items' vectors, with what is known beside them, (B, T, D)."""
        items_BH = reading.items_BH
        start_B1D = self.embedding.weight[START].expand(len(items_BH), 1, -1)
        x_BTD = torch.cat([start_B1D, self.item_representations(items_BH)], dim=1)
        x_BTD = self.with_request(x_BTD, reading)
        return F.dropout(x_BTD, self.config.dropout, self.training)

    def _buckets(self, reading: Reading) -> Tensor | None:
        """Return the bucket of the time between any two positions, (B, T, T)."""
        if not self.config.time_bias:
            return None
        times_BT = reading.times_BT
        if times_BT is None:
            times_BT = F.pad(torch.zeros_like(reading.items_BH), (1, 0))
        return time_buckets(times_BT[:, :, None], times_BT[:, None])
