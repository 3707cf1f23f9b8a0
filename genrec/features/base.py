"""FeatureExtractor: what every source of item vectors must offer.

It does not know what the vectors are for, nor does it cache: the pipeline does, keyed by what
`resolve` returns.

Shapes: N items, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from genrec.config import StrictConfig
from genrec.errors import DataError

if TYPE_CHECKING:
    from genrec.data import Catalog

MAX_NAMED = 5


class FeatureExtractor(ABC):
    """Turns a catalogue into vectors.

    Args:
        config: the subclass's `Config`.
    """

    Config: ClassVar[type[StrictConfig]] = StrictConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def embed(self, catalog: Catalog) -> np.ndarray:
        """Return vectors (N, E) float32, finite, in the row order of the catalogue."""

    def resolve(self) -> StrictConfig:
        """Return the configuration that fixes the result, before anything is computed.

        "auto" has been replaced by the extractor that will run, and files and models are named by
        a digest of their content: two equal answers (and equal catalogues) mean equal vectors.
        """
        return self.config


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
