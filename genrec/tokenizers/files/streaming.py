"""How are more items coded than fit into memory? Batch by batch from a file of vectors to a file.

It knows how an interrupted run goes on, not how codes are made: any fitted tokenizer whose `encode`
reads vectors will do.

Shapes: N items in the file, M items of a batch, L levels.
"""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from genrec.artifacts import fingerprint
from genrec.errors import ArtifactError, GenrecError, UserError
from genrec.runtime import get_logger, progress
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.files.vector_reader import BATCH_SIZE, VectorReader

log = get_logger(__name__)

CODE_BYTES = 4


@dataclass(frozen=True)
class EncodedFile:
    """What `encode_file` wrote.

    Args:
        path: npy file with codes (N, L) int32, in the order of the file of vectors.
        num_items: N.
        codebook_sizes: L sizes.
        num_resumed: items that an earlier, interrupted call had coded already.
    """

    path: Path
    num_items: int
    codebook_sizes: tuple[int, ...]
    num_resumed: int


def encode_file(
    tokenizer: ItemTokenizer,
    vectors: str | Path | VectorReader,
    output: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
) -> EncodedFile:
    """Code a file of vectors into an npy file (N, L) int32, with memory for one batch.

    The output appears under its name when it is whole. A call that was interrupted leaves a file
    `.NAME.KEY.part` beside it, and the next call with the same tokenizer and vectors goes on from
    there; with others it starts anew and removes what was left. After an error in the data nothing
    stays.

    Args:
        tokenizer: fitted.
        vectors: npy, parquet or safetensors; a `VectorReader` to name columns or give ids.
        output: ends in ".npy".
        batch_size: items coded at once.

    Raises:
        UserError: the tokenizer reads more than vectors, or an output of another kind.
        DataError: vectors that cannot be read, of another width, NaN, or infinite.
        ArtifactError: the output cannot be written.
    """
    output = Path(output)
    _check(tokenizer, output, batch_size)
    reader = vectors if isinstance(vectors, VectorReader) else VectorReader(vectors)
    sizes = tokenizer.codebook_sizes
    part = _Part(output, _key(tokenizer, reader), (reader.num_items, len(sizes)))
    try:
        done = part.open(batch_size)
        with progress("items coded", reader.num_items) as advance:
            advance(done)
            for batch in reader.batches(done, batch_size):
                part.append(tokenizer.encode(batch))
                advance(len(batch))
        part.finish()
    except GenrecError:
        part.discard()
        raise
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        part.close()
    return EncodedFile(output, reader.num_items, sizes, done)


def _check(tokenizer: ItemTokenizer, output: Path, batch_size: int) -> None:
    if "vectors" not in tokenizer.needs or "texts" in tokenizer.needs:
        raise UserError(
            f"{tokenizer.name}: its codes come from {', '.join(sorted(tokenizer.needs))}, not from "
            "vectors alone. Code these items with encode(catalog)."
        )
    if output.suffix != ".npy":
        raise UserError(f"output: got {output.name!r}, expected a name that ends in .npy.")
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}, expected an integer >= 1.")


def _key(tokenizer: ItemTokenizer, reader: VectorReader) -> str:
    state = tokenizer.state()
    arrays = [state[name] for name in sorted(state)]
    return fingerprint(tokenizer.config.to_dict(), sorted(state), *arrays, reader.digest())


class _Part:
    """The file that codes are appended to until it is whole; its name says what it belongs to.

    Plain appending rather than a memory map: a full disk is then an error and not a bus error, and
    the length of the file says how far an interrupted run came.
    """

    def __init__(self, output: Path, key: str, shape: tuple[int, int]) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.{key}.part")
        self.shape = shape
        self._file: BinaryIO | None = None
        header = io.BytesIO()
        facts = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)
        self._header = header.getvalue()

    def open(self, batch_size: int) -> int:
        """Open the file; return the number of rows, full batches, that it holds already."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for other in self.output.parent.glob(f".{self.output.name}.*.part"):
            if other != self.path:
                other.unlink(missing_ok=True)
        rows = self._rows_there() // batch_size * batch_size
        self._file = open(self.path, "r+b" if rows else "w+b")
        if not rows:
            self._file.write(self._header)
        self._file.seek(len(self._header) + rows * self._row_bytes)
        self._file.truncate()
        if rows:
            log.info("%s: goes on after %d items of an earlier call", self.output.name, rows)
        return rows

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * CODE_BYTES

    def _rows_there(self) -> int:
        if not self.path.is_file():
            return 0
        with open(self.path, "rb") as file:
            if file.read(len(self._header)) != self._header:
                return 0
        return (self.path.stat().st_size - len(self._header)) // max(1, self._row_bytes)

    def append(self, codes_ML: np.ndarray) -> None:
        assert self._file is not None and codes_ML.shape[1] == self.shape[1]
        self._file.write(np.ascontiguousarray(codes_ML, dtype="<i4").tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())  # the length must not run ahead of the content

    def finish(self) -> None:
        """Give the file its name."""
        self.close()
        os.replace(self.path, self.output)

    def discard(self) -> None:
        """Remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full"
    return ArtifactError(
        f"cannot write {str(path)!r}: {reason}. Make room or choose another place and call again; "
        "what was coded so far is kept beside it."
    )
