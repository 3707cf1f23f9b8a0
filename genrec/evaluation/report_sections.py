"""The sections of a report, one function each: results and parts in, pieces of HTML out.

A section without anything to show is an empty list. Probabilities and the tables of results have
files of their own (`report_calibration.py`, `report_results.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrec.evaluation import markup, plots
from genrec.evaluation.report_parts import GroupSection, ListedItem, ReportParts, Sample
from genrec.evaluation.report_results import metric_name, seen
from genrec.evaluation.token_plots import item_map

MAX_SAMPLES = 12
MAX_TITLE = 90


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


def _name(item: ListedItem) -> str:
    return _title(item.title, item.item_id)


def _title(title: str | None, item_id: str) -> str:
    """Return a title, cut where a shop put its whole advertisement into it, or the id."""
    if not title:
        return f"item {markup.esc(item_id)}"
    return markup.esc(title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 1] + "…")
