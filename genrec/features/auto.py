"""Auto: the best text extractor that is at hand here, said aloud.

It decides; the work is done by the extractor that it names. Use a concrete name in a configuration
whose numbers should be the same on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from genrec.config import StrictConfig
from genrec.features import FEATURES
from genrec.features.base import ALONE, FeatureExtractor, Workplace
from genrec.runtime import get_logger, lookup

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)


class Auto(FeatureExtractor):
    """MiniLM where it is installed, LSA otherwise.

    Args:
        config: see `Auto.Config`.
    """

    class Config(StrictConfig):
        """Settings of the automatic choice."""

        name: Literal["auto"] = "auto"
        """Name in the registry."""
        columns: tuple[str, ...] | None = None
        """Catalogue columns that make up the text, in order; default all."""

    config: Auto.Config

    def resolve(self) -> StrictConfig:
        """Return the configuration of the extractor that will run, and log the reason."""
        from genrec.features.sentence_encoder import SentenceEncoder, available

        reason = available()
        if reason is None:
            log.info("features: sentence_encoder (MiniLM is installed).")
            return SentenceEncoder(SentenceEncoder.Config(columns=self.config.columns)).resolve()
        log.warning("features: lsa, because the sentence encoder cannot run here: %s", reason)
        cls = lookup(FEATURES, "lsa", what="features.name")
        resolved: StrictConfig = cls(cls.Config(columns=self.config.columns)).resolve()
        return resolved

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return the vectors (N, E) float32 of the extractor that `resolve` names."""
        config = self.resolve()
        cls = lookup(FEATURES, config.to_dict()["name"], what="features.name")
        vectors: np.ndarray = cls(config).embed(catalog, interactions, workplace)
        return vectors
