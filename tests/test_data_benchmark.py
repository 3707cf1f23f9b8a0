"""Does the data benchmark run, agree with its peer, and write the format that checks read?"""

from __future__ import annotations

import json
import subprocess
import sys


def test_small_run_agrees_with_the_whole_table_program(root, tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.data", "--rows", "3000", "--json", str(file)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    result = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "rows"} <= set(result)
    rows = {(row["baseline"], row["unit"]): row for row in result["rows"]}
    assert all(row["equal"] is True for row in rows.values())
    assert set(rows) == {
        ("limit", "peak_mb"),
        ("polars_whole_table", "peak_mb"),
        ("polars_whole_table", "cpu_s"),
        ("polars_whole_table", "wall_s"),
    }
    limit = rows["limit", "peak_mb"]
    assert limit["theirs"] == 2000 and limit["ratio"] == limit["theirs"] / limit["ours"]
