"""How does a language model read and score text and codes, beside each other?

The rows of the codes are parameters beside the model's own table; the two are joined where tokens
are embedded and scored. Where the rows start, histories in their frame of text and the loss of
responses are here too, and the configuration that all classes that build on this one read. It
refuses to know which weights train (`genrec.models.pretrained_tuning`), where the model comes from
and how it is saved (`genrec.models.pretrained`).

Shapes: B requests, H history items, L levels, T tokens, C code tokens, K codes of a level, V rows
of the base, M tokens with loss, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from genrec.artifacts import fingerprint
from genrec.errors import UserError
from genrec.models import language_models, vocabulary
from genrec.models.adapters import TuningConfig
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.models.language_models import DataType, Quantization
from genrec.models.responses import ResponseLoss, Responses, response_loss
from genrec.models.shared_prompts import finished_logits
from genrec.models.vocabulary import CodeVocabulary, Start

if TYPE_CHECKING:
    from genrec.data import Catalog


class PretrainedTokens(Backbone):
    """Tokens of a language model and of the codes: vectors in, scores out.

    A part of `PretrainedBackbone`, which sets the attributes below.
    """

    class Config(Backbone.Config):
        """What every backbone on a language model can be told."""

        max_history: int = Field(default=20, ge=1)
        """Items of the history that the model sees; older ones are dropped."""
        source: str
        """Folder, name on the hub, or asset:smollm2."""
        prefix: str = "Items that a user chose, oldest first:"
        """Text before the history, in the model's own tokens."""
        tuning: TuningConfig = TuningConfig()
        """Which weights train."""
        init: Start = "mean"
        """Where the rows of the codes start. mean: around the mean of the model's rows; random:
        around zero; text: mean of the descriptions' tokens of the items with the code; codebook:
        from the item vectors, as the codebooks lie to each other."""
        init_noise: float = Field(default=0.1, ge=0.0)
        """mean, text: scatter of the new rows, in standard deviations of the model's rows."""
        dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
        """Dropout probability of all dropout layers of the model and of its input; None: as the
        model's own configuration says, and none on the input."""
        dtype: DataType = "float32"
        """Of the model's weights; the rows of the codes and adapters are float32."""
        quantization: Quantization | None = None
        """Quantize a frozen base on loading, where the library for it is installed."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return digests of the base's files, and of what the rows of the codes start from."""
            digests = {}
            if (base := language_models.source_fingerprint(self.source)) is not None:
                digests["base"] = base
            if self.init == "text":
                digests["texts"] = catalog.fingerprint
            elif self.init == "codebook" and catalog.vectors is not None:
                digests["vectors"] = fingerprint(catalog.vectors)
            return digests

    config: Config
    base: PreTrainedModel
    before: list[int]
    after: list[int]
    code_rows_CD: nn.Parameter
    code_head_CD: nn.Parameter

    # -- tokens in, scores out ------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.code_rows_CD.device

    @property
    def vocabulary(self) -> CodeVocabulary:
        """Which tokens are the codes; it extends text tokenizers."""
        return CodeVocabulary(self.first_token, self.codebook_sizes, self.shared_vocabulary)

    @property
    def tied(self) -> bool:
        """Whether the base scores tokens with the rows that embed them."""
        rows: Any = self.base.get_input_embeddings()
        return self._head.weight is rows.weight

    @property
    def _text_config(self) -> Any:
        return self.base.config.get_text_config()

    @property
    def _head(self) -> Any:
        return self.base.get_output_embeddings()

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the vectors of text and code tokens, (...) -> (..., D)."""
        rows: Any = self.base.get_input_embeddings()
        is_code = tokens >= self.first_token
        text = rows(tokens.masked_fill(is_code, 0))
        codes = F.embedding((tokens - self.first_token).clamp(min=0), self.code_rows_CD)
        codes = codes * getattr(rows, "embed_scale", 1.0)
        vectors = torch.where(is_code.unsqueeze(-1), codes.to(text.dtype), text)
        return F.dropout(vectors, self.config.dropout or 0.0, self.training)

    def item_representations(self, rows: Tensor) -> Tensor:
        """Return the mean of the items' code vectors; see `Backbone.item_representations`."""
        return self.embed(self.tokens_NL[rows.clamp(min=0)]).float().mean(-2)

    @property
    def _output_rows_CD(self) -> Tensor:
        return self.code_rows_CD if self.tied else self.code_head_CD

    def code_scores(self, hidden: Tensor, level: int) -> Tensor:
        """Return float32 logits over the codes of one level; see `Backbone.code_scores`."""
        first = self._first_tokens[level] - self.first_token
        rows_KD = self._output_rows_CD[first : first + self.codebook_sizes[level]]
        return finished_logits(self._text_config, F.linear(hidden, rows_KD.to(hidden.dtype)))

    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Return float32 logits over the base's tokens and the codes, (..., V + C)."""
        codes = F.linear(hidden, self._output_rows_CD.to(hidden.dtype))
        return finished_logits(self._text_config, torch.cat([self._head(hidden), codes], -1))

    def framed(self, history_BH: Tensor, *, after: bool) -> tuple[Tensor, Tensor]:
        """Return the tokens of histories in their frame, and how many there are of each.

        Args:
            history_BH: item rows, right-padded with -1.
            after: put the frame's end behind the last item (else leave it out).

        Returns:
            (B, T) int64, right-padded with token 0; (B,) int64.
        """
        num_requests = len(history_BH)
        valid_BH = history_BH >= 0
        items_BX = self.tokens_NL[history_BH.clamp(min=0)].flatten(1)
        items_BX = items_BX * valid_BH.repeat_interleave(self.num_levels, 1)
        before = items_BX.new_tensor(self.before).expand(num_requests, -1)
        tokens_BT = torch.cat([before, items_BX], 1)
        lengths_B = len(self.before) + valid_BH.sum(1) * self.num_levels
        if after and self.after:
            end_BX = items_BX.new_tensor(self.after).expand(num_requests, -1)
            places_BX = lengths_B[:, None] + torch.arange(end_BX.shape[1], device=end_BX.device)
            tokens_BT = F.pad(tokens_BT, (0, end_BX.shape[1])).scatter(1, places_BX, end_BX)
            lengths_B = lengths_B + end_BX.shape[1]
        return tokens_BT, lengths_B

    # -- instructions ---------------------------------------------------------------------------

    def forward(self, batch: Batch | Responses) -> LossOutput:
        """Return the loss of next items, or of responses to instructions."""
        if isinstance(batch, Responses):
            return self.response_loss(batch)
        return super().forward(batch)

    def response_loss(self, batch: Responses) -> ResponseLoss:
        """Return the loss of responses among all tokens, text and codes; prompts carry none.

        In training it is shaped as the configuration says (`label_smoothing`, `loss_temperature`).
        """
        logits_MV = self.vocabulary_scores(self._response_states(batch))
        if not self.training:
            return response_loss(logits_MV, batch)
        smoothing, temperature = self.config.label_smoothing, self.config.loss_temperature
        return response_loss(logits_MV / temperature, batch, smoothing=smoothing)

    @abstractmethod
    def _response_states(self, batch: Responses) -> Tensor:
        """Return the hidden states that predict the tokens with loss, (M, D)."""

    @abstractmethod
    def read_tokens(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Any]:
        """Read any prompts once.

        Args:
            tokens_BT: text and code tokens, right-padded with any token.
            lengths_B: int64, how many there are of each; at least one.

        Returns:
            what the head reads to predict the first token of a response, (B, D), and a state for
            `extend_tokens`, whose rows are the B prompts.
        """

    @abstractmethod
    def extend_tokens(self, tokens_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Append one token per row; see `Backbone.step` for rows and parents.

        Returns:
            what the head reads to predict the next token, (R, D), and the new state.
        """

    # -- rows of the codes ----------------------------------------------------------------------

    def _start_rows(self, old_VD: Tensor) -> Tensor:
        if self.config.init == "random":
            return vocabulary.random_rows(old_VD, self.num_codes)
        return vocabulary.scattered_rows(old_VD, self.num_codes, self.config.init_noise)

    @torch.no_grad()
    def start_from(self, catalog: Catalog) -> None:
        """Start the rows of the codes from descriptions or vectors, where `init` says so.

        Raises:
            UserError: init=codebook and a catalogue without vectors, or another catalogue.
        """
        if self.config.init not in ("text", "codebook"):
            return
        if len(catalog) != len(self.tokens_NL):
            raise UserError(
                f"model.init: got a catalogue of {len(catalog)} items for an index of "
                f"{len(self.tokens_NL)}, expected the items of the index."
            )
        rows: Any = self.base.get_input_embeddings()
        tables = [(self.code_rows_CD, rows.weight)]
        if not self.tied:
            tables.append((self.code_head_CD, self._head.weight))
        tokens_NL = self.tokens_NL - self.first_token
        if self.config.init == "text":
            tokenizer = language_models.load_text_tokenizer(self.config.source)
            texts = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in catalog.texts()
            ]
            for table, old_VD in tables:
                table.copy_(vocabulary.rows_from_texts(old_VD, table, tokens_NL, texts))
            return
        if catalog.vectors is None:
            raise UserError(
                "model.init: got 'codebook' without item vectors, expected a tokenizer that reads "
                "vectors (`genrec run`). Set model.init=mean or model.init=text."
            )
        for table, old_VD in tables:
            state = torch.get_rng_state()  # one projection for both tables
            table.copy_(vocabulary.rows_from_vectors(old_VD, table, tokens_NL, catalog.vectors))
            torch.set_rng_state(state)
