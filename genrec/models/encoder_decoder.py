"""EncoderDecoder: a T5 from scratch over semantic IDs (the TIGER family; Rajput et al. 2023).

The mathematics is T5's (RMSNorm before each block, relative position bias shared by the layers, no
scaling of the scores), so `to_hugging_face` is exact. The module is our own because a search needs
what the library's does not give: the encoder and the cross-attention's keys and values once per
request, beams as queries of their request, logits of one level only.

Encoder input: START, then L tokens per item; START alone is the empty history. Decoder input: PAD
(T5's convention), then the target's codes.

Shapes: B requests, H history items, L levels, T = 1 + H*L tokens, W rows per request, R = B*W,
h heads, d width of a head, X = h*d, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import UserError
from genrec.models.base import PAD, Batch, LossOutput
from genrec.models.layers import FeedForward, RelativePositionBias, module_list
from genrec.models.scratch import ScratchBackbone
from genrec.models.t5 import (
    NORM_EPS,
    Attention,
    DecoderLayer,
    EncoderLayer,
    KeysValues,
    hugging_face_weights,
)

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration


@dataclass(frozen=True)
class EncoderDecoderState:
    """What a search has read and chosen so far.

    Args:
        level: the level that was scored last.
        visible_B11T: which encoder positions exist.
        cross: per layer, keys and values (B, h, T, d); one copy per request.
        own: per layer, keys and values (R, h, level + 1, d) of PAD and the codes chosen so far.
    """

    level: int
    visible_B11T: Tensor
    cross: tuple[KeysValues, ...]
    own: tuple[KeysValues, ...]


class EncoderDecoder(ScratchBackbone):
    """T5-style encoder-decoder over semantic IDs; see the module's text."""

    class Config(ScratchBackbone.Config):
        """Defaults are TIGER's (Rajput et al. 2023, section 4)."""

        name: Literal["encoder_decoder"] = "encoder_decoder"
        max_history: int = Field(default=20, ge=1)
        """Items of the history that the model sees; older ones are dropped (TIGER: 20)."""
        num_heads: int = Field(default=6, ge=1)
        """Attention heads (TIGER: 6)."""
        d_kv: int = Field(default=64, ge=1)
        """Width of a head; independent of d_model as in T5 (TIGER: 64)."""
        d_ff: int = Field(default=1024, ge=1)
        """Inner width of the feed-forward blocks (TIGER: 1024)."""
        activation: Literal["relu", "gated-gelu"] = "relu"
        """Feed-forward activation: T5's, or T5 v1.1's."""
        num_buckets: int = Field(default=32, ge=4)
        """Buckets of the relative position bias (T5: 32)."""
        max_distance: int = Field(default=128, ge=16)
        """Distance in tokens from which all share one bucket (T5: 128)."""
        recency_embeddings: bool = False
        """Add a learned embedding of the item's position, counted from the last item."""

    config: Config
    training_unit: ClassVar[Literal["target", "sequence"]] = "target"
    recency: nn.Embedding
    causal_LL: Tensor

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        self.encoder = module_list(EncoderLayer(config) for _ in range(config.num_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.encoder_bias = self._bias(1 + config.max_history * self.num_levels, True)
        self.decoder = module_list(DecoderLayer(config) for _ in range(config.num_layers))
        self.decoder_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.decoder_bias = self._bias(self.num_levels, False)
        if config.recency_embeddings:
            self.recency = nn.Embedding(config.max_history, config.d_model)
        causal = torch.full((self.num_levels, self.num_levels), -torch.inf).triu(1)
        self.register_buffer("causal_LL", causal, persistent=False)
        self._init_weights()

    def _bias(self, max_length: int, bidirectional: bool) -> RelativePositionBias:
        return RelativePositionBias(
            self.config.num_heads,
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
            max_length=max_length,
            bidirectional=bidirectional,
        )

    @torch.no_grad()
    def _init_weights(self) -> None:
        """T5's initial standard deviations: scores are not scaled, so queries start small."""
        config = self.config
        inner = config.num_heads * config.d_kv
        nn.init.normal_(self.embedding.weight, std=1.0)
        if not config.tie_embeddings:
            nn.init.normal_(self.output.weight, std=config.d_model**-0.5)
        if config.recency_embeddings:
            nn.init.normal_(self.recency.weight, std=1.0)
        for bias in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(bias.weight, std=config.d_model**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.projection.weight, std=config.d_model**-0.5)
                query = module.query.weight if module.query else module.projection.weight[:inner]
                nn.init.normal_(query, std=(config.d_model * config.d_kv) ** -0.5)
                nn.init.normal_(module.out.weight, std=inner**-0.5)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.up.weight, std=config.d_model**-0.5)
                nn.init.normal_(module.down.weight, std=config.d_ff**-0.5)

    def loss(self, batch: Batch) -> LossOutput:
        """Predict `target_B` from the histories; targets of -1 are not counted.

        Raises:
            UserError: the batch has no targets.
        """
        if batch.target_B is None:
            raise UserError(
                "EncoderDecoder.loss: got a batch without target_B, expected one target row per "
                "history. Pass pad_histories(..., targets=rows)."
            )
        visible_B11T, cross = self._encode(batch.history_BH)
        tokens_BL = self.tokens_NL[batch.target_B.clamp(min=0)]
        x_BLD = self._embed(F.pad(tokens_BL[:, :-1], (1, 0), value=PAD))
        bias = self.decoder_bias(self.num_levels) + self.causal_LL
        for layer, keys_values in zip(self.decoder, cross, strict=True):
            x_BLD, _ = layer.attend(x_BLD, None, bias.to(x_BLD.dtype))
            x_BLD = layer.finish(x_BLD, keys_values, visible_B11T)
        valid_B = batch.target_B >= 0
        return self.items_nll(self._finish(x_BLD), batch.target_B, valid_B, batch.weights)

    def begin(self, batch: Batch) -> tuple[Tensor, EncoderDecoderState]:
        """Encode once per request, decode PAD; see `Backbone.begin`."""
        visible_B11T, cross = self._encode(batch.history_BH)
        start_B1 = batch.history_BH.new_full((len(batch), 1), PAD)
        return self._decode(start_B1, -1, visible_B11T, cross, None)

    def step(
        self, codes_R: Tensor, state: EncoderDecoderState, parents_R: Tensor
    ) -> tuple[Tensor, EncoderDecoderState]:
        """Decode one code per row; see `Backbone.step`."""
        tokens_R1 = self.code_tokens(codes_R, state.level).unsqueeze(1)
        own = tuple((keys[parents_R], values[parents_R]) for keys, values in state.own)
        return self._decode(tokens_R1, state.level, state.visible_B11T, state.cross, own)

    def _decode(
        self,
        tokens_R1: Tensor,
        last_level: int,
        visible_B11T: Tensor,
        cross: tuple[KeysValues, ...],
        past: tuple[KeysValues, ...] | None,
    ) -> tuple[Tensor, EncoderDecoderState]:
        level = last_level + 1
        x_R1D = self._embed(tokens_R1)
        bias = self.decoder_bias(level + 1)[:, :, -1:].to(x_R1D.dtype)
        own: list[KeysValues] = []
        for number, layer in enumerate(self.decoder):
            x_R1D, keys_values = layer.attend(x_R1D, past[number] if past else None, bias)
            own.append(keys_values)
            # The beams of a request are queries of its one copy of the encoder's keys and values.
            x_BWD = x_R1D.reshape(len(visible_B11T), -1, x_R1D.shape[-1])
            x_BWD = layer.finish(x_BWD, cross[number], visible_B11T)
            x_R1D = x_BWD.reshape(x_R1D.shape)
        state = EncoderDecoderState(level, visible_B11T, cross, tuple(own))
        return self.level_logits(self._finish(x_R1D[:, 0]), level), state

    def _encode(self, history_BH: Tensor) -> tuple[Tensor, tuple[KeysValues, ...]]:
        """Return which positions exist, and all decoder layers' cross keys and values."""
        tokens_BT, visible_BT = self.prompt(history_BH)
        x_BTD = self.embedding(tokens_BT)
        if self.config.recency_embeddings:
            x_BTD = x_BTD + F.pad(self._recency(visible_BT), (0, 0, 1, 0))
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        visible_B11T = visible_BT[:, None, None]
        bias_BhTT = self.encoder_bias(tokens_BT.shape[1]).to(x_BTD.dtype)
        bias_BhTT = bias_BhTT.masked_fill(~visible_B11T, -torch.inf)
        for layer in self.encoder:
            x_BTD = layer(x_BTD, bias_BhTT)
        x_BTD = F.dropout(self.encoder_norm(x_BTD), self.config.dropout, self.training)
        return visible_B11T, tuple(layer.cross.keys_values(x_BTD) for layer in self.decoder)

    def prompt(self, history_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's input tokens (B, T) and which of them exist, bool (B, T)."""
        return self.history_tokens(self.read_history(history_BH))

    def _recency(self, visible_BT: Tensor) -> Tensor:
        """Return embeddings (B, T - 1, D) of the items' positions, 0 = the last item."""
        visible_BH = visible_BT[:, 1 :: self.num_levels]
        numbers_H = torch.arange(1, visible_BH.shape[1] + 1, device=visible_BH.device)
        recency_BH = (visible_BH.sum(1, keepdim=True) - numbers_H).clamp(min=0)
        return self.recency(recency_BH).repeat_interleave(self.num_levels, dim=1)

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.embedding(tokens), self.config.dropout, self.training)

    def _finish(self, x: Tensor) -> Tensor:
        """Final norm; tied output rows have variance 1, so the hidden state is scaled down."""
        x = F.dropout(self.decoder_norm(x), self.config.dropout, self.training)
        return x * self.config.d_model**-0.5 if self.config.tie_embeddings else x

    def to_hugging_face(self) -> T5ForConditionalGeneration:
        """Return a `T5ForConditionalGeneration` with copies of these weights and the same logits.

        Raises:
            UserError: recency embeddings or untied embeddings, which that class cannot express.
        """
        from transformers import T5Config, T5ForConditionalGeneration

        config = self.config
        if config.recency_embeddings or not config.tie_embeddings:
            raise UserError(
                "to_hugging_face: transformers' T5 has no recency embeddings and always ties its "
                "embeddings; expected recency_embeddings=false and tie_embeddings=true. Train one "
                "so."
            )
        t5_config = T5Config(
            vocab_size=self.num_tokens,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            dropout_rate=config.dropout,
            layer_norm_epsilon=NORM_EPS,
            feed_forward_proj=config.activation,
            pad_token_id=PAD,
            eos_token_id=None,
        )
        t5_config.decoder_start_token_id = PAD
        target = T5ForConditionalGeneration(t5_config)
        target.generation_config.decoder_start_token_id = PAD
        target.load_state_dict(self._t5_weights(), strict=False)
        target.tie_weights()
        return target.eval()

    def _t5_weights(self) -> dict[str, Tensor]:
        weights = {"shared.weight": self.embedding.weight, "lm_head.weight": self.embedding.weight}
        for name, layers, norm, bias in (
            ("encoder", self.encoder, self.encoder_norm, self.encoder_bias),
            ("decoder", self.decoder, self.decoder_norm, self.decoder_bias),
        ):
            first = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            weights |= {f"{name}.final_layer_norm.weight": norm.weight, first: bias.weight}
            weights[f"{name}.embed_tokens.weight"] = self.embedding.weight
            for number, layer in enumerate(layers):
                weights |= hugging_face_weights(f"{name}.block.{number}.layer", layer)
        return {name: weight.detach().clone() for name, weight in weights.items()}
