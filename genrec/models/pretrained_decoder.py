"""How does a causal language model from Hugging Face answer the constrained search, unmodified?

`PretrainedDecoder` gives any `AutoModelForCausalLM` the `begin` and `step` of a search; beams share
their prompt as `genrec.models.shared_prompts` says. It refuses to know how prompts are worded and
how the model is trained; the model's `generation_config` is never read.

Shapes: B requests, T prompt tokens, W rows per request, R = B*W, Q new tokens of a request,
X tokens behind the prompt, L levels, K codes of a level, V vocabulary, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.errors import UserError
from genrec.item_index import level_offsets
from genrec.models.shared_prompts import (
    MASKED_ATTENTIONS,
    PretrainedState,
    extend_prompts,
    finished_logits,
    longest_input,
    read_prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PADDING = -1


def add_code_tokens(
    model: PreTrainedModel, codebook_sizes: Sequence[int], shared_vocabulary: bool = False
) -> list[Tensor]:
    """Append the codes to the model's vocabulary and return their tokens, one tensor per level.

    The new rows of the embedding start as transformers draws them (around the mean of the old
    ones); they mean nothing before training.
    """
    weight: Any = model.get_input_embeddings().weight
    first = int(weight.shape[0])
    offsets = level_offsets(codebook_sizes, shared_vocabulary)
    total = int(max(o + s for o, s in zip(offsets, codebook_sizes, strict=True)))
    model.resize_token_embeddings(first + total)
    return [
        torch.arange(first + int(offset), first + int(offset) + size)
        for offset, size in zip(offsets, codebook_sizes, strict=True)
    ]


class PretrainedDecoder:
    """A search's view on a causal language model; see the module's text.

    A batch is a sequence of histories for `prompt`, or ready prompts: int64 tokens (B, T),
    right-padded with -1 (nothing is then read back from the device).

    Args:
        model: any `AutoModelForCausalLM` with `attn_implementation` "sdpa" or "eager", in
            evaluation mode. LoRA adapters of peft may be on it.
        prompt: tokens of the prompt of one history, at least one: models have no start token that
            could be taken for granted.
        code_tokens: per level, the model's token of each code (see `add_code_tokens`). Any tokens:
            their rows of the output head are the only ones that are multiplied.
        check: compare the first answers with the model's own, on prompts of two tokens.

    Raises:
        UserError: a model that cannot be asked in this way, or tokens outside its vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Callable[[Any], Sequence[int]],
        code_tokens: Sequence[Tensor | Sequence[int]],
        *,
        check: bool = True,
    ) -> None:
        unwrap = getattr(model, "get_base_model", None)  # peft
        self.model: Any = model if unwrap is None else unwrap()
        self.prompt = prompt
        self.spans_vocabulary = False
        self.config = self.model.config.get_text_config()
        self.head = self.model.get_output_embeddings()
        self.backbone = self.model.base_model
        self._check_model()
        self.code_tokens = [
            torch.as_tensor(tokens, dtype=torch.int64, device=self.device) for tokens in code_tokens
        ]
        self._check_tokens()
        self._rows = [_slice_or_index(tokens) for tokens in self.code_tokens]
        if check:
            self._check_answers()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.code_tokens)

    def over_vocabulary(self) -> PretrainedDecoder:
        """Return a view whose logits are log-probabilities over all tokens of the model."""
        view = copy.copy(self)
        view.spans_vocabulary = True
        return view

    def begin(self, batch: Sequence[Any] | Tensor) -> tuple[Tensor, PretrainedState]:
        """Read the prompts once.

        Returns:
            float32 logits of level 0, (B, K_0), and the state for `step`.

        Raises:
            UserError: a prompt that is empty, or too long for the model.
        """
        prompt_BT = batch if isinstance(batch, Tensor) else self._prompts(batch)
        prompt_BT = prompt_BT.to(self.device)
        self._check_length(prompt_BT.shape[1])
        inputs = {"input_ids": prompt_BT.clamp(min=0)}
        hidden_BD, state = read_prompts(self.backbone, inputs, (prompt_BT != PADDING).sum(1))
        return self._logits(hidden_BD, 0), state

    def step(
        self, codes_R: Tensor, state: PretrainedState, parents_R: Tensor
    ) -> tuple[Tensor, PretrainedState]:
        """Append one code per row and score the next level, as `Backbone.step` does."""
        logits, states = self.step_levels([codes_R], state, [parents_R])
        return logits[0], states[0]

    def step_levels(
        self, codes: Sequence[Tensor], state: PretrainedState, parents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[PretrainedState]]:
        """Score several levels of a given tree of prefixes in one pass (tree attention).

        Args:
            codes: per level, the codes of its rows (R_0,), (R_1,), ...; rows of a request
                contiguous, as many for each request.
            state: what the previous call returned.
            parents: per level, the row that each row extends: of `state` for the first, of the
                level before for the others.

        Returns:
            per level, float32 logits (R_i, K) of what follows, and a state to go on from.
        """
        tokens = [self.code_tokens[n][rows] for n, rows in enumerate(codes, state.level)]
        hidden, states = extend_prompts(
            self.backbone,
            lambda tokens_BQ: {"input_ids": tokens_BQ},
            tokens,
            state,
            parents,
            self.head.weight.dtype,
        )
        logits = [self._logits(h, s.level) for h, s in zip(hidden, states, strict=True)]
        return logits, states

    def _logits(self, hidden_RD: Tensor, level: int) -> Tensor:
        if level >= self.num_levels:  # nothing is left to choose
            return hidden_RD.new_empty((len(hidden_RD), 0), dtype=torch.float32)
        rows = self._rows[level]
        bias = getattr(self.head, "bias", None)
        logits = finished_logits(
            self.config,
            F.linear(hidden_RD, self.head.weight[rows], None if bias is None else bias[rows]),
        )
        if self.spans_vocabulary:
            every = finished_logits(self.config, self.head(hidden_RD))
            logits = logits - every.logsumexp(-1, keepdim=True)
        return logits

    def _prompts(self, histories: Sequence[Any]) -> Tensor:
        prompts = [list(self.prompt(history)) for history in histories]
        for request, tokens in enumerate(prompts):
            if not tokens:
                raise UserError(
                    f"prompt: got no tokens for request {request}, expected at least 1: a causal "
                    "model predicts from the last token of its prompt. Begin prompts with a token "
                    "of your choice, e.g. the tokenizer's BOS or EOS."
                )
        prompt_BT = torch.full((len(prompts), max(map(len, prompts), default=1)), PADDING)
        for row, tokens in zip(prompt_BT, prompts, strict=True):
            row[: len(tokens)] = torch.as_tensor(tokens)
        return prompt_BT

    def _check_length(self, num_tokens: int) -> None:
        limit = longest_input(self.config)
        if limit is not None and num_tokens + self.num_levels - 1 > limit:
            raise UserError(
                f"prompt: got {num_tokens} tokens and {self.num_levels} levels for a "
                f"{type(self.model).__name__} that reads {limit} positions (its longest input or "
                f"its attention window). Shorten prompts to {limit - self.num_levels + 1} tokens."
            )

    def _check_model(self) -> None:
        name = type(self.model).__name__
        attention = self.config._attn_implementation
        if attention not in MASKED_ATTENTIONS:
            raise UserError(
                f"PretrainedDecoder: got a {name} with attn_implementation={attention!r}, expected "
                "'sdpa' or 'eager': beams side by side need a mask of their own. Load it with "
                "from_pretrained(..., attn_implementation='sdpa')."
            )
        if self.head is None or self.backbone is self.model:
            raise UserError(
                f"PretrainedDecoder: got a {name}, expected a causal language model with an output "
                "head. Load it with AutoModelForCausalLM."
            )

    def _check_tokens(self) -> None:
        size = self.head.weight.shape[0]
        for level, tokens_K in enumerate(self.code_tokens):
            found = tokens_K.tolist()
            if not found or min(found) < 0 or max(found) >= size or len(set(found)) < len(found):
                raise UserError(
                    f"code_tokens[{level}]: got {len(found)} tokens, from {min(found, default=0)} "
                    f"to {max(found, default=0)}; expected different ones of the model's {size}. "
                    "Resize its embeddings first (add_code_tokens does)."
                )

    @torch.no_grad()
    def _check_answers(self) -> None:
        """Ask two short prompts here and of the model as it is, and compare."""
        first, codes = self.code_tokens[0], torch.arange(2, device=self.device)
        codes = codes.clamp(max=len(first) - 1)
        prompts = torch.stack([first[codes], first[codes].flip(0)])
        prompts[1, 1] = PADDING
        found, state = self.begin(prompts)
        parts = [(found[:1], prompts[:1], 0), (found[1:], prompts[1:, :1], 0)]
        if self.num_levels > 1:
            found, _ = self.step(
                codes.repeat(2), state, torch.tensor([0, 0, 1, 1], device=self.device)
            )
            row = torch.cat([prompts[1:, :1], first[codes[1:]][None]], 1)
            parts.append((found[3:], row, 1))
        for ours, tokens, level in parts:
            rows = self._rows[level]
            theirs = self.model(input_ids=tokens).logits[:, -1].float()[:, rows]
            error, size = (ours - theirs).abs().max(), theirs.abs().max().clamp(min=1.0)
            if not bool(error <= 0.05 * size):
                raise UserError(
                    f"PretrainedDecoder: a {type(self.model).__name__} answers otherwise here: "
                    f"logits of level {level} differ by {float(error):.3g}. Expected a model whose "
                    "attention follows mask and positions and whose logits are its head's. It "
                    "needs an adapter of its own; check=False does not make it right."
                )


def _slice_or_index(tokens_K: Tensor) -> slice | Tensor:
    """Return neighbouring rows as a slice, which copies nothing."""
    first, size = int(tokens_K[0]), len(tokens_K)
    if tokens_K.tolist() == list(range(first, first + size)):
        return slice(first, first + size)
    return tokens_K
