"""Textual: a short phrase, generated from the item's text, as its semantic ID (IDGenRec).

Holds the generator (`phrase_generator.py`) and proposes phrases; `candidates.py` makes them unique,
`genrec.trainers.alternation` trains the generator together with a recommender (Tan et al. 2024,
2403.19021).

Shapes: N fitted items, M encoded items, L levels, G candidates, V codes of the one vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from genrec.config import StrictConfig
from genrec.errors import ConfigError, UserError
from genrec.runtime import choose_device, get_logger
from genrec.tokenizers.base import IntArray, ItemTokenizer, not_fitted
from genrec.tokenizers.collisions.candidates import first_unused
from genrec.tokenizers.text.item_texts import MAX_NAMED, Missing, item_texts
from genrec.tokenizers.text.phrase_generator import PhraseGenerator, train_on_phrases
from genrec.tokenizers.text.salient_words import salient_phrases
from genrec.tokenizers.text.subwords import FIRST_SUBWORD, TRAIN, Subwords

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions
    from genrec.item_index import CollisionPolicy

log = get_logger(__name__)


class AlternationConfig(StrictConfig):
    """How the generator learns from a recommender, round after round (2403.19021, section 3.4)."""

    rounds: int = Field(default=0, ge=0)
    """Times that generator and recommender take turns (IDGenRec: 3); 0 keeps the generator."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the training interactions per round (IDGenRec: 1)."""
    batch_size: int = Field(default=64, ge=1)
    """Histories per step (IDGenRec: 64)."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW step size (IDGenRec: 1e-8 for a pretrained T5-small; a small one needs more)."""


class Textual(ItemTokenizer):
    """Phrases of a text-to-text model, then END.

    Args:
        config: see `Textual.Config`.
    """

    class Config(StrictConfig):
        """Settings of textual ids."""

        name: Literal["textual"] = "textual"
        """Name in the registry."""
        columns: tuple[str, ...] | None = None
        """Catalogue columns that make up the text, in order; default all."""
        missing: Missing = "text"
        """What an item without text in `columns` is read as: its text over all columns or else its
        id ("text"), its id at once ("id"), or nothing: an error ("error")."""
        lowercase: bool = True
        """Turn capitals into small letters."""
        generator: str = "train"
        """"train": a small T5 that learns to say the salient words of an item's own text. Else a
        folder, or a name known on this machine, of a pretrained Hugging Face encoder-decoder with a
        fast tokenizer, used as it is; it may only say sub-words that occur in the catalogue."""
        num_words: int = Field(default=3, ge=1)
        """Salient words (TF-IDF) of the phrases that the small T5 learns."""
        vocabulary_size: int = Field(default=2048, ge=FIRST_SUBWORD)
        """Codes at most when trained, V: END, 256 bytes, sub-words."""
        max_tokens: int = Field(default=8, ge=1)
        """Sub-words of a phrase at most; L, or less if all phrases learned from are shorter."""
        max_text_tokens: int = Field(default=64, ge=2)
        """Sub-words of a text that the generator reads."""
        num_candidates: int = Field(default=10, ge=1)
        """Groups of the diverse beam search, one phrase each (IDGenRec: 10)."""
        diversity_penalties: tuple[float, ...] = (1.0, 4.0, 10.0)
        """Penalties tried one after the other for items whose phrases are taken (IDGenRec: raised
        from 1 to 10)."""
        lengthen: int = Field(default=4, ge=0)
        """Sub-words that a phrase may grow by when all its candidates are taken (IDGenRec: 10)."""
        d_model: int = Field(default=64, ge=2)
        """Width of the small T5."""
        d_ff: int = Field(default=128, ge=1)
        """Inner width of its feed-forward blocks."""
        num_layers: int = Field(default=1, ge=1)
        """Layers of its encoder, and of its decoder."""
        num_heads: int = Field(default=4, ge=1)
        """Its attention heads."""
        dropout: float = Field(default=0.0, ge=0, lt=1)
        """Its dropout."""
        learning_rate: float = Field(default=5e-3, gt=0)
        """AdamW step size on the salient words."""
        weight_decay: float = Field(default=0.01, ge=0)
        """AdamW weight decay."""
        batch_size: int = Field(default=32, ge=1)
        """Texts per step."""
        num_epochs: int = Field(default=30, ge=1)
        """Passes over the catalogue."""
        alternation: AlternationConfig = AlternationConfig()
        """Turns of generator and recommender; off by default."""
        seed: int = Field(default=0, ge=0)
        """Seed of weights and batches."""

    config: Textual.Config
    decodes: ClassVar[bool] = False
    shared_vocabulary: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"texts"})

    def __init__(self, config: Textual.Config) -> None:
        super().__init__(config)
        if config.d_model % config.num_heads:
            raise ConfigError(
                f"tokenizer.num_heads: got {config.num_heads} for d_model {config.d_model}, "
                "expected a divisor of it, e.g. tokenizer.num_heads=1."
            )
        self._generator: PhraseGenerator | None = None
        self._num_levels = 0
        self.history: list[float] = []
        """Loss of the small T5 per epoch, nats per code; empty for a pretrained generator."""

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Train the generator on the items' salient words, or load a pretrained one.

        The outcome does not depend on the order of the catalogue.

        Raises:
            UserError: no items, or no model under `generator`.
            DataError: an unknown column, or items without text and `missing` is "error".
            TrainingError: the loss became NaN or infinite.
        """
        config = self.config
        if not len(catalog):
            raise UserError("textual: got no items, expected at least one text to learn from.")
        order = sorted(range(len(catalog)), key=lambda row: catalog.item_ids[row])
        catalog = catalog.select(order)
        texts, missing = self._texts(catalog)
        if missing:
            shown = ", ".join(repr(catalog.item_ids[row]) for row in missing[:MAX_NAMED])
            log.warning(
                "textual: %d of %d items have no text in tokenizer.columns, e.g. %s; their other "
                "texts or ids stand in.", len(missing), len(texts), shown,
            )  # fmt: skip
        if config.generator == TRAIN:
            self._train(texts)
        else:
            self._num_levels = config.max_tokens
            self._generator = PhraseGenerator.pretrained(
                config.generator, texts, config.max_text_tokens
            )
        return self

    def _train(self, texts: list[str]) -> None:
        config = self.config
        phrases = salient_phrases(texts, config.num_words)
        subwords = Subwords.train([*texts, *phrases], config.vocabulary_size)
        codes_NL, lengths_N = subwords.encode_all(phrases, config.max_tokens)
        num_levels = min(config.max_tokens, int(lengths_N.max()))
        device = choose_device()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            generator = PhraseGenerator.small(subwords, config).to(device)
            self.history = train_on_phrases(generator, texts, codes_NL[:, :num_levels], config)
        self._generator, self._num_levels = generator.cpu(), num_levels

    def encode(self, catalog: Catalog) -> IntArray:
        """Return the most probable phrase of each item (M, L) int32, code by code."""
        generator = self.generator
        texts, _ = self._texts(catalog)
        return generator.phrases(texts, max_tokens=self._num_levels)[:, 0]

    def candidates(self, catalog: Catalog, attempt: int) -> IntArray | None:
        """Return phrases that an item may be given instead, best first, (M, G, L') int32.

        Args:
            catalog: M items.
            attempt: 0, 1, ...: one of `diversity_penalties` each; after the last one phrases that
                continue the most probable one by up to `lengthen` sub-words; then None.
        """
        config = self.config
        texts, _ = self._texts(catalog)
        search = partial(self.generator.phrases, texts, num_groups=config.num_candidates)
        penalties = config.diversity_penalties
        if attempt < len(penalties):
            return search(max_tokens=self._num_levels, penalty=penalties[attempt])
        if attempt > len(penalties) or not config.lengthen:
            return None
        lengths = (self.encode(catalog) != 0).sum(axis=1)
        return search(
            max_tokens=self._num_levels + config.lengthen,
            penalty=max(penalties, default=1.0),
            min_tokens=(lengths + 1).tolist(),
        )

    def collision_policy(
        self, name: str, catalog: Catalog | None = None, *, reserve: int = 0
    ) -> CollisionPolicy:
        """Return a collision policy; `first_unused` asks this tokenizer for candidates."""
        policy = super().collision_policy(name, catalog, reserve=reserve)
        if name != first_unused.__name__ or catalog is None:
            return policy

        def candidates(rows: IntArray, attempt: int) -> IntArray | None:
            return self.candidates(catalog.select(rows), attempt)

        return partial(first_unused, candidates=candidates, reserve=reserve)

    def text_of(self, codes: Iterable[int]) -> str:
        """Return the phrase that the codes of one item spell; a collision's number reads " #2"."""
        return self.generator.subwords.decode(codes)

    def texts(self, catalog: Catalog) -> list[str]:
        """Return what the generator reads of each item."""
        return self._texts(catalog)[0]

    def _texts(self, catalog: Catalog) -> tuple[list[str], list[int]]:
        config = self.config
        return item_texts(
            catalog, config.columns, missing=config.missing, lowercase=config.lowercase
        )

    @property
    def generator(self) -> PhraseGenerator:
        """The generator G, in evaluation mode and on the CPU.

        Raises:
            UserError: not fitted yet.
        """
        if self._generator is None:
            raise not_fitted("Textual")
        return self._generator

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """(V,) * L."""
        return (self.generator.subwords.size,) * self._num_levels

    def state(self) -> dict[str, np.ndarray]:
        """Return the generator's weights and configuration, its sub-words, and L."""
        return {**self.generator.state(), "num_levels": np.array([self._num_levels])}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        self._generator = PhraseGenerator.from_state(state, self.config.max_text_tokens).eval()
        self._num_levels = int(state["num_levels"][0])
        return self
