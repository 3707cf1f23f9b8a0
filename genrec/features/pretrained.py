"""Pretrained models on this machine: which folder a name means, and a digest of its files.

Nothing is downloaded or loaded here. What is in the folder is the business of each extractor.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from genrec import assets
from genrec.artifacts import file_checksum, fingerprint
from genrec.errors import AssetError

WEIGHTS = {".json", ".txt", ".safetensors", ".bin", ".model", ".gguf", ".pth", ".jinja"}


def find_model(model: str, *, instead: str) -> Path:
    """Return the folder of a model: an asset, a local folder, or a snapshot in the hub cache.

    Args:
        model: asset name, folder or hub name.
        instead: what the error suggests, e.g. "use features.name=lsa".

    Raises:
        AssetError: not on this machine.
    """
    if model in assets.ASSETS:
        try:
            return assets.resolve(model)
        except AssetError as error:
            raise AssetError(f"features.model: {error} Or {instead}.") from None
    folder = Path(model)
    return folder if folder.is_dir() else _cached_snapshot(model, instead)


def _cached_snapshot(model: str, instead: str) -> Path:
    require("huggingface_hub", "huggingface-hub", instead=instead)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # not cached, or not even a valid hub name
        raise AssetError(
            f"features.model: {model!r} is neither an asset ({', '.join(assets.ASSETS)}), nor a "
            "folder, nor in the local Hugging Face cache. genrec does not download models: fetch "
            f"it with `hf download {model}` first, or {instead}."
        ) from None


def require(package: str, requirement: str, *, what: str = "", instead: str) -> None:
    """Raise `AssetError` with the pip command unless a package is installed.

    Args:
        package: what is imported.
        requirement: what pip is asked for.
        what: how the message calls it; default the requirement.
        instead: what else the user can do.
    """
    if importlib.util.find_spec(package) is None:
        raise AssetError(
            f"features.name: this extractor needs the package {what or requirement}, which is not "
            f"installed. Install it with `pip install {requirement}`, or {instead}."
        )


def digest_of(folder: Path) -> str:
    """Return a fingerprint of a model's files: names and contents."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in WEIGHTS)
    return fingerprint({p.relative_to(folder).as_posix(): file_checksum(p) for p in files})


def checked_digest(model: str, folder: Path, expected: str | None) -> str:
    """Return the digest of a model's files.

    Raises:
        AssetError: another digest is expected.
    """
    digest = digest_of(folder)
    if expected not in (None, digest):
        raise AssetError(
            f"features.model: the files of {model!r} have fingerprint {digest}, expected "
            f"{expected} (features.digest). Use the model that the vectors were made with, or "
            "remove features.digest."
        )
    return digest
