"""The sections of a report, one function each: results and parts in, pieces of HTML out.

A section without anything to show is an empty list. Probabilities have a file of their own
(`report.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genrec.evaluation import markup, plots
from genrec.evaluation.report_parts import GroupSection, ListedItem, ReportParts, Sample
from genrec.evaluation.token_plots import item_map

OURS = "genrec"
MAX_SAMPLES = 12
MAX_TITLE = 90

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
    modes = [m for m in ("masked", "unmasked") if OURS in (figures.get(m) or {})]
    if not modes:
        return []
    rows = []
    for name, text in _LIKE.items():
        values = [figures[mode][OURS].get(name) for mode in modes]
        if any(value is not None for value in values):
            rows.append([markup.esc(text), *map(markup.number, values)])
    columns = ["", *(seen(mode == "masked") for mode in modes)]
    caption = f"What the first {figures.get('k', 10)} places of {OURS}'s lists are like"
    return [markup.details("Beyond accuracy", markup.table(caption, columns, rows))]


def groups(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return for whom it works: a metric by groups of users, as table and picture."""
    if not parts.groups:
        return []
    blocks = [
        "\n".join(_group(part, f"{parts.prefix}groups-{number}"))
        for number, part in enumerate(parts.groups)
    ]
    columns = "".join(f"<div>{block}</div>\n" for block in blocks)
    intro = (
        "Means over the users of a group with 95% intervals. Groups with few users are uncertain: "
        "read the intervals before the gaps."
    )
    return [markup.paragraph(intro, note=True), f'<div class="columns">{columns}</div>']


def _group(part: GroupSection, name: str) -> list[str]:
    metric = part.metric
    labels = [line["group"] for line in next(iter(part.systems.values()))]
    sizes = [line["num_users"] for line in next(iter(part.systems.values()))]
    rows = [
        [markup.esc(label), markup.number(size)]
        + [markup.number(s[i][metric], s[i][f"{metric}_ci"]) for s in part.systems.values()]
        for i, (label, size) in enumerate(zip(labels, sizes, strict=True))
    ]
    heads = [part.title.lower(), "users", *(s.replace("_", " ") for s in part.systems)]
    caption = f"{metric_name(metric)} by {part.title.lower()}, {seen(part.masked)}"
    made = [f"<h3>{markup.esc(part.title)}</h3>"]
    if plots.have_matplotlib() and len(labels) > 1:
        lines = {
            system.replace("_", " "): [(v[metric], v[f"{metric}_ci"]) for v in values]
            for system, values in part.systems.items()
        }
        svg = plots.by_group(labels, lines, part.title.lower(), metric_name(metric), name)
        alt = f"{caption}, one line per system; the table has the figures."
        made.append(markup.figure(svg, alt, f"{caption}; bars are 95% intervals."))
    made.append(markup.details(f"Figures by {part.title.lower()}", markup.table(
        caption, heads, rows, ours=[False] * len(rows))))  # fmt: skip
    return made


def samples(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return example users with titles and, for each item, what in the history explains it."""
    if not parts.samples:
        return []
    intro = "Test users: their last items, and the top of the list with calibrated probabilities."
    if any(item.shared for sample in parts.samples for item in sample.recommended):
        intro += (
            " Below each item: the item of the history whose semantic ID begins most like it, and "
            "the codes that both share. The search goes down these codes from the left, so a "
            "shared beginning is what two items have in common for the model."
        )
    blocks = "".join(_sample(sample) for sample in parts.samples[:MAX_SAMPLES])
    return [markup.paragraph(intro, note=True), f'<div class="columns">{blocks}</div>']


def _sample(sample: Sample) -> str:
    history = "".join(f"<li>{_name(item)}</li>" for item in sample.history)
    rows = []
    for place, item in enumerate(sample.recommended, start=1):
        mark = " ✓ consumed next" if item.is_target else ""
        chance = "–" if item.probability is None else f"{100 * item.probability:.2f}%"
        rows.append([f"{place}. {_name(item)}{mark}{_explanation(item)}", chance])
    target = f"<p>Consumed next: {_name(sample.target)}</p>" if sample.target else ""
    recommended = markup.table(f"Recommended to {sample.label}", ["item", "probability"], rows)
    return (
        f'<article class="sample"><h3>{markup.esc(sample.label)}</h3>\n'
        f"<p>Last items, oldest first:</p><ol>{history}</ol>\n{recommended}\n{target}</article>"
    )


def _explanation(item: ListedItem) -> str:
    shared = item.shared
    if shared is None:
        return ""
    if shared.item_id == item.item_id:
        return '<span class="why">already in the history</span>'
    if not shared.codes:
        return '<span class="why">no code in common with the history</span>'
    codes = "-".join(map(str, shared.codes))
    what = _title(shared.title, shared.item_id)
    number = f"{len(shared.codes)} of {shared.num_levels} codes"
    return f'<span class="why">begins like {what}: {number} ({codes})</span>'


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
    measured = timing.get("latency")
    if isinstance(measured, Mapping):
        made.append(markup.definitions(measured))
    spent = [[markup.esc(k), f"{v:,.1f}"] for k, v in stages.items() if k not in reused]
    if spent:
        table = markup.table("Seconds of the stages that were run", ["stage", "seconds"], spent)
        made.append(markup.details("All stages", table))
    return made


def training(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return the training curves and the best validation step of each seed."""
    curves = [c for c in parts.curves if len(c.train) or len(c.valid)]
    if not curves:
        return []
    rows = []
    for curve in curves:
        best = max(curve.valid, key=lambda point: point[1], default=None)
        rows.append(
            [
                markup.esc(curve.label),
                markup.number(float(curve.train[-1][1]) if len(curve.train) else None),
                markup.number(float(best[1]) if best else None),
                markup.number(int(best[0]) if best else None),
            ]
        )
    columns = ["run", "last training loss", "best validation NDCG@10", "at step"]
    made = [markup.table("Training runs", columns, rows)]
    if plots.have_matplotlib():
        data = [{"label": c.label, "train": c.train, "valid": c.valid} for c in curves]
        alt = "Training loss and validation NDCG@10 by step, one line per seed; see the table."
        svg = plots.training_curve(data, f"{parts.prefix}training")
        made.append(markup.figure(svg, alt, "Loss on training targets, NDCG@10 on validation."))
    return made


def codes(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return how evenly items use the codes, and the map of items by their first code."""
    levels = [np.asarray(counts) for counts in parts.code_usage]
    if not levels:
        return []
    rows = []
    for number, counts in enumerate(levels, start=1):
        share = counts[counts > 0] / max(counts.sum(), 1)
        perplexity = float(np.exp(-(share * np.log(share)).sum()))
        rows.append(
            [
                f"level {number}",
                markup.number(len(counts)),
                f"{np.count_nonzero(counts) / max(len(counts), 1):.1%}",
                f"{perplexity:.1f}",
                markup.number(int(counts.max(initial=0))),
            ]
        )
    columns = ["level", "codebook size", "used", "perplexity", "items of the top code"]
    made = [markup.table("How evenly items use the codes", columns, rows)]
    if plots.have_matplotlib():
        alt = "Number of items per code for each level, most used code first; see the table."
        svg = plots.code_usage(levels, f"{parts.prefix}codes")
        made.append(markup.figure(svg, alt, "Items per code, level by level."))
        made += _map(parts)
    return made


def _map(parts: ReportParts) -> list[str]:
    drawn = parts.item_map
    if drawn is None:
        return []
    svg = item_map(drawn.points_P2, drawn.first_codes_P, drawn.names, f"{parts.prefix}map")
    count = len(drawn.points_P2)
    words = "; ".join(drawn.names.values())
    alt = f"Map of {count:,} items, coloured by their first code. Largest groups: {words}."
    caption = (
        f"{count:,} items on the {drawn.method}, one colour per first code; items of the "
        f"{len(drawn.names)} biggest first codes are larger. Colours that keep together mean "
        "that the first code says what an item is like."
    )
    return ["<h3>Map of the items</h3>", markup.figure(svg, alt, caption)]


def data(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return the data card and what the checks of the data found."""
    card = parts.dataset_card if parts.dataset_card is not None else found.get("dataset")
    made = [markup.definitions(card)] if card else []
    if parts.dataset_info:
        prepared = markup.definitions(parts.dataset_info)
        made.append(markup.details("How it was prepared, and what was dropped", prepared))
    if parts.findings:
        lines = "".join(
            f"<li>{markup.esc(f['level'])}: {markup.esc(f['message'])}</li>\n"
            for f in parts.findings
        )
        made.append(f"<h3>What the data checks found</h3>\n<ul>{lines}</ul>")
    return made


def protocol(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return everything that makes two results comparable or not."""
    chosen = found.get("protocol")
    return [markup.definitions(chosen)] if chosen else []


def repeat(found: Mapping[str, Any], parts: ReportParts) -> list[str]:
    """Return the exact command, commit, versions, fingerprints and configuration."""
    made = []
    if parts.command:
        made.append(f"<h3>Command</h3>\n<pre><code>{markup.esc(parts.command)}</code></pre>")
    git = found.get("git")
    if git and git.get("commit"):
        dirty = " (with changes that were not committed)" if git.get("dirty") else ""
        made.append(f"<h3>Commit</h3>\n<p><code>{markup.esc(git['commit'])}</code>{dirty}</p>")
    elif git is not None:
        made.append("<h3>Commit</h3>\n<p>not known (not run from a checkout)</p>")
    facts = {n: found[n] for n in ("seeds", "versions", "fingerprints") if found.get(n)}
    if (found.get("timing") or {}).get("seconds") is not None:
        facts["timing"] = {"seconds": found["timing"]["seconds"]}
    for name, value in facts.items():
        shown = value if isinstance(value, Mapping) else {name: value}
        made.append(f"<h3>{markup.esc(name.capitalize())}</h3>\n{markup.definitions(shown)}")
    if parts.config_yaml:
        shown_yaml = f"<pre><code>{markup.esc(parts.config_yaml)}</code></pre>"
        made.append(markup.details("Resolved configuration", shown_yaml))
    return made


def metric_name(metric: str) -> str:
    """Return how a metric is written for people."""
    name, _, k = metric.partition("@")
    return f"{ {'recall': 'Recall', 'ndcg': 'NDCG', 'mrr': 'MRR'}.get(name, name) }@{k}"


def seen(masked: bool) -> str:
    """Return a way of ranking in words."""
    return "seen items left out" if masked else "seen items kept in"


def _name(item: ListedItem) -> str:
    return _title(item.title, item.item_id)


def _title(title: str | None, item_id: str) -> str:
    """Return a title, cut where a shop put its whole advertisement into it, or the id."""
    if not title:
        return f"item {markup.esc(item_id)}"
    return markup.esc(title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 1] + "…")
