"""What do all benchmarks share: fair timing in one process, the machine's description, the JSON.

It knows nothing about what is timed. Both sides run alternately in one process on one thread, and
CPU seconds are the first figure: they are what a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genrec import runtime


@dataclass(frozen=True)
class Timing:
    """Seconds of one side: the median of its runs."""

    cpu: float
    wall: float
    runs: int

    @classmethod
    def of(cls, cpu: Sequence[float], wall: Sequence[float]) -> Timing:
        """Summarise runs."""
        return cls(statistics.median(cpu), statistics.median(wall), len(cpu))


@dataclass(frozen=True)
class Row:
    """One line of a benchmark; `ratio` says how many times better ours is.

    Args:
        case: what was measured.
        baseline: the peer.
        ours: our figure, in `unit`.
        theirs: the peer's.
        ratio: theirs / ours for costs, ours / theirs for rates.
        unit: what the figures are in.
        equal: whether both sides gave the same answer (None: nothing to compare).
        details: anything else that a reader needs (wall seconds, sizes, differences).
    """

    case: str
    baseline: str
    ours: float
    theirs: float
    ratio: float
    unit: str
    equal: bool | None
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_timings(
        cls,
        case: str,
        baseline: str,
        ours: Timing,
        theirs: Timing,
        equal: bool | None,
        **details: Any,
    ) -> Row:
        """Compare CPU seconds; wall seconds go to the details."""
        details |= {
            "ours_wall_s": ours.wall,
            "theirs_wall_s": theirs.wall,
            "wall_ratio": theirs.wall / ours.wall,
            "runs": ours.runs,
        }
        ratio = theirs.cpu / ours.cpu
        return cls(case, baseline, ours.cpu, theirs.cpu, ratio, "cpu_s", equal, details)


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Return (CPU seconds of the process, wall seconds) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, runs: int, warm_up: int = 1
) -> tuple[Timing, Timing]:
    """Time two sides in turn, so that a change of the machine's load meets both.

    Args:
        ours: our side.
        theirs: the peer's.
        runs: timed runs of each.
        warm_up: untimed runs of each before.
    """
    sides = (ours, theirs)
    for _ in range(warm_up):
        for side in sides:
            side()
    found: tuple[list[tuple[float, float]], ...] = ([], [])
    for run in range(runs):
        for i in (0, 1) if run % 2 == 0 else (1, 0):
            found[i].append(timed(sides[i]))
    first, second = (Timing.of(*zip(*pairs, strict=True)) for pairs in found)
    return first, second


def one_thread() -> None:
    """Run torch on one thread, so that CPU seconds mean work."""
    import torch

    torch.set_num_threads(1)


def machine() -> dict[str, Any]:
    """Describe the machine in words and numbers."""
    import torch

    found: dict[str, Any] = {
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return found


def _first_value(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
    return values[0] if values else None


def _memory_gib() -> float | None:
    text = _first_value("/proc/meminfo", "MemTotal")
    return None if text is None else round(int(text.split()[0]) / 2**20, 1)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="small sizes, seconds not minutes")
    arguments.add_argument("--json", type=Path, help="write the result to this file")
    return arguments


def report(rows: Sequence[Row], path: Path | None, **more: Any) -> dict[str, Any]:
    """Print a table, write the JSON (with anything else) where asked for, and return it."""
    result = {
        "machine": machine(),
        "versions": runtime.versions(),
        "commit": runtime.git_state().get("commit", "unknown"),
        "dirty": runtime.git_state().get("dirty"),
        "rows": [asdict(row) for row in rows],
        **more,
    }
    _print(rows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _print(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "baseline", "ours", "theirs", "ratio", "unit", "equal")
    for row in rows:
        figures = (f"{row.ours:.4g}", f"{row.theirs:.4g}", f"{row.ratio:.2f}")
        table.add_row(row.case, row.baseline, *figures, row.unit, str(row.equal))
    Console().print(table)
