"""Do prepare, doctor and assets parse their options, print, and exit with the right status?"""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from genrec.cli.data import register
from genrec.data import Dataset
from genrec.errors import ConfigError, DataError

ROWS = [(f"u{n % 6}", f"i{(n * 7 + n // 6) % 5}", n % 5 + 1, 100 + n) for n in range(30)]


@pytest.fixture
def run():
    """Run a command; a GenrecError passes through as it does to `genrec.cli.main`."""
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)

    def call(*arguments) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call


@pytest.fixture
def events(tmp_path):
    text = "who\twhat\tstars\twhen\n" + "".join("\t".join(map(str, r)) + "\n" for r in ROWS)
    path = tmp_path / "events.tsv"
    path.write_text(text)
    return path


COLUMNS = ("--user", "who", "--item", "what", "--rating", "stars", "--timestamp", "when")


def test_prepare_passes_every_choice_on(run, events, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text('{"id": "i1", "label": "One", "brand": "B", "size": 3}\n')
    out = tmp_path / "out"
    status, output = run(
        *("prepare", "tabular", events, "--out", out, *COLUMNS, "--name", "mine"),
        *("--min-user", 2, "--min-item", 1, "--min-rating", 2, "--duplicates", "last"),
        *("--ties", "file", "--bad-rows", "skip", "--split", "global_time"),
        *("--valid-fraction", 0.2, "--test-fraction", 0.2, "--time-format", "s"),
        *("--items", items, "--items-id", "id", "--title", "label", "--columns", "brand"),
        *("--separator", "\\t", "--no-quotes", "--format", "tsv", "--encoding", "latin-1"),
        *("--user-map", tmp_path / "map.csv", "--json"),
    )
    assert status == 0
    printed = json.loads(output)
    dataset = Dataset.load(out)
    assert printed.pop("fingerprint") == dataset.fingerprint
    assert printed.pop("path") == str(out)
    assert printed == dataset.info
    assert dataset.info["filters"] == {
        "min_user_interactions": 2,
        "min_item_interactions": 1,
        "sample_users": None,
        "rating_threshold": 2.0,
        "bad_rows": "skip",
    }
    assert (dataset.name, dataset.info["duplicates"], dataset.info["ties"]) == (
        "mine",
        "last",
        "file",
    )
    assert dataset.info["split"]["valid_fraction"] == 0.2
    assert dataset.info["source_options"]["separator"] == "\t"
    assert dataset.catalog.columns == ["title", "brand"]
    assert (tmp_path / "map.csv").read_text().startswith("user_id,user_row\nu")


def test_prepare_prints_a_table_and_the_next_step(run, events, tmp_path):
    status, output = run(
        *("prepare", "tabular", events, "--out", tmp_path / "out", *COLUMNS, "--k-core", 1)
    )
    assert status == 0
    assert "interactions kept" in output and "30" in output
    assert f"genrec doctor {tmp_path / 'out'}" in output.replace("\n", "")


def test_prepare_without_timestamps_and_with_a_generic_option(run, events, tmp_path):
    run(
        *("prepare", "tabular", events, "--out", tmp_path / "out", *COLUMNS[:4], "--k-core", 1),
        *("--timestamp", "none", "--option", "quotes=false"),
    )
    info = Dataset.load(tmp_path / "out").info
    assert (info["order"], info["source_options"]["quotes"]) == ("file", False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--duplicates", "none"], r"prepare\.duplicates: got 'none'.*'first', 'last' or 'keep'"),
        (["--k-core", 0], r"prepare\.min_user_interactions: got 0"),
        (["--split", "random"], r"prepare\.split: got 'random'"),
        (["--release", "2014"], r"source\.release: unknown key.*Valid keys here: path, name, user"),
        (["--option", "itm=x"], r"source\.itm: unknown key. Did you mean 'item'\?"),
    ],
)
def test_wrong_options_are_config_errors(run, events, tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        run("prepare", "tabular", events, "--out", tmp_path / "out", *COLUMNS, *options)
    assert not (tmp_path / "out").exists()


def test_unknown_source_names_the_nearest(run, events, tmp_path):
    with pytest.raises(ConfigError, match=r"got 'tabel', expected one of amazon, .*'tabular'"):
        run("prepare", "tabel", events, "--out", tmp_path / "out")


def prepared(run, events, tmp_path):
    out = tmp_path / "out"
    run("prepare", "tabular", events, "--out", out, *COLUMNS, "--k-core", 1)
    return out


def test_doctor_exits_0_with_warnings_and_1_with_errors(run, events, tmp_path):
    out = prepared(run, events, tmp_path)
    status, output = run("doctor", out)
    assert status == 0
    assert "WARNING items_without_text: 5 of 5 items" in output
    assert "0 errors, 1 warnings" in output
    np.save(tmp_path / "v.npy", np.full((5, 2), np.nan))
    status, output = run("doctor", out, "--vectors", tmp_path / "v.npy", "--json")
    assert status == 1
    found = json.loads(output)
    assert (found["dataset"], found["counts"]["error"]) == ("events", 1)
    assert found["findings"][0]["code"] == "vectors_not_finite"


def test_doctor_reads_vector_artifacts_and_refuses_others(run, events, tmp_path):
    from genrec.artifacts import save_artifact

    out = prepared(run, events, tmp_path)
    save_artifact(tmp_path / "v", kind="vectors", arrays={"vectors": np.ones((4, 2))})
    status, output = run("doctor", out, "--vectors", tmp_path / "v")
    assert status == 1 and "vectors_count" in output
    (tmp_path / "bad.npy").write_text("no")
    with pytest.raises(DataError, match=r"cannot be read .*Expected a \.npy file of numbers"):
        run("doctor", out, "--vectors", tmp_path / "bad.npy")


def test_assets_list_and_fetch(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_ASSETS", str(tmp_path))
    inside = tmp_path / "recbole/dataset_example/ml-100k"
    inside.mkdir(parents=True)
    (inside / "ml-100k.inter").write_text("x")
    _, output = run("assets", "list", "--json")
    assert {row["name"]: row["path"] for row in json.loads(output)}["ml-100k"] == str(inside)
    _, output = run("assets", "list")
    assert "non-commercial" in output
    _, output = run("assets", "fetch", "--json")
    assert json.loads(output) == {"ml-100k": str(inside)}
