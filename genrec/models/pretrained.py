"""What do all backbones share that stand on a pretrained language model?

The model's own weights stay untouched modules below `base`; the rows of the codes are parameters
beside it (`genrec.models.pretrained_tokens`). So a mode of tuning is only a choice of which
parameters train (`genrec.models.pretrained_tuning`), and what is saved is what changed. Here a
backbone is put together, checked, saved and merged. It refuses to know how a history becomes a
sequence and how a search goes: that is `pretrained_causal` and `pretrained_seq2seq`.

Shapes: N items, L levels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genrec.errors import ConfigError, MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models import adapters, language_models
from genrec.models.language_models import Kind
from genrec.models.pretrained_tokens import PretrainedTokens
from genrec.models.pretrained_tuning import PretrainedTuning
from genrec.models.shared_prompts import longest_input

Frame = tuple[Sequence[int], Sequence[int]]


class PretrainedBackbone(PretrainedTuning):
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

    kind: ClassVar[Kind]

    def __init__(
        self,
        config: PretrainedTokens.Config,
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


def _check_options(config: PretrainedTokens.Config) -> None:
    if config.quantization is not None and config.tuning.mode == "full":
        raise ConfigError(
            f"model.quantization: got {config.quantization!r} with model.tuning.mode=full, "
            "expected a mode that leaves the base as it is. Set e.g. model.tuning.mode=lora."
        )
