"""Shards: long embeddings in pieces, so that a killed one goes on and processes share the work.

Each piece is a file that appears whole. What a unit (a text, an image) is, and how it becomes a
vector, is the business of the extractor.

Shapes: n units, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from genrec.artifacts import atomic_file, fingerprint
from genrec.features.base import Workplace
from genrec.runtime import get_logger, progress

log = get_logger(__name__)
Unit = TypeVar("Unit")

BATCHES_PER_SHARD = 8


def in_shards(
    units: Sequence[Unit],
    encode: Callable[[Sequence[Unit]], np.ndarray],
    *,
    width: int,
    batch_size: int,
    key: Any,
    workplace: Workplace,
    description: str,
) -> np.ndarray:
    """Return the vectors of all units, (n, E) float32, in their order.

    Shard s belongs to process s mod count, whatever the number of processes, and holds the same
    batches: one process and many give the same vectors, and a call goes on where a killed one
    stopped, even with another number of processes.

    Args:
        units: what to encode.
        encode: a batch of at most `batch_size` units to vectors (len, E).
        width: E.
        batch_size: units encoded together.
        key: whatever decides the vectors (JSON, arrays), the units included: parts of other
            calls in the same folder are left alone.
        workplace: where finished shards are kept, and which share is ours.
        description: label of the progress bar.
    """
    assert workplace.folder is not None or workplace.count == 1
    size = BATCHES_PER_SHARD * batch_size
    starts = range(0, len(units), size)
    lengths = [min(size, len(units) - start) for start in starts]
    mine = range(workplace.index, len(starts), workplace.count)
    files = _files(workplace.folder, fingerprint(key, len(units), width, size), len(starts))
    made: dict[int, np.ndarray] = {}
    reused = 0
    with progress(description, sum(lengths[s] for s in mine)) as advance:
        for shard in mine:
            if _read(files[shard], (lengths[shard], width)) is not None:
                reused += 1
                advance(lengths[shard])
                continue
            part = units[starts[shard] : starts[shard] + lengths[shard]]
            vectors = np.empty((len(part), width), dtype=np.float32)
            for start in range(0, len(part), batch_size):
                batch = part[start : start + batch_size]
                vectors[start : start + len(batch)] = encode(batch)
                advance(len(batch))
            made[shard] = _keep(files[shard], vectors)
    if reused:
        log.info("%s: %d of %d parts were there already.", description, reused, len(mine))
    workplace.barrier()
    result = np.empty((len(units), width), dtype=np.float32)
    for shard, start in enumerate(starts):
        vectors_or_none = made.get(shard)
        if vectors_or_none is None:
            vectors_or_none = _read(files[shard], (lengths[shard], width))
        assert vectors_or_none is not None, f"shard {shard} vanished from {files[shard]}"
        result[start : start + lengths[shard]] = vectors_or_none
    return result


def of_distinct_texts(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    *,
    width: int,
    batch_size: int,
    key: Any,
    workplace: Workplace,
) -> np.ndarray:
    """Return one vector per text, (n, E) float32; blank texts get zeros.

    Each distinct text is encoded once, longest first, so that a batch holds texts of about the same
    length and memory peaks at the start. Arguments as of `in_shards`.
    """
    distinct = sorted({t for t in texts if t.strip()}, key=lambda t: (-len(t), t))
    found = in_shards(
        distinct,
        encode,
        width=width,
        batch_size=batch_size,
        key=[key, fingerprint(distinct)],
        workplace=workplace,
        description="Encoding item texts",
    )
    place = {text: 1 + number for number, text in enumerate(distinct)}  # place 0: no text
    padded = np.concatenate([np.zeros((1, width), np.float32), found])
    return padded[[place.get(text, 0) for text in texts]]


def _files(folder: Path | None, key: str, count: int) -> list[Path | None]:
    if folder is None:
        return [None] * count
    return [folder / f"{key}-{number:06d}.npy" for number in range(count)]


def _keep(file: Path | None, vectors: np.ndarray) -> np.ndarray:
    if file is None:
        return vectors
    with atomic_file(file) as temporary, open(temporary, "wb") as target:
        np.save(target, vectors)
    return vectors


def _read(file: Path | None, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the vectors of a finished shard, or None where there is none of this shape."""
    if file is None or not file.is_file():
        return None
    try:
        vectors = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    good = isinstance(vectors, np.ndarray) and vectors.shape == shape
    return vectors if good and vectors.dtype == np.float32 else None
