"""What does a comparison look like as a page? Its tables and pictures in one HTML file.

It shows what `comparison.py` found and computes nothing; the tables are those of
`comparison_tables.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.evaluation import markup, plots
from genrec.evaluation.comparison_tables import (
    APART,
    LIKENESS,
    SEARCH,
    likeness_table,
    modes,
    result_table,
    search_table,
    token_table,
)


def to_html(found: Mapping[str, Any], axes: Sequence[str] = ()) -> str:
    """Return the comparison as one self-contained page.

    Args:
        found: what `compare` returned, with a `name`.
        axes: dotted keys of a grid; each numeric one gets a picture of the metric against it.
    """
    body = [f"<header><h1>{markup.esc(found['name'])}</h1></header>", *_sections(found, axes)]
    for name, text in (found.get("failed") or {}).items():
        body.append(
            markup.section(f"failed-{name}", f"{name} failed", f"<pre>{markup.esc(text)}</pre>")
        )
    for number, other in enumerate(found.get("others") or [], start=1):
        inner = [markup.paragraph(APART), *_sections(other, axes, f"other-{number}-")]
        body.append(markup.section(f"other-{number}", other["what"], *inner))
    return markup.page(str(found["name"]), "\n".join(body))


def _sections(found: Mapping[str, Any], axes: Sequence[str], prefix: str = "") -> list[str]:
    body = []
    for masked in modes(found):
        how = "left out" if masked else "kept in"
        columns, rows = result_table(found, masked)
        caption = f"{found['dataset']['name']}: test, full ranking, seen items {how}"
        shown = markup.table(
            caption,
            columns,
            [[markup.esc(c) for c in row] for row in rows],
            ours=[row[0] == found["reference"] for row in rows],
        )
        pieces = [shown, *_pictures(found, masked, axes, prefix)]
        if (likeness := likeness_table(found, masked))[1]:
            pieces.append(markup.details("Beyond accuracy", _html_table(LIKENESS, *likeness)))
        body.append(markup.section(f"{prefix}results-{how[:4]}", f"Seen items {how}", *pieces))
    if (search := search_table(found))[1]:
        body.append(markup.section(f"{prefix}search", "Search", _html_table(SEARCH, *search)))
    if (tokens := token_table(found))[1]:
        body.append(markup.section(f"{prefix}tokens", "Tokens", _html_table("Tokens", *tokens)))
    body.append(
        markup.section(
            f"{prefix}protocol",
            "Protocol",
            markup.definitions(found["protocol"]),
            markup.definitions(found["versions"]),
        )
    )
    return body


def _html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markup.table(caption, columns, [[markup.esc(c) for c in row] for row in rows])


def _pictures(
    found: Mapping[str, Any], masked: bool, axes: Sequence[str], prefix: str
) -> list[str]:
    if not plots.have_matplotlib():
        return [markup.paragraph("Install genrec with the extra `plots` to see pictures.")]
    mode = "masked" if masked else "unmasked"
    rows = [
        (cell["name"], next(r for r in cell["rows"] if r["masked"] == masked), cell["settings"])
        for cell in found["cells"]
    ]
    points = [(name, row["ndcg@10"], row["ndcg@10_ci"]) for name, row, _ in rows]
    lines = {b["name"]: b["ndcg@10"] for b in found["baselines"] if b["masked"] == masked}
    made = [
        markup.figure(
            plots.intervals(points, lines, "NDCG@10", f"{prefix}cells-{mode}"),
            "NDCG@10 of every cell with its interval; the table has the figures.",
            "NDCG@10 with 95% intervals; broken lines are baselines.",
        )
    ]
    for number, axis in enumerate(axes):
        known = [(s[axis], r["ndcg@10"], r["ndcg@10_ci"]) for _, r, s in rows if axis in s]
        if known and all(isinstance(x, int | float) for x, _, _ in known):
            svg = plots.metric_against(known, axis, "NDCG@10", f"{prefix}axis-{mode}-{number}")
            alt = f"NDCG@10 against {axis}; the table has the figures."
            made.append(markup.figure(svg, alt, f"NDCG@10 against {axis}, every cell of the grid."))
    return made
