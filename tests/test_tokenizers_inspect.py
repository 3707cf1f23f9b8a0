"""Does `genrec inspect` show any artifact, and the codes of an index?"""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from genrec.artifacts import save_artifact
from genrec.cli import inspect as command
from genrec.errors import ArtifactError
from genrec.item_index import ItemIndex

CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 2, 0]])


@pytest.fixture
def run():
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)

    def call(*arguments: str):
        return CliRunner().invoke(app, ["inspect", *arguments])

    return call


@pytest.fixture
def index(tmp_path):
    index = ItemIndex(("a", "b", "c", "d"), CODES, (2, 4, 2))
    index.save(tmp_path / "bundle" / "index", upstream={"tokenizer": "f00"})
    return tmp_path / "bundle" / "index"


def test_an_index_shows_its_levels_and_prefixes(run, index):
    result = run(str(index), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["kind"] == "index" and report["upstream"] == {"tokenizer": "f00"}
    tokens = report["tokens"]
    assert tokens["num_items"] == 4 and tokens["num_tokens"] == 8
    assert [level["used"] for level in tokens["levels"]] == [2, 3, 2]
    assert tokens["levels"][1]["perplexity"] == pytest.approx(np.exp(1.5 * np.log(2)))
    assert [p["num_distinct"] for p in tokens["prefixes"]] == [2, 3, 4]
    assert [p["share_of_items_sharing"] for p in tokens["prefixes"]] == [0.75, 0.5, 0.0]
    assert tokens["branches"][0]["prefix"] == [0] and tokens["branches"][0]["num_items"] == 3


def test_titles_come_from_the_catalogue_beside_the_index(run, index):
    titles = ["Alien", "[Rec] [/x]", None, "Brazil"]
    table = pl.DataFrame({"item_id": ["a", "b", "c", "d"], "title": titles})
    table.write_parquet(index.parent / "catalog.parquet")
    examples = json.loads(run(str(index), "--json").stdout)["tokens"]["branches"][0]["examples"]
    assert [e["title"] for e in examples] == ["Alien", "[Rec] [/x]", None]
    assert [e["item_id"] for e in examples] == ["a", "b", "c"]
    assert "[Rec] [/x]" in run(str(index)).stdout


def test_a_folder_that_holds_an_index_shows_it_too(run, index):
    save_artifact(index.parent.parent / "other", kind="vectors", arrays={"x": np.zeros(3)})
    assert "tokens" not in json.loads(run(str(index.parent.parent / "other"), "--json").stdout)
    from genrec.artifacts import MANIFEST, write_artifact

    assert not (index.parent / MANIFEST).exists()
    write_artifact(index.parent, kind="bundle", extra={"dataset": {"name": "small"}})
    report = json.loads(run(str(index.parent), "--json").stdout)
    assert report["kind"] == "bundle" and report["facts"]["dataset"] == {"name": "small"}
    assert report["tokens"]["num_items"] == 4 and report["files"]["count"] == 2


def test_long_facts_are_counted_not_printed(run, tmp_path):
    ids = tuple(f"item{number}" for number in range(100))
    ItemIndex(ids, np.arange(100)[:, None], (100,)).save(tmp_path / "index")
    report = json.loads(run(str(tmp_path / "index"), "--json").stdout)
    assert report["facts"]["item_ids"] == "100 values"
    assert "item42" not in run(str(tmp_path / "index")).stdout


def test_the_table_shows_kind_fingerprint_and_configuration(run, tmp_path):
    path = tmp_path / "t"
    saved = save_artifact(path, kind="tokenizer", config={"name": "rqkmeans", "num_levels": 3})
    text = run(str(path)).stdout
    assert "tokenizer at" in text and saved.fingerprint in text and "config.num_levels" in text


def test_what_is_no_artifact_is_refused(run, tmp_path, index):
    for path in (tmp_path, tmp_path / "nowhere"):
        result = run(str(path))
        assert isinstance(result.exception, ArtifactError)
    manifest = index / "manifest.json"
    manifest.write_text(manifest.read_text().replace("f00", "bar"))
    assert "was edited" in str(run(str(index)).exception)
