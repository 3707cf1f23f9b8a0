"""Title: the item's own title as its semantic ID, cut into sub-words (TID of Hua et al. 2023).

Learns nothing but a sub-word vocabulary. Equal titles get equal codes here; `collisions.suffix`
numbers them.

Shapes: N fitted items, M encoded items, L levels, V codes of the one vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.runtime import get_logger
from genrec.tokenizers.base import IntArray, ItemTokenizer, not_fitted
from genrec.tokenizers.text.item_texts import MAX_NAMED, Missing, item_texts
from genrec.tokenizers.text.subwords import FIRST_SUBWORD, Subwords

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)


class Title(ItemTokenizer):
    """Sub-words of the title, then END.

    Args:
        config: see `Title.Config`.
    """

    class Config(StrictConfig):
        """Settings of titles as semantic IDs."""

        name: Literal["title"] = "title"
        """Name in the registry."""
        columns: tuple[str, ...] = ("title",)
        """Catalogue columns that make up the title, in order, e.g. [title, year]."""
        subwords: str = "train"
        """"train": byte-pair encoding of the catalogue's titles. Else a folder with a
        `tokenizer.json`, or the name of a fast Hugging Face tokenizer on this machine."""
        vocabulary_size: int = Field(default=2048, ge=FIRST_SUBWORD)
        """Codes at most when trained, V: END, 256 bytes, sub-words. A pretrained tokenizer is cut
        down to the sub-words that the catalogue uses instead."""
        max_tokens: int = Field(default=16, ge=1)
        """Sub-words of a title at most; longer titles are cut. L is smaller if all are shorter."""
        lowercase: bool = False
        """Turn capitals into small letters."""
        collapse_whitespace: bool = True
        """One blank for every run of white space."""
        missing: Missing = "text"
        """What an item without a title is called: its text over all columns or else its id
        ("text"), its id at once ("id"), or nothing: an error ("error")."""

    config: Title.Config
    decodes: ClassVar[bool] = False
    shared_vocabulary: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"texts"})

    def __init__(self, config: Title.Config) -> None:
        super().__init__(config)
        self._subwords: Subwords | None = None
        self._num_levels = 0

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Learn the sub-words; log how many titles are missing and how many will be cut.

        Raises:
            UserError: no items, or no tokenizer under `subwords`.
            DataError: an unknown column, or items without a title and `missing` is "error".
        """
        config = self.config
        if not len(catalog):
            raise UserError("title: got no items, expected at least one title to learn from.")
        texts, missing = self._texts(catalog)
        if missing:
            shown = ", ".join(repr(catalog.item_ids[row]) for row in missing[:MAX_NAMED])
            stand_in = "their ids" if config.missing == "id" else "their other texts or ids"
            log.warning(
                "title: %d of %d items have no title, e.g. %s; %s stand in. Fill the titles in, or "
                "name other tokenizer.columns.", len(missing), len(texts), shown, stand_in,
            )  # fmt: skip
        subwords = Subwords.make(config.subwords, texts, config.vocabulary_size)
        _, lengths = subwords.encode_all(texts, config.max_tokens)
        longest = int(lengths.max())
        if longest > config.max_tokens:
            log.warning(
                "title: %d of %d titles are longer than %d sub-words (the longest has %d) and were "
                "cut. Raise tokenizer.max_tokens, or tokenizer.vocabulary_size.",
                int((lengths > config.max_tokens).sum()), len(texts), config.max_tokens, longest,
            )  # fmt: skip
        self._subwords, self._num_levels = subwords, min(config.max_tokens, longest)
        return self

    def encode(self, catalog: Catalog) -> IntArray:
        """Return the sub-words of the titles (M, L) int32, cut to L, END where shorter."""
        subwords = self._fitted()
        texts, _ = self._texts(catalog)
        return subwords.encode_all(texts, self._num_levels)[0]

    def text_of(self, codes: Iterable[int]) -> str:
        """Return the text that the codes of one item spell; a collision's number reads " #2"."""
        return self._fitted().decode(codes)

    def _texts(self, catalog: Catalog) -> tuple[list[str], list[int]]:
        config = self.config
        return item_texts(
            catalog,
            config.columns,
            missing=config.missing,
            lowercase=config.lowercase,
            collapse_whitespace=config.collapse_whitespace,
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """(V,) * L; L is the length of the longest fitted title, cut to `max_tokens`."""
        return (self._fitted().size,) * self._num_levels

    def state(self) -> dict[str, np.ndarray]:
        """Return the sub-word vocabulary and L."""
        return {**self._fitted().state(), "num_levels": np.array([self._num_levels])}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        self._subwords = Subwords.from_state(state)
        self._num_levels = int(state["num_levels"][0])
        return self

    def _fitted(self) -> Subwords:
        if self._subwords is None:
            raise not_fitted("Title")
        return self._subwords
