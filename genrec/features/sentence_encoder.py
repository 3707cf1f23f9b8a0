"""Sentence encoder: item texts to vectors with a sentence-transformers model on this machine.

It never downloads: a model is an asset, a local folder, or a hub name that is already in the local
cache. Encoders without sentence-transformers files are not its business.

Shapes: N items, E embedding width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from genrec import assets
from genrec.artifacts import file_checksum, fingerprint
from genrec.config import StrictConfig
from genrec.errors import AssetError
from genrec.features.base import FeatureExtractor, finished
from genrec.runtime import choose_device, progress

if TYPE_CHECKING:
    from genrec.data import Catalog

PACKAGE = "sentence_transformers"
MARKER = "modules.json"
WEIGHTS = {".json", ".txt", ".safetensors", ".bin", ".model"}


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

    def resolve(self) -> SentenceEncoder.Config:
        """Return the configuration with the digest of the model's files.

        Raises:
            AssetError: the model or the package is not on this machine, or the digest differs.
        """
        _require_package()
        digest = _digest(_folder(self.config.model))
        if self.config.digest not in (None, digest):
            raise AssetError(
                f"features.model: the files of {self.config.model!r} have fingerprint {digest}, "
                f"expected {self.config.digest} (features.digest). Use the model that the vectors "
                "were made with, or remove features.digest."
            )
        return self.config.model_copy(update={"digest": digest})

    def embed(self, catalog: Catalog) -> np.ndarray:
        """Return vectors (N, E) float32; an item without text gets the zero vector.

        Each distinct text is encoded once, longest first, so that a batch holds texts of about the
        same length and memory peaks at the start.

        Raises:
            AssetError: the model or the package is not on this machine.
        """
        self.resolve()
        texts = catalog.texts(self.config.columns)
        distinct = sorted({t for t in texts if t.strip()}, key=lambda t: (-len(t), t))
        model = self._load()
        parts = [np.zeros((1, _width(model)), np.float32)]  # place 0: no text
        size = self.config.batch_size
        with progress("Encoding item texts", len(distinct)) as advance:
            for start in range(0, len(distinct), size):
                batch = distinct[start : start + size]
                parts.append(
                    model.encode(
                        batch, batch_size=size, convert_to_numpy=True, show_progress_bar=False
                    )
                )
                advance(len(batch))
        place = {text: 1 + i for i, text in enumerate(distinct)}
        vectors = np.concatenate(parts)[[place.get(text, 0) for text in texts]]
        return finished(vectors, catalog.item_ids, normalize=self.config.normalize)

    def _load(self) -> Any:
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
    if importlib.util.find_spec(PACKAGE) is None:
        raise AssetError(
            "features.name: sentence_encoder needs the package sentence-transformers, which is not "
            "installed. Install it with `pip install 'genrec[text]'`, or use features.name=lsa."
        )


def _folder(model: str) -> Path:
    """Return the folder of a model: an asset, a local folder, or a snapshot in the hub cache."""
    if model in assets.ASSETS:
        try:
            return assets.resolve(model)
        except AssetError as error:
            raise AssetError(f"features.model: {error} Or use features.name=lsa.") from None
    folder = Path(model)
    if not folder.is_dir():
        folder = _cached_snapshot(model)
    if not (folder / MARKER).is_file():
        raise AssetError(
            f"features.model: {model!r} is no sentence-transformers folder (it has no {MARKER}). "
            "Expected one as written by SentenceTransformer.save, or features.model=minilm."
        )
    return folder


def _cached_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # not cached, or not even a valid hub name
        raise AssetError(
            f"features.model: {model!r} is neither an asset ({', '.join(assets.ASSETS)}), nor a "
            "folder, nor in the local Hugging Face cache. genrec does not download models: fetch "
            f"it with `hf download {model}` first, or use features.name=lsa."
        ) from None


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in WEIGHTS)
    return fingerprint({p.relative_to(folder).as_posix(): file_checksum(p) for p in files})


def _width(model: Any) -> int:
    name = "get_embedding_dimension"  # called get_sentence_embedding_dimension before 5.3
    get = getattr(model, name, None) or model.get_sentence_embedding_dimension
    return int(get())
