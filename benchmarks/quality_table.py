"""What do the pieces of `benchmarks.quality` say together? A table per data set and way of ranking.

It reads pieces and writes quality.json, quality.md and one picture per data set; it fits nothing.
Means are over seeds, intervals and tests over users (`genrec.evaluation.significance`).

Shapes: S seeds, U users.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import write_json_atomic, write_text_atomic
from genrec.bundle import mode_name
from genrec.errors import MismatchError, UserError
from genrec.evaluation import beyond_accuracy, plots
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.runs import Cell, check_comparable
from genrec.evaluation.significance import holm, paired_test

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
COUNTING, TRAINED = "markov", "sasrec"  # what others are tested against: a row, a kind of rows
TESTED = "ndcg@10"
LIFT, LIFT_SHOWN = "popularity_lift_over_history", "popularity's lift over the history's"
NUM_SAMPLES = 5000  # of a test: p-values are corrected for some thirty tests
SEEN = {False: "seen items kept in", True: "seen items left out"}
_STYLE = (
    "font-family:sans-serif;color:#6b7280;--grid:#d1d5db;"
    "--series-1:#2b6cb0;--series-2:#c05621;--series-3:#2f855a"
)

Row = dict[str, Any]


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
    files = [place / f"{row}-{piece['seed']}.parquet" for piece in pieces]
    results = {
        "dataset": pieces[0]["dataset"],
        "protocol": pieces[0]["protocol"],
        "seeds": [piece["seed"] for piece in pieces],
        "rows": [{"name": row, "masked": masked} for masked in SEEN],
        "pieces": pieces,
    }
    return Cell(row, {}, results, pl.concat(map(pl.read_parquet, files)), row)


# -- figures ----------------------------------------------------------------------------------


def references(cells: Mapping[str, Cell]) -> list[str]:
    """Return the rows that others are tested against: every SASRec that is there, and Markov."""
    return [name for name in cells if name.startswith(TRAINED) or name == COUNTING]


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
    """
    cells = read_cells(folder, order)
    rows = [
        row
        for dataset, mine in cells.items()
        for masked in SEEN
        for row in table(dataset, mine, masked)
    ]
    missing = {name: [row for row in order if row not in mine] for name, mine in cells.items()}
    facts = {dataset: _facts(mine) for dataset, mine in cells.items()}
    against = {dataset: references(mine) for dataset, mine in cells.items()}
    found = {"rows": rows, "not_run": missing, "datasets": facts, "references": against}
    where.mkdir(parents=True, exist_ok=True)
    pictures = _draw(rows, against, where)
    write_json_atomic(where / "quality.json", found)
    shown = {dataset: path.name for dataset, path in pictures.items()}
    write_text_atomic(where / "quality.md", to_markdown(found, shown))
    return [where / "quality.json", where / "quality.md", *pictures.values()]


def _facts(cells: Mapping[str, Cell]) -> Row:
    first = next(iter(cells.values())).results
    return {**first["dataset"], "protocol": first["protocol"]}


def _draw(
    rows: Sequence[Row], against: Mapping[str, Sequence[str]], where: Path
) -> dict[str, Path]:
    """Draw NDCG@10 with intervals, seen items kept in; {} without matplotlib."""
    if not plots.have_matplotlib():
        return {}
    found = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == dataset and not row["masked"]]
        points = [(row["name"], row[TESTED], row[f"{TESTED}_ci"]) for row in mine]
        lines = {row["name"]: row[TESTED] for row in mine if row["name"] in against[dataset]}
        svg = plots.intervals(points, lines, "NDCG@10, seen items kept in", f"quality-{dataset}")
        alone = f'<svg xmlns="http://www.w3.org/2000/svg" style="{_STYLE}" '
        found[dataset] = where / f"quality-{dataset}.svg"
        write_text_atomic(found[dataset], svg.replace("<svg ", alone, 1) + "\n")
    return found


def to_markdown(found: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        found: what quality.json holds.
        pictures: data set -> file name of its picture.
    """
    parts = ["# Quality: the default generator beside models of plain item ids", *_protocol(found)]
    for dataset, facts in found["datasets"].items():
        parts.append(f"## {dataset}")
        parts.append(
            f"{facts['num_users']:,} users, {facts['num_items']:,} items, "
            f"{facts['num_interactions']:,} interactions; equal times in the order "
            f"`{facts['protocol']['ties']}`; fingerprint `{facts['fingerprint'][:12]}`."
        )
        for masked, seen in SEEN.items():
            rows = [r for r in found["rows"] if (r["dataset"], r["masked"]) == (dataset, masked)]
            parts += [f"### {dataset}: {seen}", _figure_table(rows, found["references"][dataset])]
            parts += [_list_table(rows)]
        if dataset in pictures:
            parts.append(f"![NDCG@10 with intervals, {dataset}]({pictures[dataset]})")
        mine = [r for r in found["rows"] if r["dataset"] == dataset and not r["masked"]]
        parts += [f"### {dataset}: commands", _command_list(mine)]
        parts += ["\n".join(f"- {row}: not run." for row in found["not_run"][dataset])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _protocol(found: Mapping[str, Any]) -> list[str]:
    rows = found["rows"]
    machines, dates, commits = (
        sorted({value for row in rows for value in row[key]})
        for key in ("machines", "dates", "commits")
    )
    dirty = " (with changes that were not committed)" if any(r["dirty"] for r in rows) else ""
    return [
        "Written by `python -m benchmarks.quality table`; the same rows, with everything that is "
        "left out here, are in `quality.json`.",
        "- **Protocol.** Test target of every user, ranked among the whole catalogue. A hit is the "
        "item itself. The history holds the training and the validation items. Models that count "
        "or score rank ties by expectation; generators rank by beam search, and a target that the "
        "beam does not hold is a miss.\n"
        "- **Choice.** Training stops by NDCG@10 of validation users, seen items kept in. "
        '"Validation" is the same of all validation targets.\n'
        "- **Figures.** Means over seeds; sd is the standard deviation over seeds (n - 1). "
        "Brackets: 95% bootstrap interval over users of the mean over seeds.\n"
        f"- **Tests.** NDCG@10 against every SASRec and against `{COUNTING}`: difference, and in "
        f"parentheses p of the paired bootstrap over users ({NUM_SAMPLES:,} resamples), corrected "
        "by Holm over all tests of its table. The sign-flip test stands in `quality.json`. The "
        "tests know users, not seeds.\n"
        "- **First ten places.** What all lists together are like (docs/evaluation.md defines "
        "each); older pieces do not know it.\n"
        "- **Seconds.** Wall time of one seed: fitting (for generators vectors, semantic IDs and "
        "training; parts that another seed had made already are not counted twice) and ranking "
        "all test users once. Machines were shared, so take them as upper bounds.\n"
        f"- **Where and when.** {'; '.join(machines)}. {', '.join(dates)}. Commit "
        f"{', '.join(f'`{commit[:12]}`' for commit in commits)}{dirty}; a command repeats its "
        "row at the commit beside it: `genrec.yaml` changes.",
    ]


def _figure_table(rows: Sequence[Row], references: Sequence[str]) -> str:
    heads = ["row", "Recall@5", "NDCG@5", "Recall@10", "NDCG@10", "sd", "seeds", "validation"]
    heads += [f"NDCG@10 against `{name}`" for name in references]
    lines = [[*heads, "fit, s", "rank, s"], ["---"] * (len(heads) + 2)]
    for row in rows:
        sd = row[f"{TESTED}_sd"]
        lines.append(
            [
                row["name"],
                _short(row["recall@5"]),
                _short(row["ndcg@5"]),
                _with_interval(row, "recall@10"),
                _with_interval(row, "ndcg@10"),
                "" if sd is None else _short(sd),
                str(len(row["seeds"])),
                _short(row["validation_ndcg@10"]),
                *(_test(row.get(f"vs_{name}")) for name in references),
                f"{row['seconds']:,.1f}",
                f"{row['seconds_rank']:,.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _list_table(rows: Sequence[Row]) -> str:
    told = [row for row in rows if row["lists"]]
    if not told:
        return ""
    names = [*beyond_accuracy.PRINTED, LIFT]
    heads = ["first ten places", "seeds", *beyond_accuracy.PRINTED.values(), LIFT_SHOWN]
    lines = [heads, ["---"] * len(heads)]
    for row in told:
        shown = beyond_accuracy.printed(row["lists"], names)
        lines.append([row["name"], str(len(row["lists"]["seeds"])), *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _command_list(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        commits = ", ".join(f"`{commit[:12]}`" for commit in row["commits"])
        lines.append(f"- {row['name']}: `{row['command']}` (at {commits})")
        if row["run_command"]:
            lines.append(f"  (the model alone: `{row['run_command']}`)")
    return "\n".join(lines)


def _test(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return ""
    return f"{_short(test['difference'], '+.4f')} (p {_short(test['p_holm'], '.3f')})"


def _with_interval(row: Row, metric: str) -> str:
    low, high = (_short(end, ".3f") for end in row[f"{metric}_ci"])
    return f"{_short(row[metric])} [{low}, {high}]"


def _short(value: float, form: str = ".4f") -> str:
    return f"{value:{form}}".replace("0.", ".", 1)
