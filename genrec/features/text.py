"""LSA: item texts to vectors with TF-IDF and a truncated SVD, without any pretrained model.

It fits on the catalogue that it embeds, so vectors of two catalogues cannot be compared. Sentence
encoders are in `sentence_encoder.py`.

Shapes: N items, E embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from genrec.config import StrictConfig
from genrec.errors import DataError
from genrec.features.base import ALONE, FeatureExtractor, Workplace, finished
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)
TOKEN_PATTERN = r"(?u)\b\w+\b"  # scikit-learn's default drops words of one letter or digit


class LSA(FeatureExtractor):
    """Latent semantic analysis (Deerwester et al. 1990) by scikit-learn.

    Args:
        config: see `LSA.Config`.
    """

    class Config(StrictConfig):
        """Settings of LSA."""

        name: Literal["lsa"] = "lsa"
        """Name in the registry."""
        columns: tuple[str, ...] | None = None
        """Catalogue columns that make up the text, in order; default all."""
        num_dimensions: int = Field(default=256, ge=1)
        """Width E of the vectors; smaller when the catalogue has fewer terms or items."""
        max_terms: int = Field(default=50_000, ge=1)
        """Most frequent terms kept."""
        max_ngram: int = Field(default=2, ge=1)
        """Longest run of words that counts as a term."""
        num_iterations: int = Field(default=7, ge=1)
        """Power iterations of the randomized SVD."""
        normalize: bool = True
        """Scale vectors to length 1."""
        seed: int = Field(default=0, ge=0)
        """Seed of the randomized SVD."""

    embeds_alone = False
    config: LSA.Config

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item without a known term gets the zero vector.

        Raises:
            DataError: no item has any text, or a column is unknown.
        """
        config = self.config
        texts = catalog.texts(config.columns)
        if not any(text.strip() for text in texts):
            raise DataError(
                f"features.lsa: none of the {len(texts)} items has text in "
                f"{', '.join(config.columns or catalog.columns) or 'any column'}. Expected titles "
                "or attributes; prepare the data with an items file, or use features.name=file."
            )
        terms = TfidfVectorizer(
            token_pattern=TOKEN_PATTERN,
            ngram_range=(1, config.max_ngram),
            max_features=config.max_terms,
            sublinear_tf=True,
            dtype=np.float32,
        )
        try:
            weights = terms.fit_transform(texts)
        except ValueError as error:  # texts of punctuation only
            raise DataError(
                f"features.lsa: the item texts hold no words ({error}). Expected words; use "
                "features.name=sentence_encoder or features.name=file."
            ) from None
        width = min(config.num_dimensions, *weights.shape)
        if width < config.num_dimensions:
            log.info("LSA: %d dimensions (%d items, %d terms).", width, *weights.shape)
        left, singular, _ = randomized_svd(
            weights, width, n_iter=config.num_iterations, random_state=config.seed
        )
        return finished(left * singular, catalog.item_ids, normalize=config.normalize)
