"""An ablation: one run configuration, many variations of it, one table with a test for each.

It makes configurations, runs each in a process of its own and collects what they left; what a run
is, is in `genrec.pipeline.run`, and how figures are compared in `genrec.evaluation.comparison`.
Stages that cells share are computed once, because all cells use one stage cache.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from genrec import runtime
from genrec.artifacts import fingerprint, write_json_atomic, write_text_atomic
from genrec.config import StrictConfig, apply_overrides, apply_settings, load_yaml, parse
from genrec.configs_folder import find_config
from genrec.errors import ConfigError, nearest
from genrec.evaluation.comparison import compare
from genrec.evaluation.comparison_page import to_html
from genrec.evaluation.comparison_tables import to_markdown
from genrec.evaluation.runs import Cell
from genrec.pipeline.config import RunConfig, check_run_config

log = runtime.get_logger(__name__)

Settings = dict[str, Any]
RESULTS = "results.json"
LOG_LINES = 12
# Says where to log and how much, not what is computed: a finished cell stays finished.
NO_RESULT = ("tracking", "name")


class CellConfig(StrictConfig):
    """One variation that is written out."""

    name: str = Field(min_length=1)
    """Row of the table, and folder name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted key -> value, laid over `run`. A section name alone replaces the whole section."""


class AblationConfig(StrictConfig):
    """A file below configs/ablations/."""

    name: str = Field(min_length=1, pattern=r"^[^/.][^/]*$")
    """Folder of the results, and the group of its runs in W&B."""
    run: dict[str, Any]
    """A complete run configuration (as for `genrec run`), or what of `run_from` is different (keys
    as in a cell's `set`); its `seeds` hold for every cell."""
    run_from: str | None = None
    """Name of a ready configuration that `run` is laid over, e.g. genrec; None: `run` is all."""
    cells: tuple[CellConfig, ...] = ()
    """Variations, one by one."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Dotted key -> values; every combination, for every cell (or alone if there are no cells)."""
    reference: str | None = None
    """Cell that the others are tested against; default the first."""


@dataclass(frozen=True)
class Variation:
    """A cell before it runs."""

    name: str
    settings: Settings
    config: RunConfig


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> AblationConfig:
    """Read an ablation file and lay `key.path=value` overrides over its `run`.

    Raises:
        ConfigError: unknown keys, no such ready configuration, or a file without cells and grid.
    """
    config = parse(AblationConfig, load_yaml(path))
    if not config.cells and not config.grid:
        raise ConfigError(
            "ablation: got neither `cells` nor `grid`, expected something to vary, e.g. "
            "grid: {tokenizer.num_levels: [2, 3, 4]}."
        )
    run = config.run
    if config.run_from is not None:
        run = apply_settings(load_yaml(find_config(config.run_from, key="run_from")), run)
    return config.model_copy(update={"run": apply_overrides(run, overrides)})


def variations(config: AblationConfig) -> list[Variation]:
    """Return all cells, each with its checked configuration.

    Raises:
        ConfigError: every cell that does not work, with its problem; or an unknown reference.
    """
    found, problems = [], []
    for name, settings in _cells(config):
        data = apply_settings(config.run, settings)
        data["name"] = name
        tracking = dict(data.get("tracking") or {})
        tracking.setdefault("group", config.name)
        tracking["tags"] = [*tracking.get("tags", ()), f"cell:{name}"]
        data["tracking"] = tracking
        try:
            found.append(Variation(name, settings, check_run_config(data)))
        except ConfigError as error:
            problems.append(f"cell {name!r}: {error}")
    names = [name for name, _ in _cells(config)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        problems.append(f"cells: {', '.join(repeated)}: a name stands for one cell only.")
    if config.reference is not None and config.reference not in names:
        problems.append(
            f"reference: no cell {config.reference!r}.{nearest(config.reference, names)} "
            f"Cells: {', '.join(names)}."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _cells(config: AblationConfig) -> list[tuple[str, Settings]]:
    written = [(cell.name, dict(cell.set)) for cell in config.cells] or [("", {})]
    keys = list(config.grid)
    result = []
    for name, settings in written:
        for values in itertools.product(*config.grid.values()):
            chosen = dict(zip(keys, values, strict=True))
            parts = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in chosen.items()]
            label = ", ".join([name, *parts] if name else parts)
            result.append((label.replace("/", "-"), {**settings, **chosen}))
    return result


def _short(value: Any) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else str(value)


def run_ablation(
    config: AblationConfig,
    out: Path,
    cache: Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run what is not finished, then write ablation.json, ablation.md and ablation.html.

    Args:
        config: what to vary.
        out: folder; each cell gets `cells/<name>/` with all that `genrec run` leaves, and log.txt.
        cache: stage cache that all cells share.
        jobs: cells that run at the same time.
        threads: CPU threads of each cell.
        device: torch device of each cell.

    Returns:
        The content of ablation.json: `cells` (figures, tests, settings), `failed` (name -> last
        lines of its log), `reference`, `seeds`, `dataset`, `protocol`, and `others`: the same for
        cells on other data or under another protocol, which no test pairs with the reference.
    """
    todo = variations(config)
    folders = {cell.name: out / "cells" / _folder(cell.name) for cell in todo}
    waiting = [cell for cell in todo if not _is_done(folders[cell.name], cell.config)]
    log.info("%s: %d cells, %d of them finished", config.name, len(todo), len(todo) - len(waiting))
    failed: dict[str, str] = {}

    def work(cell: Variation) -> None:
        error = _run_cell(cell, folders[cell.name], cache, threads, device)
        if error is not None:
            failed[cell.name] = error
            log.warning("cell %s failed: %s", cell.name, error.splitlines()[-1] if error else "")

    # The first cell alone: it leaves the shared stages (data, vectors, baselines) in the cache.
    with runtime.progress(config.name, len(waiting)) as advance:
        for cell in waiting[:1]:
            work(cell)
            advance(1)
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            for _ in pool.map(work, waiting[1:]):
                advance(1)
    done = [cell for cell in todo if _is_done(folders[cell.name], cell.config)]
    return _collect(config, done, folders, failed, out)


def _run_cell(
    cell: Variation, folder: Path, cache: Path, threads: int | None, device: str | None
) -> str | None:
    """Run one cell in a process of its own; return the end of its log if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cell.yaml"
    write_text_atomic(file, cell.config.to_yaml())
    command = [sys.executable, "-m", "genrec", "run", str(file), "--out", str(folder)]
    command += ["--cache", str(cache)]
    command += ["--threads", str(threads)] if threads else []
    command += ["--device", device] if device else []
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    begun = time.perf_counter()
    with (folder / "log.txt").open("w") as output:
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code == 0 and _is_done(folder, cell.config):
        log.info("cell %s: done in %.0f s", cell.name, time.perf_counter() - begun)
        return None
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-LOG_LINES:]) or f"exit status {code}"


def _is_done(folder: Path, config: RunConfig) -> bool:
    path = folder / RESULTS
    if not path.exists():
        return False
    try:  # settings that came later stand at their defaults
        found = check_run_config(json.loads(path.read_text())["config"]).to_dict()
    except (ConfigError, KeyError):
        return False
    wanted = config.to_dict()
    return all(found.get(key) == wanted[key] for key in wanted if key not in NO_RESULT)


def _collect(
    config: AblationConfig,
    done: Sequence[Variation],
    folders: Mapping[str, Path],
    failed: Mapping[str, str],
    out: Path,
) -> dict[str, Any]:
    cells = []
    for cell in done:
        folder = folders[cell.name]
        results = json.loads((folder / RESULTS).read_text())
        cells.append(Cell(cell.name, cell.settings, results, pl.read_parquet(_users(folder))))
    if not cells:
        shown = "\n".join(f"{name}: {text}" for name, text in failed.items())
        raise ConfigError(f"ablation {config.name!r}: no cell finished.\n{shown}")
    found = {"name": config.name, **compare_in_groups(cells, config.reference)}
    found["failed"] = dict(failed)
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "ablation.json", found)
    write_text_atomic(out / "ablation.md", to_markdown(found))
    write_text_atomic(out / "ablation.html", to_html(found, list(config.grid)))
    return found


def compare_in_groups(cells: Sequence[Cell], reference: str | None) -> dict[str, Any]:
    """Compare cells with those that were evaluated alike; a tie-break makes two such groups.

    Args:
        cells: at least one.
        reference: name of a cell; its group comes first, the others have their first cell.

    Returns:
        what `genrec.evaluation.comparison.compare` returns for the first group, with `others`: the
        same for each other group, and `what`: in which words its data and protocol differ.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(fingerprint(*cell.conditions.values()), []).append(cell)
    first = next((g for g in groups.values() if reference in [c.name for c in g]), None)
    parts = list(groups.values())
    if first is not None:
        parts = [first, *(part for part in parts if part is not first)]
    found = compare(parts[0], reference=reference)
    others = []
    for part in parts[1:]:
        others.append({"what": _what_differs(parts[0][0], part[0]), **compare(part)})
    return {**found, "others": others}


def _what_differs(one: Cell, other: Cell) -> str:
    """Return what of another cell's protocol differs, or its data set where nothing else does."""
    mine, theirs = one.conditions, other.conditions
    keys = [key for key in mine if mine[key] != theirs[key]]
    return ", ".join(f"{key} {theirs[key]}" for key in (keys[1:] or keys))


def _users(folder: Path) -> Path:
    return folder / "per_user.parquet"


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
