"""ItemTokenizer: what every way of turning items into codes must offer, and how it is stored.

It knows neither how codes are learned (one file per method beside it) nor how they become unique
(`collisions.py`) nor what a model does with them.

Shapes: N fitted items, M encoded items, L levels, K codes, E embedding width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from genrec.artifacts import load_artifact, save_artifact
from genrec.config import StrictConfig, parse_component
from genrec.errors import DataError, UserError
from genrec.runtime import lookup
from genrec.tokenizers import COLLISIONS, SHARED_COLLISIONS, TOKENIZERS

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions
    from genrec.item_index import CollisionPolicy

IntArray = np.ndarray
FloatArray = np.ndarray
KIND = "tokenizer"
MAX_NAMED = 5


class ItemTokenizer(ABC):
    """Turns items into codes.

    A subclass has a nested `Config`, one line in `TOKENIZERS`, and the methods below. After `fit`
    (or `load_state`) it never changes: `encode` depends on one item at a time and on nothing else.

    Args:
        config: the subclass's `Config`.
    """

    Config: ClassVar[type[StrictConfig]] = StrictConfig
    decodes: ClassVar[bool] = True
    """Whether codes stand for vectors (`inputs` and `decode` work)."""
    codes_new_items: ClassVar[bool] = True
    """Whether `encode` works for items that `fit` did not see."""
    shared_vocabulary: ClassVar[bool] = False
    """Whether all levels draw from one vocabulary (words, sub-words): `codebook_sizes` is then
    (V,) * L, and code 0 ends a semantic ID that is shorter than L and fills the rest of its row."""
    needs: ClassVar[frozenset[str]] = frozenset({"vectors"})
    """What `fit` and `encode` read: of "vectors", "interactions" (fit only) and "texts". Without
    "vectors" the items are not embedded at all."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Learn from a catalogue with vectors.

        Args:
            catalog: N items; `catalog.vectors` (N, E) float32.
            interactions: only the training split may be used.

        Raises:
            UserError: the catalogue cannot carry such codes (too few distinct vectors, NaN).
        """

    @abstractmethod
    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32; each item's codes depend on that item alone."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each of the L levels."""

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Return all that was learned, as named arrays."""

    @abstractmethod
    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors (M, E) float32 that the codes quantise, after any normalisation."""
        raise UserError(f"{self.name}: its codes do not stand for vectors; use another tokenizer.")

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return the vectors (M, E) float32 that codes stand for, in the space of `inputs`."""
        raise UserError(f"{self.name}: its codes do not stand for vectors; use another tokenizer.")

    def last_level_distances(self, catalog: Catalog) -> FloatArray:
        """Return squared distances (M, K) from each item to every code of its last level."""
        raise UserError(
            f"{self.name}: has no distances to its last codes. Use collisions='extra_level'."
        )

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self.config.name

    def collision_policy(
        self, name: str, catalog: Catalog | None = None, *, reserve: int = 0
    ) -> CollisionPolicy:
        """Return the collision policy registered under `name`.

        Args:
            name: a key of `COLLISIONS`.
            catalog: the items that will be made unique; a policy that weighs distances asks this
                tokenizer for those of the colliding items.
            reserve: numbers to keep free for items that are added later, where the policy numbers
                items.

        Raises:
            UserError: the policy does not suit this tokenizer, or has nothing to reserve.
        """
        policy = lookup(COLLISIONS, name, what="collisions")
        if self.shared_vocabulary and name not in SHARED_COLLISIONS:
            raise UserError(
                f"collisions: got {name!r}, which weighs distances to the codes of a last level; "
                f"all levels of {self.name} draw from one vocabulary. Expected one of "
                f"{', '.join(SHARED_COLLISIONS)}."
            )
        if self.shared_vocabulary:
            policy = lookup(SHARED_COLLISIONS, name, what="collisions")
        asked = inspect.signature(policy).parameters
        if reserve and "reserve" not in asked:
            raise UserError(
                f"collisions: got reserve={reserve}, but {name!r} numbers no items. Use "
                "collisions='extra_level', or leave the reserve out."
            )
        settings: dict[str, Any] = {"reserve": reserve} if reserve else {}
        if catalog is not None and "distances" in asked:
            settings["distances"] = lambda rows: self.last_level_distances(catalog.select(rows))
        return partial(policy, **settings) if settings else policy

    def save(self, path: str | Path, upstream: Mapping[str, str] | None = None) -> None:
        """Write the fitted tokenizer as an artifact folder.

        Args:
            path: folder to create or replace.
            upstream: fingerprints of what it was fitted on.
        """
        sizes = list(self.codebook_sizes)
        save_artifact(
            path,
            kind=KIND,
            arrays=self.state(),
            config=self.config.to_dict(),
            upstream=upstream,
            extra={"codebook_sizes": sizes},
        )

    @classmethod
    def load(cls, path: str | Path) -> ItemTokenizer:
        """Read a tokenizer artifact of any registered class.

        Raises:
            ArtifactError: missing, damaged, or not a tokenizer.
        """
        artifact = load_artifact(path, kind=KIND)
        found, config = parse_component(TOKENIZERS, artifact.config, path="tokenizer")
        tokenizer: ItemTokenizer = found(config).load_state(artifact.arrays)
        return tokenizer


def checked_vectors(
    catalog: Catalog, *, normalize: bool = False, width: int | None = None
) -> FloatArray:
    """Return the vectors of a catalogue (M, E) float32, checked.

    Args:
        catalog: items with vectors.
        normalize: scale each vector to length 1 (a zero vector stays zero).
        width: E that the tokenizer was fitted with.

    Raises:
        UserError: no vectors yet, or not as wide as the fitted ones.
        DataError: NaN or infinite values, with the items that have them.
    """
    if catalog.vectors is None:
        raise UserError(
            "tokenizer: the catalogue has no vectors. Embed it first: "
            "catalog.with_vectors(extractor.embed(catalog))."
        )
    vectors = np.ascontiguousarray(catalog.vectors, dtype=np.float32)
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise UserError(
            f"tokenizer: got vectors of shape {vectors.shape}, expected (items, {width or 'width'})"
            ". Embed these items with the extractor that the tokenizer was fitted on."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        shown = ", ".join(repr(catalog.item_ids[row]) for row in bad[:MAX_NAMED])
        raise DataError(
            f"tokenizer: the vectors of {len(bad)} item(s) hold NaN or infinity, e.g. {shown}. "
            "Expected finite numbers; embed these items again or leave them out."
        )
    return unit_length(vectors) if normalize else vectors


def unit_length(vectors_NE: FloatArray) -> FloatArray:
    """Return rows scaled to length 1; rows of zeros stay zeros."""
    norms = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return np.divide(vectors_NE, norms, out=np.zeros_like(vectors_NE), where=norms > 0)


def require_distinct(vectors_NE: FloatArray, codebook_size: int) -> None:
    """Raise `UserError` unless there are at least `codebook_size` different vectors."""
    distinct = count_distinct(vectors_NE, stop=codebook_size)
    if distinct < codebook_size:
        raise UserError(
            f"tokenizer.codebook_size: got {codebook_size}, but the {len(vectors_NE)} items have "
            f"only {distinct} different vector(s). Set tokenizer.codebook_size={max(1, distinct)} "
            "or less, or check that the items have texts of their own (genrec doctor)."
        )


def count_distinct(vectors_NE: FloatArray, *, stop: int) -> int:
    """Return the number of different rows, counting no further than `stop`."""
    seen: set[bytes] = set()
    for row in vectors_NE:
        seen.add((row + 0.0).tobytes())  # + 0.0: -0.0 and 0.0 are one value
        if len(seen) >= stop:
            break
    return len(seen)


def not_fitted(name: str) -> UserError:
    """Return the error for using a tokenizer before it was fitted or loaded."""
    return UserError(f"{name}: not fitted yet. Call fit(catalog) or ItemTokenizer.load(path).")
