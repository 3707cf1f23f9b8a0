"""Do new items enter an index whole or not at all, and is drift told from overfitting?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
import torch

from genrec.artifacts import load_artifact
from genrec.config import StrictConfig
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.errors import ArtifactError, DataError, MismatchError, UserError
from genrec.features import FEATURES
from genrec.features.base import FeatureExtractor
from genrec.item_index import ItemIndex
from genrec.pipeline import indexing
from genrec.pipeline.drift import drift_figures
from genrec.pipeline.growth import add_items, isolate
from genrec.pipeline.index_folder import align, open_target, read_items
from genrec.pipeline.indexing import FITTED, OWN_CODES, UNSEEN, BuiltIndex, IndexConfig
from genrec.tokenizers.rqkmeans import RQKMeans

WIDTH = 8


def embed(text: str) -> np.ndarray:
    """A vector that depends on the text alone; the first word says where it lies."""
    digests = [hashlib.sha256(part.encode()).digest()[:WIDTH] for part in (text.split()[0], text)]
    coarse, fine = (np.frombuffer(digest, np.uint8) / 128.0 - 1 for digest in digests)
    return coarse + 0.2 * fine


class Hashing(FeatureExtractor):
    """A text encoder without a model; `turn` stands for another version of the model."""

    class Config(StrictConfig):
        name: Literal["hashing"] = "hashing"
        columns: tuple[str, ...] | None = None

    turn = 1

    def embed(self, catalog, interactions=None, workplace=None):
        texts = catalog.texts(self.config.columns)
        vectors = [embed(text) if text else np.zeros(WIDTH) for text in texts]
        return self.turn * np.array(vectors, np.float32).reshape(len(texts), WIDTH)


@pytest.fixture(autouse=True)
def hashing(monkeypatch):
    monkeypatch.setitem(FEATURES, "hashing", f"{__name__}:Hashing")
    monkeypatch.setattr(Hashing, "turn", 1)


def catalog_of(count: int = 60) -> Catalog:
    titles = [f"word{n % 6} film {n}" for n in range(count)]
    table = pl.DataFrame(
        {"item_id": [f"i{n}" for n in range(count)], "title": titles, "year": list(range(count))}
    )
    return Catalog(table, Hashing(Hashing.Config(columns=("title",))).embed(Catalog(table)))


def tokens_folder(path: Path, *, features=True, codebook_size=8, **options) -> Path:
    """Write what `genrec tokenize` writes."""
    catalog = catalog_of()
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=codebook_size)).fit(catalog)
    tokenizer.save(path / "tokenizer")
    recorded = Hashing.Config(columns=("title",)).to_dict() if features else None
    built = indexing.build(tokenizer, catalog, IndexConfig(**options), features=recorded)
    fingerprint = load_artifact(path / "tokenizer", kind="tokenizer").fingerprint
    built.save(path / "index", {"tokenizer": fingerprint})
    return path


def new_items(*titles: str | None, prefix: str = "n") -> Catalog:
    ids = [f"{prefix}{number}" for number in range(len(titles))]
    return Catalog(pl.DataFrame({"item_id": ids, "title": titles}, schema_overrides={"title": str}))


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# -- adding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["extra_level", "assign_last", "nearest_free", "sinkhorn"])
def test_new_items_join_and_no_code_changes(tmp_path, policy):
    folder = tokens_folder(tmp_path / "t", collisions=policy, codebook_size=16)
    before, tokenizer = BuiltIndex.load(folder / "index"), snapshot(folder / "tokenizer")
    report = add_items(folder, new_items("word1 film 90", "word2 film 91", "word9 what else"))
    after = BuiltIndex.load(folder / "index")
    assert np.array_equal(after.index.codes[:60], before.index.codes)
    assert after.index.item_ids == (*before.index.item_ids, "n0", "n1", "n2")
    assert after.index.codebook_sizes == before.index.codebook_sizes
    assert report["num_added"] == 3 and report["num_items"] == 63
    assert report["index_fingerprint"] == after.index.fingerprint
    assert report["previous_fingerprint"] == before.index.fingerprint
    assert [entry["codes"] for entry in report["items"]] == after.index.codes[60:].tolist()
    assert after.notes == before.notes and len(after.arrays[OWN_CODES]) == 63
    assert snapshot(folder / "tokenizer") == tokenizer
    assert json.loads(json.dumps(report)) == report
    again = add_items(folder, new_items("word3 film 92", prefix="m"))  # it can grow again
    assert again["num_items"] == 64


def test_the_same_text_gets_the_same_codes_and_no_distance(tmp_path):
    folder = tokens_folder(tmp_path / "t", reserve=3)
    old = ItemIndex.load(folder / "index")
    report = add_items(folder, new_items("word5 film 5"))
    assert report["items"][0]["codes"][:2] == old.codes[5, :2].tolist()


def test_out_leaves_the_old_folder_alone(tmp_path):
    folder = tokens_folder(tmp_path / "t", reserve=1)
    before = snapshot(folder)
    add_items(folder, new_items("word1 film 90"), out=tmp_path / "new")
    assert snapshot(folder) == before
    assert len(ItemIndex.load(tmp_path / "new" / "index")) == 61
    assert open_target(tmp_path / "new").built().index.item_ids[-1] == "n0"
    add_items(tmp_path / "new" / "index", new_items("word2 film 91", prefix="m"))
    assert len(ItemIndex.load(tmp_path / "new" / "index")) == 62


def test_refusals_are_listed_and_nothing_changes(tmp_path):
    folder = tokens_folder(tmp_path / "t", reserve=1)
    before = snapshot(tmp_path)
    items = Catalog(
        pl.DataFrame({"item_id": ["i3", "n1", "n2"], "title": ["word1 a", None, "word1 b"]})
    )
    with pytest.raises(UserError) as error:
        add_items(folder, items)
    text = str(error.value)
    assert "2 of 3 item(s) cannot be added; nothing was changed" in text and "--skip" in text
    assert "'i3': its id is in the index already" in text and "'n1': it has no text" in text
    assert snapshot(tmp_path) == before
    report = add_items(folder, items, skip=True)
    assert [entry["item_id"] for entry in report["items"]] == ["n2"]
    assert [entry["item_id"] for entry in report["refused"]] == ["i3", "n1"]
    with pytest.raises(UserError, match="none is left to add"):
        add_items(folder, items, skip=True)


def test_a_full_extra_level_refuses_by_name(tmp_path):
    folder = tokens_folder(tmp_path / "t")  # no reserve: as large as the largest group
    size = ItemIndex.load(folder / "index").codebook_sizes[-1]
    same = new_items(*["word1 film 1"] * (size + 3))
    with pytest.raises(UserError, match=rf"all {size} semantic IDs with its codes.*") as error:
        add_items(folder, same)
    assert "index.reserve" in str(error.value)
    report = add_items(folder, same, skip=True)
    assert 0 < report["num_added"] < size + 3
    assert report["num_added"] + len(report["refused"]) == size + 3
    roomy = tokens_folder(tmp_path / "r", reserve=size + 3)
    assert add_items(roomy, same)["num_added"] == size + 3


def test_an_index_of_forbid_takes_only_what_does_not_collide(tmp_path):
    catalog = catalog_of(6)
    path = tmp_path / "t"
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=1, codebook_size=6)).fit(catalog)
    tokenizer.save(path / "tokenizer")
    built = indexing.build(tokenizer, catalog, IndexConfig(collisions="forbid"))
    upstream = load_artifact(path / "tokenizer", kind="tokenizer").fingerprint
    built.save(path / "index", {"tokenizer": upstream})
    np.save(tmp_path / "v.npy", catalog.vectors[:1])
    with pytest.raises(UserError, match=r"an item with its codes \(\d,\) is there already"):
        add_items(path, new_items("word0 film 0"), vectors=tmp_path / "v.npy")


# -- vectors -------------------------------------------------------------------------------------


def vector_file(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    pl.DataFrame({"item_id": ids, "vector": vectors.tolist()}).write_parquet(path)
    return path


def test_given_vectors_are_aligned_by_id_and_checked(tmp_path):
    folder = tokens_folder(tmp_path / "t", features=False, reserve=9)
    vectors = np.stack([embed(f"word1 film {n}") for n in range(3)])
    vectors[1, 2] = np.nan
    file = vector_file(tmp_path / "v.parquet", ["n2", "n1", "n0"], vectors)
    items = new_items(None, None, None, None)
    with pytest.raises(UserError, match=r"2 of 4 item") as error:
        add_items(folder, items, vectors=file)
    assert "'n1': its vector holds NaN or infinity" in str(error.value)
    assert "'n3': the file of vectors has none for it" in str(error.value)
    report = add_items(folder, items, vectors=file, skip=True)
    expected = RQKMeans.load(folder / "tokenizer").encode(
        Catalog.from_vectors(vectors[[2, 0]], ["n0", "n2"])
    )
    assert [entry["codes"][:2] for entry in report["items"]] == expected.tolist()


def test_npy_vectors_need_one_row_per_new_item(tmp_path):
    folder = tokens_folder(tmp_path / "t", features=False, reserve=9)
    np.save(tmp_path / "v.npy", np.ones((2, WIDTH), np.float32))
    with pytest.raises(DataError, match=r"2 vectors without ids for 1 new item"):
        add_items(folder, new_items("word1 a"), vectors=tmp_path / "v.npy")
    np.save(tmp_path / "w.npy", np.ones((1, WIDTH + 1), np.float32))
    with pytest.raises(UserError, match=r"got vectors of shape \(1, 9\)"):
        add_items(folder, new_items("word1 a"), vectors=tmp_path / "w.npy")


def test_without_a_recorded_extractor_vectors_must_be_given(tmp_path):
    folder = tokens_folder(tmp_path / "t", features=False)
    with pytest.raises(UserError, match=r"does not say how its items were embedded.*--vectors"):
        add_items(folder, new_items("word1 a"))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"name": "lsa"}, "'lsa' cannot embed items that come later: it fits on the catalogue"),
        ({"name": "file", "path": "x.npy"}, "was built from a file of vectors"),
    ],
)
def test_extractors_that_cannot_embed_later_items_say_so(tmp_path, features, words):
    folder = tokens_folder(tmp_path / "t")
    built = open_target(folder).built()
    built.notes["features"] = features
    built.save(folder / "index", load_artifact(folder / "index", kind="index").upstream)
    with pytest.raises(UserError, match=words):
        add_items(folder, new_items("word1 a"))


# -- what cannot grow ----------------------------------------------------------------------------


def test_folders_that_cannot_grow_say_why(tmp_path):
    with pytest.raises(ArtifactError, match=r"no index at"):
        add_items(tmp_path / "nowhere", new_items("word1 a"))
    folder = tokens_folder(tmp_path / "t")
    index, upstream = ItemIndex.load(folder / "index"), {"tokenizer": "another"}
    index.save(folder / "index", upstream=upstream)
    with pytest.raises(MismatchError, match="tokenizer another"):
        add_items(folder, new_items("word1 a"))
    right = load_artifact(folder / "tokenizer", kind="tokenizer").fingerprint
    index.save(folder / "index", upstream={"tokenizer": right})
    with pytest.raises(UserError, match="does not say by which collision policy"):
        add_items(folder, new_items("word1 a"))


def test_tokenizers_of_known_items_only_refuse(tmp_path, monkeypatch):
    folder = tokens_folder(tmp_path / "t")
    monkeypatch.setattr(RQKMeans, "codes_new_items", False)
    with pytest.raises(UserError, match="'rqkmeans' cannot code new items"):
        add_items(folder, new_items("word1 a"))


def test_one_bad_item_among_many_is_found():
    catalog, calls = catalog_of(), []

    def call(part):
        calls.append(len(part))
        if "i17" in part.item_ids:
            raise UserError("no seventeen")
        return np.arange(len(part))

    parts, reasons = isolate(catalog, call)
    assert sum(map(len, parts)) == 59 and reasons == {"i17": "no seventeen"}
    assert len(calls) <= 2 * 6 + 1


# -- reading and aligning ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl", "items.parquet"])
def test_items_are_read_from_any_table(tmp_path, name):
    table = pl.DataFrame({"item_id": ["7", "8"], "title": ["A, b", None]})
    path = tmp_path / name
    {"csv": table.write_csv, "jsonl": table.write_ndjson, "parquet": table.write_parquet}[
        name.split(".")[1]
    ](path)
    found = read_items(path)
    assert found.item_ids == ["7", "8"] and found.titles == ["A, b", None]


def test_items_that_repeat_or_are_none_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("item_id,title\n1,a\n1,b\n")
    with pytest.raises(DataError, match=r"item ids repeat, e\.g\. '1'"):
        read_items(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("item_id,title\n")
    with pytest.raises(DataError, match="holds no items"):
        read_items(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("id,title\n1,a\n")
    with pytest.raises(DataError, match="no column 'item_id'"):
        read_items(tmp_path / "c.csv")


def test_new_items_get_the_columns_of_the_catalogue():
    known = Catalog(
        pl.DataFrame({"item_id": ["1"], "title": ["A"], "genres": [["x", "y"]], "year": [1990]})
    )
    items = Catalog(
        pl.DataFrame({"item_id": ["2"], "year": ["1991"], "genres": ["x, y"], "price": ["3"]})
    )
    found = align(items, known, None)
    assert found.table.schema == known.table.schema
    assert found.table.row(0) == ("2", None, ["x, y"], 1991)
    bad = Catalog(pl.DataFrame({"item_id": ["2"], "year": ["soon"]}))
    with pytest.raises(DataError, match="column 'year' does not hold Int64"):
        align(bad, known, None)
    assert align(items, None, ["genres", "title"]).columns == ["genres", "title"]


# -- drift ---------------------------------------------------------------------------------------


def test_drift_shares_by_hand():
    reference = np.linspace(0, 100, 101)
    figures, percentile = drift_figures(np.array([0.0, 50, 96, 99.5, 200]), {UNSEEN: reference})
    assert figures["share_above"] == {"95": 0.6, "99": 0.4} and figures["reference"] == "unseen"
    assert percentile.tolist() == [0, 50, 96, 99.5, 100] and figures["drifted"]
    assert "3 of 5 new item(s) (60%) lie farther" in figures["sentence"]
    assert "Consider fitting it again" in figures["sentence"]
    calm, _ = drift_figures(np.array([10.0, 20, 99]), {UNSEEN: reference})
    assert calm["drifted"] is False and "No sign of drift" in calm["sentence"]
    fitted, _ = drift_figures(np.array([200.0] * 9), {FITTED: reference})
    assert fitted["drifted"] is None and "this alone is no sign of drift" in fitted["sentence"]
    assert drift_figures(None, {FITTED: reference}) == (None, None)


def test_a_held_out_reference_tells_drift_from_overfitting():
    data = planted(256, num_users=1, noise=1.0, seed=1)
    rows = np.random.default_rng(0).permutation(256)
    catalog, alike = data.catalog.select(rows[:216]), data.catalog.select(rows[216:])
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=64)).fit(catalog)
    built = indexing.build(tokenizer, catalog, IndexConfig(drift_holdout=0.2))

    def shares(items):
        distances = np.square(
            tokenizer.inputs(items) - tokenizer.decode(tokenizer.encode(items))
        ).sum(axis=1)
        return [drift_figures(distances, {key: built.arrays[key]})[0] for key in (FITTED, UNSEEN)]

    fitted, unseen = shares(alike)
    assert fitted["share_above"]["95"] > 0.4  # overfitting: not drift, and not called so
    assert unseen["drifted"] is False
    other = alike.with_vectors(np.random.default_rng(1).normal(size=alike.vectors.shape))
    assert shares(other)[1]["drifted"] is True


def test_the_build_records_what_placing_takes():
    catalog = catalog_of()
    tokenizer = RQKMeans(RQKMeans.Config(num_levels=2, codebook_size=8)).fit(catalog)
    built = indexing.build(tokenizer, catalog, IndexConfig(reserve=2), features={"name": "x"})
    assert built.notes["collisions"] == "extra_level" and built.notes["reserve"] == 2
    assert built.notes["features"] == {"name": "x"} and built.notes["columns"] == ["title", "year"]
    assert np.array_equal(built.arrays[OWN_CODES], tokenizer.encode(catalog))
    plain = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert built.index.codebook_sizes[-1] == plain.codebook_sizes[-1] + 2
    assert built.arrays[FITTED].shape == (101,) and UNSEEN not in built.arrays


# -- bundles -------------------------------------------------------------------------------------


@pytest.fixture
def lsa_vectors(small_run, ring_dataset):
    from genrec.data import Dataset
    from genrec.features.text import LSA

    catalog = Dataset.load(ring_dataset).catalog
    return LSA(LSA.Config(num_dimensions=64)).embed(catalog)


def test_what_an_extractor_finds_nothing_in_is_refused_and_nothing_else(tmp_path):
    """The extractor decides, not the texts: it may read pictures, or the title alone."""
    folder = tokens_folder(tmp_path / "t", reserve=4)
    table = {"item_id": ["n0", "n1"], "title": [None, "word1 a"], "year": [1999, 2000]}
    with pytest.raises(UserError, match=r"'n0': the features find nothing in it"):
        add_items(folder, Catalog(pl.DataFrame(table)))
    report = add_items(folder, Catalog(pl.DataFrame(table)), skip=True)
    assert [entry["item_id"] for entry in report["items"]] == ["n1"]


def test_a_bundle_answers_with_its_new_items(tmp_path, small_run, lsa_vectors):
    from genrec.recommender import Recommender

    bundle = small_run / "bundle"
    before = snapshot(bundle)
    items = new_items("Ring item 50 again", "Ring item 60 again")
    file = vector_file(tmp_path / "v.parquet", ["n0", "n1"], lsa_vectors[[50, 60]])
    old = ItemIndex.load(bundle / "index")
    with pytest.raises(UserError, match="'lsa' cannot embed items that come later"):
        add_items(bundle, items, out=tmp_path / "b")
    report = add_items(bundle, items, vectors=file, out=tmp_path / "b", skip=True)
    assert snapshot(bundle) == before
    assert report["num_added"] >= 1
    added = [entry["item_id"] for entry in report["items"]]
    grown = Recommender.from_pretrained(tmp_path / "b")
    assert np.array_equal(grown.index.codes[:184], old.codes)
    assert grown.catalog.titles[184] == items.titles[int(added[0][1])]
    every = len(grown.index)
    found = grown.recommend([["48", "49"], added], k=every, width=every, exclude_seen=False)
    assert set(added) <= set(found.item_ids[0])
    assert np.allclose(np.exp(found.scores).sum(axis=1), 1, atol=1e-3)  # old and new share the mass
    asked = Recommender.from_pretrained(bundle).score([["48", "49"]], [["50", "51"]])
    again = grown.score([["48", "49"]], [["50", "51"]])
    assert np.isfinite(again).all() and asked.shape == again.shape
    manifest = load_artifact(tmp_path / "b", kind="bundle")
    assert manifest.extra["added"][0]["num_items"] == report["num_added"]
    model = load_artifact(tmp_path / "b" / "model", kind="model")
    assert model.extra["trained_on_index"] == old.fingerprint
    assert model.upstream["index"] == grown.index.fingerprint


CONTENT = {
    "features": {"name": "fusion", "parts": ["hashing", "collaborative"], "weights": "equal"},
    "tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 4},
    "model.d_model": 8, "model.num_layers": 1, "model.d_ff": 8, "model.content_half_at": 2.0,
    "trainer.epochs": 1, "decoding.width": 12, "seeds": [1], "evaluation.baselines": ["markov"],
    "index.reserve": 4,
}  # fmt: skip


@pytest.mark.parametrize("members", [1, 2])
def test_the_default_generator_knows_new_items_by_their_content(tmp_path, monkeypatch, members):
    from genrec.bundle import load_bundle
    from genrec.config import load_yaml
    from genrec.configs_folder import find_config
    from genrec.data.synthetic import ring
    from genrec.pipeline.config import load_run_config
    from genrec.pipeline.run import Run
    from genrec.recommender import Recommender

    ring(num_items=24, num_users=40, length=6).save(tmp_path / "data")
    changes = {**CONTENT, "data": str(tmp_path / "data")}
    if members > 1:
        sizes = {k: v for k, v in changes.items() if k.startswith("model.")}
        member = {**load_yaml(find_config("genrec"))["model"]}
        member |= {key.removeprefix("model."): changes.pop(key) for key in sizes}
        changes["model"] = {"name": "ensemble", "size": members, "of": member}
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    config = load_run_config(find_config("genrec"), settings)
    Run(config, out=tmp_path / "r", cache=tmp_path / "c", device="cpu").execute(command="test")
    bundle = tmp_path / "r" / "bundle"
    before = load_bundle(bundle)
    title = before.catalog.titles[5]
    report = add_items(bundle, new_items(title, "Ring film unheard of"), out=tmp_path / "b")
    assert report["num_added"] == 2
    grown = load_bundle(tmp_path / "b")
    for model, old in zip(
        getattr(grown.model, "members", [grown.model]),
        getattr(before.model, "members", [before.model]),
        strict=True,
    ):
        known, known_before = model.content.vectors_NE, old.content.vectors_NE
        assert np.array_equal(known[:24], known_before) and len(known) == 26
        assert np.allclose(known[24], known_before[5], atol=1e-5)  # the same text
        assert not np.allclose(known[25], 0) and not np.allclose(known[25], known[24])
        share_N = old.content.share_N1[:, 0]  # 2 / (2 + n) of an item with n interactions
        trained_at = float(torch.sum(2 - 2 * share_N) / torch.sum(2 / share_N - 2))
        assert 0 < trained_at < 1
        assert model.content.share_N1[24:].tolist() == [[pytest.approx(trained_at)]] * 2
        assert not model.consumed_N1[24:].any()
    again = add_items(tmp_path / "b", new_items("And another", prefix="m"), out=tmp_path / "b2")
    assert again["num_items"] == 27
    assert len(
        Recommender.from_pretrained(tmp_path / "b2").recommend([["n0", "m0"]], k=5).item_ids[0]
    )
    for turn in (-1, 0):  # another version of the encoder; one that finds nothing in any text
        monkeypatch.setattr(Hashing, "turn", turn)
        with pytest.raises(MismatchError, match=r"only 0 of 24 known items get the vector"):
            add_items(bundle, new_items("word1 a", prefix="z"), out=tmp_path / "b3")


def test_an_extractor_that_changed_is_noticed(tmp_path, small_run, monkeypatch):
    """The bundle's own items are embedded again and must get their codes."""
    import shutil

    bundle = tmp_path / "bundle"
    folder = tokens_folder(tmp_path / "t", reserve=2)
    shutil.copytree(folder, bundle)
    catalog_of().table.write_parquet(bundle / "catalog.parquet")
    from genrec.artifacts import write_artifact

    write_artifact(bundle, kind="bundle")
    monkeypatch.setattr(Hashing, "turn", -1)
    with pytest.raises(MismatchError, match=r"gives other vectors here.*only \d+ of 32"):
        add_items(bundle, new_items("word1 a"))
