"""Causal transformer layers: what the backbones share that read a sequence from left to right.

RoPE, RMSNorm before each block: the mathematics of Llama. It knows neither items nor levels nor
losses; a sequence is vectors.

Shapes: B requests, T positions, R live rows, h heads, d width of a head, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.models.layers import (
    FeedForward,
    Forgetful,
    attend,
    merge_heads,
    rotate,
    shared_prompt_attention,
    split_heads,
)
from genrec.models.scratch import ScratchBackbone

KeysValues = tuple[Tensor, Tensor]
NORM_EPS = 1e-6
BRANCH_ENDS = ("out", "feed_forward.down")


class CausalConfig(ScratchBackbone.Config):
    """Settings of a causal transformer. Defaults suit data of MovieLens-100K's size."""

    d_model: int = Field(default=64, ge=1)
    """Width of the residual stream."""
    num_layers: int = Field(default=2, ge=1)
    """Transformer layers."""
    num_heads: int = Field(default=2, ge=1)
    """Attention heads; each gets d_model / num_heads, an even number."""
    d_ff: int = Field(default=256, ge=1)
    """Inner width of the feed-forward blocks."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward activation. swiglu (Llama's) has a third matrix; gelu is faster on CPU."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021)."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of all initial weights (GPT-2)."""
    predict_first: bool = True
    """Train on a sequence's first item too; this is what an empty history answers with."""
    time_features: Literal["none", "gap", "gap_recency"] = "none"
    """Add learned vectors of logarithms of times: gap, from the item before to this one;
    gap_recency also from the last item to the request, for which training takes the time of the
    target. Data without times read as unknown."""
    user_tokens: Literal["none", "hashed", "learned"] = "none"
    """Add a vector of the user to START: hashed, one per bucket of users (TIGER's user tokens);
    learned, one per user of the training data, and a shared one for all others."""
    num_user_buckets: int = Field(default=2000, ge=1)
    """Buckets of `user_tokens: hashed` (TIGER: 2000)."""
    unknown_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of training sequences that are read without their user, and without the times of
    requests, so that the vectors for unknown ones are learned too."""


class CausalLayer(Forgetful):
    """Causal self-attention and a feed-forward block, each behind an RMSNorm."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        width = config.d_model
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.feed_forward = FeedForward(width, config.d_ff, config.activation, dropout=0.0)

    def forward(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> tuple[Tensor, KeysValues]:
        """Return the layer's output for every position, and its keys and values."""
        qkv_BTX = self.qkv(self.attention_norm(x_BTD))
        query, key, value = (split_heads(part, self.num_heads) for part in qkv_BTX.chunk(3, -1))
        query, key = rotate(query, cos_Td, sin_Td), rotate(key, cos_Td, sin_Td)
        dropout = self.attention_dropout if self.training else 0.0
        # No mask: padding stands right of everything that is read, so causality hides it, and the
        # flash kernels stay usable.
        mixed = attend(query, key, value, is_causal=True, dropout=dropout)
        return self.finish(x_BTD, merge_heads(mixed)), (key, value)

    def keys_values(self, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> KeysValues:
        """Return keys and values (B, h, T, d) only: all that the last layer's prefill needs."""
        weight = self.qkv.weight[x_BTD.shape[-1] :]
        key, value = F.linear(self.attention_norm(x_BTD), weight).chunk(2, -1)
        key = rotate(split_heads(key, self.num_heads), cos_Td, sin_Td)
        return key, split_heads(value, self.num_heads)

    def heads_of_rows(self, x_RD: Tensor, cos_Rd: Tensor, sin_Rd: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value (R, h, d) of one token per row."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in self.qkv(self.attention_norm(x_RD)).chunk(3, -1)
        )
        cos, sin = cos_Rd.unsqueeze(1), sin_Rd.unsqueeze(1)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's output and the feed-forward block to the residual stream."""
        x = x + F.dropout(self.out(mixed), self.dropout, self.training)
        forward = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(forward, self.dropout, self.training)


def prefill(
    layers: Sequence[CausalLayer],
    x_BTD: Tensor,
    tables: tuple[Tensor, Tensor],
    visible_BT: Tensor,
) -> tuple[Tensor, list[KeysValues]]:
    """Read right-padded sequences; compute the last layer for their last positions only.

    Args:
        layers: at least one.
        x_BTD: embedded sequences of at least one position.
        tables: cosines and sines (>= T, d).
        visible_BT: which positions exist: the first ones of each row.

    Returns:
        the last positions' outputs (B, D), and the keys and values of all positions per layer.
    """
    lengths_B = visible_BT.sum(1)
    cos, sin = tables
    length, prompt = x_BTD.shape[1], []
    for layer in layers[:-1]:
        x_BTD, keys_values = layer(x_BTD, cos[:length], sin[:length])
        prompt.append(keys_values)
    last = layers[-1]
    prompt.append(last.keys_values(x_BTD, cos[:length], sin[:length]))
    # Heads side by side in memory once, else every product with them makes such a copy.
    prompt = [(keys.contiguous(), values.contiguous()) for keys, values in prompt]
    x_BD = x_BTD.gather(1, (lengths_B - 1)[:, None, None].expand(-1, 1, x_BTD.shape[-1]))[:, 0]
    query_Bhd, _, _ = last.heads_of_rows(x_BD, cos[lengths_B - 1], sin[lengths_B - 1])
    none = query_Bhd.unsqueeze(2)[:, :, :0]
    mixed_BD = shared_prompt_attention(query_Bhd, prompt[-1], visible_BT, (none, none))
    return last.finish(x_BD, mixed_BD), prompt


@torch.no_grad()
def init_weights(model: nn.Module, layers: Sequence[nn.Module], std: float) -> None:
    """Draw all matrices of a model; the branches' outputs smaller with depth (GPT-2).

    Branches of a layer end in `out` and, where there is one, in `feed_forward.down`.
    """
    for weight in model.parameters():
        if weight.ndim > 1:  # norms keep their ones
            nn.init.normal_(weight, std=std)
    for layer in layers:  # keeps the residual stream's variance over the depth
        for name, module in layer.named_modules():
            if name in BRANCH_ENDS and isinstance(module, nn.Linear):
                module.weight *= (2 * len(layers)) ** -0.5
