"""How raw files are opened and cut into blocks of whole lines. It knows no format but compression.

Plain and gzipped files and members of zip archives are read in blocks that end at a line break, so
that memory does not grow with the file. Rows are counted as an editor counts lines.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genrec.errors import DataError, nearest

BLOCK_BYTES = 16 << 20
QUOTED_BYTES = 64 << 20  # no field is this long: its quote was never closed
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawFile:
    """A file, or a member of a zip archive; gzip is recognised by its first bytes."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """Name for messages and manifests: no folder of this machine."""
        return f"{self.path.name}:{self.member}" if self.member else self.path.name

    def check(self) -> None:
        """Raise `DataError` if there is no such file or it is empty."""
        if self.path.is_dir():
            raise DataError(f"{str(self.path)!r} is a folder, expected a file.")
        if not self.path.is_file():
            parent = self.path.parent
            there = [p.name for p in parent.iterdir()] if parent.is_dir() else []
            raise DataError(
                f"no file at {str(self.path)!r}. Check the path.{nearest(self.path.name, there)}"
            )
        if self.path.stat().st_size == 0:
            raise DataError(f"{str(self.path)!r} is empty (0 bytes). Expected data in it.")

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open for reading, decompressed; every defect of the file is a `DataError`."""
        self.check()
        try:
            with open(self.path, "rb") as outer:
                if self.member is not None:
                    with zipfile.ZipFile(outer) as archive, archive.open(self.member) as inner:
                        yield inner  # type: ignore[misc]
                elif outer.read(2) == b"\x1f\x8b":
                    outer.seek(0)
                    with gzip.open(outer) as inner_gz:
                        yield inner_gz  # type: ignore[misc]
                else:
                    outer.seek(0)
                    yield outer
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            raise DataError(
                f"{str(self.path)!r} is truncated or damaged ({error}). Download or copy it again."
            ) from None
        except PermissionError:
            raise DataError(f"{str(self.path)!r} cannot be read: permission denied.") from None


@dataclass(frozen=True)
class Block:
    """Whole lines of UTF-8 bytes, each with its line break, and the number of the first."""

    data: bytes
    first_line: int


def blocks(
    file: RawFile,
    *,
    encoding: str = "utf-8",
    quotes: bool = False,
    block_bytes: int | None = None,
) -> Iterator[Block]:
    """Yield a file in blocks of whole lines.

    Args:
        file: what to read.
        encoding: "utf-8" (checked) or "latin-1" (converted).
        quotes: line breaks inside double quotes do not end a line.
        block_bytes: about how much at a time (default 16 MiB).

    Raises:
        DataError: nothing in the file, or bytes that are not UTF-8 (with row and byte).
    """
    size = block_bytes or BLOCK_BYTES
    line, offset, rest, anything = 1, 0, b"", False
    with file.open() as stream:
        while True:
            read = stream.read(size)
            data = rest + read
            last = not read
            if last and data and not data.endswith(b"\n"):
                data += b"\n"
            cut = len(data) if last else _last_break(file, data, quotes, line)
            whole, rest = data[:cut], data[cut:]
            if whole.strip():
                anything = True
                yield Block(_to_utf8(file, whole, encoding, line, offset), line)
            line += whole.count(b"\n")
            offset += cut
            if last:
                break
    if not anything:
        raise DataError(f"{str(file.path)!r} is empty. Expected data in it.")


def _last_break(file: RawFile, data: bytes, quotes: bool, line: int) -> int:
    cut = data.rfind(b"\n") + 1
    if not quotes:
        return cut
    odd = data.count(b'"', 0, cut) % 2
    while cut and odd:  # an odd number of quotes before it: this line break is inside a field
        previous = data.rfind(b"\n", 0, cut - 1) + 1
        odd ^= data.count(b'"', previous, cut) % 2
        cut = previous
    if not cut and len(data) > QUOTED_BYTES:
        raise DataError(
            f"{file.name}: a double quote that opens after row {line} never closes. Expected "
            "quotes in pairs; if quotes mean nothing in this file, set quotes=false (--no-quotes)."
        )
    return cut


def _to_utf8(file: RawFile, data: bytes, encoding: str, line: int, offset: int) -> bytes:
    if encoding != "utf-8":
        return data.decode(encoding).encode("utf-8")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        row = line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{file.name}: row {row}: byte {offset + error.start} (0x{data[error.start]:02x}) is "
            "not UTF-8 text. Save the file as UTF-8, or set encoding=latin-1 (--encoding latin-1) "
            "if that is what it is."
        ) from None
    return data[len(_BOM) :] if line == 1 and data.startswith(_BOM) else data
