"""The pictures of a report, as inline SVG text. It knows arrays and labels, not their origin.

matplotlib (extra `plots`) is imported when the first picture is drawn. Colours are written as CSS
variables and text as `currentColor`, so one picture suits light, dark and print; everything that
refers outside the page is taken out.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Stand-ins that matplotlib accepts as colours; `_to_inline` turns them into CSS.
_TEXT, _GRID = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305")
_CSS = {
    _TEXT: "currentColor",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{i + 1})" for i, color in enumerate(_SERIES)},
}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_WIDTH = 5.4  # inches: about the width of a phone at the font size below
_FONT = 11
MAX_LABEL = 28


def have_matplotlib() -> bool:
    """Return whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def training_curve(curves: Sequence[Mapping[str, Any]], name: str) -> str:
    """Draw loss and validation metric by step, one line per seed.

    Args:
        curves: each with `label`, `train` [(step, loss)], `valid` [(step, metric)].
        name: prefix of ids inside the picture, unique in the page.

    Returns:
        an <svg> element.
    """
    figure, axes = _figure(2, 4.4)
    for number, curve in enumerate(curves):
        style = {
            "color": _SERIES[number % len(_SERIES)],
            "linestyle": _DASHES[number % len(_DASHES)],
            "label": _shortened(str(curve["label"])),
        }
        for axis, key in zip(axes, ("train", "valid"), strict=True):
            points = np.asarray(curve.get(key, ()), dtype=float).reshape(-1, 2)
            marker = "o" if len(points) < 30 else None
            axis.plot(points[:, 0], points[:, 1], marker=marker, markersize=3, **style)
    axes[0].set_ylabel("training loss (nats)")
    axes[1].set_ylabel("validation NDCG@10")
    axes[1].set_xlabel("step")
    if len(curves) > 1:
        _legend(axes[0])
    return _svg(figure, name)


def code_usage(levels: Sequence[np.ndarray], name: str) -> str:
    """Draw how many items hold each code of each level, most used code first.

    Args:
        levels: for each level the number of items per code, (K,).
        name: prefix of ids inside the picture.

    Returns:
        an <svg> element.
    """
    alike = len({len(counts) for counts in levels}) == 1
    figure, axes = _figure(len(levels), 1.0 + 1.25 * len(levels), share_x=alike)
    for number, (axis, counts) in enumerate(zip(axes, levels, strict=True)):
        ordered = np.sort(np.asarray(counts, dtype=float))[::-1]
        edges = np.arange(len(ordered) + 1)
        axis.stairs(ordered, edges, fill=True, color=_SERIES[0], alpha=0.85)
        axis.axhline(ordered.mean(), color=_SERIES[1], linestyle="--", linewidth=1.2)
        axis.set_ylabel(f"level {number + 1}")
        axis.set_xlim(0, len(ordered))
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("code, most used first (dashed: all equally often)")
    return _svg(figure, name)


def reliability_diagram(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], name: str
) -> str:
    """Draw predicted against actual hit rate of bins, on log axes, with hits per bin below.

    Args:
        before: bins as of `genrec.evaluation.reliability.Bin` (may be empty).
        after: bins after calibration (may be empty).
        name: prefix of ids inside the picture.

    Returns:
        an <svg> element. A bin without a hit stands at the lower edge with its interval.
    """
    figure, axes = _figure(2, 5.2, ratios=(3, 1))
    bins = [b for b in (*before, *after) if b["predicted"] > 0]
    values = [b["predicted"] for b in bins] + [b["actual"] for b in bins if b["actual"] > 0]
    low, high = 0.5 * min(values, default=1e-4), min(1.0, 2.0 * max(values, default=1.0))
    axes[0].plot([low, high], [low, high], color=_TEXT, linewidth=0.8, label="perfect")
    looks = ((before, "before", _SERIES[1], "s", "none"), (after, "after", _SERIES[0], "o", None))
    for series, label, color, marker, face in looks:
        shown = [b for b in series if b["predicted"] > 0]
        if not shown:
            continue
        x = np.array([b["predicted"] for b in shown])
        y = np.maximum([b["actual"] for b in shown], low)
        ends = np.clip([b["ci"] for b in shown], low, high).T
        spread = np.maximum(np.stack([y - ends[0], ends[1] - y]), 0.0)
        fill = color if face is None else face
        axes[0].errorbar(
            x,
            y,
            yerr=spread,
            color=color,
            marker=marker,
            markerfacecolor=fill,
            markersize=5,
            linestyle="none",
            elinewidth=1,
            label=label,
        )
        axes[1].plot(
            x,
            [b["hits"] for b in shown],
            color=color,
            marker=marker,
            markerfacecolor=fill,
            markersize=5,
            linestyle="none",
        )
    axes[0].set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes[0].xaxis, axes[0].yaxis):
        _percent_ticks(axis, high / low)
    axes[0].set_ylabel("actual hit rate")
    _legend(axes[0])
    axes[1].set_xlabel("predicted probability (mean of the bin)")
    axes[1].set_ylabel("hits")
    axes[1].set_ylim(bottom=0)
    return _svg(figure, name)


def intervals(
    points: Sequence[tuple[str, float, Sequence[float]]],
    lines: Mapping[str, float],
    label: str,
    name: str,
) -> str:
    """Draw one value with its interval per name, best at the top, and reference lines.

    Args:
        points: (name, value, [low, high]).
        lines: name -> value of a reference.
        label: of the axis.
        name: prefix of ids inside the picture, unique in the page.
    """
    points = sorted(points, key=lambda point: point[1])
    figure, (axis,) = _figure(1, 1.0 + 0.28 * len(points))
    for place, (_, value, (low, high)) in enumerate(points):
        axis.plot([low, high], [place, place], color=_SERIES[0], linewidth=1.6)
        axis.plot([value], [place], color=_SERIES[0], marker="o", markersize=5)
    for number, (text, value) in enumerate(lines.items()):
        style = {"color": _SERIES[1 + number % 4], "linestyle": _DASHES[1 + number % 3]}
        axis.axvline(value, linewidth=1.2, label=text.replace("_", " "), **style)
    axis.set_yticks(range(len(points)), [_shortened(point[0]) for point in points])
    axis.set_xlabel(label)
    if lines:
        axis.legend(frameon=False, labelcolor=_TEXT, fontsize=_FONT - 1, loc="lower right")
    return _svg(figure, name)


def metric_against(
    points: Sequence[tuple[float, float, Sequence[float]]], axis_label: str, label: str, name: str
) -> str:
    """Draw a metric against a setting: every cell with its interval, and the mean per value.

    Args:
        points: (setting, value, [low, high]).
        axis_label: what the setting is.
        label: what the metric is.
        name: prefix of ids inside the picture, unique in the page.
    """
    figure, (axis,) = _figure(1, 3.0)
    settings = sorted({float(x) for x, _, _ in points})
    places = {x: place for place, x in enumerate(settings)}
    for x, value, (low, high) in points:
        place = places[float(x)]
        axis.plot([place, place], [low, high], color=_SERIES[4], linewidth=1.0)
        axis.plot([place], [value], color=_SERIES[4], marker="o", markersize=3)
    means = [np.mean([value for x, value, _ in points if float(x) == s]) for s in settings]
    axis.plot(range(len(settings)), means, color=_SERIES[0], marker="o", markersize=5)
    axis.set_xticks(range(len(settings)), [f"{s:g}" for s in settings])
    axis.set_xlabel(axis_label)
    axis.set_ylabel(label)
    return _svg(figure, name)


def by_group(
    labels: Sequence[str],
    systems: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    axis_label: str,
    label: str,
    name: str,
) -> str:
    """Draw a metric by group of users, one line with intervals per system.

    Args:
        labels: of the groups, in order.
        systems: name -> (value, [low, high]) of each group.
        axis_label: what makes the groups.
        label: what the metric is.
        name: prefix of ids inside the picture, unique in the page.
    """
    figure, (axis,) = _figure(1, 3.2)
    places = np.arange(len(labels), dtype=float)
    for number, (system, points) in enumerate(systems.items()):
        values = np.array([value for value, _ in points])
        ends = np.array([ci for _, ci in points], dtype=float)
        shift = 0.07 * (number - (len(systems) - 1) / 2)
        axis.errorbar(
            places + shift,
            values,
            yerr=np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0.0),
            color=_SERIES[number % len(_SERIES)],
            linestyle=_DASHES[number % len(_DASHES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.9,
            label=_shortened(system),
        )
    axis.set_xticks(places, [_shortened(text) for text in labels])
    axis.set_xlim(-0.4, len(labels) - 0.6)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(axis_label)
    axis.set_ylabel(label)
    if len(systems) > 1:
        _legend(axis)
    return _svg(figure, name)


def _figure(
    rows: int, height: float, *, ratios: Sequence[float] = (), share_x: bool = True
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    keywords = {"height_ratios": ratios} if ratios else {}
    axes = figure.subplots(rows, 1, sharex=share_x, squeeze=False, gridspec_kw=keywords)[:, 0]
    for axis in axes:
        axis.grid(True, color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(colors=_TEXT, labelsize=_FONT - 1, which="both")
        axis.xaxis.label.set(color=_TEXT, fontsize=_FONT)
        axis.yaxis.label.set(color=_TEXT, fontsize=_FONT)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_edgecolor(_TEXT)
    return figure, axes


def _percent_ticks(axis: Any, span: float) -> None:
    """Label a log axis of probabilities as percent, at 1, 2 and 5 of each decade where few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 200 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axis.set_minor_formatter(NullFormatter())


def _shortened(text: str) -> str:
    """Return a label that leaves room for the drawing."""
    text = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
    return text.replace("$", r"\$")


def _legend(axis: Any) -> None:
    axis.legend(frameon=False, labelcolor=_TEXT, fontsize=_FONT - 1)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    figure.align_ylabels()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _to_inline(buffer.getvalue(), name)


def _to_inline(svg: str, name: str) -> str:
    """Keep the drawing only: no prolog, metadata, namespaces, foreign fonts or clashing ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return re.sub(
        r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true" focusable="false">',
        svg,
        count=1,
    ).strip()
