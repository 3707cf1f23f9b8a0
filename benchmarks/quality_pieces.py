"""How does a piece of the quality table lie on disk? Small enough to be kept beside the table.

A piece is two files. `ROW-SEED.json` says what was run and what came out; `ROW-SEED.parquet` holds
what the test users' targets earned, one line per user and way of ranking **with a hit** among the
first ten places: everybody else has zeros. With both in the repository, intervals and paired tests
of the table can be made again, and rows added, without training anything a second time.

Shapes: U test users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import atomic_file
from genrec.bundle import mode_name

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
DEEPEST = "recall@10"  # zero here means zero everywhere
SEEN = {False: "seen items kept in", True: "seen items left out"}

Values = Mapping[str, np.ndarray]


def runs_of(rows: np.ndarray) -> list[list[int]]:
    """Return ascending integers (U,) as [first, one after the last] of each unbroken stretch."""
    if len(rows) == 0:
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(rows, breaks)]


def rows_of(runs: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the integers (U,) int64 that `runs_of` was given."""
    parts = [np.arange(first, end, dtype=np.int64) for first, end in runs]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def write_values(path: Path, user_rows: np.ndarray, values: Mapping[str, Values]) -> None:
    """Write the lines of users with a hit, atomically.

    Args:
        path: the parquet file.
        user_rows: (U,) of the test users.
        values: by mode, metric -> (U,); of `METRICS`.
    """
    tables = []
    for masked in SEEN:
        mine = values[mode_name(masked)]
        columns = {"user_row": user_rows, **{metric: mine[metric] for metric in METRICS}}
        tables.append(pl.DataFrame(columns).with_columns(masked=pl.lit(masked)))
    table = pl.concat(tables).filter(pl.col(DEEPEST) > 0)
    with atomic_file(path) as temporary:
        table.write_parquet(temporary, compression="zstd", compression_level=19)


def read_values(path: Path, told: Mapping[str, Any]) -> pl.DataFrame:
    """Return a line per test user and way of ranking, zeros included, as a run writes them.

    Args:
        path: the parquet file.
        told: content of the JSON file beside it.
    """
    hits = pl.read_parquet(path)
    users = rows_of(told["test_users"])
    everybody = pl.DataFrame({"user_row": users}).join(
        pl.DataFrame({"masked": list(SEEN)}), how="cross"
    )
    table = everybody.join(hits, on=["user_row", "masked"], how="left", maintain_order="left")
    flags = {"name": pl.lit(told["row"]), "seed": pl.lit(told["seed"])}
    return table.with_columns(pl.col(METRICS).fill_null(0.0), **flags)
