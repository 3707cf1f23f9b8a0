"""Does the evaluation benchmark run, agree with its peer, and write the format that checks read?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_small_run_agrees_with_the_loop_and_keeps_the_limits(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.evaluation", "--quick", "--json", str(file)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=300)
    result = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "rows"} <= set(result)
    assert [(row["baseline"], row["unit"]) for row in result["rows"]] == [
        ("python_loop", "cpu_s"),
        ("limit", "cpu_s"),
        ("limit", "cpu_s"),
        ("limit", "peak_mb"),
    ]
    assert all(row["equal"] is True for row in result["rows"])
    search = result["rows"][-1]["details"]
    assert search["users"] == 64 and search["peak_mb"] >= search["before_mb"]
