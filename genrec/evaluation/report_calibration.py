"""How does a report show whether probabilities hold? The calibration section as pieces of HTML.

It formats what `genrec.evaluation.reliability` and `genrec.pipeline.calibration_figures` found and
computes nothing; figures that a result does not have are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.evaluation import markup, plots
from genrec.evaluation.report_parts import ReportParts

MEASURES = {
    "ece": "ECE, equal-mass bins",
    "ece_bound": "ECE that chance alone allows (95%)",
    "ece_equal_width": "ECE, equal-width bins",
    "mce": "MCE, equal-mass bins",
    "brier": "Brier score",
    "nll": "NLL per pair (nats)",
    "nll_list": "NLL per list (nats)",
    "predicted_hits": "predicted hits",
}
GROUPS = {
    "history_length": "Predicted and actual hits by history length",
    "target_popularity": "Predicted and actual hits by popularity of what was consumed next",
    "item_popularity": "Predicted and actual hits by popularity of the listed item",
}


def calibration(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return the section; [] where a result says nothing about calibration."""
    values = found.get("calibration") or {}
    table = _before_and_after(values)
    if not table:
        return []
    made = [*_totals(values), *_periods(values), *table]
    return [*made, *_diagram(values, parts.prefix), *_bins(values), *_groups(values)]


def _before_and_after(values: Mapping[str, Any]) -> list[str]:
    names = [name for name in MEASURES if f"{name}_after" in values]
    differences = any(f"{name}_difference_ci" in values for name in names)
    rows = []
    for name in names:
        sides = [_six(values.get(f"{name}_{side}")) for side in ("before", "after")]
        row = [markup.esc(MEASURES[name]), *sides]
        if differences:
            row.append(_difference(values, name))
        rows.append(row)
    if not rows:
        return []
    columns = ["measure", "before", "after"]
    columns += ["difference [95%]"] if differences else []
    return [markup.table("Before and after calibration", columns, rows)]


def _difference(values: Mapping[str, Any], name: str) -> str:
    interval = values.get(f"{name}_difference_ci")
    if interval is None:
        return "–"
    low, high = (_signed(end) for end in interval)
    return f"{_signed(values[f'{name}_difference'])} [{low}, {high}]"


def _totals(values: Mapping[str, Any]) -> list[str]:
    if "actual_hits" not in values:
        return []
    low, high = values.get("actual_hits_ci", (values["actual_hits"],) * 2)
    base = values.get("base_rate")
    return [
        markup.paragraph(
            f"Calibrated lists predict {values['predicted_hits_after']:.1f} hits in all; "
            f"{values['actual_hits']:,} happened (95% interval {low:.1f} to {high:.1f})."
            + (f" Base rate of a listed item: {base:.4%}." if base is not None else "")
        )
    ]


def _periods(values: Mapping[str, Any]) -> list[str]:
    """Say when the calibrator learned, when it was measured, and how it did in its own time."""
    fitted, measured = values.get("fitted") or {}, values.get("period")
    sentences = []
    if fitted.get("period") and measured:
        sentences.append(
            f"Fitted on the latest {fitted['num_users']:,} {fitted['split']} users (targets of "
            f"{_span(fitted['period'])}), measured on targets of {_span(measured)}."
        )
    held_out = fitted.get("other_users")
    if held_out:
        low, high = held_out["actual_hits_ci"]
        sentences.append(
            "Fitted on half of these users and measured on the other half, both ways, it predicts "
            f"{held_out['predicted_hits']:.1f} hits; {held_out['actual_hits']:,} happened (95% "
            f"interval {low:.1f} to {high:.1f}). What holds there and not on the later targets is "
            "a matter of time, not of the map."
        )
    return [markup.paragraph(" ".join(sentences))] if sentences else []


def _span(period: Mapping[str, str]) -> str:
    return f"{period['first']} to {period['last']}, median {period['median']}"


def _diagram(values: Mapping[str, Any], prefix: str) -> list[str]:
    before = values.get("before", {}).get("bins", [])
    after = values.get("after", {}).get("bins", [])
    if not (before or after) or not plots.have_matplotlib():
        return []
    alt = "Reliability diagram: actual hit rate against predicted probability; see the table."
    caption = (
        "Reliability before and after calibration, on log axes; bars are 95% Wilson "
        "intervals, on the line is perfect. Below: hits of each bin. All bins hold about "
        "equally many (user, item) pairs; the tables beneath have the counts."
    )
    svg = plots.reliability_diagram(before, after, f"{prefix}reliability")
    return [markup.figure(svg, alt, caption)]


def _bins(values: Mapping[str, Any]) -> list[str]:
    columns = ["predicted (mean)", "pairs", "hits", "actual", "95% interval"]
    made = []
    for name in ("before", "after"):
        rows = [
            [_six(b["predicted"]), markup.number(b["count"]), markup.number(b["hits"]),
             _six(b["actual"]), f"{b['ci'][0]:.5f} to {b['ci'][1]:.5f}"]
            for b in values.get(name, {}).get("bins", [])
        ]  # fmt: skip
        if rows:
            shown = markup.table(f"Reliability {name} calibration", columns, rows)
            made.append(markup.details(f"Bins {name} calibration", shown))
    return made


def _groups(values: Mapping[str, Any]) -> list[str]:
    groups: Mapping[str, Sequence[Mapping[str, Any]]] = values.get("groups") or {}
    columns = ["group", "users", "predicted", "actual", "95% interval"]
    made = []
    for name, lines in groups.items():
        title = GROUPS.get(name, f"Predicted and actual hits by {name.replace('_', ' ')}")
        rows = [
            [markup.esc(line["group"]), markup.number(line["num_users"]),
             f"{line['predicted_hits']:.1f}", markup.number(line["actual_hits"]),
             "{:.1f} to {:.1f}".format(*line["actual_hits_ci"])]
            for line in lines
            if line["num_users"]
        ]  # fmt: skip
        if rows:
            made.append(markup.details(title, markup.table(title, columns, rows)))
    return made


def _six(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value >= 10 else f"{value:.6f}"


def _signed(value: float) -> str:
    return f"{value:+,.1f}" if abs(value) >= 10 else f"{value:+.6f}"
