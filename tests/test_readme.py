"""The README works: its Python block runs as it stands, and so do its cheap commands."""

from __future__ import annotations

import csv
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from genrec.cli import main

# Run as they stand, in the order of the README. `genrec run` gets --dry-run; what trains is only
# parsed (tests/test_docs.py).
CHEAP = {"prepare", "doctor", "baselines", "recommend", "inspect", "run"}


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def home(root: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that looks like a clone after `make demo`, with a user's own tables."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(small_run, target_is_directory=True)
    (tmp_path / "configs").symlink_to(root / "configs", target_is_directory=True)
    draw = random.Random(0)
    with (tmp_path / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "sku", "time"])
        for customer in range(60):
            for place, item in enumerate(draw.sample(range(30), 8)):
                writer.writerow([f"c{customer}", f"sku-{item}", 1_700_000_000 + 60 * place])
    with (tmp_path / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "name"])
        writer.writerows([f"sku-{item}", f"Thing number {item}"] for item in range(30))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run(readme: str, home: Path) -> None:
    found = blocks(readme, "python")
    assert found
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    result, recommender = names["result"], names["recommender"]
    for part in (result.item_ids, result.scores, result.probabilities):  # type: ignore[attr-defined]
        assert part.shape == (1, 10)
    ids = result.item_ids[0].tolist()  # type: ignore[attr-defined]
    assert set(ids) <= set(recommender.item_ids)  # type: ignore[attr-defined]
    assert not {"50", "181", "174"} & set(ids)
    exact = recommender.score([["50", "181"]], [["174", "172"]])  # type: ignore[attr-defined]
    assert exact.shape == (1, 2) and np.isfinite(exact).all()


def test_cheap_commands_run(readme: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("genrec ")]
    ran = []
    for _, command, *arguments in words:
        if command not in CHEAP:
            continue
        if command == "run" and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments])
        captured = capsys.readouterr()
        assert not stop.value.code, f"genrec {command} {arguments}: {captured.err}"
        assert captured.out.strip()
        ran.append(command)
    assert set(ran) == CHEAP
    assert (home / "data" / "mine" / "manifest.json").is_file()


def test_first_and_second_command(readme: str) -> None:
    commands = [line for block in blocks(readme, "bash") for line in block.splitlines() if line]
    assert commands[:2] == ["make demo", "make test"]


def test_place_for_the_results_of_the_demo(readme: str) -> None:
    assert readme.count("<!-- demo-results -->") == 2
