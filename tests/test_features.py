"""Do feature extractors give one finite vector per item, repeatably, and say what is wrong?"""

from __future__ import annotations

import json
import logging

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from genrec import assets
from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import ring
from genrec.errors import AssetError, ConfigError, DataError, UserError
from genrec.features import FEATURES
from genrec.features.sentence_encoder import SentenceEncoder, available

WITHOUT_MINILM = available()
needs_minilm = pytest.mark.skipif(WITHOUT_MINILM is not None, reason=str(WITHOUT_MINILM))


def make(name, **settings):
    cls, config = parse_component(FEATURES, {"name": name, **settings}, path="features")
    return cls(config)


def films() -> Catalog:
    return Catalog(
        pl.DataFrame(
            {
                "item_id": ["a", "b", "c", "d", "e", "f"],
                "title": [
                    "Star Wars",
                    "The Empire Strikes Back, a Star Wars film",
                    "Baking sourdough bread at home",
                    "Bread and cake baking",
                    "",
                    None,
                ],
                "genre": ["space war", "space war", "cooking", "cooking", None, None],
            }
        )
    )


def check_vectors(vectors, catalog):
    assert vectors.dtype == np.float32 and vectors.flags.c_contiguous
    assert len(vectors) == len(catalog) and vectors.ndim == 2
    assert np.isfinite(vectors).all()
    norms = np.linalg.norm(vectors, axis=1)
    assert np.allclose(norms[:4], 1, atol=1e-5)
    assert (norms[4:] == 0).all()  # items without text
    similar = vectors @ vectors.T
    assert similar[0, 1] > similar[0, 2] and similar[2, 3] > similar[1, 2]


# -- LSA --------------------------------------------------------------------------------------


def test_lsa_places_similar_texts_together():
    catalog = films()
    vectors = make("lsa").embed(catalog)
    check_vectors(vectors, catalog)
    assert np.array_equal(vectors, make("lsa").embed(catalog))


def test_lsa_is_as_wide_as_asked_or_as_the_catalogue_allows():
    texts = [f"word{row} common thing{row % 7}" for row in range(50)]
    catalog = Catalog(pl.DataFrame({"item_id": [str(i) for i in range(50)], "title": texts}))
    assert make("lsa", num_dimensions=12).embed(catalog).shape == (50, 12)
    assert make("lsa", num_dimensions=400).embed(catalog).shape == (50, 50)
    one = Catalog(pl.DataFrame({"item_id": ["a"], "title": ["only one"]}))
    assert make("lsa").embed(one).shape == (1, 1)


def test_lsa_reads_the_columns_that_are_named():
    catalog = films()
    by_genre = make("lsa", columns=["genre"]).embed(catalog)
    assert np.allclose(by_genre[0], by_genre[1], atol=1e-5)
    assert not np.allclose(by_genre[0], by_genre[2], atol=0.1)
    with pytest.raises(DataError, match=r"no column 'genr'.*Did you mean 'genre'"):
        make("lsa", columns=["genr"]).embed(catalog)


def test_lsa_without_normalisation_keeps_lengths():
    norms = np.linalg.norm(make("lsa", normalize=False, num_dimensions=2).embed(films()), axis=1)
    assert (norms[:4] > 0).all() and not np.allclose(norms[:4], 1)


@pytest.mark.parametrize(("texts", "message"), [(["", None], "has text"), (["...", "?!"], "words")])
def test_lsa_says_when_there_is_nothing_to_read(texts, message):
    catalog = Catalog(pl.DataFrame({"item_id": ["a", "b"], "title": texts}))
    with pytest.raises(DataError, match=message):
        make("lsa").embed(catalog)


# -- sentence encoder -------------------------------------------------------------------------


@needs_minilm
def test_minilm_places_similar_texts_together_whatever_the_batches():
    catalog = films()
    vectors = make("sentence_encoder").embed(catalog)
    assert vectors.shape == (6, 384)
    check_vectors(vectors, catalog)
    one_by_one = make("sentence_encoder", batch_size=1).embed(catalog)
    assert np.allclose(vectors, one_by_one, atol=1e-5)
    order = [3, 5, 0, 2]
    shuffled = make("sentence_encoder").embed(catalog.select(order))
    assert np.allclose(shuffled, vectors[order], atol=1e-5)


@needs_minilm
def test_resolve_names_the_very_weights():
    resolved = make("sentence_encoder").resolve()
    assert resolved.digest and resolved == SentenceEncoder(resolved).resolve()
    folder = make("sentence_encoder", model=str(assets.resolve("minilm"))).resolve()
    assert folder.digest == resolved.digest
    with pytest.raises(AssetError, match=r"expected 123 \(features\.digest\)"):
        make("sentence_encoder", digest="123").embed(films())


def test_a_model_that_is_not_here_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"neither an asset.*nor a folder.*features\.name=lsa"):
        make("sentence_encoder", model="nobody/no-such-model").resolve()
    with pytest.raises(AssetError, match=r"no sentence-transformers folder.*modules\.json"):
        make("sentence_encoder", model=str(tmp_path)).resolve()


def test_without_the_package_the_error_names_the_remedy(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"sentence-transformers.*pip install.*features\.name=lsa"):
        make("sentence_encoder").resolve()


# -- auto -------------------------------------------------------------------------------------


@pytest.fixture
def messages(caplog):
    logger = logging.getLogger("genrec")
    before, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, logger="genrec")
    yield caplog
    logger.propagate = before


@needs_minilm
def test_auto_is_minilm_where_it_is_installed(messages):
    resolved = make("auto", columns=["title"]).resolve()
    expected = make("sentence_encoder", columns=["title"]).resolve()
    assert resolved == expected
    assert "sentence_encoder" in messages.text


def test_auto_falls_back_to_lsa_and_says_why(messages, monkeypatch):
    monkeypatch.setattr(
        "genrec.features.sentence_encoder.available", lambda: "no encoder on this machine"
    )
    auto = make("auto", columns=["title"])
    assert auto.resolve() == make("lsa", columns=["title"]).config
    assert "lsa" in messages.text and "no encoder on this machine" in messages.text
    catalog = films()
    assert np.array_equal(auto.embed(catalog), make("lsa", columns=["title"]).embed(catalog))


def test_auto_is_co_occurrence_where_no_item_has_a_text(messages):
    data = ring(num_items=12, num_users=20, length=5)
    catalog = Catalog(data.catalog.table.select("item_id"))
    auto, described = make("auto"), make("auto", columns=["title"])
    assert described.for_catalog(films()) is described and not messages.text
    chosen = auto.for_catalog(catalog)
    assert chosen.config == make("collaborative").config
    assert "features: collaborative, because none of 12 items has a text" in messages.text
    training = data.interactions.training()
    assert np.array_equal(auto.embed(catalog, training), chosen.embed(catalog, training))
    with pytest.raises(UserError, match=r"interactions"):
        auto.embed(catalog)


# -- file -------------------------------------------------------------------------------------

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


def four() -> Catalog:
    return Catalog(pl.DataFrame({"item_id": ["a", "b", "c", "d"]}))


def write(tmp_path, suffix: str, ids: list[str], vectors=VECTORS) -> str:
    path = tmp_path / f"vectors.{suffix}"
    if suffix == "npy":
        np.save(path, vectors)
    elif suffix == "parquet":
        pl.DataFrame({"item_id": ids, "vector": vectors.tolist()}).write_parquet(path)
    else:
        save_file({"vector": vectors}, str(path), metadata={"item_id": json.dumps(ids)})
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_files_with_ids_are_aligned_by_id(tmp_path, suffix):
    path = write(tmp_path, suffix, ["d", "c", "b", "a"])
    extractor = make("file", path=path)
    assert np.array_equal(extractor.embed(four()), VECTORS[::-1])
    assert np.array_equal(extractor.embed(four().select([2])), VECTORS[[1]])
    other = Catalog(pl.DataFrame({"item_id": ["a", "x"]}))
    with pytest.raises(DataError, match=r"no vector for 1 of 2 items, e\.g\. 'x'.*look like 'd'"):
        extractor.embed(other)
    repeated = write(tmp_path, suffix, ["a", "b", "c", "a"])
    with pytest.raises(DataError, match="ids repeat"):
        make("file", path=repeated).embed(four())


def test_files_without_ids_must_have_one_vector_per_item(tmp_path):
    npy = write(tmp_path, "npy", [])
    assert np.array_equal(make("file", path=npy).embed(four()), VECTORS)
    with pytest.raises(DataError, match="4 vectors without ids for 2 items"):
        make("file", path=npy).embed(four().select([0, 1]))
    bare = tmp_path / "bare.safetensors"
    save_file({"vector": VECTORS}, str(bare))
    assert np.array_equal(make("file", path=str(bare)).embed(four()), VECTORS)
    with pytest.raises(
        DataError, match=r"no tensor 'vectr'; it has vector\. Did you mean 'vector'"
    ):
        make("file", path=str(bare), vector_column="vectr").embed(four())


def test_a_changed_file_changes_what_resolve_says(tmp_path):
    path = write(tmp_path, "npy", [])
    before = make("file", path=path).resolve()
    assert before.digest and make("file", path=path).resolve() == before
    write(tmp_path, "npy", [], VECTORS + 1)
    assert make("file", path=path).resolve() != before
    with pytest.raises(DataError, match=r"features\.digest"):
        make("file", path=path, digest=before.digest).embed(four())


def test_unusable_files_are_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="no file at"):
        make("file", path=str(tmp_path / "none.npy")).embed(four())
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"ends in \.npy, \.parquet, \.safetensors"):
        make("file", path=str(tmp_path / "v.txt")).embed(four())
    for suffix in ("npy", "parquet", "safetensors"):
        broken = tmp_path / f"broken.{suffix}"
        broken.write_bytes(b"not what it says")
        with pytest.raises(DataError, match="cannot be read as"):
            make("file", path=str(broken)).embed(four())
    nan = VECTORS.copy()
    nan[2, 0] = np.nan
    with pytest.raises(DataError, match=r"1 item\(s\).*'c'"):
        make("file", path=write(tmp_path, "npy", [], nan)).embed(four())
    with pytest.raises(DataError, match=r"shape \(4,\), expected"):
        make("file", path=write(tmp_path, "npy", [], VECTORS[:, 0])).embed(four())
    ragged = tmp_path / "ragged.parquet"
    pl.DataFrame({"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}).write_parquet(ragged)
    with pytest.raises(DataError, match="different lengths"):
        make("file", path=str(ragged)).embed(four())
    with pytest.raises(DataError, match="no column 'vec'"):
        make("file", path=str(ragged), vector_column="vec").embed(four())


def test_normalize_scales_to_length_one(tmp_path):
    vectors = make("file", path=write(tmp_path, "npy", []), normalize=True).embed(four())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_every_setting_is_documented_and_checked(name):
    settings = {"file": {"path": "x.npy"}, "fusion": {"parts": ["lsa"]}}.get(name, {})
    extractor = make(name, **settings)
    fields = type(extractor).Config.model_fields
    assert [key for key, field in fields.items() if not field.description] == []
    with pytest.raises(ConfigError, match=r"features\.colums: unknown key"):
        make(name, colums=["title"], **settings)
