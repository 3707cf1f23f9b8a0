"""What does a comparison look like as text? Tables, and a Markdown document of them.

It shows what `comparison.py` found and computes nothing; the page is in `comparison_page.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genrec.evaluation import beyond_accuracy, runs
from genrec.evaluation.comparison import noise
from genrec.evaluation.metrics import PRINTED

MAX_LEVELS = 4
LIKENESS = "What the first ten places of the lists are like (all lists together):"
APART = (
    "The cells below were evaluated on other data or under another protocol: compare them with "
    "each other, not with those above."
)
SEARCH = (
    "Settings of each model, and milliseconds per request of the search of the test users (a "
    "request's share of its batch; mean over seeds and ways of ranking)."
)


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return the comparison as a Markdown document."""
    dataset = found["dataset"]
    seeds = len(found["seeds"])
    parts = [
        f"# {found['name']}",
        f"{dataset['name']}: {dataset['num_users']:,} users, {dataset['num_items']:,} items, "
        f"{dataset['num_interactions']:,} interactions. Test, full ranking, item-level hits, "
        f"{seeds} seed{'s' * (seeds > 1)}. In brackets 95% bootstrap intervals over users; "
        f"differences are paired over users, against `{found['reference']}`; p is corrected by "
        "Holm over the table; sd is the standard deviation of NDCG@10 over seeds.",
    ]
    for masked in modes(found):
        parts.append(f"## Seen items {'left out' if masked else 'kept in'}")
        parts.append(_markdown_table(*result_table(found, masked)))
        parts += [noise_sentence(found, metric, masked) for metric in PRINTED]
        likeness = likeness_table(found, masked)
        if likeness[1]:
            parts += [LIKENESS, _markdown_table(*likeness)]
    search = search_table(found)
    if search[1]:
        parts += ["## Search", SEARCH, _markdown_table(*search)]
    tokens = token_table(found)
    if tokens[1]:
        parts += ["## Tokens", _markdown_table(*tokens)]
    for name, text in (found.get("failed") or {}).items():
        parts.append(f"`{name}` failed:\n\n```\n{text}\n```")
    for other in found.get("others") or []:
        parts.append(f"---\n\n{APART}")
        parts.append(to_markdown({**other, "name": f"{found['name']}: {other['what']}"}).strip())
    return "\n\n".join(parts) + "\n"


def modes(found: Mapping[str, Any]) -> list[bool]:
    """Return which ways of ranking a comparison holds: seen items left out (true) or kept in."""
    return [row["masked"] for row in found["cells"][0]["rows"]]


def result_table(found: Mapping[str, Any], masked: bool) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of the result table of one way of ranking, as text."""
    columns = ["", "Recall@10", "NDCG@10", "sd", "NDCG@10, difference", "p"]
    rows = []
    for cell in found["cells"]:
        row = next(r for r in cell["rows"] if r["masked"] == masked)
        test = row["vs_reference"]["ndcg@10"]
        is_reference = cell["name"] == found["reference"]
        by_seed = row.get("ndcg@10_seeds")
        rows.append(
            [
                cell["name"],
                _figure(row["recall@10"], row["recall@10_ci"]),
                _figure(row["ndcg@10"], row["ndcg@10_ci"]),
                _short(f"{np.std(by_seed, ddof=1):.4f}") if by_seed else "",
                "reference" if is_reference else _figure(test["difference"], test["ci"], "+"),
                "" if is_reference else _short(f"{test['p_holm']:.3f}"),
            ]
        )
    for row in found["baselines"]:
        if row["masked"] == masked:
            shown = [_figure(row[m], row[f"{m}_ci"]) for m in PRINTED]
            rows.append([f"({row['name']})", *shown, "", "", ""])
    return columns, rows


def noise_sentence(found: Mapping[str, Any], metric: str, masked: bool) -> str:
    """Return what a reader must know before celebrating a difference of a metric."""
    difference, paired = noise(found, metric, masked)
    whose = "Differences" if paired else "Differences to an independent system"
    return (
        f"{whose} below {_short(f'{difference:.4f}')} in {metric} are noise: these users would "
        "show a true one in fewer than four cases of five (two-sided, level .05)."
    )


def paired_table(
    found: Mapping[str, Any], metric: str, masked: bool
) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of one metric of one way of ranking, with both tests, as text."""
    columns = ["", metric, "difference (95%)", "p", "p, flips", "detectable"]
    rows = []
    for cell in found["cells"]:
        row = next(r for r in cell["rows"] if r["masked"] == masked)
        line = [cell["name"], _short(f"{row[metric]:.4f}")]
        if cell["name"] == found["reference"]:
            rows.append([*line, "reference", "", "", ""])
            continue
        test = row["vs_reference"][metric]
        shown = [f"{test['p_holm']:.4f}", f"{test['p_permutation_holm']:.4f}"]
        shown.append(f"{test['detectable']:.4f}")
        difference = _figure(test["difference"], test["ci"], "+")
        rows.append([*line, difference, *map(_short, shown)])
    return columns, rows


def likeness_table(found: Mapping[str, Any], masked: bool) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of what the first places of lists are like, baselines too, as text."""
    cells = [
        (cell["name"], next(r for r in cell["rows"] if r["masked"] == masked))
        for cell in found["cells"]
    ]
    cells += [(f"({row['name']})", row) for row in found["baselines"] if row["masked"] == masked]
    rows = [
        [name, *beyond_accuracy.printed(row["likeness"])]
        for name, row in cells
        if row.get("likeness")
    ]
    return ["", *beyond_accuracy.PRINTED.values()], rows


def search_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of how each cell searched and what a request took, as text."""
    columns = ["", "history", "beam", "scoring", "p50, ms", "p95, ms", "device"]
    rows = []
    for cell in found["cells"]:
        told = cell["search"]
        measured = (cell.get("timing") or {}).get("latency") or []
        if not told and not measured:
            continue
        shown = [str(told.get(name, "")) for name in runs.SEARCH]
        for name in ("p50_ms", "p95_ms"):
            shown.append(f"{np.mean([each[name] for each in measured]):.2f}" if measured else "")
        rows.append([cell["name"], *shown, ", ".join({each["device"]: None for each in measured})])
    return columns, rows


def token_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of what the codes of each cell are like, as text."""
    columns = [
        "",
        "levels",
        "codes used",
        "collision rate",
        "largest group",
        "fit (s)",
        "train (s)",
    ]
    rows = []
    for cell in found["cells"]:
        tokens = cell.get("tokens")
        if tokens:
            rows.append([cell["name"], *tokens_row(tokens), *_seconds(cell)])
    return columns, rows


def tokens_row(tokens: Mapping[str, Any]) -> list[str]:
    """Return shape of the index, codes used per level of the tokenizer, and collisions, as text."""
    sizes = tokens["index"]["codebook_sizes"]
    shared = tokens["index"].get("shared_vocabulary")
    shape = f"up to {len(sizes)} of {sizes[0]:,}" if shared else " x ".join(map(str, sizes))
    used = [f"{level['utilisation']:.0%}" for level in tokens["levels"]]
    shown = ", ".join(used if len(used) <= MAX_LEVELS else [*used[:MAX_LEVELS], "..."])
    collisions = tokens["collisions"]
    return [shape, shown, f"{collisions['rate']:.2%}", str(collisions["largest_group"])]


def _seconds(cell: Mapping[str, Any]) -> list[str]:
    """Return seconds of fitting and training, the mean over seeds; blank where it was reused."""
    timing = cell.get("timing") or {}
    reused = set(timing.get("reused", ()))
    result = []
    for stage in ("tokenize", "train"):
        found = [
            seconds
            for label, seconds in timing.get("stages", {}).items()
            if label.startswith(f"{stage} (") and label not in reused
        ]
        result.append(f"{np.mean(found):.1f}" if found else "")
    return result


def _figure(value: float, ci: Sequence[float], sign: str = "") -> str:
    low, high = (_short(f"{bound:{sign}.3f}") for bound in ci)
    return f"{_short(f'{value:{sign}.4f}')} [{low}, {high}]"


def _short(text: str) -> str:
    """Without the leading zero, so that a row fits 80 columns."""
    return text.replace("0.", ".", 1)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
