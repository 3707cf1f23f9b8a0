"""How does a file of item vectors become batches of items, without being read as a whole?

The formats and names are those of the extractor `file` (`genrec/features/file.py`); what is done
with the batches is the business of `streaming.py`.

Shapes: N items in the file, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from genrec.artifacts import fingerprint
from genrec.data import Catalog
from genrec.errors import DataError, GenrecError, nearest

BATCH_SIZE = 16_384
PARQUET_ROWS = 65_536
"""Lines of a parquet file that are decoded at once: every read starts its row group anew."""


class VectorReader:
    """A file of item vectors, read in parts.

    Args:
        path: npy (N, E); parquet with an id and a list column; or safetensors with a (N, E)
            tensor and the ids as a JSON list in its metadata (as `features.name: file` reads them).
        id_column: parquet column, or safetensors metadata key, with the item ids.
        vector_column: parquet column, or safetensors tensor, with the vectors.
        item_ids: ids of the vectors where the file has none; "0", "1", ... otherwise.

    Raises:
        DataError: no such file, not readable, or ids and vectors that differ in number.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        id_column: str = "item_id",
        vector_column: str = "vector",
        item_ids: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.id_column, self.vector_column = id_column, vector_column
        readers = {".npy": self._npy, ".parquet": self._parquet, ".safetensors": self._safetensors}
        if not self.path.is_file():
            raise DataError(
                f"vectors: no file at {str(path)!r}. Expected {', '.join(readers)}; check the path."
            )
        if self.path.suffix not in readers:
            raise DataError(
                f"vectors: got {self.path.name!r}, expected a name that ends in "
                f"{', '.join(readers)}."
            )
        self._read = readers[self.path.suffix]
        self._own_ids: list[str] | None = None
        self.num_items = self._open()
        self._given_ids = self._own_ids if item_ids is None else item_ids
        if self._given_ids is not None and len(self._given_ids) != self.num_items:
            raise DataError(
                f"vectors: {self.path.name!r} holds {self.num_items} vectors, got "
                f"{len(self._given_ids)} ids. Expected one id per vector, in the same order."
            )

    def batches(self, start: int = 0, batch_size: int = BATCH_SIZE) -> Iterator[Catalog]:
        """Yield the items from row `start` on as catalogues of `batch_size` vectors.

        Raises:
            DataError: content that is no numbers, or rows of different lengths.
        """
        step = batch_size
        if self.path.suffix == ".parquet":
            step = max(1, PARQUET_ROWS // batch_size) * batch_size
        for first in range(start, self.num_items, step):
            vectors, ids = self._part(first, min(first + step, self.num_items))
            for low in range(0, len(vectors), batch_size):
                part = slice(low, low + batch_size)
                yield Catalog.from_vectors(vectors[part], ids[part])

    def digest(self) -> str:
        """Return a digest of which file this is (place, size, time of change) and of given ids."""
        facts = self.path.stat()
        given = None if self._given_ids is None else fingerprint(list(self._given_ids))
        names = [str(self.path.resolve()), self.id_column, self.vector_column]
        return fingerprint(names, facts.st_size, facts.st_mtime_ns, given)

    def _part(self, first: int, last: int) -> tuple[np.ndarray, list[str]]:
        try:
            vectors, ids = self._read(first, last)
        except GenrecError:
            raise
        except Exception as error:  # each library has errors of its own for damaged files
            raise self._unreadable(error) from error
        if self._given_ids is not None:
            ids = [str(i) for i in self._given_ids[first:last]]
        elif ids is None:
            ids = [str(row) for row in range(first, last)]
        return np.ascontiguousarray(vectors, dtype=np.float32), ids

    def _open(self) -> int:
        """Check what can be checked without reading vectors; return their number."""
        try:
            if self.path.suffix == ".parquet":
                return self._open_parquet()
            if self.path.suffix == ".safetensors":
                return self._open_safetensors()
            return self._checked_shape(self._mapped().shape, self._mapped().dtype.kind)
        except GenrecError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _mapped(self) -> np.ndarray:
        array: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array

    def _npy(self, first: int, last: int) -> tuple[np.ndarray, list[str] | None]:
        # Mapped anew for every part: pages of the parts before would count as memory in use.
        return np.array(self._mapped()[first:last], dtype=np.float32), None

    def _open_safetensors(self) -> int:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="numpy") as file:
            self._require(self.vector_column, list(file.keys()), "tensor")
            shape = file.get_slice(self.vector_column).get_shape()
            stored = (file.metadata() or {}).get(self.id_column)
        if stored is not None:
            self._own_ids = [str(item) for item in json.loads(stored)]
        return self._checked_shape(tuple(shape), "f")

    def _safetensors(self, first: int, last: int) -> tuple[np.ndarray, list[str] | None]:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="numpy") as file:  # anew: see _npy
            return file.get_slice(self.vector_column)[first:last], None

    def _open_parquet(self) -> int:
        import polars as pl

        table = pl.scan_parquet(self.path)
        for column in (self.id_column, self.vector_column):
            self._require(column, table.collect_schema().names(), "column")
        return int(table.select(pl.len()).collect().item())

    def _parquet(self, first: int, last: int) -> tuple[np.ndarray, list[str] | None]:
        import polars as pl

        columns = [pl.col(self.id_column).cast(pl.String), pl.col(self.vector_column)]
        part = pl.scan_parquet(self.path).slice(first, last - first).select(columns).collect()
        lists = part[self.vector_column].cast(pl.List(pl.Float32))
        widths = lists.list.len().unique().to_list()
        if len(widths) != 1 or None in widths:
            raise DataError(
                f"vectors: the vectors in {self.path.name!r} have different lengths "
                f"({', '.join(map(str, widths[:5]))}). Expected one width."
            )
        return lists.explode().to_numpy().reshape(len(part), -1), part[self.id_column].to_list()

    def _checked_shape(self, shape: tuple[int, ...], kind: str) -> int:
        if len(shape) != 2 or kind not in "fiu":
            raise DataError(
                f"vectors: {self.path.name!r} holds an array of shape {shape} and kind {kind!r}, "
                "expected numbers of shape (items, width)."
            )
        return shape[0]

    def _require(self, name: str, found: list[str], what: str) -> None:
        if name not in found:
            raise DataError(
                f"vectors: {self.path.name!r} has no {what} {name!r}; it has {', '.join(found)}."
                f"{nearest(name, found)}"
            )

    def _unreadable(self, error: Exception) -> DataError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DataError(
            f"vectors: {self.path.name!r} cannot be read as {self.path.suffix[1:]} ({reason}). "
            "Write the file again."
        )
