"""Does coding a file give the codes that coding in memory gives, whatever comes in between?"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.errors import ArtifactError, DataError, UserError
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.files import streaming
from genrec.tokenizers.files.streaming import encode_file
from genrec.tokenizers.files.vector_reader import VectorReader

RQVAE = {"hidden_dims": [16], "latent_dim": 6, "num_epochs": 2}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("rqkmeans", {}),
    ("rqkmeans", {"balanced": True}),
    ("pq", {}),
    ("opq", {"num_rounds": 2}),
    ("rqvae", RQVAE),
]
IDS = [f"item {i}" for i in range(203)]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    vectors = np.random.default_rng(0).normal(size=(203, 12)).astype("f4")
    return Catalog.from_vectors(vectors, IDS)


@pytest.fixture(scope="module")
def tokenizer(catalog: Catalog) -> ItemTokenizer:
    return fitted("rqkmeans", catalog)


def fitted(name: str, catalog: Catalog, **settings: Any) -> ItemTokenizer:
    section = {"name": name, "codebook_size": 8, **settings}
    cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
    return cls(config).fit(catalog)


def written(catalog: Catalog, folder: Path, kind: str) -> VectorReader:
    path = folder / f"vectors.{kind}"
    vectors = catalog.vectors
    assert vectors is not None
    if kind == "npy":
        np.save(path, vectors)
    elif kind == "safetensors":
        save_file({"vector": vectors}, str(path), metadata={"item_id": json.dumps(IDS)})
    else:
        pl.DataFrame({"item_id": IDS, "vector": vectors.tolist()}).write_parquet(path)
    return VectorReader(path, item_ids=IDS if kind == "npy" else None)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Dies:
    """A tokenizer whose process ends in a given call of `encode`."""

    def __init__(self, inner: ItemTokenizer, at_call: int, error: BaseException) -> None:
        self.inner, self.left, self.error = inner, at_call, error
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, catalog: Catalog) -> np.ndarray:
        self.calls += 1
        if self.calls == self.left:
            raise self.error
        return self.inner.encode(catalog)


# -- equality ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_codes_of_a_file_are_those_of_the_catalogue(name, settings, kind, catalog, tmp_path):
    tokenizer = fitted(name, catalog, **settings)
    reader = written(catalog, tmp_path, kind)
    done = encode_file(tokenizer, reader, tmp_path / "out" / "codes.npy", batch_size=50)
    codes = np.load(done.path)
    assert codes.dtype == np.int32 and np.array_equal(codes, tokenizer.encode(catalog))
    assert (done.num_items, done.num_resumed) == (203, 0)
    assert done.codebook_sizes == tokenizer.codebook_sizes
    assert names_in(tmp_path / "out") == ["codes.npy"]


@pytest.mark.parametrize("batch_size", [1, 203, 1000])
def test_the_size_of_a_batch_does_not_matter(batch_size, catalog, tokenizer, tmp_path):
    reader = written(catalog, tmp_path, "npy")
    encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=batch_size)
    assert np.array_equal(np.load(tmp_path / "codes.npy"), tokenizer.encode(catalog))


def test_a_file_without_items_gives_no_codes(tokenizer, tmp_path):
    np.save(tmp_path / "none.npy", np.empty((0, 12), np.float32))
    encode_file(tokenizer, tmp_path / "none.npy", tmp_path / "codes.npy")
    assert np.load(tmp_path / "codes.npy").shape == (0, 3)


def test_batches_hold_ids_and_vectors_in_the_order_of_the_file(catalog, tmp_path):
    for kind in ("npy", "safetensors", "parquet"):
        batches = list(written(catalog, tmp_path, kind).batches(100, batch_size=40))
        assert [len(batch) for batch in batches] == [40, 40, 23]
        assert [i for batch in batches for i in batch.item_ids] == IDS[100:]
        assert np.array_equal(np.vstack([b.vectors for b in batches]), catalog.vectors[100:])
    np.save(tmp_path / "plain.npy", np.zeros((3, 2), np.int64))
    (batch,) = VectorReader(tmp_path / "plain.npy").batches()
    assert batch.item_ids == ["0", "1", "2"] and batch.vectors.dtype == np.float32


def test_parquet_is_read_in_larger_parts_than_a_batch(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr("genrec.tokenizers.files.vector_reader.PARQUET_ROWS", 64)
    batches = list(written(catalog, tmp_path, "parquet").batches(30, batch_size=30))
    assert [len(batch) for batch in batches] == [30] * 5 + [23]
    assert [i for batch in batches for i in batch.item_ids] == IDS[30:]


def test_memory_does_not_hold_the_file(tmp_path, tokenizer):
    """Never more vectors at once than a batch has, however long the file is."""
    np.save(tmp_path / "many.npy", np.zeros((5_000, 12), np.float32))
    sizes = []

    class Watched(Dies):
        def encode(self, catalog: Catalog) -> np.ndarray:
            base = catalog.vectors
            while base.base is not None:
                base = base.base
            sizes.append(base.nbytes)
            return super().encode(catalog)

    watched: Any = Watched(tokenizer, -1, KeyboardInterrupt())
    encode_file(watched, tmp_path / "many.npy", tmp_path / "codes.npy", batch_size=100)
    assert len(sizes) == 50 and max(sizes) == 100 * 12 * 4


# -- interruption -----------------------------------------------------------------------------


def test_an_interrupted_call_is_finished_by_the_next(catalog, tokenizer, tmp_path):
    reader = written(catalog, tmp_path, "npy")
    target = tmp_path / "out" / "codes.npy"
    dying: Any = Dies(tokenizer, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode_file(dying, reader, target, batch_size=20)
    assert not target.exists() and len(names_in(target.parent)) == 1
    counting: Any = Dies(tokenizer, -1, KeyboardInterrupt())
    done = encode_file(counting, reader, target, batch_size=20)
    assert done.num_resumed == 60 and counting.calls == 8  # 3 of 11 batches were there
    assert np.array_equal(np.load(target), tokenizer.encode(catalog))
    assert names_in(target.parent) == ["codes.npy"]


@pytest.mark.parametrize("cut", [1, 13, 200, 500, 10**6])
def test_a_part_of_any_length_is_continued(cut, catalog, tokenizer, tmp_path):
    reader = written(catalog, tmp_path, "npy")
    dying: Any = Dies(tokenizer, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode_file(dying, reader, tmp_path / "codes.npy", batch_size=20)
    (part,) = tmp_path.glob(".codes.npy.*.part")
    part.write_bytes(part.read_bytes()[:cut])
    done = encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=7)
    assert done.num_resumed % 7 == 0
    assert np.array_equal(np.load(tmp_path / "codes.npy"), tokenizer.encode(catalog))


def test_another_tokenizer_or_file_starts_anew(catalog, tokenizer, tmp_path):
    reader = written(catalog, tmp_path, "npy")
    for seed in (1, 2):
        dying: Any = Dies(fitted("rqkmeans", catalog, seed=seed), 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            encode_file(dying, reader, tmp_path / "codes.npy", batch_size=20)
        assert len(list(tmp_path.glob(".codes.npy.*"))) == 1
    np.save(reader.path, catalog.vectors[::-1])
    again = VectorReader(reader.path, item_ids=IDS)
    done = encode_file(tokenizer, again, tmp_path / "codes.npy", batch_size=20)
    assert done.num_resumed == 0
    assert np.array_equal(np.load(tmp_path / "codes.npy"), tokenizer.encode(catalog)[::-1])


def test_the_output_of_before_stays_until_the_new_one_is_whole(catalog, tokenizer, tmp_path):
    reader, target = written(catalog, tmp_path, "npy"), tmp_path / "codes.npy"
    np.save(target, np.arange(3))
    dying: Any = Dies(tokenizer, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode_file(dying, reader, target, batch_size=20)
    assert np.array_equal(np.load(target), np.arange(3))
    encode_file(tokenizer, reader, target)
    assert np.load(target).shape == (203, 3)


def test_a_full_disk_is_an_error_that_keeps_what_was_done(
    catalog, tokenizer, tmp_path, monkeypatch
):
    reader = written(catalog, tmp_path, "npy")
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(streaming.os, "fsync", fsync)
        with pytest.raises(ArtifactError, match=r"codes\.npy.*the disk is full.*call again"):
            encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=20)
    done = encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=20)
    assert done.num_resumed >= 40
    assert np.array_equal(np.load(tmp_path / "codes.npy"), tokenizer.encode(catalog))


# -- bad input --------------------------------------------------------------------------------


def test_bad_vectors_are_named_and_nothing_stays(catalog, tokenizer, tmp_path):
    vectors = catalog.vectors.copy()
    vectors[150, 3] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    reader = VectorReader(tmp_path / "v.npy", item_ids=IDS)
    with pytest.raises(DataError, match=r"1 item\(s\).*'item 150'"):
        encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=20)
    assert names_in(tmp_path) == ["v.npy"]
    np.save(tmp_path / "v.npy", vectors[:, :5])
    with pytest.raises(UserError, match=r"expected \(items, 12\)"):
        encode_file(tokenizer, tmp_path / "v.npy", tmp_path / "codes.npy")
    assert names_in(tmp_path) == ["v.npy"]


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(DataError, match=r"no file at .*missing\.npy.*check the path"):
        VectorReader(tmp_path / "missing.npy")
    (tmp_path / "v.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"got 'v\.csv', expected .*\.npy, \.parquet"):
        VectorReader(tmp_path / "v.csv")
    for kind in ("npy", "parquet", "safetensors"):
        (tmp_path / f"broken.{kind}").write_bytes(b"nonsense of some length")
        with pytest.raises(DataError, match=rf"broken\.{kind}' cannot be read as {kind} \("):
            VectorReader(tmp_path / f"broken.{kind}")
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(DataError, match=r"shape \(4,\).*expected numbers of shape \(items"):
        VectorReader(tmp_path / "flat.npy")
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="3 vectors, got 2 ids"):
        VectorReader(tmp_path / "v.npy", item_ids=["a", "b"])


def test_columns_that_are_not_there_name_the_nearest(catalog, tmp_path):
    for kind, what in (("parquet", "column"), ("safetensors", "tensor")):
        path = written(catalog, tmp_path, kind).path
        with pytest.raises(DataError, match=f"no {what} 'vectr'.*Did you mean 'vector'"):
            VectorReader(path, vector_column="vectr")
    ragged = pl.DataFrame({"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]})
    ragged.write_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match=r"different lengths \(.*Expected one width"):
        list(VectorReader(tmp_path / "ragged.parquet").batches())


def test_a_truncated_file_is_an_error_and_nothing_stays(catalog, tokenizer, tmp_path):
    reader = written(catalog, tmp_path, "npy")
    data = reader.path.read_bytes()
    reader.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"vectors\.npy' cannot be read"):
        encode_file(tokenizer, reader, tmp_path / "codes.npy", batch_size=20)
    assert names_in(tmp_path) == ["vectors.npy"]


def test_arguments_that_cannot_be_are_errors(catalog, tokenizer, tmp_path):
    path = written(catalog, tmp_path, "npy").path
    with pytest.raises(UserError, match=r"got 'codes\.csv', expected a name that ends in \.npy"):
        encode_file(tokenizer, path, tmp_path / "codes.csv")
    with pytest.raises(UserError, match="batch_size: got 0"):
        encode_file(tokenizer, path, tmp_path / "codes.npy", batch_size=0)
    texts: Any = Dies(tokenizer, -1, KeyboardInterrupt())
    texts.needs = frozenset({"texts"})
    with pytest.raises(UserError, match="its codes come from texts, not from vectors alone"):
        encode_file(texts, path, tmp_path / "codes.npy")
    cls, config = parse_component(TOKENIZERS, "rqkmeans", path="tokenizer")
    with pytest.raises(UserError, match="not fitted"):
        encode_file(cls(config), path, tmp_path / "codes.npy")
    assert names_in(tmp_path) == ["vectors.npy"]
