"""Sentence encoder: item texts to vectors with a sentence-transformers model on this machine.

It never downloads: a model is an asset, a local folder, or a hub name that is already in the local
cache. Encoders without sentence-transformers files are not its business.

Shapes: N items, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.errors import AssetError
from genrec.features.base import ALONE, FeatureExtractor, Workplace, finished
from genrec.features.pretrained import checked_digest, find_model, require
from genrec.features.shards import of_distinct_texts
from genrec.runtime import choose_device

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

PACKAGE = "sentence_transformers"
MARKER = "modules.json"
INSTEAD = "use features.name=lsa"


class SentenceEncoder(FeatureExtractor):
    """Pooled transformer embeddings of item texts.

    Args:
        config: see `SentenceEncoder.Config`.
    """

    class Config(StrictConfig):
        """Settings of the sentence encoder."""

        name: Literal["sentence_encoder"] = "sentence_encoder"
        """Name in the registry."""
        model: str = "minilm"
        """Asset name, local folder, or hub name in the local cache. minilm = all-MiniLM-L6-v2,
        384 dimensions, at most 256 tokens."""
        columns: tuple[str, ...] | None = None
        """Catalogue columns that make up the text, in order; default all."""
        batch_size: int = Field(default=64, ge=1)
        """Texts encoded together (speed and memory)."""
        max_tokens: int | None = Field(default=None, ge=1)
        """Cut texts after this many tokens; default the model's own limit."""
        normalize: bool = True
        """Scale vectors to length 1."""
        digest: str | None = None
        """Fingerprint of the model's files. `resolve` fills it in, so that a cache key names the
        very weights; when set, other weights are refused."""

    config: SentenceEncoder.Config

    shares_work = True

    def resolve(self) -> SentenceEncoder.Config:
        """Return the configuration with the digest of the model's files.

        Raises:
            AssetError: the model or the package is not on this machine, or the digest differs.
        """
        _require_package()
        model = self.config.model
        digest = checked_digest(model, _folder(model), self.config.digest)
        return self.config.model_copy(update={"digest": digest})

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item without text gets the zero vector.

        Raises:
            AssetError: the model or the package is not on this machine.
        """
        resolved = self.resolve()

        def encode(texts: Sequence[str]) -> np.ndarray:
            found: np.ndarray = self._model.encode(
                list(texts), batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False
            )
            return found

        vectors = of_distinct_texts(
            catalog.texts(self.config.columns),
            encode,
            width=_width(self._model),
            batch_size=self.config.batch_size,
            key=resolved.to_dict(),
            workplace=workplace,
        )
        return finished(vectors, catalog.item_ids, normalize=self.config.normalize)

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # a second of reading needs no bar
        folder = _folder(self.config.model)
        model = SentenceTransformer(str(folder), device=str(choose_device()), local_files_only=True)
        if self.config.max_tokens is not None:
            model.max_seq_length = self.config.max_tokens
        return model.eval()


def available(model: str = "minilm") -> str | None:
    """Return why this encoder cannot run here, or None if it can."""
    try:
        _require_package()
        _folder(model)
    except AssetError as error:
        return str(error)
    return None


def _require_package() -> None:
    require(PACKAGE, "'genrec[text]'", what="sentence-transformers", instead=INSTEAD)


def _folder(model: str) -> Path:
    folder = find_model(model, instead=INSTEAD)
    if not (folder / MARKER).is_file():
        raise AssetError(
            f"features.model: {model!r} is no sentence-transformers folder (it has no {MARKER}). "
            "Expected one as written by SentenceTransformer.save, or features.model=minilm; "
            "features.name=hf_encoder reads any Hugging Face text model."
        )
    return folder


def _width(model: Any) -> int:
    name = "get_embedding_dimension"  # called get_sentence_embedding_dimension before 5.3
    get = getattr(model, name, None) or model.get_sentence_embedding_dimension
    return int(get())
