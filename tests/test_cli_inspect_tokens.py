"""Does `genrec inspect tokens` tell all it can about codes, and say what it cannot?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from genrec.artifacts import load_artifact
from genrec.cli import build_app
from genrec.errors import MismatchError, UserError
from genrec.evaluation.token_plots import code_colour, item_map, token_rows, write_token_page
from genrec.item_index import ItemIndex
from genrec.pipeline import stages
from genrec.pipeline.indexing import BuiltIndex
from genrec.pipeline.tokens import gather


def inspect(*arguments: object):
    return CliRunner().invoke(build_app(), ["inspect", *map(str, arguments)])


def report(*arguments: object) -> dict:
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ring_dataset: Path) -> Path:
    """vectors/ and tokens/ (index by assign_last) of the ring."""
    path = tmp_path_factory.mktemp("inspect")
    from genrec.data import Dataset
    from genrec.features.text import LSA
    from genrec.tokenizers.rqkmeans import RQKMeans

    dataset = Dataset.load(ring_dataset)
    features = LSA.Config(num_dimensions=64)
    stages.embed(path / "vectors", dataset.catalog, features)
    vectors = load_artifact(path / "vectors", kind="vectors")
    catalog = stages.add_vectors(dataset.catalog, vectors)
    config = RQKMeans.Config(num_levels=2, codebook_size=24, balanced=True)
    stages.fit_tokenizer(
        path / "tokens" / "tokenizer", catalog, dataset.interactions, config, {"vectors": "v"}
    )
    from genrec.pipeline.indexing import IndexConfig

    stages.build_index(
        path / "tokens" / "index",
        load_artifact(path / "tokens" / "tokenizer", kind="tokenizer"),
        catalog,
        IndexConfig(collisions="assign_last"),
        features=features.to_dict(),
    )
    return path


def test_everything_is_told_where_everything_is_at_hand(folder, ring_dataset):
    found = report(
        "tokens", folder / "tokens", "--dataset", ring_dataset, "--vectors", folder / "vectors"
    )
    assert found["notes"] == [] and found["policy"] == "assign_last"
    assert found["collisions"]["rate"] > 0 == found["index"]["collisions"]["rate"]
    assert found["index"]["num_items_moved"] > 0 and found["index"]["moved_distance"]["mean"] > 0
    for side in (found, found["index"]):
        assert side["reconstruction"]["relative_squared_error"] > 0
        assert 0 < side["neighbours"]["overlap"] <= 1
        assert -1 <= side["cooccurrence"]["correlation"] <= 1
    assert found["tree"][0]["examples"][0]["title"].startswith("Ring item")


def test_the_table_has_before_and_after(folder, ring_dataset):
    text = inspect(
        "tokens", folder / "tokens", "--dataset", ring_dataset, "--vectors", folder / "vectors"
    ).stdout
    for words in (
        "before",
        "after",
        "collision rate",
        "largest group",
        "moved how far",
        "nearest items kept",
        "correlation with co-occurrence",
        "perplexity",
        "Biggest branches",
        "Ring item",
    ):
        assert words in text, words


def test_items_are_embedded_again_as_the_index_records(folder, ring_dataset):
    given = report(
        "tokens", folder / "tokens", "--dataset", ring_dataset, "--vectors", folder / "vectors"
    )
    again = report("tokens", folder / "tokens", "--dataset", ring_dataset)
    assert again["reconstruction"] == given["reconstruction"]


def test_what_is_missing_is_said(folder, tmp_path):
    found = report("tokens", folder / "tokens", "--cache", tmp_path)
    text = " ".join(found["notes"])
    assert "--dataset" in text and "--vectors" in text and "reconstruction" not in found
    assert found["collisions"]["rate"] > 0  # the tokenizer's own codes are recorded
    shutil.copytree(folder / "tokens" / "index", tmp_path / "alone")
    found = report("tokens", tmp_path / "alone", "--cache", tmp_path)
    assert "No tokenizer beside the index" in " ".join(found["notes"])
    ItemIndex(("a", "b"), np.array([[0, 1], [1, 0]]), (2, 2)).save(tmp_path / "bare")
    found = report("tokens", tmp_path / "bare", "--cache", tmp_path)
    assert "own codes are not recorded" in " ".join(found["notes"])
    assert (
        "co-occurrence" not in inspect("tokens", tmp_path / "bare").stdout.split("No training")[0]
    )


def test_vectors_and_data_sets_of_other_items_are_refused(folder, tmp_path, ring_dataset):
    other = np.random.default_rng(0).normal(size=(184, 64)).astype(np.float32)
    np.save(tmp_path / "other.npy", other)
    with pytest.raises(MismatchError, match=r"only \d+ of 184 items get the codes"):
        gather(folder / "tokens", dataset=ring_dataset, vectors=tmp_path / "other.npy")
    from genrec.data.synthetic import planted

    planted(64, num_users=9).save(tmp_path / "planted")
    with pytest.raises(MismatchError, match="does not list the items of the index"):
        gather(folder / "tokens", dataset=tmp_path / "planted")


def test_a_bundle_finds_its_data_set_and_vectors_in_the_cache(small_run, small_cache):
    sources = gather(small_run / "bundle", cache=small_cache)
    assert sources.notes or sources.interactions is not None
    assert sources.catalog.vectors is not None and sources.catalog.titles[0] is not None
    assert BuiltIndex.load(small_run / "bundle" / "index").notes["features"]["name"] == "lsa"
    found = report("tokens", small_run / "bundle", "--cache", small_cache)
    assert found["tokenizer"] == "rqkmeans" and found["reconstruction"]


def test_pictures_are_one_page_without_the_network(folder, ring_dataset, tmp_path):
    result = inspect(
        "tokens",
        folder / "tokens",
        "--dataset",
        ring_dataset,
        "--vectors",
        folder / "vectors",
        "--plots",
        tmp_path / "plots",
    )
    assert result.exit_code == 0 and "tokens.html" in result.stdout
    page = (tmp_path / "plots" / "tokens.html").read_text()
    assert page.count("<svg") == 2 and "://" not in page and "<script" not in page
    assert "principal components" in page and "Ring item" in page
    saved = json.loads((tmp_path / "plots" / "tokens.json").read_text())
    assert saved["index"]["num_levels"] == 2


def test_titles_in_the_page_are_escaped(folder, tmp_path):
    found = gather(folder / "tokens").report()
    found["tree"][0]["examples"][0]["title"] = "<b>$x & y"
    write_token_page(
        tmp_path / "t.html",
        found,
        usage=[np.array([3, 1])],
        points=(np.zeros((4, 2)), np.array([found["tree"][0]["code"]] * 4)),
    )
    page = (tmp_path / "t.html").read_text()
    assert "<b>$x" not in page and "&lt;b&gt;$x &amp; y" in page


def test_the_map_has_a_colour_per_first_code():
    points, codes = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 3
    svg = item_map(points, codes, {1: "one"}, "m")
    assert len({code_colour(code) for code in range(256)}) > 200
    assert all(code_colour(code) in svg for code in range(3)) and ">one<" in svg


def test_a_shared_vocabulary_is_inspected_without_vectors(tmp_path):
    codes = np.array([[1, 2, 0], [1, 3, 0], [4, 0, 0]])
    ItemIndex(("a", "b", "c"), codes, (6, 6, 6), True).save(tmp_path / "index")
    found = report("tokens", tmp_path / "index")
    assert found["index"]["shared_vocabulary"] and found["index"]["levels"][2]["used"] == 0
    assert [branch["prefix"] for branch in found["tree"]] == [[1], [4]]
    assert dict((row[0], row[1:]) for row in token_rows(found))["levels"] == ["3", "3"]
    assert report(tmp_path / "index")["tokens"]["levels"][1]["used"] == 2


def test_wrong_words_are_refused(folder, tmp_path):
    for arguments, words in (
        (("token", folder / "tokens"), "got 'token' before the path"),
        (("tokens", folder / "tokens", "--map", "umap"), "--map: got 'umap', expected one of pca"),
        (("tokens", tmp_path), "is not a genrec index"),
    ):
        error = inspect(*arguments).exception
        assert isinstance(error, UserError) and words in str(error)
