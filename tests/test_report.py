"""The report: valid self-contained HTML, everything escaped, any part may be missing."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from genrec.evaluation import plots
from genrec.evaluation.comparison import compare
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.reliability import compare_reliability
from genrec.evaluation.report import (
    Curve,
    GroupSection,
    ItemMap,
    ListedItem,
    ReportParts,
    Sample,
    SharedPrefix,
    render,
    render_runs,
    write_report,
)
from genrec.evaluation.runs import Cell

NASTY = '<script>alert("x")</script> & <img src=x onerror=y> "Tom\'s $5 & $6"'
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def make_results() -> dict:
    rng = np.random.default_rng(0)
    popular = {m: rng.random(300) < 0.05 for m in ("recall@5", "recall@10", "ndcg@5", "ndcg@10")}
    ours = {m: rng.random((2, 300)) < 0.2 for m in popular}
    markov = {m: rng.random(300) < 0.5 for m in popular}
    rows = []
    for masked in (True, False):
        rows.append(summarise("genrec", "test", masked, ours, popular))
        rows.append(summarise("most_popular", "test", masked, popular))
        rows.append(summarise("markov", "test", masked, markov, popular))
    before = rng.dirichlet(np.ones(11), size=300)[:, :10]
    return {
        "dataset": {"name": NASTY, "num_items": 1349, "ties": {"policy": "hash", "share": 0.44}},
        "protocol": {"split": "leave_one_out", "ks": [5, 10], "masked": [True, False]},
        "seeds": [0, 1],
        "rows": rows,
        "calibration": compare_reliability(before, before / 3, rng.integers(-1, 10, 300)),
        "timing": {
            "seconds": 12.5,
            "stages": {
                "search test, masked (seed 0)": 2.0,
                "search test, masked (seed 1)": 0.0,
                "search valid (seed 0)": 3.0,
                "train (seed 0)": 7.5,
            },
            "reused": ["search test, masked (seed 1)"],
            "latency": [
                {
                    "seed": 0,
                    "masked": True,
                    "p50_ms": 1.234,
                    "p95_ms": 2.5,
                    "batch_p50_ms": 79.0,
                    "batch_p95_ms": 160.0,
                    "batch_size": 64,
                    "device": NASTY,
                }
            ],
        },
        "beyond_accuracy": {
            "k": 10,
            "masked": {
                "genrec": {"coverage": 0.431, "gini": 0.5},
                "most_popular": {"coverage": 0.0089, "novelty_bits": 7.25},
            },
        },
        "git": {"commit": "c0ffee", "dirty": True},
        "versions": {"genrec": "0.1.0"},
        "fingerprints": {"dataset": "abc"},
    }


def make_groups(title: str) -> GroupSection:
    lines = [
        {"group": label, "num_users": 10 * i, "recall@10": i / 9, "recall@10_ci": [i / 10, i / 5]}
        for i, label in enumerate(("1-5", "$6 & more"), start=1)
    ]
    return GroupSection(title, "recall@10", True, {"genrec": lines, "most_popular": lines})


def make_parts() -> ReportParts:
    item = ListedItem("50", NASTY)
    listed = [
        ListedItem("1", NASTY, 0.25, True, SharedPrefix("50", NASTY, [3, 1], 4)),
        ListedItem("<b>2</b>", None, 0.05, False, SharedPrefix("50", NASTY, [], 4)),
        ListedItem("3", "no probability", shared=SharedPrefix("<i>9</i>", None, [3], 4)),
        ListedItem("50", "the same", 0.01, shared=SharedPrefix("50", NASTY, [3, 1, 0, 0], 4)),
    ]
    return ReportParts(
        title=f"run {NASTY}",
        curves=[
            Curve(f"seed {seed} {NASTY}", [(1, 4.0), (2, 3.0)], [(1, 0.01), (2, 0.03)])
            for seed in range(6)
        ],
        code_usage=[np.array([5, 3, 0, 1]), np.array([2, 2, 2, 3])],
        item_map=ItemMap(
            np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 5, {1: NASTY, 2: "b"}
        ),
        groups=[make_groups("History length"), make_groups(NASTY)],
        samples=[Sample(f"User {NASTY}", [item, item], listed, item)],
        dataset_info={"ties": NASTY},
        findings=[{"level": "warning", "message": NASTY}],
        config_yaml=f"name: {NASTY}\n",
        command=f"genrec run {NASTY}",
        notes=[NASTY],
    )


def check_page(text: str) -> Page:
    page = Page(text)
    assert "http:" not in text and "https:" not in text
    assert not page.all("script") and not page.all("link") and not page.all("img")
    for _, attrs in page.tags:
        assert "src" not in attrs and not any(name.startswith("on") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "ids repeat"
    for attrs in page.all("a"):
        assert attrs["href"][1:] in ids
    return page


def test_full_report_is_self_contained_escaped_and_accessible(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    write_report(path, make_results(), make_parts())
    text = path.read_text(encoding="utf-8")
    page = check_page(text)
    assert page.text.count(NASTY) >= 9  # shown as text everywhere
    assert page.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert all("scope" in attrs for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 8
    pictures = [a for tag, a in page.tags if tag == "div" and a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == len(page.all("figure")) == 8
    assert all(a["aria-label"] for a in pictures)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    titles = ["Results", "For whom does it work?", "Speed", "Sample recommendations", "Training"]
    titles += ["Use of codes", "Data", "Protocol", "To repeat this"]
    assert all(title in page.text for title in titles)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is what takes time; these tests read text."""
    monkeypatch.setattr(plots, "have_matplotlib", lambda: False)


@pytest.mark.usefixtures("no_pictures")
def test_samples_say_what_explains_an_item():
    text = Page(render(make_results(), make_parts())).text
    assert f"begins like {NASTY}: 2 of 4 codes (3-1)" in text
    assert "begins like item <i>9</i>: 1 of 4 codes (3)" in text
    assert "no code in common with the history" in text and "already in the history" in text


@pytest.mark.usefixtures("no_pictures")
def test_endless_titles_are_cut():
    item = ListedItem("1", "Shampoo " * 40)
    text = Page(render({}, ReportParts(samples=[Sample("User 1", [item], [item])]))).text
    assert "Shampoo S…" in text and "Shampoo " * 12 not in text


@pytest.mark.usefixtures("no_pictures")
def test_lists_of_baselines_stand_beside_ours():
    page = Page(render(make_results(), ReportParts()))
    assert "What the first 10 places of all lists are like, seen items left out" in page.text
    assert "0.0089" in page.text and "7.25" in page.text and "novelty" in page.text
    assert "Gini" in page.text and "long tail" not in page.text  # nobody has that figure


@pytest.mark.usefixtures("no_pictures")
def test_speed_counts_only_what_was_timed():
    text = Page(render(make_results(), ReportParts())).text
    assert "300 requests each" in text and "150.0" in text  # 300 users in 2 seconds
    assert "search test, masked (seed 1)" not in text
    results = make_results()
    assert "1.23" in text and "batch size" in text and NASTY in text
    results["timing"] |= {"reused": list(results["timing"]["stages"]), "latency": []}
    assert "Speed" not in Page(render(results, ReportParts())).text


@pytest.mark.usefixtures("no_pictures")
def test_groups_show_every_system_and_size():
    page = check_page(render({}, ReportParts(groups=[make_groups("History length")])))
    assert "recall@10 by" not in page.text and "Recall@10 by history length" in page.text
    assert "$6 & more" in page.text and "most popular" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_the_commit_is_told_or_said_to_be_unknown():
    results = make_results()
    assert (
        "c0ffee (with changes that were not committed)" in Page(render(results, ReportParts())).text
    )
    results["git"] = {}
    assert "not known (not run from a checkout)" in Page(render(results, ReportParts())).text


def make_cell(name: str, shift: float) -> Cell:
    rng = np.random.default_rng(1)
    hits = (rng.random((2, 300)) < 0.2 + shift).astype(float)
    table = pl.concat(
        pl.DataFrame({"user_row": np.arange(300), "recall@10": values, "ndcg@10": values}).select(
            pl.all(), name=pl.lit("genrec"), seed=pl.lit(seed), masked=pl.lit(True)
        )
        for seed, values in enumerate(hits)
    )
    row = summarise("genrec", "test", True, {"recall@10": hits, "ndcg@10": hits})
    results = {
        **make_results(),
        "dataset": {"name": NASTY, "fingerprint": "f", "num_users": 300},
        "rows": [row],
    }
    return Cell(name, {}, results, table)


def test_runs_stand_side_by_side_with_paired_differences():
    pytest.importorskip("matplotlib")
    cells = [make_cell("one", 0.0), make_cell(f"two {NASTY}", 0.1)]
    found = compare(cells)
    small = replace(make_parts(), curves=(), groups=(), code_usage=())
    pages = [(cell.results, replace(small, title=cell.name)) for cell in cells]
    page = check_page(render_runs("Two runs", pages, found))
    test = found["cells"][1]["rows"][0]["vs_reference"]["ndcg@10"]
    assert test["difference"] > 0.05
    assert f"{test['difference']:+.4f}".replace("0.", ".", 1) in page.text
    assert "against one" in page.text and "reference" in page.text
    ids = [attrs.get("id") for _, attrs in page.tags]
    for number in (1, 2):
        assert f"run-{number}" in ids and f"run-{number}-samples" in ids
    levels = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    order = {"h1": 1, "h2": 2, "h3": 3, "h4": 4}
    steps = [order[b] - order[a] for a, b in itertools.pairwise(levels)]
    assert levels.count("h1") == 1 and max(steps) == 1  # no heading level is left out


@pytest.mark.usefixtures("no_pictures")
def test_verdict_says_when_a_baseline_is_higher():
    results = make_results()
    text = Page(render(results, ReportParts())).text
    assert "excludes zero" in text and "Higher: markov." in text
    results["rows"] = [row for row in results["rows"] if row["name"] != "markov"]
    assert "No baseline here is higher." in Page(render(results, ReportParts())).text


@pytest.mark.usefixtures("no_pictures")
def test_figures_are_those_of_the_rows():
    results = make_results()
    text = Page(render(results, ReportParts())).text
    row = results["rows"][0]
    low, high = row["ndcg@10_ci"]
    assert f"{row['ndcg@10']:.4f}" in text and f"[{low:.4f}, {high:.4f}]" in text
    assert f"{results['calibration']['actual_hits']} happened" in text


@pytest.mark.parametrize(
    "missing",
    [
        "dataset",
        "protocol",
        "seeds",
        "rows",
        "calibration",
        "timing",
        "versions",
        "git",
        "beyond_accuracy",
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_any_part_may_be_missing(missing):
    results = make_results()
    del results[missing]
    check_page(render(results, ReportParts()))


def test_empty_report_is_still_a_page(tmp_path):
    write_report(tmp_path / "report.html", {})
    check_page((tmp_path / "report.html").read_text())
    odd = ReportParts(
        curves=[Curve("empty"), Curve("train only", [(1, 2.0)])],
        code_usage=[np.zeros(4, int)],
        samples=[Sample("User 1", [], [])],
    )
    check_page(render({"calibration": {"ece_before": 0.1, "ece_after": 0.05}}, odd))


def test_without_matplotlib_tables_stay_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(plots, "have_matplotlib", lambda: False)
    page = check_page(render(make_results(), make_parts()))
    assert not page.all("svg") and not page.all("figure")
    assert "matplotlib is not installed" in page.text and "extra `plots`" in page.text
    assert "Reliability after calibration" in page.text


def test_same_input_gives_the_same_bytes(monkeypatch):
    pytest.importorskip("matplotlib")
    counts = [np.array([3, 1, 2])]
    assert plots.code_usage(counts, "codes") == plots.code_usage(counts, "codes")
    monkeypatch.setattr(plots, "have_matplotlib", lambda: False)
    assert render(make_results(), make_parts()) == render(make_results(), make_parts())


def test_levels_of_different_sizes_keep_their_own_axis():
    pytest.importorskip("matplotlib")
    large, small = plots.code_usage([np.ones(200)], "a"), plots.code_usage([np.ones(3)], "a")
    both = plots.code_usage([np.ones(200), np.ones(3)], "a")
    labels = [set(re.findall(r">([0-9.]+)</text>", svg)) for svg in (large, small, both)]
    assert "200" in labels[0] & labels[2] and "200" not in labels[1]


def test_reliability_picture_survives_bins_without_hits():
    pytest.importorskip("matplotlib")
    empty = {"predicted": 0.01, "actual": 0.0, "count": 10, "hits": 0, "ci": (0.0, 0.3)}
    assert "<svg" in plots.reliability_diagram([empty], [], "a")
    assert "<svg" in plots.reliability_diagram([], [], "b")
