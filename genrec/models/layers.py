"""The pieces that the backbones share: attention over a shared prompt, RoPE, T5 position bias.

Pure tensor mathematics; it knows nothing about items, levels or losses.

Shapes: B requests, W rows per request, R = B*W, h heads, d width of a head, T keys, t own keys,
D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_list(modules: Iterable[ModuleT]) -> Sequence[ModuleT]:
    """Return an `nn.ModuleList` whose items keep their type for the type checker."""
    return cast("Sequence[ModuleT]", nn.ModuleList(modules))


class Forgetful(nn.Module):
    """A layer that can compute its activations a second time instead of keeping them.

    Sublinear memory by recomputation (Chen et al. 2016). Dropout draws the same twice, so the
    gradients are the same.
    """

    forgets = False

    def __call__(self, *args: Any) -> Any:
        """Run `forward`; while training a forgetful layer keeps its inputs only."""
        if self.forgets and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def split_heads(x_BTX: Tensor, num_heads: int) -> Tensor:
    """Return (B, T, h*d) as a (B, h, T, d) view."""
    return x_BTX.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BhTd: Tensor) -> Tensor:
    """Return (B, h, T, d) as (B, T, h*d)."""
    return x_BhTd.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend; as `torch.nn.functional.scaled_dot_product_attention`, whose arguments these are.

    That function it is, but for training in bf16 on a CPU: its backward passes are slow there
    (`benchmarks.training` has both). The plain products hold all scores, (B, h, Q, T).

    Args:
        query: (B, h, Q, d).
        keys: (B, h, T, d).
        values: (B, h, T, d).
        mask: broadcasts to (B, h, Q, T): bool, True where a key is visible, of which every query
            has one; or added to the scores.
        is_causal: query n sees the keys up to n; without `mask`.
        dropout: probability on the weights.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        (B, h, Q, d).
    """
    is_slow = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if not (is_slow and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, scale=scale
        )
    if is_causal:
        shape = query.shape[-2], keys.shape[-2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ keys.transpose(2, 3)
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    weights = F.dropout(scores.float().softmax(-1), dropout).to(values.dtype)
    return weights @ values


def rotary_tables(num_positions: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (positions, d) of rotary embeddings (half-split, as in Llama)."""
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last axis of `x` by the angles of its positions (tables broadcast)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


def shared_prompt_attention(
    query_RXhd: Tensor,
    prompt: tuple[Tensor, Tensor],
    visible_BT: Tensor,
    own: tuple[Tensor, Tensor],
) -> Tensor:
    """Attend from R rows to their request's prompt and to their own generated tokens.

    Rows are extra queries of their request: its keys and values are read in place, never expanded
    to B*W copies. One softmax spans both parts.

    Args:
        query_RXhd: (R, h, d) queries, rows of a request contiguous.
        prompt: keys and values (B, h, T, d).
        visible_BT: bool, which prompt keys exist.
        own: keys and values (R, h, t, d); t may be 0.

    Returns:
        (R, h*d).
    """
    keys_BhTd, values_BhTd = prompt
    num_requests, _, num_keys, width = keys_BhTd.shape
    query_RXhd = query_RXhd * width**-0.5  # the smallest of the tensors that could be scaled
    query_BhWd = query_RXhd.unflatten(0, (num_requests, -1)).transpose(1, 2)
    scores_BhWT = query_BhWd @ keys_BhTd.transpose(2, 3)
    scores_BhWT = scores_BhWT.masked_fill_(~visible_BT[:, None, None], -torch.inf)
    scores_Rht = (own[0] @ query_RXhd.unsqueeze(-1)).squeeze(-1)
    scores_BhWt = scores_Rht.unflatten(0, (num_requests, -1)).transpose(1, 2)
    scores = torch.cat([scores_BhWT, scores_BhWt], dim=-1)
    weights = scores.float().softmax(-1).to(scores.dtype)
    from_prompt_BhWd = weights[..., :num_keys] @ values_BhTd
    weights_Rh1t = weights[..., num_keys:].transpose(1, 2).flatten(0, 1).unsqueeze(2)
    from_own_Rhd = (weights_Rh1t @ own[1]).squeeze(2)
    return (from_prompt_BhWd.transpose(1, 2).flatten(0, 1) + from_own_Rhd).flatten(1)


class FeedForward(nn.Module):
    """Two projections without bias around an activation, gated or not.

    Args:
        d_model: width of the input and output.
        d_ff: inner width.
        activation: "relu", "gelu", "swiglu" (gated SiLU) or "gated-gelu" (T5 v1.1, tanh form).
        dropout: probability on the inner activations.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.is_gated = activation in ("swiglu", "gated-gelu")
        self.up = nn.Linear(d_model, d_ff * (2 if self.is_gated else 1), bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (..., D) -> (..., D)."""
        inner = self.up(x)
        # In place where nothing has to be kept for a gradient: half the memory traffic.
        in_place = not inner.requires_grad
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            if self.activation == "swiglu":
                gate = F.silu(gate, in_place)
            else:
                gate = F.gelu(gate, approximate="tanh")
            inner = gate.mul_(inner) if in_place else gate * inner
        elif self.activation == "relu":
            inner = F.relu(inner, in_place)
        else:
            inner = F.gelu(inner)
        return self.down(F.dropout(inner, self.dropout, self.training))


class RelativePositionBias(nn.Module):
    """T5's learned bias per head and bucket of the distance between query and key.

    Buckets are exact up to a quarter (bidirectional) or half (causal) of `num_buckets` and
    logarithmic above, up to `max_distance` (Raffel et al. 2020, section 2.1).
    """

    buckets: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        max_length: int,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        distances = torch.arange(-max_length + 1, max_length)
        buckets = relative_buckets(distances, num_buckets, max_distance, bidirectional)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Return the bias (1, h, length, length) of every query for every key."""
        middle = self.max_length - 1
        near = self.buckets[middle - length + 1 : middle + length]
        table_hX = F.embedding(near, self.weight).t()
        # Row q of a Toeplitz matrix is a window of the table: no length x length look-up.
        return table_hX.unfold(1, length, 1).flip(1).unsqueeze(0)


def relative_buckets(
    distances: Tensor, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """Return T5's bucket of each distance key - query."""
    if bidirectional:
        num_buckets //= 2
        start = (distances > 0).long() * num_buckets
        distances = distances.abs()
    else:
        start = torch.zeros_like(distances)
        distances = (-distances).clamp(min=0)
    exact = num_buckets // 2
    # float32 and truncation as in the reference: buckets at the edges must agree with it.
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return start + torch.where(distances < exact, distances, far)
