"""PretrainedCausal: any causal language model of Hugging Face as a backbone.

Tokens of a history: whatever the model's tokenizer puts first, the text `prefix`, then L tokens per
item; every item of a sequence is predicted in one causal pass. It refuses to know how a search
shares its prompt (`genrec.models.shared_prompts`) and which weights train
(`genrec.models.adapters`).

Shapes: B requests, T tokens, R live rows, L levels, P virtual tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from genrec.errors import UserError
from genrec.models.base import Batch, LossOutput
from genrec.models.language_models import Kind
from genrec.models.pretrained import PretrainedBackbone
from genrec.models.responses import Responses
from genrec.models.shared_prompts import (
    MASKED_ATTENTIONS,
    PretrainedState,
    extend_prompts,
    finished_logits,
    read_prompts,
)


class PretrainedCausal(PretrainedBackbone):
    """Causal language model over text and codes; see the module's text."""

    class Config(PretrainedBackbone.Config):
        """See `PretrainedBackbone.Config`."""

        name: Literal["pretrained_causal"] = "pretrained_causal"
        """Name in the registry."""
        predict_first: bool = True
        """Train on a sequence's first item too; this is what an empty history answers with."""

    config: Config
    kind: ClassVar[Kind] = "causal"
    training_unit: ClassVar[Literal["target", "sequence"]] = "sequence"

    @property
    def _body(self) -> Any:
        return self.base.base_model

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        Sequences longer than `max_history + 1` keep their last items. Neither the prefix nor
        virtual tokens are predicted.
        """
        batch = batch.last(self.config.max_history + 1)
        sequence_BH, weights = batch.history_BH, batch.weights
        if not sequence_BH.shape[1]:
            sequence_BH, weights = F.pad(sequence_BH, (0, 1), value=-1), None
        tokens_BT, _ = self.framed(sequence_BH, after=False)
        vectors = self.with_prompt(self.embed(tokens_BT[:, :-1]))
        cache = self.virtual_cache(len(vectors))
        hidden_BTD = self._body(
            inputs_embeds=vectors, past_key_values=cache, use_cache=cache is not None
        )[0]
        hidden_BTD = hidden_BTD[:, self.num_prompt_vectors + len(self.before) - 1 :]
        valid_BH = sequence_BH >= 0
        if not self.config.predict_first:
            valid_BH[:, :1] = False
        return self.items_nll(
            hidden_BTD.reshape(-1, self.num_levels, hidden_BTD.shape[-1]),
            sequence_BH.reshape(-1),
            valid_BH.reshape(-1),
            None if weights is None else weights.reshape(-1),
        )

    def begin(self, batch: Batch) -> tuple[Tensor, PretrainedState]:
        """Read the histories once per request; see `Backbone.begin`."""
        history_BH = self.read_history(batch.history_BH)
        hidden_BD, state = self.read_tokens(*self.framed(history_BH, after=False))
        return self.level_logits(hidden_BD, 0), state

    def read_tokens(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, PretrainedState]:
        """Read any prompts once; see `PretrainedBackbone.read_tokens`."""
        return read_prompts(
            self._body,
            {"inputs_embeds": self.with_prompt(self.embed(tokens_BT))},
            lengths_B + self.num_prompt_vectors,
            self.virtual_cache(len(tokens_BT)),
        )

    def extend_tokens(
        self, tokens_R: Tensor, state: PretrainedState, parents_R: Tensor
    ) -> tuple[Tensor, PretrainedState]:
        """Append one token per row; see `PretrainedBackbone.extend_tokens`."""
        hidden, states = self._extend([tokens_R], state, [parents_R])
        return hidden[0], states[0]

    def _response_states(self, batch: Responses) -> Tensor:
        vectors = self.with_prompt(self.embed(batch.tokens_BT[:, :-1]))
        cache = self.virtual_cache(len(vectors))
        hidden_BTD = self._body(
            inputs_embeds=vectors, past_key_values=cache, use_cache=cache is not None
        )[0]
        states: Tensor = hidden_BTD[batch.rows_M, batch.places_M + self.num_prompt_vectors - 1]
        return states

    def step(
        self, codes_R: Tensor, state: PretrainedState, parents_R: Tensor
    ) -> tuple[Tensor, PretrainedState]:
        """Append one code per row; see `Backbone.step`."""
        logits, states = self.step_levels([codes_R], state, [parents_R])
        return logits[0], states[0]

    def step_levels(
        self, codes: Sequence[Tensor], state: PretrainedState, parents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[PretrainedState]]:
        """Score several levels of a given tree of prefixes in one pass; see `PretrainedDecoder`."""
        tokens = [self.code_tokens(rows, n) for n, rows in enumerate(codes, state.level)]
        hidden, states = self._extend(tokens, state, parents)
        return [self._answer(h, s.level) for h, s in zip(hidden, states, strict=True)], states

    def _extend(
        self, tokens: Sequence[Tensor], state: PretrainedState, parents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[PretrainedState]]:
        return extend_prompts(
            self._body,
            lambda tokens_BQ: {"inputs_embeds": self.embed(tokens_BQ)},
            tokens,
            state,
            parents,
            self.base.dtype,
        )

    def _answer(self, hidden_RD: Tensor, level: int) -> Tensor:
        if level >= self.num_levels:  # nothing is left to choose
            return hidden_RD.new_empty((len(hidden_RD), 0), dtype=torch.float32)
        return self.level_logits(hidden_RD, level)

    def _read_virtual(self, vectors_1PD: Tensor) -> DynamicCache:
        cache = DynamicCache()
        self._body(inputs_embeds=vectors_1PD, past_key_values=cache, use_cache=True)
        return cache

    @torch.no_grad()
    def _check_base(self) -> None:
        """Ask two text tokens here and of the model as it is, and compare."""
        super()._check_base()
        name = type(self.base).__name__
        attention = self._text_config._attn_implementation
        if attention not in MASKED_ATTENTIONS or self._body is self.base:
            raise UserError(
                f"model.source: {self.config.source!r} holds a {name} (attention {attention!r}), "
                "expected a causal language model whose attention takes masks ('sdpa' or 'eager')."
            )
        rows: Any = self.base.get_input_embeddings()
        tokens = torch.arange(2, device=rows.weight.device)[None] % self.first_token
        theirs = self.base(input_ids=tokens).logits.float()
        hidden = self._body(inputs_embeds=rows(tokens))[0]
        ours = finished_logits(self._text_config, self._head(hidden))
        error, size = (ours - theirs).abs().max(), theirs.abs().max().clamp(min=1.0)
        if not bool(error <= 0.05 * size):
            raise UserError(
                f"model.source: a {name} answers otherwise here: logits differ by "
                f"{float(error):.3g}. Expected a model whose logits are its head's, from vectors "
                "as from tokens. It needs a backbone of its own."
            )
