"""The folder whose index grows: what lies where in it, and how the extended one is written whole.

A bundle, a folder of `genrec tokenize`, or an index with its tokenizer beside it. Which codes new
items get is none of its business.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import (
    MANIFEST,
    Artifact,
    atomic_directory,
    load_artifact,
    read_manifest,
    write_artifact,
)
from genrec.bundle import load_model, save_bundle, save_model
from genrec.data import Catalog
from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.dataset import CATALOG
from genrec.data.prepare import make_source
from genrec.data.tabular import Tabular
from genrec.errors import ArtifactError, DataError, UserError
from genrec.pipeline.indexing import BuiltIndex
from genrec.runtime import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A folder that holds an index and the tokenizer that made it.

    Args:
        path: the folder as given.
        kind: "bundle", "tokens" (tokenizer/ and index/) or "index".
        index: folder of the index.
        tokenizer: folder of the tokenizer.
    """

    path: Path
    kind: str
    index: Path
    tokenizer: Path

    def built(self) -> BuiltIndex:
        """Return the index with its notes, checked to be made by this tokenizer."""
        artifact = load_artifact(self.index, kind="index")
        tokenizer = load_artifact(self.tokenizer, kind="tokenizer")
        artifact.require_upstream("tokenizer", tokenizer.fingerprint)
        return BuiltIndex.load(self.index)

    def catalog(self) -> Catalog | None:
        """Return the catalogue of the index, where the folder holds it."""
        if self.kind != "bundle":
            return None
        return Catalog(pl.read_parquet(self.path / CATALOG))

    def reads_content(self) -> bool:
        """Whether the bundle's model knows items by their vectors, too."""
        if self.kind != "bundle":
            return False
        facts = load_artifact(self.path / "model", kind="model").extra.get("backbone", {})
        members = facts.get("members", [facts])
        return any(member.get("vector_width") for member in members)

    def write(self, out: Path, grown: BuiltIndex, added: Catalog) -> None:
        """Write the folder with the extended index; all of it or nothing.

        Raises:
            UserError: the model of the bundle cannot take more items.
        """
        upstream = load_artifact(self.index, kind="index").upstream
        if self.kind == "bundle":
            self._write_bundle(out, grown, added, upstream)
        elif self.kind == "index" or out.resolve() == self.path.resolve():
            grown.save(out if self.kind == "index" else self.index, upstream)
        else:
            with atomic_directory(out) as folder:
                shutil.copytree(self.tokenizer, folder / "tokenizer")
                grown.save(folder / "index", upstream)

    def _write_bundle(
        self, out: Path, grown: BuiltIndex, added: Catalog, upstream: dict[str, str]
    ) -> None:
        bundle = load_artifact(self.path, kind="bundle")
        old = self.catalog()
        assert old is not None
        catalog = Catalog(pl.concat([old.table, added.table.select(old.table.columns)]))
        with tempfile.TemporaryDirectory() as temporary:
            index, model = Path(temporary) / "index", Path(temporary) / "model"
            grown.save(index, upstream)
            resigned = _resign(self.path / "model", model, grown.index.fingerprint)
            try:
                larger = load_model(model, grown.index)
            except (ArtifactError, UserError) as error:
                raise UserError(
                    f"the model of {str(self.path)!r} cannot take more items: {error} Train it "
                    "again on the extended index."
                ) from None
            if larger.reads_content and added.content_vectors is not None:
                larger.describe(len(old), added.content_vectors)
                described = Path(temporary) / "described"
                extra = {k: v for k, v in resigned.extra.items() if k != "backbone"}
                resigned = save_model(described, larger, grown.index, extra=extra)
                model = described
            save_bundle(
                out,
                catalog=catalog,
                index=index,
                tokenizer=self.tokenizer,
                model=model,
                calibration=self.path / "calibration",
                extra=_extra(bundle.extra, bundle.fingerprint, len(added), index, resigned),
            )


def open_target(path: Path) -> Target:
    """Return what lies where in a folder that can grow.

    Raises:
        ArtifactError: none of the folders that can, with what is missing.
    """
    kind = read_manifest(path)["kind"] if (path / MANIFEST).is_file() else None
    if kind == "index":
        target = Target(path, "index", path, path.parent / "tokenizer")
    else:
        target = Target(
            path,
            "bundle" if kind == "bundle" else "tokens",
            path / "index",
            path / "tokenizer",
        )
    for part in (target.index, target.tokenizer):
        if not part.is_dir():
            raise ArtifactError(
                f"{str(path)!r}: no {part.name} at {str(part)!r}. Expected a bundle, or a folder "
                "that `genrec tokenize` wrote (tokenizer/ and index/)."
            )
    return target


def read_items(path: Path, *, item_id: str = ITEM_ID, title: str = TITLE) -> Catalog:
    """Return the items of a csv, tsv, parquet or JSON-lines file.

    Args:
        path: one row per item.
        item_id: column with the ids.
        title: column with the titles, where there is one.

    Raises:
        DataError: unreadable, without ids, or ids that repeat.
    """
    options = {"path": path, "items": path, "item": item_id, "title": title}
    source = make_source({"name": "tabular", **options})
    assert isinstance(source, Tabular)
    for file in source.files():
        file.check()
    table = source.items(None)
    assert table is not None
    if not len(table):
        raise DataError(f"{path.name!r} holds no items. Expected one row per item.")
    return Catalog(table)


def align(items: Catalog, known: Catalog | None, columns: Sequence[str] | None) -> Catalog:
    """Return new items with the columns of the catalogue that they join, in its order.

    Texts are made of the columns in their order, so new items must have the same. A column that is
    missing is null; one that the catalogue has not is left out.

    Raises:
        DataError: values that do not fit the catalogue's column.
    """
    if known is None and columns is None:
        return items
    schema = dict(known.table.schema) if known is not None else {}
    names = [ITEM_ID, *(known.columns if known is not None else columns or ())]
    table = items.table
    extra = [name for name in table.columns if name not in names]
    if extra:
        log.info("new items: columns that the catalogue has not are left out: %s", ", ".join(extra))
    parts = []
    for name in names:
        dtype = schema.get(name)
        if name not in table.columns:
            parts.append(pl.lit(None, dtype=dtype or pl.String).alias(name))
        else:
            parts.append(_fitting(table, name, dtype))
    return Catalog(table.select(parts), items.vectors)


def _fitting(table: pl.DataFrame, name: str, dtype: Any) -> pl.Expr:
    """Return a column as the catalogue's type; one text stands for a list of one."""
    own = table.schema[name]
    if dtype is None or own == dtype:
        return pl.col(name)
    if isinstance(dtype, pl.List) and not isinstance(own, pl.List):
        text = pl.col(name).cast(pl.String)
        return pl.when(text.is_null()).then(None).otherwise(pl.concat_list(text)).alias(name)
    if isinstance(own, pl.List):
        return pl.col(name).cast(pl.List(pl.String)).list.join(", ").alias(name)
    try:
        table[name].cast(dtype)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"new items: column {name!r} does not hold {dtype} like the catalogue's "
            f"({str(error).splitlines()[0]}). Correct the column or leave it out."
        ) from None
    return pl.col(name).cast(dtype)


def _resign(source: Path, target: Path, index_fingerprint: str) -> Artifact:
    """Copy a model, to be loaded with an index that extends the one it was trained on."""
    artifact = load_artifact(source, kind="model")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST))
    trained_on = artifact.extra.get("trained_on_index", artifact.upstream.get("index"))
    manifest = write_artifact(
        target,
        kind="model",
        config=artifact.config,
        upstream={**artifact.upstream, "index": index_fingerprint},
        extra={**artifact.extra, "trained_on_index": trained_on},
    )
    return Artifact(target, manifest)


def _extra(
    old: Mapping[str, Any], fingerprint: str, num_added: int, index: Path, model: Artifact
) -> dict[str, Any]:
    parts = {
        **old.get("parts", {}),
        "index": load_artifact(index, kind="index").fingerprint,
        "model": model.fingerprint,
    }
    history = [*old.get("added", ()), {"num_items": num_added, "bundle_before": fingerprint}]
    return {**old, "parts": parts, "added": history}
