"""The decode benchmark runs, its lists equal the peer's, and its JSON has the documented shape."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quick_benchmark_writes_equal_lists_and_the_documented_json(root, tmp_path):
    path = tmp_path / "decoding.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.decoding", "--quick", "--json", str(path)],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=300,
    )
    result = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "rows"} <= result.keys()
    for row in result["rows"]:
        assert {"case", "baseline", "ours", "theirs", "ratio", "unit", "equal"} <= row.keys()
    peers = [row for row in result["rows"] if row["baseline"] == "hf_generate"]
    assert len(peers) == 5 and all(row["equal"] for row in peers)
