"""Image: one picture per item to a vector, with an image model on this machine.

The catalogue names the files in a column; an item without one has the zero vector, which fusion
takes for a missing modality. It never downloads models or pictures.

Shapes: N items, E embedding width, B images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from genrec.artifacts import file_checksum, fingerprint
from genrec.config import StrictConfig
from genrec.errors import DataError, nearest
from genrec.features.base import ALONE, MAX_NAMED, FeatureExtractor, Workplace, finished
from genrec.features.image_models import ImageModel, digest, load
from genrec.features.pretrained import require
from genrec.features.shards import in_shards
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)
INSTEAD = "use features.name=lsa"


class Image(FeatureExtractor):
    """Pooled features of an image model.

    Args:
        config: see `Image.Config`.
    """

    class Config(StrictConfig):
        """Settings of the image extractor."""

        name: Literal["image"] = "image"
        """Name in the registry."""
        model: str = "efficientnet-lite0"
        """efficientnet-lite0 (an asset, 1,280 dimensions), or the folder or cached hub name of a
        Hugging Face image model (ViT, DINOv2, ConvNeXt, CLIP, SigLIP, ...)."""
        column: str = "image"
        """Catalogue column with the path of each item's image; null or empty: it has none."""
        folder: str = "."
        """Folder that relative paths start from."""
        unreadable: Literal["error", "missing"] = "error"
        """What a path without a file, or a file that is no image, means: an error that names the
        items, or an item without an image (counted in a warning)."""
        batch_size: int = Field(default=32, ge=1)
        """Images encoded together (speed and memory)."""
        normalize: bool = True
        """Scale vectors to length 1."""
        digest: str | None = None
        """Fingerprint of the model's files. `resolve` fills it in, so that a cache key names the
        very weights; when set, other weights are refused."""

    config: Image.Config
    shares_work = True

    def resolve(self) -> Image.Config:
        """Return the configuration with the digest of the model's files.

        Raises:
            AssetError: the model or a package is not on this machine, or the digest differs.
        """
        require("PIL", "pillow", instead=INSTEAD)
        found = digest(self.config.model, self.config.digest)
        return self.config.model_copy(update={"digest": found})

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return a digest of the contents of all image files."""
        sums = {
            str(path): file_checksum(path)
            for path in self._paths(catalog)
            if path is not None and path.is_file()
        }
        return {f"images in {self.config.column}": fingerprint(sums)}

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item without an image gets the zero vector.

        Raises:
            AssetError: the model or a package is not on this machine.
            DataError: no such column, no image at all, or unreadable images (unless they count as
                missing).
        """
        resolved = self.resolve()
        paths = self._readable(catalog)
        distinct = sorted({path for path in paths if path is not None})
        found = in_shards(
            distinct,
            self._encode,
            width=self._model.width,
            batch_size=self.config.batch_size,
            key=[resolved.to_dict(), [str(path) for path in distinct], self.reads(catalog)],
            workplace=workplace,
            description="Encoding images",
        )
        place: dict[Path | None, int] = {path: 1 + i for i, path in enumerate(distinct)}
        padded = np.concatenate([np.zeros((1, found.shape[1]), np.float32), found])
        vectors = padded[[place.get(path, 0) for path in paths]]
        return finished(vectors, catalog.item_ids, normalize=self.config.normalize)

    def _paths(self, catalog: Catalog) -> list[Path | None]:
        column = self.config.column
        if column not in catalog.columns:
            raise DataError(
                f"features.column: the catalogue has no column {column!r}; it has "
                f"{', '.join(catalog.columns) or 'only ids'}.{nearest(column, catalog.columns)} "
                "Expected a column with the path of each item's image."
            )
        folder = Path(self.config.folder)
        return [folder / str(v) if v not in (None, "") else None for v in catalog.table[column]]

    def _readable(self, catalog: Catalog) -> list[Path | None]:
        """Return each item's path, None where it has no (readable) image."""
        paths = self._paths(catalog)
        bad = {
            row: reason
            for row, path in enumerate(paths)
            if path is not None and (reason := _problem(path)) is not None
        }
        if bad:
            shown = "; ".join(
                f"{catalog.item_ids[row]!r}: {paths[row]} ({reason})"
                for row, reason in list(bad.items())[:MAX_NAMED]
            )
            message = f"the images of {len(bad)} of {len(catalog)} items cannot be read, e.g. "
            if self.config.unreadable == "error":
                raise DataError(
                    f"features.image: {message}{shown}. Correct features.folder or the paths in "
                    f"column {self.config.column!r}, or set features.unreadable=missing."
                )
            log.warning("features.image: %s%s. They count as missing.", message, shown)
        paths = [None if row in bad else path for row, path in enumerate(paths)]
        if not any(paths):
            raise DataError(
                f"features.image: none of the {len(catalog)} items has an image that can be read "
                f"(column {self.config.column!r}, folder {self.config.folder!r}). Expected paths."
            )
        return paths

    def _encode(self, paths: Sequence[Path]) -> np.ndarray:
        from PIL import Image as Picture

        batch = []
        for path in paths:
            with Picture.open(path) as picture:
                batch.append(self._model.prepare(picture.convert("RGB")))
        return self._model.encode(np.stack(batch))

    @cached_property
    def _model(self) -> ImageModel:
        return load(self.config.model)


def _problem(path: Path) -> str | None:
    """Return why a file is no image, from its header, or None."""
    from PIL import Image as Picture
    from PIL import UnidentifiedImageError

    if not path.is_file():
        return "no such file"
    try:
        with Picture.open(path) as picture:
            picture.verify()
    except UnidentifiedImageError:
        return "not an image"
    except (OSError, SyntaxError, ValueError) as error:
        return f"damaged: {error}"
    return None
