"""What if one identifier says two things? Codes of several tokenizers in one semantic ID.

HID of Hua et al. 2023 (2305.06569) is a path of clusters or categories followed by a code of the
item's own; content codes followed by codes of collaborative vectors are another. It knows nothing
about how a part makes its codes.

Shapes: N fitted items, M encoded items, L levels of all parts together, K codes of the last level,
E width of decoded vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from genrec.config import StrictConfig, parse_component
from genrec.errors import ConfigError, UserError
from genrec.features.collaborative import CollaborativeConfig, collaborative_vectors
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import FloatArray, IntArray, ItemTokenizer, not_fitted
from genrec.tokenizers.fixed import KnownItems, training_interactions
from genrec.tokenizers.parts import load_part, make_part, part_state

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

TABLE = "collaborative."  # prefix of the table of collaborative vectors in the state


class Part(StrictConfig):
    """One tokenizer of a hybrid. A bare name stands for that tokenizer with its defaults."""

    tokenizer: dict[str, Any]
    """A tokenizer's section; its settings are filled in and checked."""
    vectors: Literal["content", "collaborative"] = "content"
    """What it quantises: the catalogue's vectors, or collaborative vectors of the training
    interactions, which only fitted items have."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        section = data.get("tokenizer") if isinstance(data, Mapping) else data
        if not isinstance(section, str | Mapping):
            return data  # the field's own check says what is wrong
        found, config = parse_component(TOKENIZERS, section, path="tokenizer")
        tokenizer: ItemTokenizer = found(config)
        if tokenizer.shared_vocabulary:
            raise ConfigError(
                f"tokenizer.name: got {tokenizer.name!r}, whose levels draw from one vocabulary "
                "and whose semantic IDs end anywhere. Expected parts with a fixed number of levels."
            )
        rest = dict(data) if isinstance(data, Mapping) else {}
        if rest.get("vectors") == "collaborative" and "vectors" not in tokenizer.needs:
            raise ConfigError(
                f"vectors: got 'collaborative', but {tokenizer.name!r} reads no vectors. Leave it "
                "out, or use a tokenizer that quantises vectors (rqkmeans)."
            )
        return {**rest, "tokenizer": config.to_dict()}


class Hybrid(ItemTokenizer):
    """The codes of several tokenizers, one after the other or interleaved.

    Args:
        config: see `Hybrid.Config`.
    """

    class Config(StrictConfig):
        """Settings of a hybrid."""

        name: Literal["hybrid"] = "hybrid"
        """Name in the registry."""
        parts: tuple[Part, ...] = Field(default_factory=lambda: _default_parts())
        """The tokenizers, in the order of their codes (default: HID, a path of collaborative
        clusters, then a code of the item's own)."""
        order: Literal["concatenate", "interleave"] = "concatenate"
        """All codes of the first part, then all of the second (a1 a2 b1 b2), or level by level
        (a1 b1 a2 b2; a longer part goes on alone)."""
        collaborative: CollaborativeConfig = CollaborativeConfig()
        """How collaborative vectors are made, for parts with `vectors: collaborative`."""
        seed: int = Field(default=0, ge=0)
        """Added to the seeds of the parts and of the collaborative vectors."""

        @model_validator(mode="after")
        def _several_parts(self) -> Self:
            if len(self.parts) < 2:
                raise ConfigError(
                    f"parts: got {len(self.parts)} part(s), expected at least 2. One tokenizer "
                    "alone needs no hybrid: set tokenizer.name to it."
                )
            return self

    config: Hybrid.Config

    def __init__(self, config: Hybrid.Config) -> None:
        super().__init__(config)
        self._parts = [
            make_part(part.tokenizer, path=f"tokenizer.parts.{place}.tokenizer", seed=config.seed)
            for place, part in enumerate(config.parts)
        ]
        self._table: KnownItems | None = None
        self._is_fitted = False

    @property
    def parts(self) -> tuple[ItemTokenizer, ...]:
        """The tokenizers of the parts."""
        return tuple(self._parts)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the parts need; collaborative vectors need interactions."""
        found: set[str] = set()
        for part, tokenizer in zip(self.config.parts, self._parts, strict=True):
            if part.vectors == "collaborative":
                found |= tokenizer.needs - {"vectors"} | {"interactions"}
            else:
                found |= tokenizer.needs
        return frozenset(found)

    @property
    def codes_new_items(self) -> bool:  # type: ignore[override]
        """Whether every part does, and none quantises collaborative vectors."""
        return not self._is_collaborative and all(p.codes_new_items for p in self._parts)

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether the codes of some part stand for the catalogue's vectors."""
        return bool(self._decoding)

    @property
    def _is_collaborative(self) -> bool:
        return any(part.vectors == "collaborative" for part in self.config.parts)

    @property
    def _decoding(self) -> list[int]:
        parts = enumerate(zip(self.config.parts, self._parts, strict=True))
        return [n for n, (part, own) in parts if part.vectors == "content" and own.decodes]

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Fit each part, independently of the others.

        Raises:
            UserError: a part cannot be fitted; the message says which.
        """
        if self._is_collaborative:
            training = training_interactions(interactions, catalog, name="hybrid")
            options = self.config.collaborative
            options = options.model_copy(update={"seed": options.seed + self.config.seed})
            vectors = collaborative_vectors(training, options)
            self._table = KnownItems(catalog.item_ids, vectors)
        for place, tokenizer in enumerate(self._parts):
            items = self._items(place, catalog)
            self._try(place, lambda t=tokenizer, c=items: t.fit(c, interactions))  # type: ignore[misc]
        self._is_fitted = True
        return self

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32 in the configured order.

        Raises:
            UserError: a part has no codes for some item.
        """
        self._require_fitted()
        codes = []
        for place, tokenizer in enumerate(self._parts):
            items = self._items(place, catalog)
            codes.append(self._try(place, lambda t=tokenizer, c=items: t.encode(c)))  # type: ignore[misc]
        return np.ascontiguousarray(np.concatenate(codes, axis=1)[:, self._columns()])

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return what the codes of the parts that quantise content stand for, side by side.

        Args:
            codes_ML: in the configured order.
        """
        self._require_fitted()
        if not self.decodes:
            return super().decode(codes_ML)
        own = np.empty_like(codes_ML)
        own[:, self._columns()] = codes_ML
        starts = self._starts()
        parts = [self._parts[n].decode(own[:, starts[n] : starts[n + 1]]) for n in self._decoding]
        return np.concatenate(parts, axis=1)

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors that `decode` approximates: one copy per part that quantises them."""
        if not self.decodes:
            return super().inputs(catalog)
        return np.concatenate([self._parts[n].inputs(catalog) for n in self._decoding], axis=1)

    def last_level_distances(self, catalog: Catalog) -> FloatArray:
        """Return the distances (M, K) of the part whose code comes last."""
        self._require_fitted()
        place = int(np.searchsorted(self._starts(), self._columns()[-1], side="right")) - 1
        return self._parts[place].last_level_distances(self._items(place, catalog))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Sizes of the parts' levels in the configured order."""
        self._require_fitted()
        sizes = list(itertools.chain.from_iterable(part.codebook_sizes for part in self._parts))
        return tuple(sizes[column] for column in self._columns())

    def state(self) -> dict[str, np.ndarray]:
        """Return the parts' states under `part_0/`, `part_1/` ... and the collaborative vectors."""
        self._require_fitted()
        state: dict[str, np.ndarray] = {}
        for place, part in enumerate(self._parts):
            state |= part_state(part, f"part_{place}")
        return state if self._table is None else {**state, **self._table.state(TABLE)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        for place, part in enumerate(self._parts):
            load_part(part, state, f"part_{place}")
        self._table = KnownItems.of_state(state, TABLE) if self._is_collaborative else None
        self._is_fitted = True
        return self

    def _items(self, place: int, catalog: Catalog) -> Catalog:
        """Return the catalogue with the vectors that a part quantises."""
        if self.config.parts[place].vectors == "content":
            return catalog
        assert self._table is not None
        return catalog.with_vectors(self._table.take(catalog.item_ids, name="hybrid"))

    def _starts(self) -> list[int]:
        """Return where each part's codes start when concatenated, and where the last one ends."""
        lengths = (len(part.codebook_sizes) for part in self._parts)
        return [0, *itertools.accumulate(lengths)]

    def _columns(self) -> list[int]:
        """Return, for each level, its column among the concatenated codes."""
        bounds = list(itertools.pairwise(self._starts()))
        if self.config.order == "interleave":
            rounds = itertools.zip_longest(*(range(a, b) for a, b in bounds))
            return [column for columns in rounds for column in columns if column is not None]
        return list(range(bounds[-1][1]))

    def _try(self, place: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            part = f"tokenizer.parts.{place} ({self._parts[place].name})"
            raise type(error)(f"{part}: {error}") from None

    def _require_fitted(self) -> None:
        if not self._is_fitted:
            raise not_fitted("Hybrid")


def _default_parts() -> tuple[Part, ...]:
    names = ("collaborative", "independent")
    return tuple(Part(tokenizer={"name": name}) for name in names)
