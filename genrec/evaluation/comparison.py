"""Which of several runs is better, and is the difference more than chance? Paired tests, by user.

It takes what runs left behind (`runs.py`: results and per-user values) and knows neither
configurations nor how runs are made; tables of what it found are in `comparison_tables.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from genrec.evaluation.metrics import PRINTED
from genrec.evaluation.runs import SYSTEM, Cell, check_comparable, common_modes
from genrec.evaluation.significance import detectable_prior, holm, paired_test


def compare(
    cells: Sequence[Cell],
    *,
    reference: str | None = None,
    metrics: Sequence[str] = PRINTED,
    same_seeds: bool = True,
) -> dict[str, Any]:
    """Return figures of every cell and paired tests against a reference.

    Args:
        cells: at least one; all of one data set and protocol.
        reference: name of a cell; the first where there is none of that name.
        metrics: what is tested, e.g. "ndcg@10"; each cell must have it per user.
        same_seeds: refuse cells that were trained under other seeds.

    Returns:
        JSON types: `dataset`, `protocol`, `seeds`, `reference`, `baselines` (rows as in
        results.json) and `cells`: `name`, `settings`, `rows` (by mode, each with `vs_reference`:
        metric -> difference, ci, p, p_permutation, both also corrected by Holm over the cells as
        `p_holm` and `p_permutation_holm`, detectable, and `likeness`: its figures beside accuracy),
        `search` (history length, beam width, scoring), `tokens` and `timing`.

    Raises:
        MismatchError: cells of other data or another protocol, with both.
    """
    first = cells[0]
    for cell in cells[1:]:
        check_comparable(first, cell, same_seeds=same_seeds)
    against = next((cell for cell in cells if cell.name == reference), first)
    shared = common_modes(cells)
    lines = [_line(cell, against, shared, metrics) for cell in cells]
    for mode in range(len(shared)):
        for metric in metrics:
            tests = [
                line["rows"][mode]["vs_reference"][metric]
                for line in lines
                if line["name"] != against.name
            ]
            for p in ("p", "p_permutation"):
                for test, corrected in zip(tests, holm([t[p] for t in tests]), strict=True):
                    test[f"{p}_holm"] = corrected
    return {
        "dataset": first.results["dataset"],
        "protocol": first.results["protocol"],
        "seeds": first.results["seeds"],
        "reference": against.name,
        "baselines": [
            row | {"likeness": replace(first, system=row["name"]).likeness(row["masked"])}
            for row in first.results["rows"]
            if row["name"] != SYSTEM
        ],
        "cells": lines,
        "versions": first.results["versions"],
    }


def noise(found: Mapping[str, Any], metric: str, masked: bool) -> tuple[float, bool]:
    """Return the difference below which a table holds nothing but noise.

    The smallest of the paired detectable differences to the reference (80% power, level .05).

    Returns:
        the difference, and whether it comes from pairs; alone, a cell is measured against an
        independent system that spreads as it does.
    """
    tests = [
        row["vs_reference"][metric]["detectable"]
        for cell in found["cells"]
        for row in cell["rows"]
        if row["masked"] == masked and cell["name"] != found["reference"]
    ]
    differing = [difference for difference in tests if difference > 0]
    if differing:
        return min(differing), True
    rows = [r for cell in found["cells"] for r in cell["rows"] if r["masked"] == masked]
    return rows[0]["detectable"][metric], False


def _line(
    cell: Cell, against: Cell, modes: Sequence[bool], metrics: Sequence[str]
) -> dict[str, Any]:
    rows = []
    for masked in modes:
        row = cell.row(masked)
        mine = {metric: cell.values(metric, masked) for metric in metrics}
        row["vs_reference"] = {
            metric: paired_test(values, against.values(metric, masked))
            for metric, values in mine.items()
        }
        # Results written before figures had it.
        prior = {metric: detectable_prior(values) for metric, values in mine.items()}
        row["detectable"] = {**prior, **row.get("detectable", {})}
        row["likeness"] = cell.likeness(masked)
        rows.append(row)
    told = cell.results if cell.system == SYSTEM else {}
    return {
        "name": cell.name,
        "settings": dict(cell.settings),
        "search": cell.search,
        "rows": rows,
        "tokens": told.get("tokens"),
        "timing": told.get("timing"),
        "calibration": {
            key: told.get("calibration", {}).get(key)
            for key in ("ece_before", "ece_after", "nll_before", "nll_after")
        },
    }
