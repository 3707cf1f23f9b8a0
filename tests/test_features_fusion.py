"""Is every modality weighed as asked, is a missing one no harm, and are files aligned by id?"""

from __future__ import annotations

import json
import logging
import zlib
from typing import Literal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from genrec.artifacts import load_artifact
from genrec.config import StrictConfig, parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted, planted_leaves
from genrec.errors import ConfigError, DataError, UserError
from genrec.features import FEATURES
from genrec.features.base import FeatureExtractor
from genrec.features.fusing import Scale, agreement_weights, concatenate, imputed, weighted_sum
from genrec.pipeline import stages

DATA = planted(num_items=120, num_users=400, branching=3, width=12, seed=3)
TRAINING = DATA.interactions.training()
LEAVES = planted_leaves(DATA.catalog)
VECTORS = np.asarray(DATA.catalog.vectors)


def make(name, **values):
    cls, config = parse_component(FEATURES, {"name": name, **values}, path="features")
    return cls(config)


def scaled(part: np.ndarray, scaling: str) -> np.ndarray:
    return Scale.of(part, scaling).scaled(part)


def as_file(folder, name: str, vectors: np.ndarray) -> dict[str, str]:
    path = folder / f"{name}.npy"
    np.save(path, vectors.astype(np.float32))
    return {"name": "file", "path": str(path)}


def purity(vectors: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Share of the 3 nearest neighbours that lie in the same leaf."""
    rows = np.arange(len(vectors)) if rows is None else rows
    centred = vectors - vectors[vectors.any(axis=1)].mean(0)
    units = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    similar = units[rows] @ units.T
    similar[np.arange(len(rows)), rows] = -np.inf
    nearest = np.argsort(-similar, axis=1)[:, :3]
    return float((LEAVES[nearest] == LEAVES[rows][:, None]).mean())


def noise(width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(120, width))


# -- functions --------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)))
def test_squared_distances_are_the_weighted_mean_of_the_parts(seed, weights):
    rng = np.random.default_rng(seed)
    parts = [scaled(rng.normal(size=(9, width)), "center") for width in (4, 7)]
    shares = np.array(weights) / sum(weights)
    joined = concatenate(parts, shares)
    for part in (*parts, joined):
        assert np.allclose(np.linalg.norm(part, axis=1), 1)

    def distances(x):
        return ((x[:, None] - x[None]) ** 2).sum(-1)

    expected = sum(w * distances(part) for w, part in zip(shares, parts, strict=True))
    assert np.allclose(distances(joined), expected)


def test_statistics_see_only_the_items_that_have_the_part():
    part = noise(5) + 10
    part[::2] = 0
    whole = part[1::2] - part[1::2].mean(0)
    found = scaled(part, "center")
    assert (found[::2] == 0).all()
    assert np.allclose(found[1::2], whole / np.linalg.norm(whole, axis=1, keepdims=True))
    spread = whole / whole.std(0)
    standard = scaled(part, "standardize")[1::2]
    assert np.allclose(standard, spread / np.linalg.norm(spread, axis=1, keepdims=True))
    assert np.array_equal(scaled(part, "none"), part)
    constant = scaled(np.ones((4, 3)), "center")
    assert np.allclose(np.linalg.norm(constant, axis=1), 1)


def test_an_item_that_lacks_a_part_is_as_long_as_the_others_and_keeps_its_neighbours():
    first, second = scaled(noise(6), "center"), scaled(noise(4, 1), "center")
    second[:60] = 0
    joined = concatenate([first, second], np.array([0.7, 0.3]))
    assert np.allclose(np.linalg.norm(joined, axis=1), 1)
    assert np.allclose(joined[:60, :6], first[:60]) and (joined[:60, 6:] == 0).all()


def test_a_rotated_copy_adds_up_to_the_original():
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    first = scaled(VECTORS, "center")
    second = first @ rotation
    alone = weighted_sum([first], np.ones(1), 12, seed=0)
    both = weighted_sum([first, second], np.array([0.5, 0.5]), 12, seed=0)
    assert both.shape == (120, 12)
    assert np.allclose(both, alone, atol=1e-6)
    second[:30] = 0
    some = weighted_sum([first, second], np.array([0.5, 0.5]), 12, seed=0)
    assert np.allclose(some[:30], alone[:30], atol=1e-6)


def test_a_missing_part_is_the_mean_of_the_nearest_that_have_it():
    first, second = scaled(VECTORS, "center"), scaled(noise(4), "center")
    second[[0, 7]] = 0
    first[7] = 0
    found = imputed([first, second], np.array([0.5, 0.5]))
    known = np.setdiff1d(np.arange(120), [0, 7])
    nearest = known[np.argsort(-(first[known] @ first[0]))[:5]]
    mean = second[nearest].mean(0)
    assert np.allclose(found[1][0], mean / np.linalg.norm(mean))
    assert (found[1][7] == 0).all() and (found[0][7] == 0).all()  # it has nothing to go by
    assert np.array_equal(found[1][known], second[known])


def test_weights_follow_agreement_with_training():
    parts = [scaled(part, "center") for part in (VECTORS, noise(12), VECTORS[:, :3])]
    weights = agreement_weights(parts, TRAINING, seed=0)
    assert weights.sum() == pytest.approx(1) and weights[0] > weights[2] > weights[1]
    assert weights[1] < 0.1


# -- extractor --------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["concatenate", "pca", "weighted_sum"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_second_modality_that_is_missing_is_no_harm(tmp_path, combine, share):
    """Half of the items have a good image vector, the others none: nobody is worse off."""
    rng = np.random.default_rng(0)
    second = VECTORS @ rng.normal(size=(12, 20)) + 0.05 * rng.normal(size=(120, 20))
    lacking = np.arange(120) < 120 * (1 - share)
    second[lacking] = 0
    second[-1] = 1e-3  # with share 0, one item has something
    parts = [as_file(tmp_path, "text", VECTORS), as_file(tmp_path, "image", second)]
    found = make("fusion", parts=parts, combine=combine, width=12).embed(DATA.catalog, TRAINING)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    alone = scaled(VECTORS, "center")
    rows = np.flatnonzero(lacking)
    assert purity(found) >= purity(alone) - 0.05
    assert purity(found, rows) >= purity(alone, rows) - 0.05


@pytest.mark.parametrize(
    "values",
    [
        {"combine": "concatenate"},
        {"combine": "pca", "width": 9},
        {"combine": "weighted_sum", "width": 12},
    ],
)
def test_a_modality_of_noise_is_no_harm(tmp_path, values):
    parts = [as_file(tmp_path, "text", VECTORS), as_file(tmp_path, "noise", noise(64))]
    alone = purity(scaled(VECTORS, "center"))
    found = make("fusion", parts=parts, **values).embed(DATA.catalog, TRAINING)
    assert purity(found) >= alone - 0.05
    equal = make("fusion", parts=parts, weights="equal", **values).embed(DATA.catalog)
    assert purity(equal) < alone - 0.05  # which is why it is not the default


def test_blocks_say_where_each_part_lies(tmp_path):
    second = noise(7)
    second[5] = 0
    parts = [as_file(tmp_path, "text", VECTORS), as_file(tmp_path, "image", second), "lsa"]
    values = {"weights": [1, 2, 0.5], "missing": "zero", "normalize": False}
    fusion = make("fusion", parts=parts, **values)
    found = fusion.embed(DATA.catalog)
    names = [(block.name, block.start, block.stop) for block in fusion.blocks]
    assert names[:2] == [("file", 0, 12), ("file", 12, 19)] and names[2][:2] == ("lsa", 19)
    assert names[2][2] == found.shape[1]
    assert (found[5, 12:19] == 0).all() and found[6, 12:19].any()
    norms = [np.linalg.norm(found[6, a:b]) ** 2 for _, a, b in names]
    assert np.allclose(norms, np.array([1, 2, 0.5]) / 3.5, atol=1e-4)


def test_parts_made_of_interactions_are_no_content(tmp_path):
    collaborative = {"name": "collaborative", "width": 8}
    parts = [as_file(tmp_path, "text", VECTORS), collaborative, as_file(tmp_path, "b", noise(7))]
    fusion = make("fusion", parts=parts, weights="equal")
    fusion.embed(DATA.catalog, TRAINING)
    assert fusion.content_columns(27, fusion.blocks) == (*range(12), *range(20, 27))
    assert make("fusion", parts=parts[:1]).content_columns(128, ()) == tuple(range(128))
    assert make("fusion", parts=parts, combine="pca").content_columns(128, ()) == ()
    assert make("collaborative").content_columns(64, ()) == ()
    assert make("lsa").content_columns(3, ()) == (0, 1, 2)


def test_a_stage_tells_the_catalogue_which_columns_are_content(tmp_path):
    parts = [{"name": "collaborative", "width": 8}, as_file(tmp_path, "text", VECTORS)]
    for config, width in (({"name": "fusion", "parts": parts}, 12), (parts[0], None)):
        resolved = make(**config).resolve()
        folder = tmp_path / config["name"]
        table = Catalog(DATA.catalog.table)
        stages.embed(folder, table, resolved, interactions=DATA.interactions)
        known = stages.add_vectors(table, load_artifact(folder, kind="vectors"))
        content = known.content_vectors
        if width is None:
            assert content is None
            continue
        assert content.shape == (120, width)
        assert np.array_equal(content, known.vectors[:, 8:])
        assert np.array_equal(known.select([7, 3]).content_vectors, content[[7, 3]])
        assert known.with_vectors(known.vectors).content_vectors.shape == (120, 20)


def test_an_item_without_anything_has_the_zero_vector(tmp_path):
    first, second = VECTORS.copy(), noise(6)
    first[[0, 1]], second[[1, 2]] = 0, 0
    parts = [as_file(tmp_path, "a", first), as_file(tmp_path, "b", second)]
    for combine in ("concatenate", "pca", "weighted_sum"):
        fusion = make("fusion", parts=parts, combine=combine, width=6, weights="equal")
        found = fusion.embed(DATA.catalog)
        assert (found[1] == 0).all() and found[[0, 2, 3]].any(axis=1).all()


def test_a_fusion_does_without_auto_where_no_item_has_a_text():
    silent = Catalog(DATA.catalog.table.select("item_id"))
    around = {"name": "collaborative", "width": 8}
    fusion = make("fusion", parts=["auto", around], weights=[0.3, 0.7])
    described = make("fusion", parts=["lsa", around])
    assert described.for_catalog(silent) is described  # chosen by name: it says what is wrong
    titled = Catalog(silent.table.with_columns(title=pl.lit("a word")))
    assert fusion.for_catalog(titled) is fusion
    left = fusion.for_catalog(silent)
    assert left.config.parts == (make(**around).config.to_dict(),) and left.config.weights == (0.7,)
    assert left.embed(silent, TRAINING).shape == (120, 8)
    alone = make("fusion", parts=["auto"], weights="equal").for_catalog(silent)
    assert [part["name"] for part in alone.config.parts] == ["collaborative"]


class Titles(FeatureExtractor):
    """A text encoder without a model: a vector that depends on the title alone."""

    class Config(StrictConfig):
        name: Literal["titles"] = "titles"

    def embed(self, catalog, interactions=None, workplace=None):
        rows = [zlib.crc32((title or "").encode()) for title in catalog.titles]
        known = np.array([bool(title) for title in catalog.titles])[:, None]
        return np.stack([np.random.default_rng(row).normal(size=6) for row in rows]) * known


@pytest.fixture
def titles(monkeypatch):
    monkeypatch.setitem(FEATURES, "titles", f"{__name__}:Titles")


@pytest.mark.parametrize("missing", ["neighbours", "zero"])
def test_items_that_join_later_are_embedded_as_if_they_had_been_there(tmp_path, titles, missing):
    """What they lack is filled in from the others. Without scaling nothing else depends on N."""
    names = [f"film {number % 17}" for number in range(120)]
    everybody = Catalog(DATA.catalog.table.with_columns(title=pl.Series(names)))
    first, later = everybody.select(np.arange(100)), everybody.select(np.arange(100, 120))
    behaviour = VECTORS.copy()
    behaviour[[3, 50]] = 0
    behaviour[100:] = 0

    def fusion(count: int):
        parts = ["titles", as_file(tmp_path, f"b{count}", behaviour[:count])]
        options = {"scaling": "none", "normalize": False, "missing": missing}
        return make("fusion", parts=parts, weights=[0.3, 0.7], **options)

    together = fusion(120).embed(everybody)
    then = fusion(100)
    known = then.embed(first)
    assert then.embeds_later and np.allclose(known, together[:100], atol=1e-6)
    fitted = {name: np.array(array) for name, array in then.fitted().items()}
    found = fusion(100).embed_later(later, fitted, known)
    assert found.dtype == np.float32 and np.allclose(found, together[100:], atol=1e-5)


@pytest.mark.parametrize("scaling", ["center", "standardize"])
def test_items_that_join_later_are_scaled_as_the_others_were(titles, scaling):
    names = [f"film {number % 17}" for number in range(120)]
    catalog = Catalog(DATA.catalog.table.with_columns(title=pl.Series(names)))
    parts = ["titles", {"name": "collaborative", "width": 8}]
    fusion = make("fusion", parts=parts, scaling=scaling, weights="equal")
    known = fusion.embed(catalog, TRAINING)
    rows = np.array([0, 5, 119])
    found = fusion.embed_later(catalog.select(rows), fusion.fitted(), known)
    columns = list(fusion.content_columns(known.shape[1], fusion.blocks))
    assert columns == list(range(6))
    assert np.allclose(found[:, columns], known[rows][:, columns], atol=1e-5)
    assert found[:, 6:].any(axis=1).all()  # a guess from their neighbours
    with pytest.raises(UserError, match=r"what it fitted .* is not at hand"):
        fusion.embed_later(catalog, {}, known)
    plain = {"scaling": "none", "missing": "zero", "weights": "equal"}
    alone = make("fusion", parts=["titles"], **plain)
    assert np.array_equal(alone.embed_later(catalog, alone.fitted(), None), alone.embed(catalog))
    assert alone.fitted() == {}
    assert not make("fusion", parts=parts, combine="pca").embeds_later
    assert not make("fusion", parts=["lsa", parts[1]]).embeds_later


def test_parts_are_resolved_and_what_they_need_is_passed_on(tmp_path):
    part = as_file(tmp_path, "text", VECTORS)
    fusion = make("fusion", parts=[part, {"name": "collaborative", "width": 8}])
    assert fusion.needs_interactions and not fusion.shares_work
    resolved = fusion.resolve()
    assert resolved.parts[0]["digest"] and resolved.parts[1]["width"] == 8
    assert make(**resolved.to_dict()).resolve() == resolved
    assert fusion.embed(DATA.catalog, TRAINING).shape == (120, 20)
    with pytest.raises(UserError, match="needs the training interactions"):
        fusion.embed(DATA.catalog)
    assert make("fusion", parts=["lsa"]).needs_interactions
    assert not make("fusion", parts=["lsa"], weights="equal").needs_interactions
    assert make("fusion", parts=["lsa", "hf_encoder"]).shares_work


def test_only_a_fusion_that_fits_nothing_embeds_items_alone(tmp_path):
    part = as_file(tmp_path, "text", VECTORS)
    alone = {"scaling": "none", "missing": "zero", "weights": [1, 2]}
    fusion = make("fusion", parts=[part, part], **alone)
    assert fusion.embeds_alone
    whole, rows = fusion.embed(DATA.catalog), [5, 3]
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(DATA.catalog.item_ids))
    by_id = make("fusion", parts=[{**part, "ids": str(ids)}] * 2, **alone)
    assert np.allclose(by_id.embed(DATA.catalog.select(rows)), whole[rows], atol=1e-6)
    assert not make("fusion", parts=["lsa", part], **alone).embeds_alone
    for change in ({"scaling": "center"}, {"missing": "neighbours"}, {"combine": "pca"}):
        assert not make("fusion", parts=[part, part], **{**alone, **change}).embeds_alone


def test_unusable_fusions_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"features\.parts.*at least 1"):
        make("fusion", parts=[])
    with pytest.raises(ConfigError, match=r"^features\.parts\.0\.colums: unknown key.*'columns'"):
        make("fusion", parts=[{"name": "lsa", "colums": ["title"]}])
    with pytest.raises(UserError, match=r"got 2 numbers for 1 parts"):
        make("fusion", parts=["lsa"], weights=[1, 2])
    with pytest.raises(ConfigError, match="at least one of them above 0"):
        make("fusion", parts=["lsa"], weights=[0])
    parts = [as_file(tmp_path, "none", np.zeros((120, 3))), "lsa"]
    with pytest.raises(DataError, match=r"part 'file' has no vector for any of the 120"):
        make("fusion", parts=parts).embed(DATA.catalog, TRAINING)


# -- files ------------------------------------------------------------------------------------

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def four() -> Catalog:
    return Catalog(pl.DataFrame({"item_id": ["a", "b", "c", "d"]}))


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("ids_suffix", ["txt", "json"])
def test_ids_may_lie_in_a_file_of_their_own(tmp_path, suffix, ids_suffix):
    path, ids = tmp_path / f"v.{suffix}", tmp_path / f"ids.{ids_suffix}"
    if suffix == "npy":
        np.save(path, ROWS)
    else:
        save_file({"vector": ROWS}, str(path))
    order = ["d", "b", "a", "c"]
    ids.write_text(json.dumps(order) if ids_suffix == "json" else "\n".join(order) + "\n")
    extractor = make("file", path=str(path), ids=str(ids))
    assert np.array_equal(extractor.embed(four()), ROWS[[2, 1, 3, 0]])
    before = extractor.resolve().digest
    ids.write_text(json.dumps(order[::-1]) if ids_suffix == "json" else "\n".join(order[::-1]))
    assert extractor.resolve().digest != before
    ids.write_text('["a"]' if ids_suffix == "json" else "a\n")
    with pytest.raises(DataError, match="holds 1 ids for 4 vectors"):
        extractor.embed(four())
    ids.write_text('["a", "a", "b", "c"]' if ids_suffix == "json" else "a\na\nb\nc")
    with pytest.raises(DataError, match=r"1 item ids repeat.*'a'"):
        extractor.embed(four())


def test_wrong_id_files_are_clear_errors(tmp_path):
    np.save(tmp_path / "v.npy", ROWS)
    values = {"path": str(tmp_path / "v.npy"), "ids": str(tmp_path / "ids.json")}
    with pytest.raises(DataError, match=r"features\.ids: no file at"):
        make("file", **values).embed(four())
    for text in ('{"a": 1}', "not json"):
        (tmp_path / "ids.json").write_text(text)
        with pytest.raises(DataError, match=r"features\.ids: 'ids\.json' cannot be read"):
            make("file", **values).embed(four())
    save_file({"vector": ROWS}, str(tmp_path / "v.safetensors"), metadata={"item_id": '["a"]'})
    (tmp_path / "ids.json").write_text('["a", "b", "c", "d"]')
    with pytest.raises(DataError, match=r"holds (4 vectors and 1 ids|ids of its own)"):
        make("file", **{**values, "path": str(tmp_path / "v.safetensors")}).embed(four())


def test_missing_items_are_listed_or_zero_and_others_are_noted(tmp_path, caplog):
    logging.getLogger("genrec").propagate = True
    path = str(tmp_path / "v.parquet")
    pl.DataFrame({"item_id": ["c", "x", "a", "y"], "vector": ROWS.tolist()}).write_parquet(path)
    with pytest.raises(DataError, match=r"no vector for 2 of 4 items, e\.g\. 'b', 'd'"):
        make("file", path=path).embed(four())
    with caplog.at_level(logging.INFO, logger="genrec"):
        found = make("file", path=path, missing="zero").embed(four())
    assert np.array_equal(found, np.stack([ROWS[2], ROWS[0] * 0, ROWS[0], ROWS[0] * 0]))
    assert "2 of 4 vectors in 'v.parquet' are of other items" in caplog.text
    assert "They get zero vectors" in caplog.text
    other = Catalog(pl.DataFrame({"item_id": ["q"]}))
    with pytest.raises(DataError, match="no vector for 1 of 1 items"):
        make("file", path=path, missing="zero").embed(other)
