"""How does the catalogue's tree outlive the process that built it?

An artifact folder with the tensors of a `CSRIndex` in one safetensors file, which `load_index` maps
into memory instead of reading. It knows nothing about searching.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genrec.artifacts import ARRAYS, file_checksum, read_manifest, save_artifact
from genrec.decoding.csr import CSRIndex
from genrec.decoding.levels import Level
from genrec.errors import ArtifactError, UserError

KIND = "constraint"
ROWS = "rows"


def save_index(
    constraint: CSRIndex, path: str | Path, *, upstream: Mapping[str, str] | None = None
) -> None:
    """Write an index; see `CSRIndex.save`."""
    if constraint.allowed_before is not None:
        raise UserError(
            "CSRIndex.save: got an index that a rule restricts, expected the whole one. Save that, "
            "and call restricted() after loading: rules change more often than catalogues."
        )
    tensors = {ROWS: constraint.rows_N}
    for number, level in enumerate(constraint.levels):
        tensors |= {f"levels.{number}.{name}": t for name, t in _tensors(level).items()}
    running = constraint.num_running
    save_artifact(
        path,
        kind=KIND,
        arrays={name: tensor.cpu().numpy() for name, tensor in tensors.items()},
        upstream=upstream,
        extra={
            "codebook_sizes": list(constraint.codebook_sizes),
            "num_nodes": list(constraint.num_nodes),
            "num_shared": list(constraint.num_shared),
            "num_running": None if running is None else list(running),
            "max_degrees": [level.max_degree for level in constraint.levels],
        },
    )


def load_index(path: str | Path, *, verify: bool = True) -> CSRIndex:
    """Map an index into memory; see `CSRIndex.load`."""
    path = Path(path)
    manifest = read_manifest(path, kind=KIND)
    facts, file = manifest["files"].get(ARRAYS, {"bytes": -1}), path / ARRAYS
    size = file.stat().st_size if file.is_file() else None
    if size != facts["bytes"] or (verify and file_checksum(file) != facts["sha256"]):
        state = "missing" if size is None else f"{size} bytes, checksum differs"
        raise ArtifactError(
            f"{str(file)!r} is damaged: {state}; expected {facts['bytes']} bytes as written. Copy "
            "it again, or build the index again (CSRIndex.from_index)."
        )
    return _assemble(_mapped(file), manifest["extra"])


def _mapped(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)  # torch maps the file; tensors are views of it
    except SafetensorError as error:
        raise ArtifactError(
            f"{str(file)!r} is damaged: {error}. Copy it again, or build the index again."
        ) from error


def _tensors(level: Level) -> dict[str, Tensor]:
    found = {"pointers": level.pointers, "codes": level.codes}
    return found if level.mask is None else {**found, "mask": level.mask}


def _assemble(tensors: dict[str, Tensor], facts: dict[str, Any]) -> CSRIndex:
    levels = [
        Level(
            tensors[f"levels.{number}.pointers"],
            tensors[f"levels.{number}.codes"],
            tensors.get(f"levels.{number}.mask"),
            degree,
            size,
        )
        for number, (degree, size) in enumerate(
            zip(facts["max_degrees"], facts["codebook_sizes"], strict=True)
        )
    ]
    running = facts["num_running"]
    return CSRIndex(
        tuple(levels),
        tensors[ROWS],
        tuple(facts["codebook_sizes"]),
        tuple(facts["num_nodes"]),
        tuple(facts["num_shared"]),
        None if running is None else tuple(running),
    )
