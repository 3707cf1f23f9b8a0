"""What did a run leave, and may two runs be compared? Result folders in, per-user values out.

A folder holds results.json and per_user.parquet. Runs are compared on the same users of the same
data under the same protocol, or not at all; how is in `comparison.py`.

Shapes: S seeds, U users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.errors import ArtifactError, MismatchError, UserError, nearest

SYSTEM = "genrec"
RESULTS, PER_USER = "results.json", "per_user.parquet"
# What two results must share: the data with its splits, and how they were ranked.
PROTOCOL = ("split", "ties", "duplicates", "filters", "ranking", "hit", "targets", "test_history")
# What they may differ in, and a reader must see.
SEARCH = ("max_history", "beam_width", "scoring")
KEYS = ("name", "seed", "masked", "user_row")


@dataclass(frozen=True)
class Cell:
    """One system of one run.

    Args:
        name: row of the table.
        settings: what makes it different, dotted key -> value.
        results: content of its results.json.
        per_user: its per_user.parquet: one line per system, seed, mode and user.
        system: which of the run's systems: the generator or a baseline.
    """

    name: str
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    per_user: pl.DataFrame
    system: str = SYSTEM

    @property
    def modes(self) -> list[bool]:
        """Ways of ranking that it holds: seen items left out (true) or kept in."""
        return [row["masked"] for row in self.results["rows"] if row["name"] == self.system]

    def row(self, masked: bool) -> dict[str, Any]:
        """Return its row of results.json."""
        rows = self.results["rows"]
        return dict(next(r for r in rows if r["name"] == self.system and r["masked"] == masked))

    def likeness(self, masked: bool) -> dict[str, Any]:
        """Return what its lists are like beside accuracy; {} where its results do not say."""
        modes = self.results.get("beyond_accuracy") or {}
        figures = modes.get("masked" if masked else "unmasked") or {}
        return dict(figures.get(self.system) or {})

    @property
    def conditions(self) -> dict[str, Any]:
        """What another cell must share to be compared with it: data set and protocol."""
        protocol = self.results["protocol"]
        return {"data set": _data(self), **{key: protocol.get(key) for key in PROTOCOL}}

    @property
    def search(self) -> dict[str, Any]:
        """How its lists were searched: settings of the model, {} for a baseline.

        Runs that differ here may be compared: it is part of what is compared.
        """
        if self.system != SYSTEM:
            return {}
        told = dict(self.results["protocol"])
        config = (self.results.get("config") or {}).get("decoding") or {}
        told.setdefault("scoring", config.get("scoring"))  # results written before it stood there
        return {name: told[name] for name in SEARCH if told.get(name) is not None}

    def values(self, metric: str, masked: bool) -> np.ndarray:
        """Return a metric by seed and user, (S, U), users in ascending order of their row.

        Raises:
            UserError: a metric that the run does not have.
            ArtifactError: a user that is missing, or stands twice, under one of the seeds.
        """
        if metric not in self.per_user.columns:
            known = [c for c in self.per_user.columns if c not in KEYS]
            raise UserError(
                f"{self.name!r} has no {metric!r} per user.{nearest(metric, known)} It has "
                f"{', '.join(known)}; evaluation.ks decides."
            )
        by_seed = self._mine(masked).partition_by("seed", maintain_order=True)
        users = self.users(masked)
        for part in by_seed:
            if not np.array_equal(np.sort(part["user_row"].to_numpy()), users):
                raise ArtifactError(
                    f"{self.name!r}: {PER_USER} has not the same users, once each, under every "
                    "seed. It is damaged; run it again."
                )
        return np.stack([part.sort("user_row")[metric].to_numpy() for part in by_seed])

    def users(self, masked: bool) -> np.ndarray:
        """Return the rows of the users that were evaluated, ascending."""
        return self._mine(masked)["user_row"].unique().sort().to_numpy()

    def _mine(self, masked: bool) -> pl.DataFrame:
        return self.per_user.filter((pl.col("name") == self.system) & (pl.col("masked") == masked))


def read_cell(source: str | Path, name: str | None = None) -> Cell:
    """Read what a run left.

    Args:
        source: run folder; `FOLDER:SYSTEM` for one of its baselines.
        name: row of the table; default the folder's name (and the system's).

    Raises:
        ArtifactError: no results there, or results of something else.
        UserError: no such system.
    """
    folder, system = Path(source), SYSTEM
    if not folder.exists() and ":" in str(source):
        path, _, system = str(source).rpartition(":")
        folder = Path(path)
    for file in (RESULTS, PER_USER):
        if not (folder / file).is_file():
            raise ArtifactError(
                f"{str(folder)!r} has no {file}. Give the folder of a finished `genrec run` "
                "(with :SYSTEM behind it for a baseline)."
            )
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        per_user = pl.read_parquet(folder / PER_USER)
        systems = list(dict.fromkeys(row["name"] for row in results["rows"]))
        _ = results["dataset"]["fingerprint"], results["protocol"], results["seeds"]
    except (json.JSONDecodeError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(
            f"{str(folder)!r}: its results cannot be read ({type(error).__name__}: {error}). "
            "Expected what `genrec run` writes; run it again."
        ) from error
    if system not in systems or not set(KEYS) <= set(per_user.columns):
        raise UserError(
            f"{str(folder)!r} has no system {system!r}.{nearest(system, systems)} It has "
            f"{', '.join(systems)}."
        )
    label = name or (folder.resolve().name + ("" if system == SYSTEM else f":{system}"))
    return Cell(label, {}, results, per_user, system)


def check_comparable(one: Cell, other: Cell, *, same_seeds: bool = False) -> None:
    """Raise unless two cells were evaluated on the same users of the same data in the same way.

    Args:
        one: a cell.
        other: another.
        same_seeds: demand the same training seeds too.

    Raises:
        MismatchError: with what each of them has.
    """
    checks: dict[str, tuple[Any, Any]] = {
        what: (value, other.conditions[what]) for what, value in one.conditions.items()
    }
    if same_seeds:
        checks["seeds"] = (list(one.results["seeds"]), list(other.results["seeds"]))
    for what, (a, b) in checks.items():
        if a != b:
            raise MismatchError(
                f"{other.name!r} cannot be compared with {one.name!r}: its {what} is {b}, not "
                f"{a}. Compare runs of one prepared data set under one protocol."
            )
    for masked in common_modes([one, other]):
        a_U, b_U = one.users(masked), other.users(masked)
        if not np.array_equal(a_U, b_U):
            raise MismatchError(
                f"{other.name!r} cannot be compared with {one.name!r}: it was evaluated for "
                f"{len(b_U)} users, not {len(a_U)}, of whom {len(np.intersect1d(a_U, b_U))} are "
                "the same. Evaluate both for the same users."
            )


def common_modes(cells: Sequence[Cell]) -> list[bool]:
    """Return the ways of ranking that all cells have, in the order of the first.

    Raises:
        MismatchError: there is none.
    """
    found = [mode for mode in cells[0].modes if all(mode in cell.modes for cell in cells)]
    if not found:
        shown = "; ".join(f"{cell.name!r}: masked {cell.modes}" for cell in cells)
        raise MismatchError(
            f"no way of ranking that all runs have ({shown}). Set the same evaluation.masked."
        )
    return found


def _data(cell: Cell) -> str:
    return str(cell.results["dataset"]["fingerprint"])
