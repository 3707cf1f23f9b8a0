"""The report: valid self-contained HTML, everything escaped, any part may be missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from genrec.evaluation import plots
from genrec.evaluation.evaluator import summarise
from genrec.evaluation.reliability import compare_reliability
from genrec.evaluation.report import Curve, ListedItem, ReportParts, Sample, render, write_report

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
        "timing": {"seconds": 12.5},
        "versions": {"genrec": "0.1.0"},
        "fingerprints": {"dataset": "abc"},
    }


def make_parts() -> ReportParts:
    item = ListedItem("50", NASTY)
    listed = [
        ListedItem("1", NASTY, 0.25, is_target=True),
        ListedItem("<b>2</b>", None, 0.05),
        ListedItem("3", "no probability"),
    ]
    return ReportParts(
        title=f"run {NASTY}",
        curves=[
            Curve(f"seed {seed} {NASTY}", [(1, 4.0), (2, 3.0)], [(1, 0.01), (2, 0.03)])
            for seed in range(6)
        ],
        code_usage=[np.array([5, 3, 0, 1]), np.array([2, 2, 2, 3])],
        samples=[Sample(f"User {NASTY}", [item, item], listed, item)],
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
    assert len(pictures) == len(page.all("svg")) == len(page.all("figure")) == 3
    assert all(a["aria-label"] for a in pictures)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    heads = [title for title in ("Results", "Sample recommendations", "Training", "Use of codes",
             "Data", "Protocol", "To repeat this") if title in page.text]  # fmt: skip
    assert len(heads) == 7


def test_verdict_says_when_a_baseline_is_higher():
    results = make_results()
    text = Page(render(results, ReportParts())).text
    assert "excludes zero" in text and "Higher: markov." in text
    results["rows"] = [row for row in results["rows"] if row["name"] != "markov"]
    assert "No baseline here is higher." in Page(render(results, ReportParts())).text


def test_figures_are_those_of_the_rows():
    results = make_results()
    text = Page(render(results, ReportParts())).text
    row = results["rows"][0]
    low, high = row["ndcg@10_ci"]
    assert f"{row['ndcg@10']:.4f}" in text and f"[{low:.4f}, {high:.4f}]" in text
    assert f"{results['calibration']['actual_hits']} happened" in text


@pytest.mark.parametrize(
    "missing", ["dataset", "protocol", "seeds", "rows", "calibration", "timing", "versions"]
)
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


def test_reliability_picture_survives_bins_without_hits():
    pytest.importorskip("matplotlib")
    empty = {"predicted": 0.01, "actual": 0.0, "count": 10, "hits": 0, "ci": (0.0, 0.3)}
    assert "<svg" in plots.reliability_diagram([empty], [], "a")
    assert "<svg" in plots.reliability_diagram([], [], "b")
