"""What came out of a run? One self-contained HTML file for people: no network, no other files.

It formats what it is given (the content of results.json and the parts below) and computes nothing
beyond code usage; a part that is missing is left out, and the page says so where that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artifacts import write_text_atomic
from genrec.evaluation import markup, plots

OURS = "genrec"


@dataclass(frozen=True)
class Curve:
    """One training run.

    Args:
        label: e.g. "seed 0".
        train: (step, training loss in nats per target) pairs.
        valid: (step, validation NDCG@10) pairs.
    """

    label: str
    train: Sequence[tuple[float, float]] = ()
    valid: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class ListedItem:
    """One item of a sample.

    Args:
        item_id: external id.
        title: shown instead of the id where there is one.
        probability: calibrated, None in a history.
        is_target: whether it is what the user consumed next.
    """

    item_id: str
    title: str | None = None
    probability: float | None = None
    is_target: bool = False


@dataclass(frozen=True)
class Sample:
    """One user's list.

    Args:
        label: e.g. "User 1"; no external user ids.
        history: last items, oldest first.
        recommended: best first.
        target: what the user consumed next, where known.
    """

    label: str
    history: Sequence[ListedItem]
    recommended: Sequence[ListedItem]
    target: ListedItem | None = None


@dataclass(frozen=True)
class ReportParts:
    """What a report shows beside results.json; everything is optional.

    Args:
        title: of the page.
        curves: training curves, one per seed.
        code_usage: for each level, how many items hold each code, (K,) ints.
        samples: a few users.
        dataset_card: facts about the data set; default: results["dataset"].
        config_yaml: resolved configuration.
        command: how the run was started.
        notes: sentences printed below the headline (a fallback that was used, say).
    """

    title: str = "genrec report"
    curves: Sequence[Curve] = ()
    code_usage: Sequence[np.ndarray] = ()
    samples: Sequence[Sample] = ()
    dataset_card: Mapping[str, Any] | None = None
    config_yaml: str = ""
    command: str = ""
    notes: Sequence[str] = field(default=())


def write_report(
    path: str | Path, results: Mapping[str, Any], parts: ReportParts | None = None
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        results: content of results.json (docs/evaluation.md): `rows` as made by
            `genrec.evaluation.evaluator.summarise`, and optionally `dataset`, `protocol`, `seeds`,
            `calibration` (see `genrec.evaluation.reliability.compare_reliability`), `timing`,
            `versions`, `fingerprints`.
        parts: everything else.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_text_atomic(path, render(results, parts or ReportParts()))


def render(results: Mapping[str, Any], parts: ReportParts) -> str:
    """Return the report as HTML text; see `write_report`."""
    makers: list[tuple[str, str, Callable[[Mapping[str, Any], ReportParts], list[str]]]] = [
        ("results", "Results", _results),
        ("samples", "Sample recommendations", _samples),
        ("calibration", "Do the probabilities hold?", _calibration),
        ("training", "Training", _training),
        ("codes", "Use of codes", _codes),
        ("data", "Data", _data),
        ("protocol", "Protocol", _protocol),
        ("repeat", "To repeat this", _repeat),
    ]
    sections = [(key, title, maker(results, parts)) for key, title, maker in makers]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<li><a href="#{key}">{markup.esc(title)}</a></li>' for key, title, _ in shown)
    header = f"<header><h1>{markup.esc(parts.title)}</h1>\n{_verdict(results)}</header>"
    notes = [markup.paragraph(note, note=True) for note in parts.notes]
    if not plots.have_matplotlib():
        notes.append(
            markup.paragraph(
                "matplotlib is not installed, so this report has tables but no pictures. "
                "Install genrec with the extra `plots` and write it again.",
                note=True,
            )
        )
    nav = f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    body = [markup.section(key, title, *parts_html) for key, title, parts_html in shown]
    return markup.page(parts.title, "\n".join([header, nav, "<main>", *notes, *body, "</main>"]))


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
            f"Recall@10 {row['recall@10']:.4f} on {row['split']}, {_seen(row['masked'])}: "
            f"{against['difference']:+.4f} against most popular (95% interval {low:+.4f} to "
            f"{high:+.4f}, {certainty} zero).{higher}"
        )
    return "\n".join(markup.paragraph(sentence) for sentence in sentences)


def _results(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    rows = results.get("rows", [])
    tables = []
    for split, masked in dict.fromkeys((row["split"], row["masked"]) for row in rows):
        chosen = [row for row in rows if (row["split"], row["masked"]) == (split, masked)]
        tables.append(_result_table(chosen, f"{split} split, {_seen(masked)}"))
    if not tables:
        return []
    seeds = results.get("seeds", [])
    explanation = (
        "Full ranking of the whole catalogue; a hit is an item, not a semantic ID. In brackets: "
        "95% bootstrap intervals over users. Differences are paired over the same users."
    )
    if seeds:
        explanation += f" {OURS}: mean over {len(seeds)} training seed(s) per user."
    return [markup.paragraph(explanation, note=True), *tables]


def _result_table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    metrics = [m for m in ("recall@5", "recall@10", "ndcg@5", "ndcg@10") if m in rows[0]]
    versus = any("vs_most_popular" in row for row in rows)
    columns = ["system", *(_metric_name(m) for m in metrics)]
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
    return markup.table(caption, columns, cells, ours=[row["name"] == OURS for row in rows])


def _samples(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    if not parts.samples:
        return []
    intro = "Test users: their last items, and the top of the list with calibrated probabilities."
    blocks = "".join(_sample(sample) for sample in parts.samples)
    return [markup.paragraph(intro, note=True), f'<div class="columns">{blocks}</div>']


def _sample(sample: Sample) -> str:
    history = "".join(f"<li>{_name(item)}</li>" for item in sample.history)
    rows = []
    for place, item in enumerate(sample.recommended, start=1):
        mark = " ✓ consumed next" if item.is_target else ""
        chance = "–" if item.probability is None else f"{100 * item.probability:.2f}%"
        rows.append([f"{place}. {_name(item)}{mark}", chance])
    target = f"<p>Consumed next: {_name(sample.target)}</p>" if sample.target else ""
    recommended = markup.table(f"Recommended to {sample.label}", ["item", "probability"], rows)
    return (
        f'<article class="sample"><h3>{markup.esc(sample.label)}</h3>\n'
        f"<p>Last items, oldest first:</p><ol>{history}</ol>\n{recommended}\n{target}</article>"
    )


def _calibration(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    values = results.get("calibration") or {}
    names = {
        "ece": "ECE, equal-mass bins",
        "ece_bound": "ECE that chance alone allows (95%)",
        "ece_equal_width": "ECE, equal-width bins",
        "mce": "MCE, equal-mass bins",
        "brier": "Brier score",
        "nll": "NLL per pair (nats)",
        "predicted_hits": "predicted hits",
    }
    rows = [
        [markup.esc(text), _six(values.get(f"{name}_before")), _six(values.get(f"{name}_after"))]
        for name, text in names.items()
        if f"{name}_after" in values
    ]
    if not rows:
        return []
    made = [markup.table("Before and after calibration", ["measure", "before", "after"], rows)]
    if "actual_hits" in values:
        low, high = values.get("actual_hits_ci", (values["actual_hits"],) * 2)
        base = values.get("base_rate")
        made.insert(
            0,
            markup.paragraph(
                f"Calibrated lists predict {values['predicted_hits_after']:.1f} hits in all; "
                f"{values['actual_hits']:,} happened (95% interval {low:.1f} to {high:.1f})."
                + (f" Base rate of a listed item: {base:.4%}." if base is not None else "")
            ),
        )
    return [*made, *_reliability(values)]


def _reliability(values: Mapping[str, Any]) -> list[str]:
    before = values.get("before", {}).get("bins", [])
    after = values.get("after", {}).get("bins", [])
    made = []
    if (before or after) and plots.have_matplotlib():
        alt = "Reliability diagram: actual hit rate against predicted probability; see the table."
        caption = (
            "Reliability before and after calibration, on log axes; bars are 95% Wilson "
            "intervals, on the line is perfect. Below: hits of each bin. All bins hold about "
            "equally many (user, item) pairs; the tables beneath have the counts."
        )
        svg = plots.reliability_diagram(before, after, "reliability")
        made.append(markup.figure(svg, alt, caption))
    columns = ["predicted (mean)", "pairs", "hits", "actual", "95% interval"]
    for name, bins in (("before", before), ("after", after)):
        rows = [
            [_six(b["predicted"]), markup.number(b["count"]), markup.number(b["hits"]),
             _six(b["actual"]), f"{b['ci'][0]:.5f} to {b['ci'][1]:.5f}"]
            for b in bins
        ]  # fmt: skip
        if rows:
            shown = markup.table(f"Reliability {name} calibration", columns, rows)
            made.append(markup.details(f"Bins {name} calibration", shown))
    return made


def _training(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
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
        svg = plots.training_curve(data, "training")
        made.append(markup.figure(svg, alt, "Loss on training targets, NDCG@10 on validation."))
    return made


def _codes(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
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
        svg = plots.code_usage(levels, "codes")
        made.append(markup.figure(svg, alt, "Items per code, level by level."))
    return made


def _data(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    card = parts.dataset_card if parts.dataset_card is not None else results.get("dataset")
    return [markup.definitions(card)] if card else []


def _protocol(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    protocol = results.get("protocol")
    return [markup.definitions(protocol)] if protocol else []


def _repeat(results: Mapping[str, Any], parts: ReportParts) -> list[str]:
    made = []
    if parts.command:
        made.append(f"<h3>Command</h3>\n<pre><code>{markup.esc(parts.command)}</code></pre>")
    facts = {
        name: results[name]
        for name in ("seeds", "versions", "fingerprints", "timing")
        if results.get(name)
    }
    for name, value in facts.items():
        shown = value if isinstance(value, Mapping) else {name: value}
        made.append(f"<h3>{markup.esc(name.capitalize())}</h3>\n{markup.definitions(shown)}")
    if parts.config_yaml:
        shown_yaml = f"<pre><code>{markup.esc(parts.config_yaml)}</code></pre>"
        made.append(markup.details("Resolved configuration", shown_yaml))
    return made


def _name(item: ListedItem) -> str:
    return markup.esc(item.title) if item.title else f"item {markup.esc(item.item_id)}"


def _six(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value >= 10 else f"{value:.6f}"


def _metric_name(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "N")


def _seen(masked: bool) -> str:
    return "seen items left out" if masked else "seen items kept in"
