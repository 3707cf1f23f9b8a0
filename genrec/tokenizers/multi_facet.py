"""Multi-facet identifiers: attributes, title and id of an item in one vocabulary (TransRec,
Lin et al. 2024, 2310.06491).

It says how the facets of an item are spelled. Generating several facets and finding the items that
they point to together is grounding (`genrec.decoding.grounding`).

Shapes: N fitted items, M encoded items, L levels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator

from genrec.artifacts import pack_strings, unpack_strings
from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.item_index import END
from genrec.tokenizers.base import IntArray, ItemTokenizer, not_fitted
from genrec.tokenizers.category import COLUMNS
from genrec.tokenizers.parts import complete_part, load_part, make_part, part_state
from genrec.tokenizers.pieces.feature_sets import FeatureSets
from genrec.tokenizers.text.item_texts import Missing, item_texts
from genrec.tokenizers.text.subwords import FIRST_SUBWORD, Subwords

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

Facet = Literal["attributes", "title", "id"]
PART = "tokenizer.id_codes"


class MultiFacet(ItemTokenizer):
    """Facets one after the other, each behind a marker of its own.

    Code 0 is `END`; then come the markers in the order of `facets`, the codes of the id, the
    attribute values, and the sub-words of titles.

    Args:
        config: see `MultiFacet.Config`.
    """

    class Config(StrictConfig):
        """Settings of multi-facet identifiers."""

        name: Literal["multi_facet"] = "multi_facet"
        """Name in the registry."""
        facets: tuple[Facet, ...] = ("attributes", "title", "id")
        """Facets in the order of the identifier, "id" among them: it tells items apart (the paper
        generates each facet by itself, so it has no order)."""
        id_codes: dict[str, Any] = Field(
            default={"name": "sequential", "base": 10}, validate_default=True
        )
        """Section of the tokenizer whose codes are the id (the paper: the digits of a number). New
        items have an id only if it codes new items (rqkmeans)."""
        attributes: tuple[str, ...] | None = None
        """Columns whose values are attributes; None: those of categories, category, genres, genre
        and class that the catalogue has."""
        max_values: int = Field(default=3, ge=1)
        """Values of a column that an item keeps, the first ones."""
        columns: tuple[str, ...] = ("title",)
        """Columns that make up the title."""
        title_tokens: int = Field(default=6, ge=1)
        """Sub-words of a title in the identifier, the first ones (`facets()` has all of them; the
        paper generates up to 10)."""
        subwords: str = "train"
        """"train": byte-pair encoding of the catalogue's titles. Else a folder with a
        `tokenizer.json`, or the name of a fast Hugging Face tokenizer on this machine."""
        num_subwords: int = Field(default=2048, ge=FIRST_SUBWORD)
        """Sub-words at most when trained, 256 bytes included."""
        missing: Missing = "text"
        """What an item without a title is called: its text over all columns or else its id
        ("text"), its id at once ("id"), or nothing: an error ("error")."""
        seed: int = Field(default=0, ge=0)
        """Moves the seed of `id_codes`."""

        @field_validator("facets")
        @classmethod
        def _with_id(cls, facets: tuple[Facet, ...]) -> tuple[Facet, ...]:
            if "id" not in facets or len(set(facets)) < len(facets):
                raise ValueError("expected each facet at most once, and 'id' among them")
            return facets

        @field_validator("id_codes", mode="before")
        @classmethod
        def _complete(cls, section: Any) -> Any:
            return complete_part(section, default="sequential")

    config: MultiFacet.Config
    decodes: ClassVar[bool] = False
    shared_vocabulary: ClassVar[bool] = True

    def __init__(self, config: MultiFacet.Config) -> None:
        super().__init__(config)
        self._ids = self._new_ids()
        self._vocabulary: _Vocabulary | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Texts, and what `id_codes` needs."""
        return frozenset({"texts"}) | self._ids.needs

    @property
    def codes_new_items(self) -> bool:  # type: ignore[override]
        """Whether `id_codes` does."""
        return self._ids.codes_new_items

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Fit `id_codes`, collect attribute values, learn sub-words.

        Raises:
            UserError: no items, no sub-words of that name, or what `id_codes` raises.
            DataError: no such column, or items without a title and `missing` is "error".
        """
        if not len(catalog):
            raise UserError(f"{self.name}: got a catalogue without items, expected at least one.")
        config = self.config
        texts = self._texts(catalog)
        ids = self._new_ids().fit(catalog, interactions)
        values = FeatureSets.of(
            np.zeros((len(catalog), 0), np.int32),
            (),
            catalog,
            attributes=self._columns(catalog),
            max_values=config.max_values,
            num_buckets=0,
        )
        subwords = Subwords.make(config.subwords, texts, config.num_subwords)
        longest = int(subwords.encode_all(texts, 1)[1].max())
        title_tokens = min(longest, config.title_tokens)
        self._ids = ids
        self._vocabulary = _Vocabulary(
            len(config.facets), ids.codebook_sizes, values, subwords, title_tokens
        )
        return self

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32: marker and facet after marker and facet, then `END`.

        Raises:
            UserError: `id_codes` has no codes for items that were not fitted.
        """
        facets, limit = self.facets(catalog), 1 + self._fitted().title_tokens
        codes_ML = np.full((len(catalog), len(self.codebook_sizes)), END, np.int32)
        for row in range(len(catalog)):
            codes: list[int] = []
            for name in self.config.facets:
                codes += facets[name][row][: limit if name == "title" else None]
            codes_ML[row, : len(codes)] = codes
        return codes_ML

    def facets(self, catalog: Catalog) -> dict[str, list[tuple[int, ...]]]:
        """Return each facet of M items as codes, its marker first; titles are not cut.

        What a grounding index is built from: `NgramIndex.build(tokenizer.facets(catalog))`.

        Raises:
            UserError: `id_codes` has no codes for items that were not fitted.
        """
        return {
            name: [(marker, *codes) for codes in self._codes_of(name, catalog)]
            for marker, name in enumerate(self.config.facets, start=1)
        }

    def _codes_of(self, facet: Facet, catalog: Catalog) -> list[list[int]]:
        vocabulary = self._fitted()
        if facet == "id":
            ids: list[list[int]] = (self._ids.encode(catalog) + vocabulary.id_firsts).tolist()
            return ids
        if facet == "attributes":
            tokens = vocabulary.values.encode(np.zeros((len(catalog), 0), np.int32), catalog)
            return [(row[row != END] + vocabulary.before_values).tolist() for row in tokens]
        texts, shift = self._texts(catalog), vocabulary.before_subwords
        return [[code + shift for code in vocabulary.subwords.encode(text)] for text in texts]

    def text_of(self, codes: Iterable[int]) -> str:
        """Return what codes say, facet after facet: "attributes: a, b | title: foo | id: 0 1 7".

        Any run of codes will do, n-grams that begin in the middle of a facet included.
        """
        vocabulary = self._fitted()
        parts: list[tuple[str, list[int]]] = []
        for code in codes:
            if code == END:
                break
            if code <= len(self.config.facets):
                parts.append((f"{self.config.facets[code - 1]}: ", []))
            else:
                parts = parts or [("", [])]
                parts[-1][1].append(code)
        return " | ".join(name + vocabulary.text_of(found) for name, found in parts)

    def _texts(self, catalog: Catalog) -> list[str]:
        return item_texts(catalog, self.config.columns, missing=self.config.missing)[0]

    def _columns(self, catalog: Catalog) -> tuple[str, ...]:
        if "attributes" not in self.config.facets:
            return ()
        if self.config.attributes is not None:
            return self.config.attributes
        return tuple(name for name in COLUMNS if name in catalog.columns)

    def _new_ids(self) -> ItemTokenizer:
        return make_part(self.config.id_codes, path=PART, seed=self.config.seed)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The vocabulary, once for every code of the longest possible identifier."""
        vocabulary = self._fitted()
        lengths = {
            "id": len(vocabulary.id_sizes),
            "attributes": vocabulary.values.width,
            "title": vocabulary.title_tokens,
        }
        return (vocabulary.size,) * sum(1 + lengths[name] for name in self.config.facets)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of `id_codes`, attribute columns and values, and the sub-words."""
        vocabulary = self._fitted()
        columns, column_offsets = pack_strings(list(vocabulary.values.attributes))
        return {
            **vocabulary.subwords.state(),
            **vocabulary.values.state(),
            **part_state(self._ids, "id_codes"),
            "columns": columns,
            "column_offsets": column_offsets,
            "title_tokens": np.array([vocabulary.title_tokens], np.int64),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        load_part(self._ids, state, "id_codes")
        columns = unpack_strings(state["columns"], state["column_offsets"])
        self._vocabulary = _Vocabulary(
            len(self.config.facets),
            self._ids.codebook_sizes,
            FeatureSets.from_state(state, (), attributes=columns, num_buckets=0),
            Subwords.from_state(state),
            int(state["title_tokens"][0]),
        )
        return self

    def _fitted(self) -> _Vocabulary:
        if self._vocabulary is None:
            raise not_fitted("MultiFacet")
        return self._vocabulary


@dataclass(frozen=True)
class _Vocabulary:
    """Where the codes of each facet begin; `title_tokens` is how many of a title are kept."""

    num_facets: int
    id_sizes: tuple[int, ...]
    values: FeatureSets
    subwords: Subwords
    title_tokens: int

    @property
    def id_firsts(self) -> IntArray:
        """The first code of each level of the id."""
        return 1 + self.num_facets + np.cumsum([0, *self.id_sizes[:-1]])

    @property
    def before_values(self) -> int:
        """What is added to the tokens of attribute values, which start at 1."""
        return self.num_facets + sum(self.id_sizes)

    @property
    def before_subwords(self) -> int:
        """What is added to the codes of sub-words, which start at 1."""
        return self.before_values + self.values.end - 1

    @property
    def size(self) -> int:
        """Number of codes, V."""
        return self.before_subwords + self.subwords.size

    def text_of(self, codes: list[int]) -> str:
        """Return what the codes of one facet, without its marker, say."""
        if all(code > self.before_subwords for code in codes):
            return self.subwords.decode(code - self.before_subwords for code in codes)
        names = [value for column in self.values.values for value in column]
        return " ".join(
            names[code - self.before_values - 1]
            if self.before_values < code <= self.before_subwords
            else str(code)
            for code in codes
        )
