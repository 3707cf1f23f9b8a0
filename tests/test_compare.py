"""`genrec compare`: pairing by user, both tests, refusals, baselines, several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.cli import main
from genrec.errors import ArtifactError, MismatchError, UserError
from genrec.evaluation.comparison import compare, noise
from genrec.evaluation.comparison_tables import noise_sentence, paired_table
from genrec.evaluation.runs import check_comparable, read_cell
from genrec.evaluation.significance import holm, paired_bootstrap, paired_permutation

METRIC = "ndcg@10"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def write(
    folder: Path,
    values: dict[str, np.ndarray],
    *,
    users: np.ndarray | None = None,
    dataset: str = "d",
    masked: tuple[bool, ...] = (True,),
    **protocol: Any,
) -> Path:
    """Write what a run leaves: (seeds, users) of NDCG@10 by system."""
    folder.mkdir(parents=True)
    rows, tables = [], []
    for mode in masked:
        for name, found in values.items():
            num_seeds, num_users = found.shape
            mean = float(found.mean())
            row = {"name": name, "masked": mode, "split": "test", "num_users": num_users}
            for metric in ("recall@10", METRIC):
                row |= {metric: mean, f"{metric}_ci": [mean, mean]}
            rows.append(row)
            ids = np.arange(num_users) if users is None else users
            for seed in range(num_seeds):
                table = pl.DataFrame({"user_row": ids, METRIC: found[seed]}).with_columns(
                    pl.col(METRIC).alias("recall@10"),
                    name=pl.lit(name),
                    seed=pl.lit(seed),
                    masked=pl.lit(mode),
                )
                tables.append(table)
    counts = {"num_users": 9, "num_items": 9, "num_interactions": 99}
    results = {
        "rows": rows,
        "dataset": {"name": "data", "fingerprint": dataset, **counts},
        "protocol": {"split": "leave_one_out", "ties": "hash", **protocol},
        "seeds": list(range(values["genrec"].shape[0])),
        "versions": {"genrec": "x"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    pl.concat(tables).write_parquet(folder / "per_user.parquet")
    return folder


def draw(share: float, seed: int, seeds: int = 1, users: int = 300) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, users)) < share).astype(float)


def test_a_run_against_another_and_a_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, better, knn = draw(0.2, 1), draw(0.35, 2, seeds=2), draw(0.2, 3)
    one = write(tmp_path / "one", {"genrec": base})
    two = write(tmp_path / "two", {"genrec": better, "item_knn": knn})
    status, out, _ = call(capsys, "compare", one, two, f"{two}:item_knn", "-m", METRIC, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["reference"], found["metrics"]) == ("one", [METRIC])
    assert found["seeds"] == {"one": [0], "two": [0, 1], "two:item_knn": [0, 1]}
    tests = {cell["name"]: cell["rows"][0]["vs_reference"][METRIC] for cell in found["cells"]}
    assert tests["two"]["difference"] == pytest.approx(better.mean() - base.mean())
    assert tests["two"]["p"] == paired_bootstrap(better, base)["p"]
    assert tests["two"]["p_permutation"] == paired_permutation(better, base, num_samples=2000)
    raw = [tests[name]["p_permutation"] for name in ("two", "two:item_knn")]
    corrected = [tests[name]["p_permutation_holm"] for name in ("two", "two:item_knn")]
    assert corrected == holm(raw)
    status, out, _ = call(capsys, "compare", one, two)
    assert status == 0 and "seen items left out, recall@10" in out and "are noise" in out


def test_users_are_matched_by_their_row_not_by_their_order(tmp_path: Path) -> None:
    base = draw(0.3, 1)
    shuffled = np.random.default_rng(0).permutation(300)
    one = read_cell(write(tmp_path / "one", {"genrec": base}))
    two = read_cell(write(tmp_path / "two", {"genrec": base[:, shuffled]}, users=shuffled))
    test = compare([one, two])["cells"][1]["rows"][0]["vs_reference"][METRIC]
    assert test["difference"] == 0 and test["p_permutation"] == 1 and test["detectable"] == 0


def test_the_noise_line_names_the_smallest_detectable_difference(tmp_path: Path) -> None:
    base = draw(0.3, 1)
    near = base.copy()
    near[0, :5] = 1 - near[0, :5]
    cells = [
        read_cell(write(tmp_path / name, {"genrec": values}))
        for name, values in {"base": base, "near": near, "far": draw(0.3, 9)}.items()
    ]
    found = compare(cells)
    tests = [cell["rows"][0]["vs_reference"][METRIC]["detectable"] for cell in found["cells"]]
    assert 0 < tests[1] < tests[2]
    assert noise(found, METRIC, True) == (tests[1], True)
    assert f"{tests[1]:.4f}"[1:] in noise_sentence(found, METRIC, True)
    heads, rows = paired_table(found, METRIC, True)
    assert all(len(row) == len(heads) for row in rows) and rows[0][2] == "reference"
    alone = compare(cells[:1])
    assert noise(alone, METRIC, True)[1] is False
    assert "independent system" in noise_sentence(alone, METRIC, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "e"}, "its data set is e, not d"),
        ({"ties": "file"}, "its ties is file, not hash"),
        ({"split": "global_time"}, "its split is global_time, not leave_one_out"),
        ({"users": np.arange(1, 301)}, "for 300 users, not 300, of whom 299 are the same"),
        ({"masked": (False,)}, "no way of ranking that all runs have"),
    ],
)
def test_other_data_protocol_or_users_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    one = write(tmp_path / "one", {"genrec": draw(0.2, 1)})
    two = write(tmp_path / "two", {"genrec": draw(0.2, 2)}, **change)
    status, out, err = call(capsys, "compare", one, two)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err


def test_settings_of_a_model_may_differ_and_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "one", {"genrec": draw(0.2, 1)}, beam_width=50, scoring="level")
    two = write(tmp_path / "two", {"genrec": draw(0.2, 2)}, beam_width=10, scoring="raw")
    status, out, _ = call(capsys, "compare", one, two, "--json")
    assert status == 0
    searches = [cell["search"] for cell in json.loads(out)["cells"]]
    assert searches == [
        {"beam_width": 50, "scoring": "level"},
        {"beam_width": 10, "scoring": "raw"},
    ]
    status, out, _ = call(capsys, "compare", one, two)
    assert status == 0 and "level" in out and "raw" in out


def test_seeds_are_averaged_but_cells_of_an_ablation_share_them(tmp_path: Path) -> None:
    one = read_cell(write(tmp_path / "one", {"genrec": draw(0.2, 1)}))
    two = read_cell(write(tmp_path / "two", {"genrec": draw(0.2, 2, seeds=3)}))
    assert compare([one, two], same_seeds=False)["cells"][1]["name"] == "two"
    with pytest.raises(MismatchError, match=r"its seeds is \[0, 1, 2\], not \[0\]"):
        check_comparable(one, two, same_seeds=True)


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", {"genrec": draw(0.2, 1), "markov": draw(0.2, 3)})
    cell = read_cell(one)
    with pytest.raises(UserError, match=r"no 'ndcg@1' per user\. Did you mean 'ndcg@10'"):
        cell.values("ndcg@1", True)
    with pytest.raises(UserError, match=r"no system 'marcov'\. Did you mean 'markov'"):
        read_cell(f"{one}:marcov")
    with pytest.raises(ArtifactError, match=r"has no results\.json"):
        read_cell(tmp_path)
    for arguments, message in (
        ([one], "got 1 run, expected at least two"),
        ([one, one], "named twice"),
        ([one, tmp_path / "nothing"], "has no results.json"),
    ):
        status, _, err = call(capsys, "compare", *arguments)
        assert status == 2 and message in err


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"genrec": draw(0.2, 1, seeds=2)})
    table = pl.read_parquet(one / "per_user.parquet")
    table.filter(~((pl.col("seed") == 1) & (pl.col("user_row") == 7))).write_parquet(
        one / "per_user.parquet"
    )
    with pytest.raises(ArtifactError, match="not the same users, once each"):
        read_cell(one).values(METRIC, True)
    (one / "results.json").write_text('{"rows": []}')
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_cell(one)
    (one / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSONDecodeError"):
        read_cell(one)


def test_the_json_is_written_and_equal_names_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "a" / "run", {"genrec": draw(0.2, 1)})
    two = write(tmp_path / "b" / "run", {"genrec": draw(0.2, 2)})
    status, out, _ = call(capsys, "compare", one, two, "--json", "--out", tmp_path / "c.json")
    assert status == 0 and json.loads((tmp_path / "c.json").read_text()) == json.loads(out)
    assert [cell["name"] for cell in json.loads(out)["cells"]] == [str(one), str(two)]


def test_a_real_run_against_its_baseline_and_what_it_says_of_itself(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(capsys, "compare", f"{small_run}:markov", small_run, "--json")
    assert status == 0
    found = json.loads(out)
    results = json.loads((small_run / "results.json").read_text())
    own = found["cells"][1]["rows"][0]
    row = next(r for r in results["rows"] if r["name"] == "genrec")
    assert own["detectable"] == row["detectable"] and own[METRIC] == row[METRIC]
    assert found["cells"][0]["search"] == {}  # a baseline is not searched
    settings = {"max_history": 6, "beam_width": 12, "scoring": "renormalized"}
    assert found["cells"][1]["search"] == settings
    assert own["likeness"] == results["beyond_accuracy"]["masked"]["genrec"]
    of_baseline = found["cells"][0]["rows"][0]["likeness"]
    assert of_baseline == results["beyond_accuracy"]["masked"]["markov"]
    assert 0 < of_baseline["coverage"] <= 1 and "certified" not in of_baseline
    shown = found["baselines"][0]
    assert shown["likeness"]["coverage"] > 0
    status, out, _ = call(capsys, "compare", f"{small_run}:markov", small_run)
    assert status == 0 and "renormalized" in out and "coverage" in out and "p95, ms" in out
    assert {"p_permutation", "detectable"} <= set(row["vs_most_popular"][METRIC])
    beyond = results["beyond_accuracy"]
    assert beyond["k"] == 10 and set(beyond["masked"]["genrec"]) >= {
        "coverage", "gini", "entropy_bits", "novelty_bits", "average_popularity",
        "popularity_lift", "popularity_lift_over_history", "long_tail_share", "invalid_rate",
        "diversity_vectors", "certified",
    }  # fmt: skip
    for masked in ("masked", "unmasked"):
        by_id = beyond[masked]["genrec"]["semantic_id_level"]
        item = next(
            r
            for r in results["rows"]
            if r["name"] == "genrec" and r["masked"] is (masked == "masked")
        )
        assert by_id["recall@10"] >= item["recall@10"]  # never below the item's
        assert set(results["groups"][masked]) == {"genrec", "most_popular", "item_knn", "markov"}
        for division in results["groups"][masked]["genrec"].values():
            assert sum(line["num_users"] for line in division["groups"]) == row["num_users"]
