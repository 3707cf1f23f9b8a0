"""Auto: the best extractor that is at hand for these items, said aloud.

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
    """MiniLM where it is installed, LSA otherwise; co-occurrence where no item has a text.

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

    def for_catalog(self, catalog: Catalog) -> FeatureExtractor:
        """Return this extractor, or `collaborative` with its defaults where no item has a text."""
        if any(catalog.texts(self.config.columns)):
            return self
        log.warning("features: collaborative, because none of %d items has a text.", len(catalog))
        cls = lookup(FEATURES, "collaborative", what="features.name")
        stand_in: FeatureExtractor = cls(cls.Config())
        return stand_in

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
        """Return the vectors (N, E) float32 of what `for_catalog` and `resolve` choose."""
        chosen = self.for_catalog(catalog)
        if chosen is self:
            config = self.resolve()
            cls = lookup(FEATURES, config.to_dict()["name"], what="features.name")
            chosen = cls(config)
        return chosen.embed(catalog, interactions, workplace)
