"""Does `genrec tokenize` fit, add, refuse and print as its help says?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from genrec.artifacts import load_artifact
from genrec.cli import build_app
from genrec.errors import ArtifactError, UserError
from genrec.item_index import ItemIndex


def tokenize(*arguments: object):
    return CliRunner().invoke(build_app(), ["tokenize", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ring_dataset: Path) -> Path:
    """Vectors file and tokens of the ring, made by the commands."""
    path = tmp_path_factory.mktemp("tokenize")
    embed = ["embed", ring_dataset, "--out", path / "vectors", "features.name=lsa"]
    assert CliRunner().invoke(build_app(), list(map(str, embed))).exit_code == 0
    result = tokenize(
        ring_dataset,
        "--vectors",
        path / "vectors",
        "--out",
        path / "tokens",
        "--json",
        "tokenizer.num_levels=2",
        "tokenizer.codebook_size=16",
        "index.reserve=2",
        "index.drift_holdout=0.1",
    )
    assert result.exit_code == 0, result.exception
    (path / "report.json").write_text(result.stdout)
    vectors = load_artifact(path / "vectors", kind="vectors").arrays["vectors"]
    table = {"item_id": ["n1", "n2"], "vector": (vectors[[5, 9]] * 1.01).tolist()}
    pl.DataFrame(table).write_parquet(path / "v.parquet")
    (path / "new.csv").write_text("item_id,title\nn1,First\nn2,Second\n")
    return path


def test_fitting_prints_the_figures_of_the_index(made, ring_dataset):
    found = json.loads((made / "report.json").read_text())
    index = ItemIndex.load(made / "tokens" / "index")
    assert found["fingerprint"] == index.fingerprint and found["policy"] == "extra_level"
    assert found["cooccurrence"]["num_pairs"] == 184 * 183 // 2
    manifest = load_artifact(made / "tokens" / "index", kind="index")
    assert manifest.config["reserve"] == 2 and manifest.config["features"]["name"] == "lsa"
    assert "unseen_distances" in manifest.arrays


def test_adding_prints_codes_distances_and_drift(made, tmp_path):
    common = ["--add", made / "new.csv", "--index", made / "tokens", "--vectors"]
    result = tokenize(*common, made / "v.parquet", "--out", tmp_path / "grown")
    assert result.exit_code == 0, result.exception
    for words in ("2 item(s) added", "now 186", "n1", "Second", "drift"):
        assert words in result.stdout, words
    result = tokenize(*common, made / "v.parquet", "--out", tmp_path / "grown", "--json")
    found = json.loads(result.stdout)
    assert [entry["item_id"] for entry in found["items"]] == ["n1", "n2"]
    assert found["drift"]["reference"] == "unseen" and found["refused"] == []
    index = ItemIndex.load(tmp_path / "grown" / "index")
    assert len(index) == 186 and len(ItemIndex.load(made / "tokens" / "index")) == 184
    assert np.array_equal(index.codes[184:], [entry["codes"] for entry in found["items"]])


def test_what_is_left_out_is_listed(made, tmp_path):
    (tmp_path / "new.csv").write_text("item_id,title\nn1,First\n7,Known\n")
    common = ["--add", tmp_path / "new.csv", "--index", made / "tokens"]
    common += ["--vectors", made / "v.parquet", "--out", tmp_path / "grown"]
    error = tokenize(*common).exception
    assert isinstance(error, UserError) and "'7': its id is in the index already" in str(error)
    assert not (tmp_path / "grown").exists()
    result = tokenize(*common, "--skip")
    assert result.exit_code == 0 and "1 item(s) left out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--add", "{new}"], "expected `genrec tokenize --add ITEMS --index DIR`"),
        (["{data}", "--add", "{new}", "--index", "{tokens}"], "neither a data set nor overrides"),
        (["{data}", "--out", "x"], "'rqkmeans' needs item vectors. Give --vectors"),
        ([], "got no data set or no --out"),
        (["{data}", "--vectors", "{tokens}/index", "--out", "x"], "expected 'vectors'"),
        (["--add", "none.csv", "--index", "{tokens}"], "none.csv"),
        (["--add", "{new}", "--index", "{data}"], "Expected a bundle, or a folder"),
        (["--add", "{new}", "--index", "{tokens}"], "'lsa' cannot embed items that come later"),
    ],
)
def test_bad_calls_are_one_message(arguments, words, made, ring_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"new": made / "new.csv", "data": ring_dataset, "tokens": made / "tokens"}
    error = tokenize(*[str(a).format(**names) for a in arguments]).exception
    assert isinstance(error, UserError | ArtifactError), error
    assert words in str(error) and list(tmp_path.iterdir()) == []
