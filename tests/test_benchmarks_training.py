"""The training benchmark compares equal trainings, and its JSON has the documented shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from genrec.trainers.optimization import cpu_has_bf16


def test_quick_benchmark_starts_both_sides_from_the_same_loss(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    tiny = ["--quick", "--users", "6", "--runs", "1"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *tiny, "--json", str(path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "versions", "commit", "rows"} <= result.keys()
    assert result["machine"]["threads"] == 1
    twins = [row for row in result["rows"] if "first_loss_difference" in row["details"]]
    attention = [row for row in result["rows"] if row["baseline"] == "torch's attention"]
    across = [row for row in result["rows"] if row not in twins + attention]
    mixed = [row["baseline"] for row in twins if "bf16" in row["case"]]
    both = ["hf_trainer, fp32", "hf_trainer, bf16", "hf_trainer, fp32"]
    assert mixed == (both if cpu_has_bf16() else [])
    assert len(attention) == (3 if cpu_has_bf16() else 0)
    for row in attention:
        assert row["details"]["largest_relative_loss_difference"] <= 0.02
    assert len(twins) == 6 + len(mixed) and len(across) == 2
    assert {row["details"]["model"]["name"] for row in across} == {"hierarchical"}
    assert {row["details"]["their_model"]["name"] for row in across} == {"encoder_decoder"}
    for row in result["rows"]:
        assert {"case", "baseline", "ours", "theirs", "ratio", "unit", "equal"} <= row.keys()
        assert row in attention or row["baseline"].startswith("hf_trainer")
        assert row["unit"] == "targets/s"
        assert row["equal"] is True
        details = row["details"]
        if row in twins:
            assert details["first_loss_difference"] <= 1e-4 and details["first_loss_ours"] > 1.0
        assert len(details["ours_cpu_s"]) == len(details["theirs_cpu_s"]) == details["runs"]
        assert row["ratio"] == row["ours"] / row["theirs"]
