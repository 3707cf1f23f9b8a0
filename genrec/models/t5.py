"""T5's layers (Raffel et al. 2020), and what transformers calls their weights.

RMSNorm before each block, scores not scaled, no biases. Written so that a search can hold keys and
values once per request; it knows nothing about items or levels.

Shapes: B requests, T tokens, Q queries per request, R live rows, t new tokens of a row, h heads,
d width of a head, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.models.layers import FeedForward, Forgetful, attend, merge_heads, split_heads

if TYPE_CHECKING:
    from genrec.models.encoder_decoder import EncoderDecoder

KeysValues = tuple[Tensor, Tensor]
NORM_EPS = 1e-6


class Attention(nn.Module):
    """T5 attention: projections without bias, scores not scaled.

    Args:
        config: widths and dropout.
        is_cross: queries come from one stream, keys and values from another.
    """

    def __init__(self, config: EncoderDecoder.Config, *, is_cross: bool) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = config.num_heads, config.attention_dropout
        inner = config.num_heads * config.d_kv
        self.inner = inner
        self.query = nn.Linear(config.d_model, inner, bias=False) if is_cross else None
        self.projection = nn.Linear(config.d_model, inner * (2 if is_cross else 3), bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value (B, h, T, d) of self-attention."""
        query, key, value = self.projection(x_BTD).chunk(3, dim=-1)
        heads = self.num_heads
        return split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)

    def keys_values(self, x_BTD: Tensor) -> KeysValues:
        """Return key and value (B, h, T, d) of cross-attention to `x_BTD`."""
        key, value = self.projection(x_BTD).chunk(2, dim=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Return the attention's output (B, Q, D); `bias` is added to the scores (or a mask)."""
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(query, keys, values, bias, dropout=dropout, scale=1.0)
        return self.out(merge_heads(mixed))


class EncoderLayer(Forgetful):
    """Self-attention and feed-forward, each behind an RMSNorm."""

    def __init__(self, config: EncoderDecoder.Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attention = Attention(config, is_cross=False)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.feed_forward = FeedForward(
            config.d_model, config.d_ff, config.activation, config.dropout
        )

    def forward(self, x_BTD: Tensor, bias_BhTT: Tensor) -> Tensor:
        """Return the layer's output (B, T, D)."""
        query, keys, values = self.attention.heads(self.attention_norm(x_BTD))
        x_BTD = self.add(x_BTD, self.attention.mix(query, keys, values, bias_BhTT))
        return self.add(x_BTD, self.feed_forward(self.feed_forward_norm(x_BTD)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add a block's output to the residual stream, with dropout."""
        return x + F.dropout(branch, self.dropout, self.training)


class DecoderLayer(EncoderLayer):
    """An encoder layer with cross-attention between its two blocks."""

    def __init__(self, config: EncoderDecoder.Config) -> None:
        super().__init__(config)
        self.cross_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.cross = Attention(config, is_cross=True)

    def attend(
        self, x_RtD: Tensor, past: KeysValues | None, bias: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """Self-attention of new positions over past and new ones."""
        query, keys, values = self.attention.heads(self.attention_norm(x_RtD))
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        return self.add(x_RtD, self.attention.mix(query, keys, values, bias)), (keys, values)

    def finish(self, x_BQD: Tensor, cross: KeysValues, visible_B11T: Tensor) -> Tensor:
        """Cross-attention from Q queries per request, then the feed-forward block."""
        assert self.cross.query is not None
        query = split_heads(self.cross.query(self.cross_norm(x_BQD)), self.cross.num_heads)
        x_BQD = self.add(x_BQD, self.cross.mix(query, *cross, visible_B11T))
        return self.add(x_BQD, self.feed_forward(self.feed_forward_norm(x_BQD)))


def hugging_face_weights(prefix: str, layer: EncoderLayer) -> dict[str, Tensor]:
    """Return one layer's weights under transformers' names, which start with `prefix`."""
    query, key, value = layer.attention.projection.weight.chunk(3)
    attention = {"q": query, "k": key, "v": value, "o": layer.attention.out.weight}
    weights = {f"{prefix}.0.SelfAttention.{k}.weight": v for k, v in attention.items()}
    weights[f"{prefix}.0.layer_norm.weight"] = layer.attention_norm.weight
    last = 1
    if isinstance(layer, DecoderLayer):
        last = 2
        key, value = layer.cross.projection.weight.chunk(2)
        assert layer.cross.query is not None
        cross = {"q": layer.cross.query.weight, "k": key, "v": value, "o": layer.cross.out.weight}
        weights |= {f"{prefix}.1.EncDecAttention.{k}.weight": v for k, v in cross.items()}
        weights[f"{prefix}.1.layer_norm.weight"] = layer.cross_norm.weight
    forward = layer.feed_forward
    names = ["wi_0", "wi_1"] if forward.is_gated else ["wi"]
    inner = zip(names, forward.up.weight.chunk(len(names)), strict=True)
    weights |= {f"{prefix}.{last}.DenseReluDense.{k}.weight": v for k, v in inner}
    weights[f"{prefix}.{last}.DenseReluDense.wo.weight"] = forward.down.weight
    weights[f"{prefix}.{last}.layer_norm.weight"] = layer.feed_forward_norm.weight
    return weights
