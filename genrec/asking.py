"""How is a language model with codes asked in words, and answered with items or texts?

An `Asker` writes prompts in the model's tokens, searches items for them under the constraint of the
catalogue, and lets the model write freely. Which prompts there are is told to it; how written text
leads to items is in `genrec.titles`. It trains nothing.

Shapes: B prompts, k list length, N items, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.data import Catalog
from genrec.decoding import CSRIndex, Filters, beam_search
from genrec.decoding.free_text import Prompts, Written, generate
from genrec.errors import UserError, nearest
from genrec.inference import RankedLists
from genrec.instructions.encoding import PieceEncoder
from genrec.instructions.facts import ItemFacts
from genrec.instructions.mixture import MixtureConfig, load_all
from genrec.instructions.templates import Augmentation, Piece, Several, Value
from genrec.models.language_models import frame_tokens, load_text_tokenizer
from genrec.models.pretrained import PretrainedBackbone
from genrec.models.responses import pad_tokens
from genrec.models.shared_prompts import longest_input

AS_WRITTEN = Augmentation(shuffle="none", mask=0.0)


def make_encoder(
    model: PretrainedBackbone, *, max_tokens: int, base: str | None = None
) -> PieceEncoder:
    """Return what writes instructions in a model's tokens.

    Args:
        model: gives the tokenizer (of its source) and the items' tokens.
        max_tokens: of a prompt with its response; fewer where the model reads fewer.
        base: where the language model lies, if it has moved.
    """
    tokenizer = load_text_tokenizer(base or model.config.source)
    before, after = frame_tokens(tokenizer, "")
    limit = longest_input(model.base.config.get_text_config())
    tuning = model.config.tuning
    virtual = tuning.num_virtual_tokens if tuning.mode in ("prompt", "prefix") else 0
    room = max_tokens if limit is None else min(max_tokens, limit - virtual)
    return PieceEncoder(
        tokenizer,
        model.tokens_NL.cpu().numpy(),
        before,
        after,
        ends=model.kind == "seq2seq",
        max_tokens=room,
    )


class Asker:
    """Asks one model.

    Args:
        model: a backbone on a language model; used in evaluation mode.
        catalog: its items, with their words.
        config: wordings; default the shipped templates.
        base: where the language model's tokenizer lies, if it has moved.

    Raises:
        UserError: a catalogue of another number of items, or a model without a tokenizer.
    """

    def __init__(
        self,
        model: PretrainedBackbone,
        catalog: Catalog,
        config: MixtureConfig | None = None,
        *,
        base: str | None = None,
    ) -> None:
        if not isinstance(model, PretrainedBackbone):
            raise UserError(
                f"Asker: got a {type(model).__name__}, which reads no text; expected a model "
                "trained with model.name=pretrained_causal or model.name=pretrained_seq2seq."
            )
        if len(catalog) != len(model.tokens_NL):
            raise UserError(
                f"Asker: got a catalogue of {len(catalog)} items for a model of "
                f"{len(model.tokens_NL)}, expected the items that it was trained on."
            )
        self.config = config or MixtureConfig()
        self.model, self.catalog = model.eval(), catalog
        self.facts = ItemFacts(catalog, max_characters=self.config.max_characters)
        self.encoder = make_encoder(model, max_tokens=self.config.max_tokens, base=base)
        self._templates = load_all(self.config)

    def word(self, task: str, values: Mapping[str, Value]) -> tuple[Piece, ...]:
        """Return the prompt of a task, by its first template that takes just these values.

        Args:
            task: as in a mixture.
            values: what its placeholders stand for; those of the response may be left out.

        Raises:
            UserError: no such task, or no template for these values.
        """
        if task not in self._templates:
            raise UserError(
                f"task: got {task!r}, expected one of {', '.join(self._templates)}."
                f"{nearest(task, self._templates)}"
            )
        for template in self._templates[task]:
            if template.asks == set(values):
                filled = {**dict.fromkeys(template.placeholders, ""), **values}
                return template.render(filled, AS_WRITTEN, np.random.default_rng(0)).prompt
        raise UserError(
            f"task {task}: no template asks with {', '.join(sorted(values))} alone. Write one, or "
            "give other values."
        )

    def history(self, rows: Sequence[int]) -> Several:
        """Return a history as a value for `word`: semantic IDs of the last items it may have."""
        return Several(tuple(int(row) for row in rows[-self.model.config.max_history :]))

    def titles(self, rows: Sequence[int]) -> Several | None:
        """Return the titles of a history's last items, None if none has one."""
        return self.facts.named(int(row) for row in rows[-self.model.config.max_history :])

    @torch.inference_mode()
    def items(
        self,
        prompts: Sequence[Sequence[Piece]],
        constraint: CSRIndex,
        *,
        k: int = 10,
        width: int = 50,
        exclude: Sequence[np.ndarray] | None = None,
        batch_size: int = 16,
    ) -> RankedLists:
        """Return the most probable items after each prompt.

        Args:
            prompts: B rows of pieces.
            constraint: the model's index, on its device.
            k: list length.
            width: beam width.
            exclude: per prompt, rows that may not be returned.
            batch_size: prompts searched together.
        """
        total, width = len(prompts), max(width, k)
        rows, logprobs = np.full((total, k), -1, np.int64), np.full((total, k), -np.inf)
        certified, eligible = np.ones(total, bool), np.full(total, constraint.num_items)
        for start in range(0, total, batch_size):
            part = slice(start, min(start + batch_size, total))
            denied = None if exclude is None else [np.asarray(e) for e in exclude[part]]
            beams = beam_search(
                _Prompted(self.model),
                self.prompts(prompts[part]),
                constraint,
                width=width,
                k=k,
                filters=None if denied is None else Filters(exclude=denied),
            )
            got = beams.rows_Bk.shape[1]
            rows[part, :got] = beams.rows_Bk.cpu().numpy()
            logprobs[part, :got] = beams.logprobs_Bk.double().cpu().numpy()
            certified[part] = beams.certified_B.cpu().numpy()
            if denied is not None:
                eligible[part] -= [len(np.unique(e)) for e in denied]
        return RankedLists(rows, logprobs, certified, eligible)

    @torch.inference_mode()
    def texts(
        self,
        prompts: Sequence[Sequence[Piece]],
        *,
        num_texts: int = 1,
        max_tokens: int = 32,
        temperature: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[list[tuple[str, float]]]:
        """Return texts that the model writes after each prompt, with log-probabilities.

        A text ends with the tokenizer's end token or a line break. See `generate`.
        """
        found: list[list[Written]] = []
        for start in range(0, len(prompts), batch_size):
            found += generate(
                self.model,
                self.prompts(prompts[start : start + batch_size]),
                ends=self.ends,
                num_tokens=self.model.first_token,
                num_texts=num_texts,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed + start,
            )
        return [[(self.decode(text.tokens), text.logprob) for text in texts] for texts in found]

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Return what the model's head reads after each text, float32 (B, D).

        Titles and written texts go through the same tokens, so that equal texts have equal
        embeddings (up to rounding: batches are padded differently).
        """
        parts = [
            self.model.read_tokens(*self._padded([self.encoder.prompt([t or " "]) for t in part]))[
                0
            ]
            for start in range(0, len(texts), batch_size)
            if (part := texts[start : start + batch_size])
        ]
        return torch.cat(parts).float().cpu().numpy()

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text: the tokenizer's end, and a line break where it is one token."""
        broken = self.encoder.text("\n")
        return [self.encoder.end[0], *(broken if len(broken) == 1 else ())]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones and blanks around it."""
        text: str = self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return " ".join(text.split())

    def prompts(self, prompts: Sequence[Sequence[Piece]]) -> Prompts:
        """Return prompts in tokens, on the model's device."""
        return Prompts(*self._padded([self.encoder.prompt(pieces) for pieces in prompts]))

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        lengths_B = torch.tensor([len(row) for row in rows])
        if not len(rows) or int(lengths_B.min()) < 1:
            raise UserError(
                f"prompts: got {len(rows)} prompts, the shortest of no tokens; expected at least "
                "one prompt, and a token in each."
            )
        return pad_tokens(rows).to(self.model.device), lengths_B.to(self.model.device)


class _Prompted:
    """A backbone as a `StepModel` whose batches are `Prompts`."""

    def __init__(self, model: PretrainedBackbone) -> None:
        self.model = model

    def begin(self, batch: Prompts) -> tuple[Tensor, Any]:
        hidden_BD, state = self.model.read_tokens(batch.tokens_BT, batch.lengths_B)
        return self.model.level_logits(hidden_BD, 0), state

    def step(self, codes_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        return self.model.step(codes_R, state, parents_R)
