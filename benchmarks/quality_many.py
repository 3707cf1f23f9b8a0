"""Which pieces of the quality table can be made in so many minutes? Side by side, until time is up.

For machines that are lent for minutes: what is finished is skipped, what is not done in time is
told to stop, keeps its checkpoint, and goes on with the next call. It fits nothing itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from benchmarks.quality_rows import BASELINES, row_names
from genrec.errors import UserError
from genrec.models.baselines import TRAINED

GRACE_S = 30.0  # what a process that was told to stop has for its checkpoint
DONE, STOPPED, FAILED, LEFT = "done", "stopped", "failed", "not begun"

Piece = tuple[str, Path, int]


def pieces(rows: Sequence[str], data: Sequence[Path], seeds: Sequence[int]) -> list[Piece]:
    """Return (row, data set, seed) in the order in which they are made: first seeds first.

    Raises:
        UserError: an unknown row.
    """
    unknown = [row for row in rows if row not in row_names()]
    if unknown:
        raise UserError(f"--rows: got {unknown[0]!r}, expected some of {', '.join(row_names())}.")
    found = []
    for seed, folder, row in product(seeds, data, rows):
        counts = row in BASELINES and BASELINES[row]["name"] not in TRAINED
        if not counts or seed == seeds[0]:
            found.append((row, folder, 0 if counts else seed))
    return found


def make(
    wanted: Sequence[Piece], options: Sequence[str], *, minutes: float, processes: int
) -> list[tuple[Piece, str]]:
    """Make pieces, each in a process of its own; return what became of them.

    Args:
        wanted: in the order in which they are begun.
        options: passed on to `python -m benchmarks.quality row`.
        minutes: after which nothing runs any more.
        processes: how many at a time.
    """
    deadline = time.monotonic() + 60 * minutes - GRACE_S

    def one(piece: Piece) -> tuple[Piece, str]:
        row, folder, seed = piece
        if time.monotonic() >= deadline:
            return piece, LEFT
        command = [sys.executable, "-m", "benchmarks.quality", "row", row, "--data", str(folder)]
        process = subprocess.Popen([*command, "--seed", str(seed), *options])
        try:
            code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return piece, STOPPED
        return piece, DONE if code == 0 else FAILED

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(one, wanted))
