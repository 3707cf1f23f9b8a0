"""FeatureExtractor: what every source of item vectors must offer.

It does not know what the vectors are for, nor does it cache: the pipeline does, keyed by what
`resolve` returns.

Shapes: N items, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from genrec.config import StrictConfig
from genrec.errors import DataError

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

MAX_NAMED = 5


def _alone() -> None:
    """Wait for nobody."""


@dataclass(frozen=True)
class Workplace:
    """Where partial results lie, and which processes share the work.

    Args:
        folder: for finished parts, on a disk that all processes see; None keeps none.
        index: number of this process.
        count: number of processes; more than one need a folder.
        barrier: lets all processes meet.
    """

    folder: Path | None = None
    index: int = 0
    count: int = 1
    barrier: Callable[[], None] = _alone


ALONE = Workplace()


@dataclass(frozen=True)
class Block:
    """Where one part lies in vectors that were put together.

    Args:
        name: of the part's extractor.
        start: first column.
        stop: one past the last column.
    """

    name: str
    start: int
    stop: int


class FeatureExtractor(ABC):
    """Turns a catalogue into vectors.

    Args:
        config: the subclass's `Config`.
    """

    Config: ClassVar[type[StrictConfig]] = StrictConfig
    needs_interactions: bool = False
    """Whether `embed` must be given the training interactions."""
    shares_work: bool = False
    """Whether several processes take a part of `embed` each (otherwise one does it)."""
    blocks: tuple[Block, ...] = ()
    """After `embed`: which columns came from which part, where vectors are put together."""
    embeds_alone: bool = True
    """Whether an item's vector depends on that item alone: `embed` then serves for items that join
    later, too."""

    parts: Sequence[FeatureExtractor] = ()
    """Extractors whose vectors `join` puts together, if it has any."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32, finite, in the row order of the catalogue.

        An item about which nothing is known has the zero vector.

        Args:
            catalog: N items.
            interactions: `interactions.training()`, where `needs_interactions` says so.
            workplace: where and with whom to work.
        """

    def join(
        self,
        catalog: Catalog,
        vectors: Sequence[np.ndarray],
        interactions: Interactions | None = None,
    ) -> np.ndarray:
        """Return what `embed` returns, from the vectors of `parts`; see `embed`."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def for_catalog(self, catalog: Catalog) -> FeatureExtractor:
        """Return what these items allow: this extractor, unless it chooses by what is there."""
        return self

    @property
    def embeds_later(self) -> bool:
        """Whether `embed_later` can embed items that join when the others have their vectors."""
        return self.embeds_alone and not self.needs_interactions

    def fitted(self) -> dict[str, np.ndarray]:
        """Return, after `embed`, what `embed_later` needs; {} where items are embedded alone."""
        return {}

    def embed_later(
        self, catalog: Catalog, fitted: Mapping[str, np.ndarray], vectors_NE: np.ndarray | None
    ) -> np.ndarray:
        """Return vectors (M, E) float32 of items that join later, in the space of the others.

        Args:
            catalog: M items.
            fitted: what `fitted` returned.
            vectors_NE: what `embed` returned then; None will do where `fitted` returned {}.
        """
        return self.embed(catalog)

    def resolve(self) -> StrictConfig:
        """Return the configuration that fixes the result, before anything is computed.

        "auto" has been replaced by the extractor that will run, and files and models are named by
        a digest of their content: two equal answers (and equal catalogues) mean equal vectors.
        """
        return self.config

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return digests of what `embed` will read beside the catalogue and the configuration.

        They join the key of the cache: an image file that changes makes new vectors.
        """
        return {}

    def content_columns(self, width: int, blocks: Sequence[Block]) -> tuple[int, ...]:
        """Return which columns of finished vectors describe an item without interactions.

        Args:
            width: E.
            blocks: as they were after `embed`.
        """
        return () if self.needs_interactions else tuple(range(width))


def finished(vectors_NE: np.ndarray, item_ids: list[str], *, normalize: bool) -> np.ndarray:
    """Return vectors as contiguous float32, checked, scaled to length 1 if asked.

    A zero vector (an item without text) stays zero.

    Raises:
        DataError: NaN or infinite values, with the items that have them.
    """
    vectors = np.ascontiguousarray(vectors_NE, dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        shown = ", ".join(repr(item_ids[row]) for row in bad[:MAX_NAMED])
        raise DataError(
            f"features: the vectors of {len(bad)} item(s) hold NaN or infinity, e.g. {shown}. "
            "Expected finite numbers; repair these vectors or leave the items out."
        )
    if normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return vectors
