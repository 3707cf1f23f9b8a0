"""What do the pieces of `benchmarks.quality` say together? A table per data set and way of ranking.

It reads pieces and writes quality.json, quality.md and one picture per data set; it fits nothing.
Means are over seeds, intervals and tests over users (`genrec.evaluation.significance`). Rows of the
quality.json that is there and has no piece any more stay as they are, and are marked.

Shapes: S seeds, U users.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import quality_page, quality_pieces
from benchmarks.quality_page import COUNTING, NUM_SAMPLES, TESTED, TRAINED, Row
from benchmarks.quality_pieces import METRICS, SEEN
from genrec.artifacts import write_json_atomic, write_text_atomic
from genrec.bundle import mode_name
from genrec.errors import MismatchError, UserError
from genrec.evaluation import beyond_accuracy
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.runs import Cell, check_comparable
from genrec.evaluation.significance import holm, paired_test

# -- pieces -----------------------------------------------------------------------------------


def read_cells(folder: Path, order: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Return data set -> row -> all its seeds as one cell, rows in the given order.

    Raises:
        UserError: no pieces.
        MismatchError: seeds of a row that were made under different settings, or rows of other data
            under one name.
    """
    found: dict[str, dict[str, Cell]] = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        pieces = [json.loads(path.read_text("utf-8")) for path in sorted(place.glob("*.json"))]
        rows = [row for row in order if any(piece["row"] == row for piece in pieces)]
        cells = {
            row: _cell(row, [piece for piece in pieces if piece["row"] == row], place)
            for row in rows
        }
        for cell in cells.values():
            check_comparable(next(iter(cells.values())), cell)
        if cells:
            found[place.name] = cells
    if not found:
        raise UserError(
            f"{folder.name!r} holds no pieces. Make some: python -m benchmarks.quality row ..."
        )
    return found


def _cell(row: str, pieces: list[Row], place: Path) -> Cell:
    """Return the pieces of one row as a cell; `results["pieces"]` holds them as they were."""
    pieces = sorted(pieces, key=lambda piece: piece["seed"])
    for piece in pieces:
        for what in ("dataset", "protocol", "settings"):
            if piece[what] != pieces[0][what]:
                raise MismatchError(
                    f"{row} on {place.name}: {what} of seed {piece['seed']} is not that of seed "
                    f"{pieces[0]['seed']}. Make the older one again (--again)."
                )
    values = [
        quality_pieces.read_values(place / f"{row}-{piece['seed']}.parquet", piece)
        for piece in pieces
    ]
    results = {
        "dataset": pieces[0]["dataset"],
        "protocol": pieces[0]["protocol"],
        "seeds": [piece["seed"] for piece in pieces],
        "rows": [{"name": row, "masked": masked} for masked in SEEN],
        "pieces": pieces,
    }
    return Cell(row, {}, results, pl.concat(values), row)


# -- figures ----------------------------------------------------------------------------------


def references(cells: Mapping[str, Cell]) -> list[str]:
    """Return the rows that others are tested against: every SASRec that is there, and Markov."""
    return [name for name in cells if _is_reference(name)]


def _is_reference(name: str) -> bool:
    return name.startswith(TRAINED) or name == COUNTING


def _validation(cell: Cell) -> float:
    return _mean(piece["validation_ndcg@10"] for piece in cell.results["pieces"])


def table(dataset: str, cells: Mapping[str, Cell], masked: bool) -> list[Row]:
    """Return the rows of one table, each tested against `references`.

    `p_holm` and `p_permutation_holm` are corrected over all tests of the table.
    """
    rows = [_figures(dataset, cell, masked) for cell in cells.values()]
    tests: list[Any] = []
    for name in references(cells):
        theirs = cells[name].values(TESTED, masked)
        for row in (row for row in rows if row["name"] != name):
            mine = cells[row["name"]].values(TESTED, masked)
            row[f"vs_{name}"] = paired_test(mine, theirs, num_samples=NUM_SAMPLES)
            tests.append(row[f"vs_{name}"])
    for p in ("p", "p_permutation"):
        for test, corrected in zip(tests, holm([test[p] for test in tests]), strict=True):
            test[f"{p}_holm"] = corrected
    return rows


def _figures(dataset: str, cell: Cell, masked: bool) -> Row:
    values = {metric: cell.values(metric, masked) for metric in METRICS}
    summary = summarise(cell.name, "test", masked, values)
    row: Row = {"name": cell.name, "dataset": dataset, "masked": masked}
    for metric in METRICS:
        by_seed = summary.get(f"{metric}_seeds")
        row[metric], row[f"{metric}_ci"] = summary[metric], summary[f"{metric}_ci"]
        row[f"{metric}_sd"] = float(np.std(by_seed, ddof=1)) if by_seed else None
    pieces = cell.results["pieces"]
    mode = mode_name(masked)
    return row | {
        "pieces": True,
        "seeds": cell.results["seeds"],
        "num_users": summary["num_users"],
        "validation_ndcg@10": _validation(cell),
        "seconds": _mean(piece["seconds_fit"] for piece in pieces),
        "seconds_rank": _mean(piece["seconds_rank"][mode] for piece in pieces),
        "command": _command(pieces),
        "run_command": pieces[0]["run_command"],
        "lists": _lists(pieces, mode),
        "settings": pieces[0]["settings"],
        "machines": sorted({_machine(piece["machine"]) for piece in pieces}),
        "dates": sorted({piece["date"] for piece in pieces}),
        "commits": sorted({piece["git"].get("commit", "unknown") for piece in pieces}),
        "dirty": any(piece["git"].get("dirty", False) for piece in pieces),
        "versions": pieces[0]["versions"],
    }


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def _lists(pieces: Sequence[Row], mode: str) -> dict[str, Any]:
    """Return what lists are like, means over the seeds whose pieces know it; {} if none does."""
    told = {piece["seed"]: piece["lists"][mode] for piece in pieces if "lists" in piece}
    return {"seeds": [*told], **beyond_accuracy.mean_of([*told.values()])} if told else {}


def _command(pieces: Sequence[Row]) -> str:
    seeds = [str(piece["seed"]) for piece in pieces]
    choice = seeds[0] if len(seeds) == 1 else f"{{{','.join(seeds)}}}"
    return f"{pieces[0]['command']} --seed {choice} --out FOLDER"


def _machine(told: Mapping[str, Any]) -> str:
    where = told["gpu"] if told["device"].startswith("cuda") else told["cpu"]
    return f"{where}, {told['threads']} CPU thread(s)"


# -- documents --------------------------------------------------------------------------------


def write(folder: Path, where: Path, order: Sequence[str]) -> list[Path]:
    """Write quality.json, quality.md and pictures; return their paths.

    Args:
        folder: of the pieces.
        where: folder of the documents.
        order: every row of the table, in its order.

    Raises:
        MismatchError: a row without pieces is of other data than those with pieces.
    """
    cells = read_cells(folder, order)
    facts = {dataset: _facts(mine) for dataset, mine in cells.items()}
    kept = _kept(where / "quality.json", cells, facts, order)
    rows = []
    for dataset, mine in cells.items():
        for masked in SEEN:
            there = [*table(dataset, mine, masked), *kept.get((dataset, masked), [])]
            rows += sorted(there, key=lambda row: order.index(row["name"]))
    names = {dataset: {r["name"] for r in rows if r["dataset"] == dataset} for dataset in cells}
    found = {
        "rows": rows,
        "not_run": {name: [row for row in order if row not in names[name]] for name in cells},
        "datasets": facts,
        "references": {
            dataset: [row for row in order if row in names[dataset] and _is_reference(row)]
            for dataset in cells
        },
    }
    against = found["references"]
    where.mkdir(parents=True, exist_ok=True)
    pictures = quality_page.draw(rows, against, where)
    write_json_atomic(where / "quality.json", found)
    shown = {dataset: path.name for dataset, path in pictures.items()}
    write_text_atomic(where / "quality.md", quality_page.to_markdown(found, shown))
    return [where / "quality.json", where / "quality.md", *pictures.values()]


def _kept(
    path: Path,
    cells: Mapping[str, Mapping[str, Cell]],
    facts: Mapping[str, Row],
    order: Sequence[str],
) -> dict[tuple[str, bool], list[Row]]:
    """Return rows of an earlier table that have no pieces, by data set and way of ranking."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[str, bool], list[Row]] = {}
    for row in before["rows"]:
        dataset = row["dataset"]
        if row["name"] not in order or dataset not in cells or row["name"] in cells[dataset]:
            continue
        if before["datasets"][dataset] != facts[dataset]:
            raise MismatchError(
                f"{path.name}: {row['name']} on {dataset} has no piece, and was made with other "
                "data or another protocol than the pieces. Make it again, or write to an empty "
                "folder to leave it out."
            )
        found.setdefault((dataset, row["masked"]), []).append({**row, "pieces": False})
    return found


def _facts(cells: Mapping[str, Cell]) -> Row:
    first = next(iter(cells.values())).results
    return {**first["dataset"], "protocol": first["protocol"]}
