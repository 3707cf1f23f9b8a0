"""VectorFile: precomputed item vectors from npy, parquet or safetensors, aligned with the items.

Alignment is checked, never assumed: by item id where there are ids, by count where there are none.
How the vectors were made is not its business.

Shapes: N items, F vectors in the file, E embedding width.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from genrec.artifacts import file_checksum
from genrec.config import StrictConfig
from genrec.errors import DataError, nearest
from genrec.features.base import ALONE, FeatureExtractor, Workplace, finished
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)
MAX_NAMED = 5
Loaded = tuple[np.ndarray, list[str] | None]


class VectorFile(FeatureExtractor):
    """Vectors made elsewhere.

    Args:
        config: see `VectorFile.Config`.
    """

    class Config(StrictConfig):
        """Settings of the vector file."""

        name: Literal["file"] = "file"
        """Name in the registry."""
        path: str
        """npy: (F, E), with ids in a file of their own or in the row order of the catalogue.
        parquet: one line per item with an id and a list column. safetensors: a (F, E) tensor, with
        the ids as a JSON list in the file's metadata under `id_column`, in a file of their own, or
        in the row order of the catalogue."""
        ids: str | None = None
        """npy, safetensors: file with the item id of each vector, in the order of the vectors:
        a JSON list (.json), or text with one id per line."""
        id_column: str = "item_id"
        """Parquet column, or safetensors metadata key, with the item ids."""
        vector_column: str = "vector"
        """Parquet column, or safetensors tensor, with the vectors."""
        missing: Literal["error", "zero"] = "error"
        """What an item without a vector in the file means: an error that lists them, or the zero
        vector (counted in a warning), which fusion takes for a missing modality."""
        normalize: bool = False
        """Scale vectors to length 1."""
        digest: str | None = None
        """sha256 of the file, and of the ids' file if there is one. `resolve` fills it in, so that
        a cache key names the very content; when set, another content is refused."""

    config: VectorFile.Config

    @property
    def embeds_later(self) -> bool:
        """False: the file that was read then has nothing on items that join later."""
        return False

    def resolve(self) -> VectorFile.Config:
        """Return the configuration with the digest of the file.

        Raises:
            DataError: no such file, or its digest differs.
        """
        path = Path(self.config.path)
        if not path.is_file():
            raise DataError(
                f"features.path: no file at {self.config.path!r}. Expected npy, parquet or "
                "safetensors; check the path."
            )
        digest = file_checksum(path)
        if self.config.ids is not None:
            if not Path(self.config.ids).is_file():
                raise DataError(
                    f"features.ids: no file at {self.config.ids!r}. Expected a JSON list, or text "
                    "with one id per line; check the path."
                )
            digest += f"+{file_checksum(Path(self.config.ids))}"
        if self.config.digest not in (None, digest):
            raise DataError(
                f"features.path: {self.config.path!r} has sha256 {digest}, expected "
                f"{self.config.digest} (features.digest). Use the original file, or remove "
                "features.digest."
            )
        return self.config.model_copy(update={"digest": digest})

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return the vectors (N, E) float32 of the catalogue's items.

        Vectors of items that the catalogue lacks are left out, and a log line says how many.

        Raises:
            DataError: unreadable file, wrong count, repeated ids, items without a vector (unless
                `missing` allows them), or NaN.
        """
        config = self.config
        vectors, ids = self.read()
        name = Path(config.path).name
        rows = _rows(catalog.item_ids, ids, len(vectors), name, config.missing)
        padded = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), vectors.dtype)])
        return finished(padded[rows], catalog.item_ids, normalize=config.normalize)

    def read(self) -> Loaded:
        """Return the vectors (F, E) as they are in the file, and their ids (None: in row order).

        Raises:
            DataError: unreadable file.
        """
        self.resolve()
        config = self.config
        readers = {".npy": self._npy, ".parquet": self._parquet, ".safetensors": self._safetensors}
        path = Path(config.path)
        if path.suffix not in readers:
            raise DataError(
                f"features.path: got {path.name!r}, expected a name that ends in "
                f"{', '.join(readers)}."
            )
        vectors, ids = readers[path.suffix](path)
        if vectors.ndim != 2:
            raise DataError(
                f"features.path: {path.name!r} holds an array of shape {vectors.shape}, expected "
                "(items, width)."
            )
        if config.ids is not None:
            ids = self._ids_beside(Path(config.ids), ids, len(vectors))
        return vectors, ids

    def _ids_beside(self, path: Path, stored: list[str] | None, num_vectors: int) -> list[str]:
        """Read the file of ids."""
        if stored is not None:
            raise DataError(
                f"features.ids: {Path(self.config.path).name!r} holds ids of its own. Leave "
                "features.ids out."
            )
        try:
            text = path.read_text(encoding="utf-8")
            ids = json.loads(text) if path.suffix == ".json" else text.splitlines()
            if not isinstance(ids, list):
                raise ValueError(f"a JSON {type(ids).__name__}")
        except ValueError as error:  # UnicodeDecodeError is one
            raise DataError(
                f"features.ids: {path.name!r} cannot be read as a JSON list, or as text with one "
                f"id per line ({error})."
            ) from None
        if len(ids) != num_vectors:
            raise DataError(
                f"features.ids: {path.name!r} holds {len(ids)} ids for {num_vectors} vectors. "
                "Expected one id per vector."
            )
        return [str(item) for item in ids]

    def _npy(self, path: Path) -> Loaded:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise _unreadable(path, "an npy file of numbers", error) from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise _unreadable(path, "an npy file of numbers", TypeError("other content"))
        return array, None

    def _parquet(self, path: Path) -> Loaded:
        import polars as pl

        try:
            table = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(path, "a parquet file", error) from None
        for column in (self.config.id_column, self.config.vector_column):
            _require(column, table.columns, path, "column")
        try:
            lists = table[self.config.vector_column].cast(pl.List(pl.Float32))
            widths = lists.list.len().unique().to_list()
        except pl.exceptions.PolarsError as error:
            raise _unreadable(path, "a list of numbers per item", error) from None
        if len(widths) > 1 or None in widths:
            raise DataError(
                f"features.path: the vectors in {path.name!r} have different lengths "
                f"({', '.join(map(str, widths[:MAX_NAMED]))}). Expected one width."
            )
        flat = lists.explode().to_numpy()
        ids = table[self.config.id_column].cast(pl.String).to_list()
        return flat.reshape(len(table), -1), ids

    def _safetensors(self, path: Path) -> Loaded:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                _require(self.config.vector_column, list(file.keys()), path, "tensor")
                vectors = file.get_tensor(self.config.vector_column)
                stored = (file.metadata() or {}).get(self.config.id_column)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, "a safetensors file", error) from None
        try:
            ids = None if stored is None else [str(i) for i in json.loads(stored)]
        except (ValueError, TypeError) as error:
            raise _unreadable(path, "a JSON list of ids in its metadata", error) from None
        if ids is not None and len(ids) != len(vectors):
            raise DataError(
                f"features.path: {path.name!r} holds {len(vectors)} vectors and {len(ids)} ids. "
                "Expected one id per vector."
            )
        return vectors, ids


def _rows(
    wanted: Sequence[str], ids: list[str] | None, num_vectors: int, name: str, policy: str
) -> np.ndarray:
    """Return the place in the file of each wanted item; -1 for one that is missing by policy."""
    if ids is None:
        if num_vectors != len(wanted):
            raise DataError(
                f"features.path: {name!r} holds {num_vectors} vectors without ids for "
                f"{len(wanted)} items. Expected one per item in the row order of the catalogue; "
                "give features.ids, or use a parquet file with ids, if the catalogue was filtered."
            )
        return np.arange(num_vectors)
    place = {item: row for row, item in enumerate(ids)}
    if len(place) != len(ids):
        repeated = [item for item, count in Counter(ids).items() if count > 1]
        shown = ", ".join(map(repr, repeated[:MAX_NAMED]))
        raise DataError(
            f"features.path: {len(repeated)} item ids repeat in {name!r}, e.g. {shown}. Expected "
            "one vector each."
        )
    rows = np.array([place.get(item, -1) for item in wanted], dtype=np.int64)
    _report_missing(wanted, ids, rows, name, policy)
    extra = len(ids) - int((rows >= 0).sum())
    if extra:
        log.info("features: %d of %d vectors in %r are of other items.", extra, len(ids), name)
    return rows


def _report_missing(
    wanted: Sequence[str], ids: list[str], rows: np.ndarray, name: str, policy: str
) -> None:
    missing = [item for item, row in zip(wanted, rows, strict=True) if row < 0]
    if not missing:
        return
    shown = ", ".join(repr(item) for item in missing[:MAX_NAMED])
    message = (
        f"{name!r} has no vector for {len(missing)} of {len(wanted)} items, e.g. {shown}; its ids "
        f"look like {', '.join(map(repr, ids[:2]))}."
    )
    if policy == "error" or len(missing) == len(wanted):
        raise DataError(
            f"features.path: {message} Expected the ids of the raw data, for all items; "
            "features.missing=zero lets some be missing."
        )
    log.warning("features: %s They get zero vectors.", message)


def _require(name: str, found: list[str], path: Path, what: str) -> None:
    if name not in found:
        raise DataError(
            f"features.path: {path.name!r} has no {what} {name!r}; it has {', '.join(found)}."
            f"{nearest(name, found)}"
        )


def _unreadable(path: Path, expected: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"features.path: {path.name!r} cannot be read as {expected} ({reason}).")
