"""The command line: every command on small data, bad input without traceback, quick help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genrec.cli import build_app, main


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit status, standard output and error."""
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def commands() -> set[str]:
    return {c.name or c.callback.__name__ for c in build_app().registered_commands}  # type: ignore[union-attr]


def test_every_command_of_the_issue_is_there() -> None:
    wanted = {
        "demo",
        "run",
        "prepare",
        "doctor",
        "embed",
        "tokenize",
        "train",
        "calibrate",
        "evaluate",
        "recommend",
        "inspect",
        "baselines",
    }
    assert wanted <= commands()


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in sorted(commands()):
        status, out, _ = call(capsys, name, "--help")
        assert status == 0 and "Usage" in out, name


def test_help_and_version_as_a_program(root: Path) -> None:
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-m", "genrec", flag], capture_output=True, text=True, cwd=root
        )
        assert done.returncode == 0 and "genrec" in done.stdout.lower()


def test_dry_run_prints_the_resolved_config(
    capsys: pytest.CaptureFixture[str], small_config: Path
) -> None:
    status, out, _ = call(capsys, "run", small_config, "--dry-run", "tokenizer.num_levels=3")
    assert status == 0 and "num_levels: 3" in out and "weight_decay" in out


def test_run_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str],
    small_config: Path,
    small_cache: Path,
    tmp_path: Path,
    small_run: Path,
) -> None:
    common = ["run", small_config, "--out", tmp_path / "r", "--cache", small_cache]
    status, out, _ = call(capsys, *common)
    assert status == 0 and "most_popular" in out and "report.html" in out
    status, out, _ = call(capsys, *common, "--json")
    assert status == 0 and json.loads(out)["rows"]


def test_the_stages_alone_make_a_bundle_that_answers(
    capsys: pytest.CaptureFixture[str], small_config: Path, ring_dataset: Path, tmp_path: Path
) -> None:
    config = ["--config", small_config]
    out = {name: tmp_path / name for name in ("vectors", "tokens", "model", "bundle")}
    cache = ["--cache", tmp_path / "cache"]

    def done(*arguments: object) -> dict:
        status, text, err = call(capsys, *arguments, "--json")
        assert status == 0, err
        return json.loads(text)

    assert done("embed", ring_dataset, *config, "--out", out["vectors"])["items"] == 184
    tokens = done(
        "tokenize", ring_dataset, *config, "--vectors", out["vectors"], "--out", out["tokens"]
    )
    assert "fingerprint" in tokens
    trained = done(
        "train",
        ring_dataset,
        *config,
        "--index",
        out["tokens"],
        "--out",
        out["model"],
        "trainer.epochs=1",
    )
    assert trained["epochs"] == 1
    done(
        "calibrate",
        ring_dataset,
        *config,
        "--index",
        out["tokens"],
        "--model",
        out["model"],
        "--out",
        out["bundle"],
        *cache,
    )
    figures = done(
        "evaluate", out["bundle"], ring_dataset, *config, *cache, "--out", tmp_path / "results.json"
    )
    assert figures["rows"] == json.loads((tmp_path / "results.json").read_text())["rows"]
    asked = done("recommend", out["bundle"], "--history", "50,51,52", "-k", 3)
    assert len(asked[0]["items"]) == 3 and asked[0]["items"][0]["title"].startswith("Ring item")
    assert (out["bundle"] / "tokenizer").is_dir()


@pytest.mark.parametrize("command", ["train", "evaluate", "baselines"])
def test_stages_that_measure_refuse_data_with_an_error(
    command: str, capsys: pytest.CaptureFixture[str], small_config: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    lines = [[user, *sorted(rng.permutation(40)[:12])] for user in range(60)]
    (tmp_path / "sorted.txt").write_text("".join(" ".join(map(str, x)) + "\n" for x in lines))
    data = tmp_path / "data"
    status, _, err = call(
        capsys, "prepare", "sequences", tmp_path / "sorted.txt", "--out", data, "--name", "sorted"
    )
    assert status == 0, err
    config = ["--config", small_config]
    arguments = {
        "train": [data, *config, "--index", tmp_path / "none", "--out", tmp_path / "model"],
        "evaluate": [tmp_path / "none", data, *config, "--cache", tmp_path / "cache"],
        "baselines": [data],
    }
    status, _, err = call(capsys, command, *arguments[command])
    assert status == 2 and "order of the items' id, and no time says otherwise" in err
    assert not (tmp_path / "model").exists()


def test_recommend_prints_titles_and_probabilities(
    capsys: pytest.CaptureFixture[str], small_run: Path
) -> None:
    bundle = small_run / "bundle"
    status, out, err = call(
        capsys, "recommend", bundle, "--history", "50,nope", "--history", "", "-k", 2
    )
    assert status == 0 and out.count("Ring item") >= 4 and "%" in out
    assert "nope" in err and "Traceback" not in err
    assert out.count("Expected hits in this list") == out.count("Preference strength") == 2
    status, out, _ = call(
        capsys,
        "recommend",
        bundle,
        "--history",
        "5",
        "-k",
        2,
        "--candidates",
        "9,8",
        "--exclude",
        "9",
        "--json",
    )
    assert [item["item_id"] for item in json.loads(out)[0]["items"]] == ["8"]
    status, out, _ = call(
        capsys, "recommend", bundle, "--history", "5", "--history", "9,10", "--json", "-k", 3
    )
    for user in json.loads(out):
        listed = sum(item["probability"] for item in user["items"])
        assert user["expected_hits"] == pytest.approx(listed)
        assert 0 <= user["preference_strength"] <= 1
    asked = ("recommend", bundle, "--history", "5", "-k", 3, "--json", "--rule")
    status, out, _ = call(capsys, *asked, "item_id = '8' or item_id = '9'")
    assert {item["item_id"] for item in json.loads(out)[0]["items"]} == {"8", "9"}
    status, _, err = call(capsys, *asked, "prize < 3")
    assert status == 2 and "prize" in err


def test_inspect_shows_what_an_artifact_is(
    capsys: pytest.CaptureFixture[str], small_run: Path
) -> None:
    for part, kind in (("", "bundle"), ("index", "index"), ("model", "model")):
        status, out, _ = call(capsys, "inspect", small_run / "bundle" / part, "--json")
        assert status == 0 and json.loads(out)["kind"] == kind


def test_baselines_and_doctor(capsys: pytest.CaptureFixture[str], ring_dataset: Path) -> None:
    status, out, _ = call(capsys, "baselines", ring_dataset, "--json")
    rows = json.loads(out)["rows"] if status == 0 else []
    markov = [r for r in rows if r["name"] == "markov" and not r["masked"]]
    assert markov[0]["recall@10"] == 1.0  # the ring is a Markov chain
    likeness = json.loads(out)["beyond_accuracy"]["masked"]
    assert likeness["markov"]["coverage"] > likeness["most_popular"]["coverage"] > 0
    status, out, _ = call(capsys, "baselines", ring_dataset)
    assert status == 0 and "long tail" in out
    status, out, _ = call(capsys, "doctor", ring_dataset, "--json")
    assert status == 0 and isinstance(json.loads(out), dict | list)


BAD = [
    (["run", "none.yaml"], "no file at"),
    (["run", "{config}", "tokenizer.num_levelz=3"], "tokenizer.num_levelz"),
    (["run", "{config}", "trainer.epochs=many"], "trainer.epochs: got 'many'"),
    (["run", "{config}", "data=nowhere"], "no dataset at"),
    (["recommend", "nowhere", "--history", "1"], "no bundle at"),
    (["recommend", "{bundle}", "--history", "1", "-k", "0"], "k: got 0"),
    (["recommend", "{bundle}", "--history", "1", "--width", "0"], "width: got 0"),
    (["recommend", "{bundle}", "--history", "nope", "--missing", "error"], "'nope'"),
    (["doctor", "nowhere"], "nowhere"),
    (["baselines", "{bundle}"], "expected 'dataset'"),
    (["inspect", "nowhere"], "nowhere"),
    (["embed", "{bundle}", "--out", "x"], "expected 'dataset'"),
    (["train", "{dataset}", "--index", "{bundle}/model", "--out", "x"], "expected 'index'"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD, ids=lambda v: "-".join(v) if isinstance(v, list) else None
)
def test_bad_input_is_one_message_and_status_2(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    small_run: Path,
    small_config: Path,
    ring_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [
        a.format(config=small_config, bundle=small_run / "bundle", dataset=ring_dataset)
        for a in arguments
    ]
    status, out, err = call(capsys, *filled)
    assert status == 2 and words in err and "Traceback" not in err + out, err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_killed_run_goes_on_where_it_was(
    small_config: Path, small_run: Path, tmp_path: Path, root: Path
) -> None:
    """SIGKILL after the first checkpoint of a real process, then the same command again."""
    out, cache = tmp_path / "r", tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "genrec",
        "run",
        str(small_config),
        "--out",
        str(out),
        "--cache",
        str(cache),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENREC_PROGRESS": "0"}
    process = subprocess.Popen(
        [*command, "trainer.checkpoint_every=1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment,
    )
    while not list(cache.glob("model/*.work/checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
    process.kill()
    process.communicate()
    assert not (out / "bundle").exists()
    done = subprocess.run(
        [*command, "trainer.checkpoint_every=1"],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows == json.loads((small_run / "results.json").read_text())["rows"]
    assert not list(cache.glob("model/*.work"))
