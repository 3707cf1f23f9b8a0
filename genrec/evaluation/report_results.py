"""How does a report show what was reached, and how fast? Tables of metrics, lists and latency.

It formats results and computes nothing; the other sections are in `report_sections.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.evaluation import markup, plots
from genrec.evaluation.report_parts import ReportParts

OURS = "genrec"

_LIKE = {
    "coverage": "share of the catalogue that some list holds",
    "gini": "Gini index of exposure (0 = all items equally often)",
    "entropy_bits": "entropy of exposure (bits)",
    "novelty_bits": "novelty (mean self-information, bits)",
    "average_popularity": "mean training count of a recommended item",
    "popularity_lift": "popularity lift over what is consumed",
    "popularity_lift_over_history": "popularity lift over the users' histories",
    "long_tail_share": "share of items outside the most popular fifth",
    "invalid_rate": "places without an item",
    "diversity_attributes": "variety within a list (attributes)",
    "diversity_vectors": "variety within a list (vectors)",
    "calibration_miss": "KL of a list's attributes from the history's (nats)",
    "certified": "lists proven to be the true top of the catalogue",
}


def results(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return the tables of metrics with intervals, one per split and way of ranking."""
    rows = found.get("rows", [])
    tables = []
    for split, masked in dict.fromkeys((row["split"], row["masked"]) for row in rows):
        chosen = [row for row in rows if (row["split"], row["masked"]) == (split, masked)]
        tables += _result_tables(chosen, f"{split} split, {seen(masked)}", parts.prefix)
    if not tables:
        return []
    seeds = found.get("seeds", [])
    explanation = (
        "Full ranking of the whole catalogue; a hit is an item, not a semantic ID. In brackets: "
        "95% bootstrap intervals over users. Differences are paired over the same users."
    )
    if seeds:
        explanation += f" {OURS}: mean over {len(seeds)} training seed(s) per user."
    return [markup.paragraph(explanation, note=True), *tables, *_likeness(found)]


def _result_tables(rows: Sequence[Mapping[str, Any]], caption: str, prefix: str) -> list[str]:
    metrics = [m for m in ("recall@5", "recall@10", "ndcg@5", "ndcg@10") if m in rows[0]]
    versus = any("vs_most_popular" in row for row in rows)
    columns = ["system", *(metric_name(m) for m in metrics)]
    if versus:
        columns.append("R@10 − most popular")
    cells = []
    for row in rows:
        line = [markup.esc(row["name"].replace("_", " "))]
        line += [markup.number(row.get(m), row.get(f"{m}_ci")) for m in metrics]
        if versus:
            against = row.get("vs_most_popular", {}).get("recall@10", {})
            line.append(markup.number(against.get("difference"), against.get("ci"), signed=True))
        cells.append(line)
    made = [markup.table(caption, columns, cells, ours=[row["name"] == OURS for row in rows])]
    known = [row for row in rows if "ndcg@10_ci" in row]
    if len(known) > 1 and plots.have_matplotlib():
        points = [(r["name"].replace("_", " "), r["ndcg@10"], r["ndcg@10_ci"]) for r in known]
        name = f"{prefix}intervals-{len(rows)}-{rows[0]['split']}-{int(rows[0]['masked'])}"
        svg = plots.intervals(points, {}, "NDCG@10", name)
        alt = f"NDCG@10 of every system with its interval, {caption}; the table has the figures."
        made.append(markup.figure(svg, alt, f"NDCG@10 with 95% intervals, {caption}."))
    return made


def _likeness(found: Mapping[str, Any]) -> list[str]:
    """Return what lists are like beside accuracy, in a block that opens on demand."""
    figures = found.get("beyond_accuracy") or {}
    tables = []
    for mode in ("masked", "unmasked"):
        systems: Mapping[str, Any] = figures.get(mode) or {}
        rows = []
        for name, text in _LIKE.items():
            values = [of.get(name) for of in systems.values()]
            if any(value is not None for value in values):
                rows.append([markup.esc(text), *map(markup.number, values)])
        if rows:
            columns = ["", *(system.replace("_", " ") for system in systems)]
            caption = (
                f"What the first {figures.get('k', 10)} places of all lists are like, "
                f"{seen(mode == 'masked')}"
            )
            tables.append(markup.table(caption, columns, rows, ours=[False] * len(rows)))
    return [markup.details("Beyond accuracy", "\n".join(tables))] if tables else []


def latency(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return how long the stages took and how many requests the search answered a second."""
    timing = found.get("timing") or {}
    stages, reused = timing.get("stages") or {}, set(timing.get("reused") or ())
    users = next((r.get("num_users") for r in found.get("rows", []) if r["name"] == OURS), None)
    rows = [
        [markup.esc(label), f"{seconds:,.1f}", f"{users / seconds:,.1f}"]
        for label, seconds in stages.items()
        if label.startswith("search test") and label not in reused and users and seconds > 0
    ]  # fmt: skip
    made = []
    if rows:
        width = (found.get("protocol") or {}).get("beam_width")
        made.append(
            markup.paragraph(
                f"{users:,} requests each" + (f", beam width {width}" if width else "")
                + ", in batches; on the machine of the run, with whatever else ran there.",
                note=True,
            )
        )  # fmt: skip
        columns = ["search of the test users", "seconds", "requests per second"]
        made.append(markup.table("Speed of the constrained search", columns, rows))
    made += _requests(timing.get("latency") or [])
    spent = [[markup.esc(k), f"{v:,.1f}"] for k, v in stages.items() if k not in reused]
    if spent:
        table = markup.table("Seconds of the stages that were run", ["stage", "seconds"], spent)
        made.append(markup.details("All stages", table))
    return made


def _requests(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a request took: its share of its batch, and the batch that it waited for."""
    if not measured:
        return []
    rows = [
        [
            f"seed {each['seed']}, {seen(each['masked'])}",
            *(f"{each[name]:.2f}" for name in ("p50_ms", "p95_ms", "batch_p50_ms", "batch_p95_ms")),
            markup.number(each["batch_size"]),
            markup.esc(each["device"]),
        ]
        for each in measured
    ]
    columns = ["test users", "p50", "p95", "batch p50", "batch p95", "batch size", "device"]
    return [markup.table("Milliseconds per request, and per batch", columns, rows)]


def metric_name(metric: str) -> str:
    """Return how a metric is written for people."""
    name, _, k = metric.partition("@")
    return f"{ {'recall': 'Recall', 'ndcg': 'NDCG', 'mrr': 'MRR'}.get(name, name) }@{k}"


def seen(masked: bool) -> str:
    """Return a way of ranking in words."""
    return "seen items left out" if masked else "seen items kept in"
