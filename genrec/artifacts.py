"""Artifacts on disk: a folder with `manifest.json` and safetensors, atomic, checksummed, no pickle.

A folder appears under its final name only when it is whole: it is written under a temporary name
beside it and renamed. Loading checks the kind, the format version and every checksum. What the
arrays mean is the business of whoever saves them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.errors import ArtifactError, MismatchError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ARRAYS = "arrays.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A loaded (or just saved) artifact."""

    path: Path
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hex digest of content: kind, config, upstream, extra and file checksums."""
        return self.manifest["fingerprint"]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the artifact was made with."""
        return self.manifest["config"]

    @property
    def upstream(self) -> dict[str, str]:
        """Fingerprints of what the artifact was made from, by name."""
        return self.manifest["upstream"]

    @property
    def extra(self) -> dict[str, Any]:
        """Small JSON facts (counts, histories, choices)."""
        return self.manifest["extra"]

    def require_upstream(self, name: str, fingerprint: str) -> None:
        """Raise `MismatchError` with both fingerprints unless this was made from that upstream."""
        got = self.upstream.get(name)
        if got != fingerprint:
            raise MismatchError(
                f"{self.manifest['kind']} at {str(self.path)!r} was made with {name} {got}, but "
                f"the {name} given here is {fingerprint}. Load the {name} stored beside it, or "
                f"make the {self.manifest['kind']} again."
            )


def fingerprint(*parts: Any) -> str:
    """Return a 32-character hex digest of JSON values, arrays, bytes and strings, in order."""
    digest = hashlib.sha256()
    for part in parts:
        _update(digest, part)
    return digest.hexdigest()[:32]


def _update(digest: Any, part: Any) -> None:
    if isinstance(part, np.ndarray):
        if part.dtype.kind in "OUT":
            part = [str(x) for x in part.tolist()]
        else:
            array = np.ascontiguousarray(part)
            digest.update(f"array:{array.dtype.str}:{array.shape};".encode())
            digest.update(array.tobytes())
            return
    if isinstance(part, bytes):
        digest.update(f"bytes:{len(part)};".encode())
        digest.update(part)
        return
    text = json.dumps(part, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest.update(f"json:{len(text)};{text}".encode())


def pack_strings(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return strings as arrays that an artifact can hold.

    Returns:
        all strings in UTF-8, one after the other, uint8; and where each begins and ends in it,
        (len(strings) + 1,) int64.
    """
    encoded = [text.encode() for text in strings]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in encoded])]).astype(np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8).copy(), offsets


def unpack_strings(encoded: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Return the strings that `pack_strings` packed."""
    joined = np.asarray(encoded, dtype=np.uint8).tobytes()
    bounds = np.asarray(offsets, dtype=np.int64).tolist()
    return [joined[a:b].decode() for a, b in itertools.pairwise(bounds)]


def file_checksum(path: Path) -> str:
    """Return the sha256 hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` on success and vanishes on any error.

    Raises:
        ArtifactError: the disk is full or the place cannot be written (nothing is left behind).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        _replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise _cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.rename(path, old / "old")
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, path)


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(
            f"cannot write {str(path)!r}: the disk is full. Nothing was left behind; free some "
            "space or choose another place, then run the command again."
        )
    return ArtifactError(
        f"cannot write {str(path)!r}: {error.strerror}. Expected a place that can be written; "
        "choose another one."
    )


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file name that replaces `path` on success and vanishes on any error.

    Raises:
        ArtifactError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    with atomic_directory(path.with_name(f".{path.name}.folder")) as folder:
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)
    path.with_name(f".{path.name}.folder").rmdir()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 file through a temporary name, so that no reader sees half of it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON (indent 2, UTF-8) through a temporary name."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_artifact(
    path: str | Path,
    *,
    kind: str,
    arrays: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    upstream: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write one artifact folder atomically.

    Args:
        path: folder to create or replace.
        kind: what it is ("vectors", "index", "model", ...); loading asks for it.
        arrays: numpy arrays, numeric or bool; strings go to `extra`.
        config: the configuration that determined it (JSON types).
        upstream: fingerprints of what it was made from.
        extra: small JSON facts.
    """
    with atomic_directory(path) as folder:
        manifest = write_artifact(
            folder, kind=kind, arrays=arrays, config=config, upstream=upstream, extra=extra
        )
    return Artifact(Path(path), manifest, dict(arrays or {}))


def write_artifact(
    folder: Path,
    *,
    kind: str,
    arrays: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    upstream: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write arrays and the manifest into a folder that the caller already made atomic.

    Files and sub-folders that are already there are checksummed into the manifest too.
    """
    from safetensors.numpy import save_file

    if arrays:
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(tensors, str(folder / ARRAYS))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": dict(config or {}),
        "upstream": dict(upstream or {}),
        "extra": dict(extra or {}),
        "files": {
            p.relative_to(folder).as_posix(): {
                "sha256": file_checksum(p),
                "bytes": p.stat().st_size,
            }
            for p in files
        },
    }
    manifest = json.loads(json.dumps(manifest))
    manifest["fingerprint"] = _manifest_fingerprint(manifest)
    manifest["made_by"] = {"libraries": runtime.versions(), "git": runtime.git_state()}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    keys = ("format_version", "kind", "config", "upstream", "extra", "files")
    return fingerprint({key: manifest[key] for key in keys})


def read_manifest(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """Read and check a manifest (kind, format version, its own fingerprint), not the files."""
    path = Path(path)
    what = kind or "artifact"
    if not path.exists():
        raise ArtifactError(f"no {what} at {str(path)!r}: the folder does not exist.")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{str(path)!r} is not a genrec {what}: it has no {MANIFEST}. Expected a folder that "
            "genrec wrote."
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        missing = {"format_version", "kind", "fingerprint", "files"} - set(manifest)
    except (ValueError, TypeError):
        manifest, missing = {}, {"valid JSON"}
    if missing:
        raise ArtifactError(
            f"{str(path / MANIFEST)!r} is damaged (without {', '.join(sorted(missing))}). "
            "Make the artifact again."
        )
    if manifest["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{str(path)!r} has format version {manifest['format_version']}, this genrec reads up "
            f"to {FORMAT_VERSION}. Install a newer genrec."
        )
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{str(path)!r} is a {manifest['kind']!r} artifact, expected {kind!r}.")
    if manifest["fingerprint"] != _manifest_fingerprint(manifest):
        raise ArtifactError(
            f"{str(path / MANIFEST)!r} was edited: its content does not match its fingerprint "
            f"{manifest['fingerprint']}. Make the artifact again."
        )
    return manifest


def load_artifact(path: str | Path, *, kind: str) -> Artifact:
    """Read an artifact and check every byte of it.

    Raises:
        ArtifactError: missing, of another kind, newer format, truncated or edited.
    """
    from safetensors.numpy import load_file

    path = Path(path)
    manifest = read_manifest(path, kind=kind)
    for name, facts in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"] or file_checksum(file) != facts["sha256"]:
            state = "missing" if size is None else f"{size} bytes, checksum differs"
            raise ArtifactError(
                f"{str(file)!r} is damaged: {state}; expected {facts['bytes']} bytes with sha256 "
                f"{facts['sha256'][:12]}... Copy it again or make the {kind} again."
            )
    arrays = load_file(str(path / ARRAYS)) if ARRAYS in manifest["files"] else {}
    return Artifact(path, manifest, arrays)
