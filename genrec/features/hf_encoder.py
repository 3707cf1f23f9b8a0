"""HF encoder: item texts to vectors with any Hugging Face text model, pooled over its tokens.

Encoders (BERT), the encoder of encoder-decoders (T5) and decoders (SmolLM2, Llama) alike, without
sentence-transformers files. It never downloads, and runs no code that comes with a model.

Shapes: N items, E embedding width, B texts, T tokens.
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
from genrec.features.pretrained import checked_digest, find_model
from genrec.features.shards import of_distinct_texts
from genrec.runtime import choose_device

if TYPE_CHECKING:
    from torch import Tensor

    from genrec.data import Catalog, Interactions

INSTEAD = "use features.name=lsa"
MODEL_FILE = "config.json"


class HFEncoder(FeatureExtractor):
    """Pooled last hidden states of a transformer.

    Args:
        config: see `HFEncoder.Config`.
    """

    class Config(StrictConfig):
        """Settings of the encoder."""

        name: Literal["hf_encoder"] = "hf_encoder"
        """Name in the registry."""
        model: str = "minilm"
        """Asset name, local folder, or hub name in the local cache. A folder with a single .gguf
        file and no config.json is read through it (needs the package gguf)."""
        pooling: Literal["mean", "last_token", "first_token"] = "mean"
        """mean: over the tokens of the text. last_token: for decoders, whose last token has read
        the others. first_token: for encoders trained with [CLS]."""
        columns: tuple[str, ...] | None = None
        """Catalogue columns that make up the text, in order; default all."""
        prefix: str = ""
        """Put before each text, as some encoders want ("passage: ")."""
        batch_size: int = Field(default=32, ge=1)
        """Texts encoded together (speed and memory)."""
        max_tokens: int = Field(default=256, ge=1)
        """Cut texts after this many tokens."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Precision of the model; bfloat16 is faster where the hardware has it, pooling is
        float32."""
        normalize: bool = True
        """Scale vectors to length 1."""
        digest: str | None = None
        """Fingerprint of the model's files. `resolve` fills it in, so that a cache key names the
        very weights; when set, other weights are refused."""

    config: HFEncoder.Config
    shares_work = True

    def resolve(self) -> HFEncoder.Config:
        """Return the configuration with the digest of the model's files.

        Raises:
            AssetError: the model is not on this machine, or the digest differs.
        """
        folder = _folder(self.config.model)[0]
        digest = checked_digest(self.config.model, folder, self.config.digest)
        return self.config.model_copy(update={"digest": digest})

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item without text gets the zero vector.

        Raises:
            AssetError: the model is not on this machine, or is no text model.
        """
        vectors = of_distinct_texts(
            catalog.texts(self.config.columns),
            self._encode,
            width=self._loaded[1].config.get_text_config().hidden_size,
            batch_size=self.config.batch_size,
            key=self.resolve().to_dict(),
            workplace=workplace,
        )
        return finished(vectors, catalog.item_ids, normalize=self.config.normalize)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, model = self._loaded
        rows = tokenizer(
            [self.config.prefix + text for text in texts],
            truncation=True,
            max_length=self.config.max_tokens,
            padding=False,
        )["input_ids"]
        # Padded here, on the right: decoders with learned positions would shift under left
        # padding, and many have no padding token at all. Attention never sees the padding.
        mask_BT = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
        tokens_BT = torch.zeros_like(mask_BT)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask_BT[b, : len(row)] = 1
        tokens_BT, mask_BT = tokens_BT.to(model.device), mask_BT.to(model.device)
        with torch.inference_mode():
            hidden_BTE = model(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        pooled: np.ndarray = pool(hidden_BTE.float(), mask_BT, self.config.pooling).cpu().numpy()
        return pooled

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        folder, gguf = _folder(self.config.model)
        more: dict[str, Any] = {"local_files_only": True, **({"gguf_file": gguf} if gguf else {})}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **more)
            model = AutoModel.from_pretrained(
                folder, dtype=getattr(torch, self.config.dtype), **more
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise AssetError(
                f"features.model: {self.config.model!r} cannot be loaded as a text model with its "
                f"tokenizer ({reason}). Expected a folder as written by save_pretrained of both, "
                f"or {INSTEAD}."
            ) from None
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        return tokenizer, model.eval().to(choose_device())


def pool(hidden_BTE: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """Return one vector per row, (B, E); a row without tokens gets zeros.

    Args:
        hidden_BTE: last hidden states.
        mask_BT: 1 for tokens, 0 for padding on whichever side.
        pooling: "mean", "last_token" or "first_token".
    """
    import torch

    real_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTE.dtype)
    if pooling == "mean":
        return (hidden_BTE * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)
    places_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    if pooling == "first_token":
        places_T = places_T.flip(0)
    chosen_B = (mask_BT * places_T).argmax(dim=1)
    rows = torch.arange(len(mask_BT), device=mask_BT.device)
    return hidden_BTE[rows, chosen_B] * real_BT1[rows, chosen_B]


def _folder(model: str) -> tuple[Path, str | None]:
    """Return the folder of a model, and its GGUF file where that is all it has."""
    folder = find_model(model, instead=INSTEAD)
    if (folder / MODEL_FILE).is_file():
        return folder, None
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if len(ggufs) != 1:
        raise AssetError(
            f"features.model: {model!r} is no Hugging Face model folder (it has no {MODEL_FILE}, "
            f"and {len(ggufs)} .gguf files). Expected one as written by save_pretrained, or "
            f"{INSTEAD}."
        )
    return folder, ggufs[0]
