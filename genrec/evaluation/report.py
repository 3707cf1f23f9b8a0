"""What came out of a run, or of several? One self-contained HTML file: no network, no other files.

It formats what it is given (the content of results.json and the parts of `report_parts.py`) and
computes nothing beyond code usage; a part that is missing is left out, and the page says so where
that matters. Several runs stand below each other, after a table of their paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from genrec.artifacts import write_text_atomic
from genrec.evaluation import comparison_tables, markup, plots
from genrec.evaluation import report_results as tables
from genrec.evaluation import report_sections as sections
from genrec.evaluation.report_calibration import calibration
from genrec.evaluation.report_parts import (
    Curve,
    GroupSection,
    ItemMap,
    ListedItem,
    ReportParts,
    Sample,
    SharedPrefix,
)
from genrec.evaluation.report_results import OURS, seen

__all__ = [
    "Curve",
    "GroupSection",
    "ItemMap",
    "ListedItem",
    "ReportParts",
    "Sample",
    "SharedPrefix",
    "render",
    "render_runs",
    "write_report",
    "write_runs",
]

Page = tuple[Mapping[str, Any], ReportParts]


def write_report(
    path: str | Path, results: Mapping[str, Any], parts: ReportParts | None = None
) -> None:
    """Write the report of one run.

    Args:
        path: of the HTML file.
        results: content of results.json (docs/evaluation.md): `rows` as made by
            `genrec.evaluation.evaluator.summarise`, and optionally `dataset`, `protocol`, `seeds`,
            `calibration` (see `genrec.evaluation.reliability.compare_reliability`), `timing`,
            `beyond_accuracy`, `versions`, `git`, `fingerprints`.
        parts: everything else.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_text_atomic(path, render(results, parts or ReportParts()))


def write_runs(
    path: str | Path, title: str, pages: Sequence[Page], comparison: Mapping[str, Any]
) -> None:
    """Write one report of several runs; see `render_runs`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_text_atomic(path, render_runs(title, pages, comparison))


def render(results: Mapping[str, Any], parts: ReportParts) -> str:
    """Return the report of one run as HTML text; see `write_report`."""
    shown = _shown(results, parts)
    links = "".join(_link(key, title) for key, title, _ in shown)
    header = f"<header><h1>{markup.esc(parts.title)}</h1>\n{_verdict(results)}</header>"
    nav = f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    body = [markup.section(key, title, *parts_html) for key, title, parts_html in shown]
    notes = [*_notes(parts), *_no_pictures()]
    return markup.page(parts.title, "\n".join([header, nav, "<main>", *notes, *body, "</main>"]))


def render_runs(title: str, pages: Sequence[Page], comparison: Mapping[str, Any]) -> str:
    """Return the report of several runs as HTML text.

    Args:
        title: of the page.
        pages: results and parts of each run; the titles of the parts name the runs.
        comparison: what `genrec.evaluation.comparison.compare` returned for them, in this order.
    """
    links, bodies = _link("comparison", "Side by side"), []
    for number, (results, own) in enumerate(pages, start=1):
        parts = replace(own, prefix=f"run-{number}-")
        key, shown = f"run-{number}", _shown(results, parts)
        links += _link(key, parts.title)
        inner = [markup.subsection(name, text, *body) for name, text, body in shown]
        bodies.append(markup.section(key, parts.title, _verdict(results), *_notes(parts), *inner))
    together = markup.section("comparison", "Side by side", *_comparison(comparison))
    header = f"<header><h1>{markup.esc(title)}</h1></header>"
    nav = f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    main = ["<main>", *_no_pictures(), together, *bodies, "</main>"]
    return markup.page(title, "\n".join([header, nav, *main]))


def _shown(results: Mapping[str, Any], parts: ReportParts) -> list[tuple[str, str, list[str]]]:
    """Return id, title and content of the sections that have some."""
    makers: list[tuple[str, str, Callable[[Mapping[str, Any], ReportParts], list[str]]]] = [
        ("results", "Results", tables.results),
        ("groups", "For whom does it work?", sections.groups),
        ("samples", "Sample recommendations", sections.samples),
        ("calibration", "Do the probabilities hold?", calibration),
        ("training", "Training", sections.training),
        ("codes", "Use of codes", sections.codes),
        ("latency", "Speed", tables.latency),
        ("data", "Data", sections.data),
        ("protocol", "Protocol", sections.protocol),
        ("repeat", "To repeat this", sections.repeat),
    ]
    made = [(parts.prefix + key, title, maker(results, parts)) for key, title, maker in makers]
    return [(key, title, body) for key, title, body in made if body]


def _comparison(found: Mapping[str, Any]) -> list[str]:
    """Return tables of all runs with paired differences, and a picture, per way of ranking."""
    intro = (
        "The same users of the same data under the same protocol. Differences are paired over "
        f"users, against {found['reference']}; p is corrected by Holm's method over the runs; sd "
        "is the standard deviation over seeds."
    )
    made = [markup.paragraph(intro, note=True)]
    for masked in comparison_tables.modes(found):
        columns, rows = comparison_tables.result_table(found, masked)
        cells = [[markup.esc(cell) for cell in row] for row in rows]
        marks = [row[0] == found["reference"] for row in rows]
        columns[0] = "run (or baseline)"
        caption = f"{found['dataset']['name']}: test split, {seen(masked)}"
        made.append(markup.table(caption, columns, cells, ours=marks))
        made.append(
            markup.paragraph(comparison_tables.noise_sentence(found, "ndcg@10", masked), note=True)
        )
        if plots.have_matplotlib():
            rows_of = [(c["name"], r) for c in found["cells"] for r in c["rows"]]
            mine = [(n, r["ndcg@10"], r["ndcg@10_ci"]) for n, r in rows_of if r["masked"] == masked]
            lines = {b["name"]: b["ndcg@10"] for b in found["baselines"] if b["masked"] == masked}
            svg = plots.intervals(mine, lines, "NDCG@10", f"comparison-{int(masked)}")
            alt = f"NDCG@10 of every run with its interval, {seen(masked)}; see the table."
            caption = "NDCG@10 with 95% intervals; broken lines are baselines."
            made.append(markup.figure(svg, alt, caption))
    return made


def _link(key: str, title: str) -> str:
    return f'<li><a href="#{markup.esc(key)}">{markup.esc(title)}</a></li>'


def _notes(parts: ReportParts) -> list[str]:
    return [markup.paragraph(note, note=True) for note in parts.notes]


def _no_pictures() -> list[str]:
    if plots.have_matplotlib():
        return []
    return [
        markup.paragraph(
            "matplotlib is not installed, so this report has tables but no pictures. Install "
            "genrec with the extra `plots` and write it again.",
            note=True,
        )
    ]


def _verdict(results: Mapping[str, Any]) -> str:
    """Say in words how our rows stand, better or worse."""
    sentences = []
    for row in results.get("rows", []):
        against = row.get("vs_most_popular", {}).get("recall@10")
        if row["name"] != OURS or against is None:
            continue
        low, high = against["ci"]
        certainty = "excludes" if low > 0 or high < 0 else "includes"
        better = [
            other["name"].replace("_", " ")
            for other in results["rows"]
            if other["masked"] == row["masked"]
            and other["split"] == row["split"]
            and other["recall@10"] > row["recall@10"]
        ]
        higher = f" Higher: {', '.join(better)}." if better else " No baseline here is higher."
        sentences.append(
            f"Recall@10 {row['recall@10']:.4f} on {row['split']}, {seen(row['masked'])}: "
            f"{against['difference']:+.4f} against most popular (95% interval {low:+.4f} to "
            f"{high:+.4f}, {certainty} zero).{higher}"
        )
    return "\n".join(markup.paragraph(sentence) for sentence in sentences)
