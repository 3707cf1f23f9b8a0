"""ScratchBackbone: what backbones share that train from random weights over a token table.

PAD, START, then the codes of all levels. It refuses to know layers and losses.

Shapes: B requests, H history items, N items, L levels, K codes of a level, V vocabulary, T tokens,
D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import ConfigError
from genrec.models.base import PAD, START, Backbone
from genrec.models.layers import Forgetful


class ScratchBackbone(Backbone):
    """A backbone with a token table of its own, trained from random weights.

    Tokens: PAD, START, then the codes of all levels.

    Args:
        config: the leaf's `Config`.
        tokens_NL: (N, L) int64 code tokens of all items (`ItemIndex.tokens(0)`).
        codebook_sizes: L sizes.
        shared_vocabulary: see `Backbone`.
    """

    class Config(Backbone.Config):
        """What every backbone from scratch can be told."""

        d_model: int = Field(default=128, ge=1)
        """Width of the residual stream."""
        num_layers: int = Field(default=4, ge=1)
        """Transformer layers (encoder and decoder have this many each)."""
        num_heads: int = Field(default=4, ge=1)
        """Attention heads."""
        d_ff: int = Field(default=512, ge=1)
        """Inner width of the feed-forward blocks."""
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
        """Dropout probability on embeddings and block outputs."""
        attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Dropout probability on attention weights; above 0 the fused CPU kernels are not used."""
        tie_embeddings: bool = True
        """Output rows are the input embeddings."""

    config: Config
    output: nn.Linear

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        self.embedding = nn.Embedding(self.num_tokens, config.d_model)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.d_model, self.num_tokens, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def output_weight_VD(self) -> Tensor:
        """Rows that score tokens."""
        return self.embedding.weight if self.config.tie_embeddings else self.output.weight

    def history_tokens(self, history_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return START and the items' tokens, (B, 1 + H*L), PAD where padded; and which exist."""
        valid_BH = history_BH >= 0
        tokens_BHL = self.tokens_NL[history_BH.clamp(min=0)]
        tokens_BT = tokens_BHL.masked_fill(~valid_BH.unsqueeze(-1), PAD).flatten(1)
        exists_BT = valid_BH.repeat_interleave(self.num_levels, dim=1)
        return F.pad(tokens_BT, (1, 0), value=START), F.pad(exists_BT, (1, 0), value=True)

    def item_representations(self, rows: Tensor) -> Tensor:
        """Return the mean of the items' code vectors; see `Backbone.item_representations`."""
        return self.embedding(self.tokens_NL[rows.clamp(min=0)]).mean(-2)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Let the layers forget their activations; see `Backbone.checkpoint_gradients`."""
        for module in self.modules():
            if isinstance(module, Forgetful):
                module.forgets = enabled

    def code_scores(self, hidden: Tensor, level: int) -> Tensor:
        """Return float32 logits over the codes of one level; see `Backbone.code_scores`."""
        first = self._first_tokens[level]
        weight_KD = self.output_weight_VD[first : first + self.codebook_sizes[level]]
        return F.linear(hidden, weight_KD).float()

    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Return float32 logits over all tokens."""
        return F.linear(hidden, self.output_weight_VD).float()


def check_heads(config: ScratchBackbone.Config) -> int:
    """Return the width of a head, or raise `ConfigError` if the heads do not divide the model."""
    width, rest = divmod(config.d_model, config.num_heads)
    if rest or width % 2:
        raise ConfigError(
            f"model.num_heads: got {config.num_heads} heads for d_model {config.d_model}, expected "
            "a number of heads that leaves an even width per head, e.g. "
            f"model.num_heads={max(1, config.d_model // 32)} model.d_model="
            f"{32 * max(1, config.d_model // 32)}."
        )
    return width
