"""`genrec report` and `genrec rerank` on a small run: what they write, print and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_report import Page, check_page

from genrec.cli import build_app, main
from genrec.data import Catalog, Dataset
from genrec.errors import ArtifactError, MismatchError, UserError
from genrec.evaluation import plots
from genrec.evaluation.metrics import list_metrics
from genrec.item_index import ItemIndex
from genrec.pipeline.finished import FinishedRun
from genrec.pipeline.listing import read_lists
from genrec.pipeline.reporting import popularity_groups, write_runs_report
from genrec.pipeline.sample_lists import shared_prefix


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert not stop.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_both_commands_are_listed() -> None:
    assert {"report", "rerank"} <= {command.name or command.callback.__name__
                                    for command in build_app().registered_commands}  # fmt: skip


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is what takes time."""
    monkeypatch.setattr(plots, "have_matplotlib", lambda: False)


# -- report -----------------------------------------------------------------------------------


def test_a_report_of_one_run_has_every_section(
    small_run: Path, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "page.html"
    assert str(out) in call(capsys, "report", small_run, "--cache", small_cache, "--out", out)
    page = check_page(out.read_text(encoding="utf-8"))
    for title in ("Results", "For whom does it work?", "Sample recommendations", "Training",
                  "Use of codes", "Map of the items", "Speed", "Data", "Protocol"):  # fmt: skip
        assert title in page.text, title
    assert "genrec run small.yaml" in page.text  # the command that made it
    # Whether an item shares codes with the history is up to this small model's chance.
    assert "begins like" in page.text or "no code in common" in page.text
    assert "not at hand" not in page.text


def test_a_run_and_the_command_write_the_same_page(
    small_run: Path, small_cache: Path, tmp_path: Path
) -> None:
    from genrec.pipeline.reporting import write_run_report

    again = write_run_report(FinishedRun.open(small_run, small_cache), out=tmp_path / "again.html")
    first = (small_run / "report.html").read_text(encoding="utf-8")
    assert again.read_text(encoding="utf-8") == first


@pytest.mark.usefixtures("no_pictures")
def test_without_data_or_cache_the_page_says_what_is_missing(
    small_run: Path, tmp_path: Path, ring_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(small_run, moved)
    results = json.loads((moved / "results.json").read_text())
    results["config"]["data"] = {"dataset": str(tmp_path / "gone")}
    for name in ("training", "command"):  # as older runs
        del results[name]
    for sample in results["samples"]:
        for item in sample["recommended"]:
            del item["shared"]
    (moved / "results.json").write_text(json.dumps(results))
    call(capsys, "report", moved, "--cache", tmp_path / "none")
    text = Page((moved / "report.html").read_text(encoding="utf-8")).text
    assert "The data set is not at hand" in text and "For whom does it work?" not in text
    assert "Training" in text and f"genrec run {moved}/config.yaml" in text
    call(capsys, "report", moved, "--cache", tmp_path / "none", "--dataset", ring_dataset)
    text = Page((moved / "report.html").read_text(encoding="utf-8")).text
    assert "not at hand" not in text and "For whom does it work?" in text


@pytest.mark.usefixtures("no_pictures")
def test_several_runs_and_what_is_refused(
    small_run: Path, small_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_run, other)
    out = tmp_path / "both.html"
    call(capsys, "report", small_run, other, "--cache", small_cache, "--out", out)
    text = check_page(out.read_text(encoding="utf-8")).text
    assert "Side by side" in text and "2 runs on" in text
    runs = [FinishedRun.open(small_run, small_cache), FinishedRun.open(other, small_cache)]
    found = write_runs_report(runs, out, reference="other")
    assert found["reference"] == "other"
    tests = [row["vs_reference"]["ndcg@10"] for row in found["cells"][0]["rows"]]
    assert all(test["difference"] == 0 and test["p"] == 1 for test in tests)
    with pytest.raises(UserError, match="--reference: got 'third', expected one of small, other"):
        write_runs_report(runs, out, reference="third")
    with pytest.raises(UserError, match="the same run twice"):
        write_runs_report([runs[0], runs[0]], out)
    results = json.loads((other / "results.json").read_text())
    results["dataset"]["fingerprint"] = "another"
    (other / "results.json").write_text(json.dumps(results))
    before = out.read_text(encoding="utf-8")
    with pytest.raises(MismatchError, match="another"):
        write_runs_report([runs[0], FinishedRun.open(other, small_cache)], out)
    assert out.read_text(encoding="utf-8") == before


def test_folders_that_are_no_runs_are_named(tmp_path: Path, small_run: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no results.json. Give the folder of a finished"):
        FinishedRun.open(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        FinishedRun.open(tmp_path)
    from genrec.cli.report import write

    with pytest.raises(UserError, match="--reference: got one run"):
        write([small_run], reference="x")


def test_a_data_set_of_another_run_is_refused(small_run: Path, tmp_path: Path) -> None:
    from genrec.data.synthetic import ring

    ring(num_items=20, num_users=20, length=5).save(tmp_path / "ring")
    run = FinishedRun.open(small_run, None, tmp_path / "ring")
    with pytest.raises(MismatchError, match="was evaluated on"):
        run.dataset()


def test_the_longest_shared_prefix_explains() -> None:
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 2]])
    index = ItemIndex([*"abcde"], codes, (2, 2, 3))
    catalog = Catalog(pl.DataFrame({"item_id": [*"abcde"], "title": ["A", "B", "C", "D", "E"]}))
    found = shared_prefix(index, 0, np.array([1, 4, 2, 3]), catalog)
    assert found is not None
    assert (found.item_id, found.title, found.codes) == ("e", "E", [0, 0])  # the latest of b, e
    assert found.num_levels == 3
    none = shared_prefix(index, 3, np.array([0, 1]))
    assert none is not None and none.codes == [] and none.item_id == "b"
    assert shared_prefix(index, 0, np.empty(0, np.int64)) is None


def test_popularity_groups_are_even_and_never_tear_ties_apart() -> None:
    counts = np.array([1, 1, 1, 1, 2, 3, 4, 5, 6, 7])
    found = popularity_groups(counts)
    assert found.labels == ["1", "2-3", "4-5", "6-7"]
    assert np.bincount(found.group_U).tolist() == [4, 2, 2, 2]
    constant = popularity_groups(np.full(8, 3))
    assert set(constant.group_U.tolist()) == {0} and constant.labels[0] == "3"


# -- rerank -----------------------------------------------------------------------------------


def test_strength_0_gives_the_run_s_own_figures_and_more_costs_score(
    small_run: Path, small_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = call(
        capsys, "rerank", small_run, "similarity=vectors", "--method", "mmr",
        "--strengths", "0,.5,.95", "--cache", small_cache, "--json",
    )  # fmt: skip
    found = json.loads(printed)
    assert found["lists_from"] == "the stage cache" and found["masked"] is True
    run = FinishedRun.open(small_run, small_cache)
    artifact = run.lists(True)
    assert artifact is not None
    lists, targets = read_lists(artifact)
    own = list_metrics(lists.rows[:, :10], targets, [10])
    first = found["rows"][0]
    assert first["recall@10"] == pytest.approx(own["recall@10"].mean())
    assert first["ndcg@10"] == pytest.approx(own["ndcg@10"].mean())
    assert first["cost"] == 0 and first["hits_lost"] == 0
    assert first["vs_unchanged"]["ndcg@10"]["difference"] == 0
    costs = [row["cost"] for row in found["rows"]]
    varied = [row["diversity_vectors"] for row in found["rows"]]
    assert costs == sorted(costs) and costs[-1] > 0
    assert varied == sorted(varied) and varied[-1] > varied[0]
    assert found["rows"][-1]["hits_lost"] > 0


def test_the_table_has_a_line_per_strength(
    small_run: Path, small_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = call(
        capsys, "rerank", small_run, "target=equal", "--method", "exposure", "--by", "popularity",
        "--strengths", "0,1", "--cache", small_cache, "-k", "5",
    )  # fmt: skip
    assert "exposure by popularity, top 5 of 12" in printed and "N@5" in printed
    assert printed.count("largest gap to the target") == 2
    assert max(map(len, printed.splitlines())) <= 80 + 60  # only the exposure lines are longer


def test_lists_are_searched_with_the_bundle_where_the_cache_lacks_them(
    small_run: Path, small_cache: Path, tmp_path: Path, ring_dataset: Path
) -> None:
    from genrec.pipeline.reranking import gather

    cached = gather(FinishedRun.open(small_run, small_cache), by=None)
    searched = gather(FinishedRun.open(small_run, tmp_path / "none", ring_dataset), by=None)
    assert searched.source == "a search with the bundle"
    np.testing.assert_array_equal(cached.candidates.rows_UM, searched.candidates.rows_UM)
    np.testing.assert_allclose(
        cached.candidates.probabilities_UM, searched.candidates.probabilities_UM, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "stek", "--by", "popularity"], "--method: got 'stek'.*steck"),
        (["--strengths", "0,much"], "--strengths: got '0,much', expected numbers"),
        (["--by", "colour"], "no column 'colour'"),
        ([], "Steck: got no groups_N"),
        (["--by", "popularity", "-k", "13"], "-k: got 13, expected 1 to 12"),
        (["--by", "popularity", "smothing=.1"], "smoothing"),
        (["--by", "popularity", "--strengths", "2"], "strength"),
    ],
)
def test_bad_requests_are_refused(
    small_run: Path,
    small_cache: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    with pytest.raises(SystemExit) as stop:
        main(["rerank", str(small_run), "--cache", str(small_cache), *arguments])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_without_the_data_set_rerank_says_what_to_give(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(small_run, moved)
    results = json.loads((moved / "results.json").read_text())
    results["config"]["data"] = {}
    (moved / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        main(["rerank", str(moved), "--by", "popularity", "--cache", str(tmp_path / "none")])
    assert "Give --dataset DIR" in capsys.readouterr().err


def test_the_data_set_is_found_by_its_fingerprint(small_run: Path, ring_dataset: Path) -> None:
    found = FinishedRun.open(small_run).dataset()  # the run's configuration names the folder
    assert found is not None and found.fingerprint == Dataset.load(ring_dataset).fingerprint
