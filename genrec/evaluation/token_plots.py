"""What do the codes of a catalogue look like? One self-contained HTML page of pictures and tables.

It draws the report and the plain arrays that it is given, and knows neither index nor tokenizer.

Shapes: P items on the map.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artifacts import write_text_atomic
from genrec.errors import UserError
from genrec.evaluation import markup, plots

NUM_COLOURS = 4
NUM_TITLES = 2
GOLDEN_ANGLE = 0.381966  # of a full turn


def write_token_page(
    path: Path,
    report: Mapping[str, Any],
    *,
    usage: Sequence[np.ndarray],
    points: tuple[np.ndarray, np.ndarray] | None = None,
    method: str = "pca",
) -> None:
    """Write the page.

    Args:
        path: .html file to create or replace.
        report: what `genrec inspect tokens --json` prints.
        usage: for each level how many items hold each code, (K,).
        points: 2-D map (P, 2) and the first code (P,) of each item on it.
        method: how the map was made ("pca", "tsne").

    Raises:
        UserError: matplotlib is not installed.
    """
    if not plots.have_matplotlib():
        raise UserError(
            "--plots: matplotlib is not installed. Install it: pip install 'genrec[plots]'."
        )
    title = f"Codes of {report['num_items']:,} items"
    parts = [
        f"<h1>{markup.esc(title)}</h1>",
        markup.paragraph(
            f"Tokenizer {report['tokenizer'] or 'unknown'}, collisions "
            f"{report['policy'] or 'unknown'}, index {report['index_fingerprint']}."
        ),
        *[markup.paragraph(note, note=True) for note in report["notes"]],
        markup.section("figures", "Before and after", _figures(report)),
        markup.section("usage", "How often each code is used", _usage(usage)),
    ]
    if points is not None:
        parts.append(markup.section("map", "Items on a map", _map(points, report, method)))
    parts.append(markup.section("tree", "The biggest branches", _tree(report["tree"])))
    write_text_atomic(path, markup.page(title, "\n".join(parts)))


def item_map(
    points_P2: np.ndarray, first_codes_P: np.ndarray, names: Mapping[int, str], name: str
) -> str:
    """Draw items as points, coloured by their first code.

    Args:
        points_P2: places on the map.
        first_codes_P: first code of each item; its hue goes round the circle by the golden angle,
            so that no two of the first codes look alike.
        names: codes that are drawn larger and with a shape each, with the words of the legend.
        name: prefix of ids inside the picture.

    Returns:
        an <svg> element.
    """
    figure, (axis,) = plots._figure(1, 4.6)
    rest = ~np.isin(first_codes_P, list(names))
    if rest.any():
        colours = [code_colour(int(code)) for code in first_codes_P[rest]]
        axis.scatter(*points_P2[rest].T, s=7, c=colours, linewidths=0, alpha=0.8)
    for number, (code, text) in enumerate(names.items()):
        chosen = first_codes_P == code
        if chosen.any():
            axis.scatter(
                *points_P2[chosen].T,
                s=34,
                marker=plots._MARKERS[number % len(plots._MARKERS)],
                color=code_colour(code),
                edgecolors=plots._TEXT,
                linewidths=0.8,
                label=text.replace("$", r"\$"),
            )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(
        frameon=False,
        labelcolor=plots._TEXT,
        fontsize=plots._FONT - 2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
    )
    return plots._svg(figure, name)


def code_colour(code: int) -> str:
    """Return the colour of a first code as #rrggbb: legible on light and on dark."""
    rgb = colorsys.hls_to_rgb(code * GOLDEN_ANGLE % 1.0, 0.5, 0.6)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _figures(report: Mapping[str, Any]) -> str:
    rows = [[markup.esc(name), *values] for name, *values in token_rows(report)]
    return markup.table("Codes of the tokenizer, and of the index", ["", "before", "after"], rows)


def token_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return [name, before, after] of the figures of a report, as text."""
    before, after = report, report["index"]
    rows = [
        ["levels", str(len(before["levels"])), str(after["num_levels"])],
        ["collision rate", *_both(before, after, ("collisions", "rate"), ".2%")],
        ["items that collide", *_both(before, after, ("collisions", "num_items_colliding"), ",")],
        ["largest group", *_both(before, after, ("collisions", "largest_group"), ",")],
        ["different semantic IDs", *_both(before, after, ("collisions", "num_distinct"), ",")],
        ["items with other codes", "", f"{after['num_items_moved']:,}"],
        ["items told apart by a number", "", f"{after['num_items_numbered']:,}"],
    ]
    moved = after.get("moved_distance")
    if moved:
        text = f"{moved['mean']:.3f} ({moved['relative_mean']:.1%} of the spread)"
        rows.append(["moved how far (mean)", "", text])
        rows.append(["moved how far (most)", "", f"{moved['max']:.3f}"])
    error = ("reconstruction", "relative_squared_error")
    together = ("cooccurrence", "correlation")
    rows += [
        ["reconstruction error / variance", *_both(before, after, error, ".3f")],
        ["nearest items kept", *_both(before, after, ("neighbours", "overlap"), ".1%")],
        ["correlation with co-occurrence", *_both(before, after, together, "+.3f")],
    ]
    return [row for row in rows if any(row[1:])]


def _both(
    before: Mapping[str, Any], after: Mapping[str, Any], keys: tuple[str, str], form: str
) -> list[str]:
    found = []
    for side in (before, after):
        value = (side.get(keys[0]) or {}).get(keys[1])
        found.append("" if value is None else f"{value:{form}}")
    return found


def _usage(usage: Sequence[np.ndarray]) -> str:
    alt = "Items per code at each level, most used code first; the command prints the figures."
    caption = "How many items hold each code, most used first. Dashed: all equally often."
    return markup.figure(plots.code_usage(usage, "usage"), alt, caption)


def _map(points: tuple[np.ndarray, np.ndarray], report: Mapping[str, Any], method: str) -> str:
    places_P2, first_codes_P = points
    names = {branch["code"]: _name(branch) for branch in report["tree"][:NUM_COLOURS]}
    svg = item_map(places_P2, first_codes_P, names, "map")
    way = {"pca": "first two principal components", "tsne": "t-SNE"}.get(method, method)
    alt = f"Map of {len(places_P2)} items, coloured by their first code."
    caption = (
        f"{len(places_P2):,} items on the {way} of their vectors, one colour per first code; items "
        f"of the {len(names)} biggest first codes are larger."
    )
    return markup.figure(svg, alt, caption)


def _name(branch: Mapping[str, Any]) -> str:
    examples = [e["title"] or e["item_id"] for e in branch["examples"][:NUM_TITLES]]
    text = ", ".join(examples)
    return f"{branch['code']}: {text if len(text) <= 48 else text[:47] + '…'}"


def _tree(branches: Sequence[Mapping[str, Any]]) -> str:
    if not branches:
        return ""
    items = "".join(
        f"<li>{_branch(branch)}{_tree(branch['children'])}</li>\n" for branch in branches
    )
    return f"<ul>\n{items}</ul>"


def _branch(branch: Mapping[str, Any]) -> str:
    examples = "; ".join(e["title"] or e["item_id"] for e in branch["examples"])
    prefix = "-".join(map(str, branch["prefix"]))
    return (
        f"<strong>{markup.esc(prefix)}</strong>: {branch['num_items']:,} item(s), for example "
        f"{markup.esc(examples)}"
    )
