"""How is the quality table shown? As a page of Markdown and one picture per data set.

It shows what `quality_table` found and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_pieces import SEEN
from benchmarks.quality_rows import PREPARED
from genrec.artifacts import write_text_atomic
from genrec.evaluation import beyond_accuracy, plots

COUNTING, TRAINED = "markov", "sasrec"  # what others are tested against: a row, a kind of rows
TESTED = "ndcg@10"
NUM_SAMPLES = 5000  # of a test: p-values are corrected for some thirty tests
LIFT, LIFT_SHOWN = "popularity_lift_over_history", "popularity's lift over the history's"
KEPT = "\N{DEGREE SIGN}"  # marks rows without pieces
_STYLE = (
    "font-family:sans-serif;color:#6b7280;--grid:#d1d5db;"
    "--series-1:#2b6cb0;--series-2:#c05621;--series-3:#2f855a"
)

Row = dict[str, Any]


def draw(rows: Sequence[Row], against: Mapping[str, Sequence[str]], where: Path) -> dict[str, Path]:
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
            + (f" Prepared with `{PREPARED[dataset]}`." if dataset in PREPARED else "")
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
    kept = (
        f"- **{KEPT}** The values per user of these rows were not kept: intervals and tests are "
        "those of the day when they were made, and no row made later is tested against them.\n"
        if any(not row["pieces"] for row in rows)
        else ""
    )
    dirty = " (with changes that were not committed)" if any(r["dirty"] for r in rows) else ""
    return [
        "Written by `python -m benchmarks.quality table` from the pieces in `pieces/` (a row and a "
        "seed each: what was run, what every user's target earned); the same rows, with "
        "everything that is left out here, are in `quality.json`.",
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
        f"{kept}- **First ten places.** What all lists together are like (docs/evaluation.md "
        "defines each); older pieces do not know it.\n"
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
                _marked(row),
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
        lines.append([_marked(row), str(len(row["lists"]["seeds"])), *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _command_list(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        commits = ", ".join(f"`{commit[:12]}`" for commit in row["commits"])
        lines.append(f"- {row['name']}: `{row['command']}` (at {commits})")
        if row["run_command"]:
            lines.append(f"  (the model alone: `{row['run_command']}`)")
    return "\n".join(lines)


def _marked(row: Row) -> str:
    return row["name"] if row["pieces"] else row["name"] + KEPT


def _test(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return ""
    return f"{_short(test['difference'], '+.4f')} (p {_short(test['p_holm'], '.3f')})"


def _with_interval(row: Row, metric: str) -> str:
    low, high = (_short(end, ".3f") for end in row[f"{metric}_ci"])
    return f"{_short(row[metric])} [{low}, {high}]"


def _short(value: float, form: str = ".4f") -> str:
    return f"{value:{form}}".replace("0.", ".", 1)
