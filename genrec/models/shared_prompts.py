"""How do the beams of a search share their prompt in a causal language model from Hugging Face?

The prompt is read once per request (`read_prompts`), and its keys and values are never copied per
beam: all beams of a request stand side by side in one row behind the prompt, at equal positions,
and a mask shows each of them the prompt and its own ancestors (`extend_prompts`). It refuses to
know what the tokens mean, where a head is and which level has which codes.

Shapes: B requests, T prompt tokens, W rows per request, R = B*W, Q new tokens of a request,
X tokens behind the prompt, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

MASKED_ATTENTIONS = ("sdpa", "eager")  # those that take a mask of any form


@dataclass(frozen=True)
class PretrainedState:
    """What a search has read and chosen so far.

    Args:
        level: the level that was scored last.
        lengths_B: prompt tokens of each request.
        num_prompt: T, with padding.
        cache: keys and values of T + X tokens per request.
        own_BWX: bool, which of the X tokens behind the prompt are the row's own.
    """

    level: int
    lengths_B: Tensor
    num_prompt: int
    cache: DynamicCache
    own_BWX: Tensor


def read_prompts(
    model: Any, inputs: dict[str, Tensor], lengths_B: Tensor, cache: DynamicCache | None = None
) -> tuple[Tensor, PretrainedState]:
    """Read right-padded prompts.

    No mask: padding stands right of all that is read, so causality hides it, and the flash kernels
    stay usable.

    Args:
        model: the body of a causal model (without its head).
        inputs: `input_ids` (B, T) or `inputs_embeds` (B, T, D); padding may be any token.
        lengths_B: int64, tokens of each prompt, without what `cache` holds.
        cache: keys and values that all prompts begin with, of no request in particular.

    Returns:
        hidden state of the last token of each prompt (B, D), and the state to go on from.
    """
    cache = DynamicCache() if cache is None else cache
    before = cache.get_seq_length()
    hidden_BTD = model(**inputs, past_key_values=cache, use_cache=True)[0]
    last_B11 = (lengths_B - 1).clamp(min=0)[:, None, None]
    hidden_BD = hidden_BTD.gather(1, last_B11.expand(-1, 1, hidden_BTD.shape[-1]))[:, 0]
    num_requests, num_prompt = hidden_BTD.shape[:2]
    none = lengths_B.new_empty((num_requests, 1, 0), dtype=torch.bool)
    return hidden_BD, PretrainedState(0, lengths_B + before, before + num_prompt, cache, none)


def extend_prompts(
    model: Any,
    embed: Callable[[Tensor], dict[str, Tensor]],
    tokens: Sequence[Tensor],
    state: PretrainedState,
    parents: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[PretrainedState]]:
    """Read several levels of a given tree of tokens in one pass (tree attention).

    Args:
        model: the body of a causal model.
        embed: gives its inputs for tokens (B, Q).
        tokens: per level, the tokens of its rows (R_0,), (R_1,), ...; rows of a request
            contiguous, as many for each request.
        state: what the previous call returned.
        parents: per level, the row that each row extends: of `state` for the first, of the level
            before for the others.
        dtype: of the model's attention, for masks that are added.

    Returns:
        per level, the hidden states of its rows (R_i, D), and a state to go on from.
    """
    num_requests = len(state.lengths_B)
    masks = _tree(state, parents)
    widths = [mask_BWX.shape[1] for mask_BWX in masks]
    places = state.lengths_B.device
    depths_Q = torch.cat(
        [torch.full((w,), n, device=places) for n, w in enumerate(widths, state.level)]
    )
    cache = _fork(state.cache)
    tokens_BQ = torch.cat([tokens_R.view(num_requests, -1) for tokens_R in tokens], 1)
    hidden_BQD = model(
        **embed(tokens_BQ),
        attention_mask=_attention_mask(model.config, state, torch.cat(masks, 1), dtype),
        position_ids=state.lengths_B[:, None] + depths_Q,
        past_key_values=cache,
        use_cache=True,
    )[0]
    states = [
        PretrainedState(state.level + 1 + done, state.lengths_B, state.num_prompt, cache, mask)
        for done, mask in enumerate(masks)
    ]
    return [hidden.flatten(0, 1) for hidden in hidden_BQD.split(widths, 1)], states


def _tree(state: PretrainedState, parents: Sequence[Tensor]) -> list[Tensor]:
    """Return, per level, which tokens behind the prompt each row sees."""
    num_requests, device = len(state.lengths_B), state.lengths_B.device
    first_B1 = torch.arange(num_requests, device=device)[:, None]
    masks, sees_BWX = [], state.own_BWX
    for parents_R in parents:
        local_BW = parents_R.view(num_requests, -1) - first_B1 * sees_BWX.shape[1]
        places_BWX = local_BW[..., None].expand(-1, -1, sees_BWX.shape[2])
        width = local_BW.shape[1]
        itself = torch.eye(width, dtype=torch.bool, device=device).expand(num_requests, -1, -1)
        sees_BWX = torch.cat([sees_BWX.gather(1, places_BWX), itself], 2)
        masks.append(sees_BWX)
    total = sees_BWX.shape[2]
    return [F.pad(mask, (0, total - mask.shape[2])) for mask in masks]


def _attention_mask(
    config: Any, state: PretrainedState, own_BQX: Tensor, dtype: torch.dtype
) -> Tensor:
    places_T = torch.arange(state.num_prompt, device=own_BQX.device)
    prompt_B1T = (places_T < state.lengths_B[:, None])[:, None]
    prompt_BQT = prompt_B1T.expand(-1, own_BQX.shape[1], -1)
    visible = torch.cat([prompt_BQT, own_BQX], 2)[:, None]
    if config._attn_implementation == "sdpa":
        return visible
    hidden = torch.full_like(visible, torch.finfo(dtype).min, dtype=dtype)
    return hidden.masked_fill(visible, 0.0)


def finished_logits(config: Any, logits: Tensor) -> Tensor:
    """Do what some models do to logits behind their head (Granite, Cohere, Gemma 2); float32."""
    logits = logits.float()
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def longest_input(config: Any) -> int | None:
    """Return how many positions a model reads (its longest input or its attention window)."""
    limits = [getattr(config, "max_position_embeddings", None)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or "sliding_attention" in kinds:
        limits.append(getattr(config, "sliding_window", None))
    if kinds is None or "chunked_attention" in kinds:
        limits.append(getattr(config, "attention_chunk_size", None))
    return min((limit for limit in limits if limit is not None), default=None)


def _fork(cache: DynamicCache) -> DynamicCache:
    """Return a cache that grows on its own; keys and values so far are shared."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
