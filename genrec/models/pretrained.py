"""What do all backbones share that stand on a pretrained language model?

The model's own weights stay untouched modules below `base`; the rows of the codes are parameters
beside it, joined to the model's table where tokens are embedded and scored. So a mode of tuning is
only a choice of which parameters train, and what is saved is what changed. It refuses to know how a
history becomes a sequence and how a search goes: that is `pretrained_causal` and
`pretrained_seq2seq`.

Shapes: B requests, H history items, L levels, T tokens, C code tokens, V rows of the base,
P virtual tokens, D model width.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from genrec.artifacts import fingerprint
from genrec.errors import ConfigError, MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models import adapters, language_models, vocabulary
from genrec.models.adapters import TuningConfig
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.models.language_models import DataType, Kind, Quantization
from genrec.models.responses import ResponseLoss, Responses, response_loss
from genrec.models.shared_prompts import finished_logits, longest_input
from genrec.models.vocabulary import CodeVocabulary, Start

if TYPE_CHECKING:
    from genrec.data import Catalog

Frame = tuple[Sequence[int], Sequence[int]]


class PretrainedBackbone(Backbone):
    """A language model that also reads and writes codes; see the module's text.

    Args:
        config: the leaf's `Config`.
        tokens_NL: (N, L) int64 code tokens of all items (`ItemIndex.tokens(0)`).
        codebook_sizes: L sizes.
        shared_vocabulary: see `Backbone`.
        base: the language model; None loads `config.source`.
        frame: text tokens before and after a history; None asks the model's tokenizer.

    Raises:
        UserError: a source that cannot be read, or a model that does not fit.
        ConfigError: options that do not go together.
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
    kind: ClassVar[Kind]
    _forgets = False
    code_head_CD: nn.Parameter
    virtual_PD: nn.Parameter
    virtual_keys: nn.ParameterList
    virtual_values: nn.ParameterList

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
        *,
        base: PreTrainedModel | None = None,
        frame: Frame | None = None,
    ) -> None:
        _check_options(config)
        if base is None:
            base = language_models.load_language_model(
                config.source, self.kind, dtype=config.dtype, quantization=config.quantization
            )
        if frame is None:
            tokenizer = language_models.load_text_tokenizer(config.source)
            frame = language_models.frame_tokens(tokenizer, config.prefix)
        rows: Any = base.get_input_embeddings()
        super().__init__(
            config,
            tokens_NL,
            codebook_sizes,
            shared_vocabulary,
            first_token=int(rows.weight.shape[0]),
        )
        self.base = base
        self.before, self.after = list(frame[0]), list(frame[1])
        self._check_base()
        self._set_dropout()
        self.code_rows_CD = nn.Parameter(self._start_rows(rows.weight))
        if not self.tied:
            self.code_head_CD = nn.Parameter(self._start_rows(self._head.weight))
        self._tune()

    # -- what trains ----------------------------------------------------------------------------

    def _tune(self) -> None:
        tuning = self.config.tuning
        for weight in self.base.parameters():
            if weight.is_floating_point():
                weight.requires_grad = tuning.mode == "full"
        if tuning.mode == "full" and not self.tied and self.config.softmax != "vocabulary":
            self._head.weight.requires_grad = False  # nothing is ever scored by it
        if tuning.mode == "lora":
            adapters.add_lora(self.base, tuning)
        elif tuning.mode == "prompt":
            self.virtual_PD = nn.Parameter(self._virtual_tokens().float())
        elif tuning.mode == "prefix":
            keys, values = self._virtual_keys_values()
            self.virtual_keys, self.virtual_values = (
                nn.ParameterList(keys),
                nn.ParameterList(values),
            )
        elif tuning.mode == "frozen":
            self.requires_grad_(False)

    def base_names(self) -> set[str]:
        """Return names of the state's entries that are as the base came: they are not saved."""
        if self.config.tuning.mode == "full":
            return set()
        return {
            name for name in self.state_dict() if name.startswith("base.") and "lora_" not in name
        }

    @torch.no_grad()
    def _virtual_tokens(self) -> Tensor:
        """Return the embeddings of P tokens of the base, drawn at random (Lester et al. 2021)."""
        count = self.config.tuning.num_virtual_tokens
        return self.embed(torch.randint(0, self.first_token, (count,)).to(self.device))

    @torch.no_grad()
    def _virtual_keys_values(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the base makes of P of its tokens, per layer (h, P, d)."""
        layers: Any = self._read_virtual(self._virtual_tokens().unsqueeze(0)).layers
        return (
            [layer.keys[0].float().clone() for layer in layers],
            [layer.values[0].float().clone() for layer in layers],
        )

    @abstractmethod
    def _read_virtual(self, vectors_1PD: Tensor) -> DynamicCache:
        """Return the keys and values of the layers that write the codes."""

    def virtual_cache(self, num_rows: int) -> DynamicCache | None:
        """Return a cache that holds the prefix for so many rows; None without a prefix."""
        if self.config.tuning.mode != "prefix":
            return None
        cache = DynamicCache()
        dtype = self.base.dtype
        for number, (keys, values) in enumerate(
            zip(self.virtual_keys, self.virtual_values, strict=True)
        ):
            shape = (num_rows, *keys.shape)
            cache.update(keys.to(dtype).expand(shape), values.to(dtype).expand(shape), number)
        return cache

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Let the base's layers forget their activations; see `Backbone.checkpoint_gradients`."""
        if not enabled:
            if self._forgets:
                self.base.gradient_checkpointing_disable()
        elif self.config.tuning.mode == "prefix":
            raise ConfigError(
                "trainer.gradient_checkpointing: got true with model.tuning.mode=prefix, expected "
                "false: the prefix lies in the cache, which checkpointing does without."
            )
        else:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self._forgets = enabled

    def item_representations(self, rows: Tensor) -> Tensor:
        """Return the mean of the items' code vectors; see `Backbone.item_representations`."""
        return self.embed(self.tokens_NL[rows.clamp(min=0)]).float().mean(-2)

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

    def with_prompt(self, vectors_BTD: Tensor) -> Tensor:
        """Return the vectors behind the soft prompt, (B, P + T, D); as they are without one."""
        if self.config.tuning.mode != "prompt":
            return vectors_BTD
        prompt_PD = self.virtual_PD.to(vectors_BTD.dtype)
        return torch.cat([prompt_PD.expand(len(vectors_BTD), -1, -1), vectors_BTD], 1)

    @property
    def num_prompt_vectors(self) -> int:
        """P of a soft prompt, else 0."""
        tuning = self.config.tuning
        return tuning.num_virtual_tokens if tuning.mode == "prompt" else 0

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

    def train_text_head(self) -> None:
        """Let an untied head train too where everything does: responses may be text."""
        if self.config.tuning.mode == "full":
            self._head.weight.requires_grad = True

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

    # -- saving and leaving ---------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return the base's source, fingerprint and architecture, and the frame's tokens."""
        full = self.config.tuning.mode == "full"
        return {
            "source": self.config.source,
            "fingerprint": None if full else language_models.weights_fingerprint(self.base),
            "architecture": self.base.config.to_dict(),
            "before": self.before,
            "after": self.after,
        }

    @classmethod
    def for_saved(
        cls, config: Any, index: ItemIndex, facts: Mapping[str, Any], *, base: str | None = None
    ) -> Self:
        """Build a backbone that saved weights are loaded into; see `Backbone.for_saved`.

        Raises:
            MismatchError: the base has other weights than the one that was trained on.
            UserError: `base` for a model that was saved whole, or a base that cannot be read.
        """
        if config.tuning.mode == "full":
            if base is not None:
                raise UserError(
                    f"base: got {base!r} for a model that was saved with all its weights. Leave it "
                    "out."
                )
            model = language_models.empty_language_model(
                facts["architecture"], cls.kind, dtype=config.dtype
            )
        else:
            source = base or config.source
            model = language_models.load_language_model(
                source, cls.kind, dtype=config.dtype, quantization=config.quantization
            )
            found = language_models.weights_fingerprint(model)
            if found != facts["fingerprint"]:
                raise MismatchError(
                    f"the model was trained on a base with weights {facts['fingerprint']}, "
                    f"{source!r} has {found}. Give the folder of the base that it was trained on "
                    f"({facts['source']!r})."
                )
        return cls(
            config,
            torch.from_numpy(index.tokens()),
            index.codebook_sizes,
            index.shared_vocabulary,
            base=model,
            frame=(facts["before"], facts["after"]),
        )

    def merged(self) -> Self:
        """Return a copy with all its weights in one: it needs no base and no adapter.

        Raises:
            UserError: a soft prompt or prefix, which are no weights of the base; a quantized base.
        """
        mode = self.config.tuning.mode
        if mode in ("prompt", "prefix"):
            raise UserError(
                f"merge: got a model with model.tuning.mode={mode}, expected lora, embeddings_only "
                "or frozen: virtual tokens cannot be added to weights. Keep the base beside it."
            )
        if self.config.quantization is not None:
            raise UserError(
                f"merge: got a base quantized with {self.config.quantization}, expected a plain "
                "one. Load the model with the plain base and merge that."
            )
        clone = copy.deepcopy(self)
        if mode == "lora":
            adapters.merge_lora(clone.base)
        tuning = self.config.tuning.model_copy(update={"mode": "full"})
        clone.config = self.config.model_copy(update={"tuning": tuning})
        clone.requires_grad_(True)
        return clone

    @torch.no_grad()
    def to_hugging_face(self) -> PreTrainedModel:
        """Return a plain model of the library with the codes in its vocabulary, and equal logits.

        `vocabulary.extend` gives the tokenizer for it.

        Raises:
            UserError: as `merged`.
        """
        model = self.merged().base
        rows, head = self.code_rows_CD, self._output_rows_CD
        model.resize_token_embeddings(self.num_tokens, mean_resizing=False)
        embedding: Any = model.get_input_embeddings()
        output: Any = model.get_output_embeddings()
        embedding.weight[self.first_token :] = rows.to(embedding.weight.dtype)
        output.weight[self.first_token :] = head.to(output.weight.dtype)
        if getattr(output, "bias", None) is not None:
            output.bias[self.first_token :] = 0.0
        return model.eval()

    # -- checks ---------------------------------------------------------------------------------

    def _set_dropout(self) -> None:
        rate = self.config.dropout
        if rate is None:
            return
        for module in self.base.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, rate)

    def _check_base(self) -> None:
        if self._head is None:
            raise UserError(
                f"model.source: {self.config.source!r} holds a {type(self.base).__name__} without "
                "an output head, expected a language model."
            )
        if not self.before and self.kind == "causal" and not self.num_prompt_vectors:
            raise ConfigError(
                "model.prefix: got no text for a tokenizer without a start token, expected at "
                "least one token to predict the first item from. Set e.g. model.prefix='Items:'."
            )
        tuning = self.config.tuning
        virtual = tuning.num_virtual_tokens if tuning.mode in ("prompt", "prefix") else 0
        items = self.config.max_history + (self.kind == "causal")
        longest = virtual + len(self.before) + len(self.after) + items * self.num_levels
        limit = longest_input(self._text_config)
        if limit is not None and longest > limit:
            room = limit - longest + self.config.max_history * self.num_levels
            raise ConfigError(
                f"model.max_history: got {self.config.max_history} items of {self.num_levels} "
                f"codes, {longest} tokens with all that stands around them; a "
                f"{type(self.base).__name__} reads {limit}. Set "
                f"model.max_history={max(1, room // self.num_levels)} or shorten model.prefix."
            )


def _check_options(config: PretrainedBackbone.Config) -> None:
    if config.quantization is not None and config.tuning.mode == "full":
        raise ConfigError(
            f"model.quantization: got {config.quantization!r} with model.tuning.mode=full, "
            "expected a mode that leaves the base as it is. Set e.g. model.tuning.mode=lora."
        )
