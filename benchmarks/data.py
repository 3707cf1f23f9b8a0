"""How much memory and time does preparing a large csv file take, beside reading it whole?

The peer is the straightforward program: polars reads the whole table, filters, sorts and numbers
it. Each side runs in a process of its own, on the same file, and the results must be equal; the
peak is the high-water mark of resident memory that the system reports.

    python -m benchmarks.data [--quick] [--rows N] [--json FILE]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import common
from genrec.artifacts import fingerprint
from genrec.data.prepare import PrepareConfig, prepare

ROWS, QUICK_ROWS = 10_000_000, 300_000
LIMIT_MB = 2_000.0
CHUNK = 500_000
CORE = 5
SIDES = ("ours_file", "ours_hash", "theirs")


def write_csv(path: Path, num_rows: int, seed: int = 0) -> None:
    """Write random events in no order: ids as long as Amazon's, popular items, many equal times."""
    rng = np.random.default_rng(seed)
    num_users, num_items = max(20, num_rows // 10), max(20, num_rows // 50)
    with open(path, "wb") as file:
        for start in range(0, num_rows, CHUNK):
            size = min(CHUNK, num_rows - start)
            table = pl.DataFrame(
                {
                    "user": rng.integers(num_users, size=size),
                    "item": (num_items * rng.random(size) ** 2).astype(np.int64),
                    "rating": rng.integers(1, 6, size=size),
                    "time": 1_300_000_000 + 86_400 * rng.integers(0, 40, size=size),
                }
            ).with_columns(
                user="A" + pl.col("user").cast(pl.String).str.zfill(13),
                item="B" + pl.col("item").cast(pl.String).str.zfill(9),
            )
            table.write_csv(file, include_header=start == 0)


def ours(path: Path, ties: str = "file") -> str:
    """Prepare with genrec and return a digest of the sequences."""
    source = {
        "name": "tabular",
        "path": str(path),
        "user": "user",
        "item": "item",
        "timestamp": "time",
    }
    config = PrepareConfig(
        min_user_interactions=CORE,
        min_item_interactions=CORE,
        ties="hash" if ties == "hash" else "file",
        name="benchmark",
    )
    dataset = prepare(source, config, path.parent / "dataset")
    events = dataset.interactions
    return fingerprint(dataset.catalog.item_ids, events.item_rows, events.offsets)


def theirs(path: Path) -> str:
    """Do the same with the whole table in memory."""
    table = pl.read_csv(path).with_row_index("place")
    table = table.with_columns(pl.col("place").min().over("user").alias("first"))
    table = table.sort("time", "place").unique(["user", "item"], keep="first", maintain_order=True)
    while True:
        size = len(table)
        for key in ("user", "item"):
            table = table.filter(pl.len().over(key) >= CORE)
        if len(table) == size:
            break
    table = table.sort("first", "time", "place")
    items = table["item"].unique().sort()
    rows = table["item"].replace_strict(items, pl.Series(range(len(items)), dtype=pl.Int32))
    lengths = table.group_by("first", maintain_order=True).len()["len"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table.select("first", "time").with_columns(rows).write_parquet(path.parent / "theirs.parquet")
    return fingerprint(items.to_list(), rows.to_numpy(), offsets)


def peak_mb() -> float:
    """Return this process's high-water mark of resident memory in MB (10^6 bytes)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def child(side: str, path: Path) -> None:
    """Run one side and print what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    digest = theirs(path) if side == "theirs" else ours(path, ties=side.removeprefix("ours_"))
    figures = {
        "digest": digest,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": peak_mb(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def measure(side: str, path: Path) -> dict[str, Any]:
    """Run one side in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data", "--child", side, "--file", str(path)]
    environment = {**os.environ, "GENREC_PROGRESS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{side} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run both sides; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, help="number of events (default 10 million)")
    parser.add_argument("--child", choices=SIDES, help="used by the benchmark itself")
    parser.add_argument("--file", type=Path, help="used by the benchmark itself")
    arguments = parser.parse_args(argv)
    if arguments.child:
        child(arguments.child, arguments.file)
        return {}
    num_rows = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    with tempfile.TemporaryDirectory(prefix="genrec-benchmark-") as folder:
        path = Path(folder) / "events.csv"
        write_csv(path, num_rows)
        size = path.stat().st_size / 1e6
        mine, hashed, peer = (measure(side, path) for side in SIDES)
    equal = mine["digest"] == peer["digest"]
    case = f"prepare {num_rows:,} events"
    details = {"rows": num_rows, "file_mb": size, "ours": mine, "hash": hashed, "theirs": peer}
    rows = [_limit(f"{case}, ties=hash", hashed, details), _limit(case, mine, details)]
    for key in ("peak_mb", "cpu_s", "wall_s"):
        ratio = peer[key] / mine[key]
        rows.append(
            common.Row(case, "polars_whole_table", mine[key], peer[key], ratio, key, equal, details)
        )
    return common.report(rows, arguments.json)


def _limit(case: str, figures: dict[str, Any], details: dict[str, Any]) -> common.Row:
    """Compare the peak with the limit; `equal` says whether it was kept."""
    peak = figures["peak_mb"]
    ratio = LIMIT_MB / peak
    return common.Row(case, "limit", peak, LIMIT_MB, ratio, "peak_mb", peak < LIMIT_MB, details)


if __name__ == "__main__":
    main()
