"""PretrainedSeq2Seq: any encoder-decoder language model of Hugging Face as a backbone.

Encoder input: what the model's tokenizer puts first, the text `prefix`, L tokens per item, what the
tokenizer puts last. Decoder input: the model's own decoder start token, then the target's codes. In
a search the encoder runs once per request and its keys and values exist once per request; only the
decoder's own, a few tokens long, follow the beams. It refuses to know which weights train
(`genrec.models.adapters`).

Shapes: B requests, T encoder tokens, W rows per request, R = B*W, L levels, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from genrec.errors import UserError
from genrec.models.base import Batch, LossOutput
from genrec.models.language_models import Kind
from genrec.models.pretrained import PretrainedBackbone
from genrec.models.responses import Responses


@dataclass(frozen=True)
class PretrainedSeq2SeqState:
    """What a search has read and chosen so far.

    Args:
        level: the level that was scored last.
        encoded_BTD: the encoder's output.
        visible_BT: which of its positions exist.
        cache: the decoder's own keys and values, one per row; the cross-attention's, one per
            request.
    """

    level: int
    encoded_BTD: Tensor
    visible_BT: Tensor
    cache: EncoderDecoderCache


class PretrainedSeq2Seq(PretrainedBackbone):
    """Encoder-decoder language model over text and codes; see the module's text."""

    class Config(PretrainedBackbone.Config):
        """See `PretrainedBackbone.Config`."""

        name: Literal["pretrained_seq2seq"] = "pretrained_seq2seq"
        """Name in the registry."""

    config: Config
    kind: ClassVar[Kind] = "seq2seq"
    _scale: float
    _shares_keys: bool
    training_unit: ClassVar[Literal["target", "sequence"]] = "target"

    def loss(self, batch: Batch) -> LossOutput:
        """Predict `target_B` from the histories; targets of -1 are not counted.

        Raises:
            UserError: the batch has no targets.
        """
        if batch.target_B is None:
            raise UserError(
                "PretrainedSeq2Seq.loss: got a batch without target_B, expected one target row "
                "per history. Pass pad_histories(..., targets=rows)."
            )
        encoded_BTD, visible_BT = self._encode(batch.history_BH)
        tokens_BL = self.tokens_NL[batch.target_B.clamp(min=0)]
        hidden_BLD = self._predict(tokens_BL, encoded_BTD, visible_BT)
        valid_B = batch.target_B >= 0
        return self.items_nll(hidden_BLD, batch.target_B, valid_B, batch.weights)

    def _response_states(self, batch: Responses) -> Tensor:
        encoded_BTD, visible_BT = self._encode_tokens(batch.tokens_BT, batch.lengths_B)
        hidden_BQD = self._predict(batch.response_BQ, encoded_BTD, visible_BT)
        return hidden_BQD[batch.rows_M, batch.places_M]

    def _predict(self, tokens_BQ: Tensor, encoded_BTD: Tensor, visible_BT: Tensor) -> Tensor:
        """Return what predicts each of these tokens, (B, Q, D)."""
        tokens_BQ = F.pad(tokens_BQ[:, :-1], (1, 0), value=self._start_token)
        own = self.virtual_cache(len(tokens_BQ))
        cache = None if own is None else EncoderDecoderCache(own, DynamicCache())
        return self._decode(tokens_BQ, encoded_BTD, visible_BT, cache)

    def begin(self, batch: Batch) -> tuple[Tensor, PretrainedSeq2SeqState]:
        """Encode once per request, decode the start token; see `Backbone.begin`."""
        history_BH = self.read_history(batch.history_BH)
        hidden_BD, state = self.read_tokens(*self.framed(history_BH, after=True))
        return self.level_logits(hidden_BD, 0), state

    def read_tokens(
        self, tokens_BT: Tensor, lengths_B: Tensor
    ) -> tuple[Tensor, PretrainedSeq2SeqState]:
        """Read any prompts once; see `PretrainedBackbone.read_tokens`."""
        encoded_BTD, visible_BT = self._encode_tokens(tokens_BT, lengths_B)
        own = self.virtual_cache(len(tokens_BT)) or DynamicCache()
        state = PretrainedSeq2SeqState(
            -1, encoded_BTD, visible_BT, EncoderDecoderCache(own, DynamicCache())
        )
        return self._next(lengths_B.new_full((len(tokens_BT),), self._start_token), state)

    def step(
        self, codes_R: Tensor, state: PretrainedSeq2SeqState, parents_R: Tensor
    ) -> tuple[Tensor, PretrainedSeq2SeqState]:
        """Decode one code per row; see `Backbone.step`."""
        tokens_R = self.code_tokens(codes_R, state.level)
        hidden_RD, state = self.extend_tokens(tokens_R, state, parents_R)
        if state.level >= self.num_levels:  # nothing is left to choose
            return hidden_RD.new_empty((len(hidden_RD), 0), dtype=torch.float32), state
        return self.level_logits(hidden_RD, state.level), state

    def extend_tokens(
        self, tokens_R: Tensor, state: PretrainedSeq2SeqState, parents_R: Tensor
    ) -> tuple[Tensor, PretrainedSeq2SeqState]:
        """Append one token per row; see `PretrainedBackbone.extend_tokens`."""
        own: Any = DynamicCache()
        past: Any = state.cache.self_attention_cache
        for number, layer in enumerate(past.layers):
            own.update(layer.keys[parents_R], layer.values[parents_R], number)
        cross: Any = state.cache.cross_attention_cache
        if not self._shares_keys and len(cross.layers[0].keys) != len(tokens_R):
            cross = _repeated(cross, len(tokens_R), len(state.visible_BT))
        forked = PretrainedSeq2SeqState(
            state.level, state.encoded_BTD, state.visible_BT, EncoderDecoderCache(own, cross)
        )
        return self._next(tokens_R, forked)

    def _next(
        self, tokens_R: Tensor, state: PretrainedSeq2SeqState
    ) -> tuple[Tensor, PretrainedSeq2SeqState]:
        level = state.level + 1
        hidden_R1D = self._decode(
            tokens_R[:, None], state.encoded_BTD, state.visible_BT, state.cache
        )
        state = PretrainedSeq2SeqState(level, state.encoded_BTD, state.visible_BT, state.cache)
        return hidden_R1D[:, 0], state

    def _encode(self, history_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's output (B, T, D), and which positions exist, bool (B, T)."""
        history_BH = self.read_history(history_BH)
        return self._encode_tokens(*self.framed(history_BH, after=True))

    def _encode_tokens(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.with_prompt(self.embed(tokens_BT))
        lengths_B = lengths_B + self.num_prompt_vectors
        places_T = torch.arange(vectors.shape[1], device=vectors.device)
        visible_BT = places_T < lengths_B[:, None]
        encoder: Any = self.base.get_encoder()
        encoded = encoder(inputs_embeds=vectors, attention_mask=visible_BT.long())[0]
        return encoded, visible_BT

    def _decode(
        self,
        tokens_RQ: Tensor,
        encoded_BTD: Tensor,
        visible_BT: Tensor,
        cache: EncoderDecoderCache | None,
    ) -> Tensor:
        """Return what the head reads, (R, Q, D)."""
        decoder: Any = self.base.get_decoder()
        visible_B11T = visible_BT[:, None, None]
        if not self._shares_keys:
            repeat = len(tokens_RQ) // len(visible_BT)
            encoded_BTD = encoded_BTD.repeat_interleave(repeat, 0)
            visible = visible_B11T.repeat_interleave(repeat, 0)
            visible_B11T = torch.zeros_like(visible, dtype=encoded_BTD.dtype).masked_fill(
                ~visible, torch.finfo(encoded_BTD.dtype).min
            )
        hidden_RQD = decoder(
            inputs_embeds=self.embed(tokens_RQ),
            encoder_hidden_states=encoded_BTD,
            encoder_attention_mask=visible_B11T,
            past_key_values=cache,
            use_cache=cache is not None,
        )[0]
        return hidden_RQD * self._scale

    @property
    def _start_token(self) -> int:
        for config in (self.base.config, self.base.generation_config):
            token = getattr(config, "decoder_start_token_id", None)
            if token is not None:
                return int(token)
        raise UserError(
            f"model.source: {self.config.source!r} does not say what its decoder starts with, "
            "expected decoder_start_token_id in its config.json. Add it there."
        )

    def _read_virtual(self, vectors_1PD: Tensor) -> DynamicCache:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoder: Any = self.base.get_encoder()
        decoder: Any = self.base.get_decoder()
        decoder(
            inputs_embeds=vectors_1PD,
            encoder_hidden_states=encoder(inputs_embeds=vectors_1PD)[0],
            past_key_values=cache,
            use_cache=True,
        )
        own: Any = cache.self_attention_cache
        return own

    @torch.no_grad()
    def _check_base(self) -> None:
        """Learn how the base scales what its head reads, and compare with its own logits."""
        super()._check_base()
        rows: Any = self.base.get_input_embeddings()
        tokens = torch.arange(2, device=rows.weight.device)[None] % self.first_token
        start = torch.full_like(tokens[:, :1], self._start_token)
        read: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            theirs = self.base(input_ids=tokens, decoder_input_ids=start).logits.float()
        finally:
            hook.remove()
        self._scale = 1.0
        visible_BT = torch.ones_like(tokens, dtype=torch.bool)
        encoder: Any = self.base.get_encoder()
        encoded = encoder(inputs_embeds=rows(tokens), attention_mask=visible_BT.long())[0]
        decoder: Any = self.base.get_decoder()
        hidden = decoder(inputs_embeds=rows(start), encoder_hidden_states=encoded)[0]
        # A constant: T5 divides by the root of its width where it is tied.
        self._scale = float((read[0].float() * hidden).sum() / (hidden.float() ** 2).sum())
        self._shares_keys = self._can_share_keys(rows(start), encoded)
        ours = self._head(hidden * self._scale).float()
        error, size = (ours - theirs).abs().max(), theirs.abs().max().clamp(min=1.0)
        if not bool(error <= 0.05 * size):
            raise UserError(
                f"model.source: a {type(self.base).__name__} answers otherwise here: logits "
                f"differ by {float(error):.3g}. Expected a model whose logits are its head's, from "
                "vectors as from tokens. It needs a backbone of its own."
            )

    def _can_share_keys(self, start_11D: Tensor, encoded_1TD: Tensor) -> bool:
        """Try whether rows of a request can read its one copy of the encoder's keys and values."""
        decoder: Any = self.base.get_decoder()
        expected = decoder(
            inputs_embeds=start_11D.repeat(1, 2, 1), encoder_hidden_states=encoded_1TD
        )[0][:, -1:]
        two_2TD = encoded_1TD.repeat(2, 1, 1)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        asked = {
            "encoder_hidden_states": two_2TD,
            "encoder_attention_mask": torch.ones_like(
                two_2TD[:, None, None, :, 0], dtype=torch.bool
            ),
            "use_cache": True,
        }
        try:
            decoder(inputs_embeds=start_11D.repeat(2, 1, 1), past_key_values=cache, **asked)
            past: Any = cache.self_attention_cache
            own = _repeated(past, 4, 2)
            both = EncoderDecoderCache(own, cache.cross_attention_cache)
            found = decoder(inputs_embeds=start_11D.repeat(4, 1, 1), past_key_values=both, **asked)[
                0
            ]
        except (RuntimeError, ValueError):  # its attention does not go through the interface
            return False
        return torch.allclose(found, expected.expand_as(found), atol=0.05, rtol=0.05)


def _repeated(cross: Any, num_rows: int, num_requests: int) -> DynamicCache:
    """Return keys and values for every row, for models that cannot share a request's copy."""
    repeated, before = DynamicCache(), len(cross.layers[0].keys) // num_requests
    for number, layer in enumerate(cross.layers):
        keys, values = (
            part[::before].repeat_interleave(num_rows // num_requests, 0)
            for part in (layer.keys, layer.values)
        )
        repeated.update(keys, values, number)
    return repeated
