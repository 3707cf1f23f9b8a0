"""Two processes train, search and report what one does: the command line under its launchers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from genrec.artifacts import load_artifact
from genrec.data.synthetic import planted

NUM_USERS = 61  # odd: shares differ in size, and batches have remainders
LAUNCHER = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
LIMIT_S = 300


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def torchrun() -> list[str]:
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", *address, "-m", "genrec"]


def accelerate_launch(*options: str) -> list[str]:
    return ["-m", "accelerate.commands.accelerate_cli", "launch", *options, "-m", "genrec"]


def genrec(launcher: list[str], root: Path, *arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=root,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a configuration: 5 parts of 8 examples leave a process without a share."""
    folder = tmp_path_factory.mktemp("two")
    planted(num_items=64, num_users=NUM_USERS, branching=2, length=(5, 9)).save(folder / "data")
    model = {"max_history": 6, "d_model": 16, "num_layers": 1, "d_ff": 32, "dropout": 0.0}
    trainer = {"epochs": 2, "batch_size": 8, "accumulation": 5, "learning_rate": 3e-3}
    trainer |= {"average": 0.9, "weights": {"inverse_popularity": 0.5}}
    config = {
        "name": "two",
        "data": str(folder / "data"),
        "features": "lsa",
        "tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 4},
        "model": {"name": "decoder_only", **model},
        "trainer": {"name": "next_item", **trainer},
        "decoding": {"width": 64},
        "evaluation": {"bootstrap_samples": 100},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def run(launcher: list[str], root: Path, folder: Path, name: str, *more: str) -> str:
    out, cache = ("--out", str(folder / name)), ("--cache", str(folder / "cache"))
    return genrec(launcher, root, "run", str(folder / "run.yaml"), *more, *out, *cache)


@pytest.fixture(scope="module")
def one(folder: Path, root: Path) -> Path:
    """The run of one process."""
    run(["-m", "genrec"], root, folder, "one")
    return folder / "one"


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "seed-1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def test_two_processes_give_what_one_gives(one: Path, folder: Path, root: Path) -> None:
    said = run(torchrun(), root, folder, "two")
    two = folder / "two"

    timing = results(two)["timing"]
    assert "train (seed 1)" in timing["stages"] and "train (seed 1)" not in timing["reused"]
    assert "index (seed 1)" in timing["reused"]
    models = [path.name for path in (folder / "cache" / "model").iterdir()]
    assert len(models) == 2, "the number of processes is part of the key"
    assert said.count("train (seed 1): running") == 1, "only the first process speaks"

    assert len(metrics(two)) == len(metrics(one)) == 3  # two epochs and the summary
    for ours, expected in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == expected.keys()
        for name in ours.keys() - {"targets_per_second"}:
            assert ours[name] == pytest.approx(expected[name], abs=1e-4), name

    for ours, expected in zip(results(two)["rows"], results(one)["rows"], strict=True):
        for name in ("name", "masked", "num_users"):
            assert ours[name] == expected[name], name
        for name in ("recall@10", "ndcg@10"):
            assert ours[name] == pytest.approx(expected[name], abs=1e-4), name
    tables = [pl.read_parquet(path / "per_user.parquet") for path in (two, one)]
    keys = ["name", "seed", "masked", "user_row"]
    assert tables[0].select(keys).equals(tables[1].select(keys))
    assert tables[0].filter(name="genrec", masked=True)["user_row"].to_list() == [*range(NUM_USERS)]


def test_accelerate_launch_runs_one_process(one: Path, folder: Path, root: Path) -> None:
    """It finds every stage in the cache of `python -m genrec run`."""
    run(accelerate_launch("--num_processes", "1"), root, folder, "launched")
    found = results(folder / "launched")
    assert set(found["timing"]["reused"]) == set(found["timing"]["stages"])
    assert found["rows"] == results(one)["rows"]


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_and_they_resume_exactly(
    folder: Path, root: Path
) -> None:
    """Only one process hears it, at whatever step; both must leave after the same checkpoint."""
    psutil = pytest.importorskip("psutil")
    long = ("trainer.epochs=60", "trainer.patience=60", "trainer.accumulation=1")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]

    def launcher() -> list[str]:
        return accelerate_launch(*options, "--main_process_port", free_port())

    arguments = ["run", str(folder / "run.yaml"), *long, "--cache", str(folder / "cut-cache")]
    curve = folder / "cut" / "seed-1" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *launcher(), *arguments, "--out", str(folder / "cut")],
        cwd=root,
        env=environment(ACCELERATE_USE_CPU="true"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + LIMIT_S
        while not (curve.exists() and len(curve.read_text().splitlines()) >= 2):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        psutil.Process(process.pid).children()[-1].send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and "SIGTERM: checkpoint at step" in said
    assert len(metrics(folder / "cut")) < 60

    for name in ("cut", "whole"):
        cache = ("--cache", str(folder / f"{name}-cache"), "--out", str(folder / name))
        said = genrec(launcher(), root, *arguments[:-2], *cache, ACCELERATE_USE_CPU="true")
        assert ("resumed at step" in said) == (name == "cut")
    cut, whole = (metrics(folder / name) for name in ("cut", "whole"))
    assert [line.get("loss") for line in cut] == [line.get("loss") for line in whole]
    first, second = (
        load_artifact(folder / name / "bundle" / "model", kind="model").arrays
        for name in ("cut", "whole")
    )
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
