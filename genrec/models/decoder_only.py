"""DecoderOnly: a causal transformer over the code tokens of a whole history.

One causal pass trains every item of a sequence. RoPE, RMSNorm before each block, SwiGLU, tied
embeddings: the mathematics of Llama, so `to_hugging_face` is exact. It refuses to know how long a
search is or how wide: `step` is given rows and their parents.

Tokens of a history: START, then L tokens per item. Position p therefore predicts level p mod L of
item p // L, and START alone is the empty history.

Shapes: B requests, H history items, L levels, T = 1 + H*L tokens, R live rows, h heads, d width of
a head, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import UserError
from genrec.models.base import PAD, START, Batch, LossOutput
from genrec.models.causal import NORM_EPS, CausalConfig, CausalLayer, KeysValues, prefill
from genrec.models.layers import module_list, shared_prompt_attention
from genrec.models.request_features import Reading, RequestFeaturesBackbone

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class DecoderState:
    """What a search has read and chosen so far.

    Args:
        level: the level that was scored last.
        lengths_B: prompt tokens of each request, START included.
        visible_BT: which prompt positions exist.
        prompt: per layer, keys and values (B, h, T, d); one copy per request.
        own: per layer, keys and values (R, h, level, d) of the codes chosen so far.
    """

    level: int
    lengths_B: Tensor
    visible_BT: Tensor
    prompt: tuple[KeysValues, ...]
    own: tuple[KeysValues, ...]


class DecoderOnly(RequestFeaturesBackbone):
    """Causal language model over semantic IDs; see the module's text."""

    class Config(CausalConfig):
        """Defaults are measured in docs/models.md."""

        name: Literal["decoder_only"] = "decoder_only"
        """Name in the registry."""
        item_positions: bool = False
        """Add a learned embedding of the item's position, counted from the first kept item."""
        level_embeddings: bool = False
        """Add a learned embedding of the level that a position predicts."""

    config: Config
    training_unit: ClassVar[Literal["target", "sequence"]] = "sequence"
    item_position: nn.Embedding
    level_embedding: nn.Embedding
    layers: Sequence[CausalLayer]

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        self.layers = module_list(CausalLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        if config.item_positions:
            self.item_position = nn.Embedding(config.max_history + 2, config.d_model)
        if config.level_embeddings:
            self.level_embedding = nn.Embedding(self.num_levels, config.d_model)
        self.complete(self.max_tokens)

    @property
    def max_tokens(self) -> int:
        """Longest sequence: START, a full history and one more item."""
        return 1 + (self.config.max_history + 1) * self.num_levels

    def loss(self, batch: Batch) -> LossOutput:
        """Predict every item of the sequences in one causal pass (`target_B` is ignored).

        Sequences longer than `max_history + 1` keep their last items; a trainer that wants all of
        them as targets cuts windows.
        """
        batch = batch.last(self.config.max_history + 1)
        sequence_BH = batch.history_BH
        tokens_BT, _ = self.history_tokens(sequence_BH)
        hidden_BTD = self._hidden(tokens_BT[:, :-1], Reading.of_sequence(batch))
        valid_BH = sequence_BH >= 0
        if not self.config.predict_first:
            valid_BH[:, :1] = False
        return self.items_nll(
            hidden_BTD.reshape(-1, self.num_levels, self.config.d_model),
            sequence_BH.reshape(-1),
            valid_BH.reshape(-1),
            None if batch.weights is None else batch.weights.reshape(-1),
        )

    def begin(self, batch: Batch) -> tuple[Tensor, DecoderState]:
        """Prefill once per request; see `Backbone.begin`."""
        batch = batch.kept(self.config.max_history, self.config.truncation)
        tokens_BT, visible_BT = self.prompt(batch.history_BH)
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self._with_request(self._embed(tokens_BT, positions_T), Reading.of_history(batch))
        x_BD, prompt = prefill(self.layers, x_BTD, (self.cos, self.sin), visible_BT)
        none = prompt[-1][0].new_empty((len(x_BD), self.config.num_heads, 0, self.cos.shape[1]))
        own = ((none, none),) * len(self.layers)
        state = DecoderState(0, visible_BT.sum(1), visible_BT, tuple(prompt), own)
        return self.level_logits(self.norm(x_BD), 0), state

    def step(
        self, codes_R: Tensor, state: DecoderState, parents_R: Tensor
    ) -> tuple[Tensor, DecoderState]:
        """Append one code per row; see `Backbone.step`."""
        rows_per_request = len(codes_R) // len(state.lengths_B)
        positions_R = state.lengths_B.repeat_interleave(rows_per_request, output_size=len(codes_R))
        positions_R = positions_R + state.level
        x_RD = self._embed(self.code_tokens(codes_R, state.level), positions_R)
        tables = self.cos[positions_R], self.sin[positions_R]
        own: list[KeysValues] = []
        for layer, prompt, past in zip(self.layers, state.prompt, state.own, strict=True):
            query, key, value = layer.heads_of_rows(x_RD, *tables)
            keys = torch.cat([past[0][parents_R], key.unsqueeze(2)], dim=2)
            values = torch.cat([past[1][parents_R], value.unsqueeze(2)], dim=2)
            own.append((keys, values))
            mixed_RD = shared_prompt_attention(query, prompt, state.visible_BT, own[-1])
            x_RD = layer.finish(x_RD, mixed_RD)
        level = state.level + 1
        new_state = DecoderState(level, state.lengths_B, state.visible_BT, state.prompt, tuple(own))
        return self.level_logits(self.norm(x_RD), level), new_state

    def prompt(self, history_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T) of the kept histories and which of them exist, bool (B, T)."""
        return self.history_tokens(self.read_history(history_BH))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.config.level_embeddings:
            x = x + self.level_embedding(positions % self.num_levels)
        if self.config.item_positions:
            x = x + self.item_position((positions + self.num_levels - 1) // self.num_levels)
        return F.dropout(x, self.config.dropout, self.training)

    def _with_request(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """Add what is known beside items to START and to the last token of each item.

        A search never reads the last token of the item that it is looking for, so nothing of it
        can show.
        """
        if not self.has_request_features:
            return x_BTD
        ends_BTD = self.with_request(x_BTD[:, :: self.num_levels], reading)
        x_BTD = x_BTD.clone()
        x_BTD[:, :: self.num_levels] = ends_BTD
        return x_BTD

    def _hidden(self, tokens_BT: Tensor, reading: Reading) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self._with_request(self._embed(tokens_BT, positions_T), reading)
        for layer in self.layers:
            x_BTD, _ = layer(x_BTD, self.cos[: len(positions_T)], self.sin[: len(positions_T)])
        return self.norm(x_BTD)

    def to_hugging_face(self) -> LlamaForCausalLM:
        """Return a `LlamaForCausalLM` with copies of these weights and the same logits.

        Token 0 pads, token 1 starts every sequence, codes follow (`tokens_NL`).

        Raises:
            UserError: the config uses what Llama has not (gelu, item positions, level embeddings,
                users, times).
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        config = self.config
        extras = config.item_positions or config.level_embeddings or self.has_request_features
        if config.activation != "swiglu" or extras:
            raise UserError(
                "to_hugging_face: Llama has no gelu activation, item_positions, level_embeddings, "
                "time_features or user_tokens; expected a model with activation='swiglu' and all "
                "these options off. Train one so."
            )
        target = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.num_tokens,
                hidden_size=config.d_model,
                intermediate_size=config.d_ff,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=self.max_tokens,
                rms_norm_eps=NORM_EPS,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_embeddings,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=None,
            )
        )
        target.load_state_dict(self._llama_weights(), strict=False)
        target.tie_weights()
        return target.eval()

    def _llama_weights(self) -> dict[str, Tensor]:
        weights = {
            "model.embed_tokens.weight": self.embedding.weight,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.output_weight_VD,
        }
        for number, layer in enumerate(self.layers):
            query, key, value = layer.qkv.weight.chunk(3)
            gate, up = layer.feed_forward.up.weight.chunk(2)
            parts = {
                "input_layernorm": layer.attention_norm.weight,
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": layer.out.weight,
                "post_attention_layernorm": layer.feed_forward_norm.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.feed_forward.down.weight,
            }
            weights |= {f"model.layers.{number}.{k}.weight": v for k, v in parts.items()}
        return {name: weight.detach().clone() for name, weight in weights.items()}
