"""Pieces of the table of quality are made once and hold what they say; the table adds them up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks import quality, quality_many, quality_pieces, quality_rows, quality_table
from benchmarks.quality_rows import Order
from genrec.cli import main
from genrec.configs_folder import find_config
from genrec.data import Dataset
from genrec.data.synthetic import ring
from genrec.errors import ConfigError, DataError, MismatchError, UserError
from genrec.evaluation.evaluator import evaluate_scores
from genrec.models.baselines import Markov, make_baselines

SASREC = {"name": "sasrec", "d_model": 8, "num_layers": 1, "epochs": 2, "batch_targets": 256}
GENERATOR = {
    "features": {"name": "lsa", "num_dimensions": 8},
    "tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 4},
    "model.d_model": 8,
    "model.num_layers": 1,
    "model.d_ff": 8,
    "trainer.epochs": 1,
    "decoding.width": 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rings"
    ring(num_items=24, num_users=40, length=6).save(path)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quality_rows.BASELINES, "sasrec-sampled", SASREC)
    monkeypatch.setitem(quality_rows.GENERATORS, "genrec", GENERATOR)
    monkeypatch.setattr(quality_table, "NUM_SAMPLES", 200)


def make(
    folder: Path, tmp_path: Path, row: str, seed: int = 0, name: str = "", **more: Any
) -> Path:
    order = Order(row, seed, {"dataset": str(folder)}, name)
    return quality.make_piece(
        order,
        tmp_path / "out",
        tmp_path / "cache",
        logs=tmp_path / "logs",
        device="cpu",
        **more,
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", quality_rows.row_names())
def test_every_row_is_a_valid_configuration(row: str) -> None:
    order = Order(row, 0, {"dataset": "rings"}, "rings")
    assert order.config.evaluation.masked == (False, True)
    if row in quality_rows.BASELINES:
        assert len(make_baselines([order.settings])) == 1
        assert order.run_command is None
    else:
        assert order.run_command.startswith("genrec run configs/genrec.yaml data=rings")


def test_rows_differ_from_the_default_as_they_are_named() -> None:
    def model(row: str) -> dict[str, Any]:
        return Order(row, 1, {"dataset": "x"}, "x").config.model.to_dict()

    assert model("genrec")["content"] and not model("genrec-no-content")["content"]
    assert model("genrec")["repeat_bias"] and not model("genrec-no-repeat")["repeat_bias"]
    items = model("genrec-items-0")
    assert (items["items_from"], items["num_negatives"]) == (0, 512)
    assert model("tiger")["name"] == "encoder_decoder"


def test_mistakes_in_an_order_are_named() -> None:
    with pytest.raises(UserError, match=r"row: got 'markow', expected one of most_popular"):
        Order("markow", 0, {}, "")
    with pytest.raises(UserError, match=r"markov has no seed: got 2, expected 0"):
        Order("markov", 2, {}, "")
    with pytest.raises(ConfigError, match=r"expected either `dataset`"):
        _ = Order("markov", 0, {}, "").config


def test_a_counting_piece_holds_what_every_user_earned(folder: Path, tmp_path: Path) -> None:
    path = make(folder, tmp_path, "markov")
    told, data = read(path), Dataset.load(folder)
    assert path == tmp_path / "out" / data.name / "markov-0.json"
    assert told["command"] == "python -m benchmarks.quality row markov --data rings"
    assert str(tmp_path) not in path.read_text() and told["seconds_fit"] >= 0
    assert {"commit", "cpu", "torch"} <= {*told["git"], *told["machine"], *told["versions"]}
    table = quality_pieces.read_values(path.with_suffix(".parquet"), told)
    assert table.select("name", "seed").unique().rows() == [("markov", 0)]
    model = Markov().fit(data.interactions.training())
    for masked, mode in ((False, "unmasked"), (True, "masked")):
        test = data.interactions.examples("test")
        expected = evaluate_scores(model.scores, test, mask_seen=masked)
        mine = table.filter(pl.col("masked") == masked)
        assert mine["user_row"].to_list() == test.user_rows.tolist()
        for metric in quality_table.METRICS:
            assert np.array_equal(mine[metric].to_numpy(), expected[metric])
            assert told["metrics"][mode][metric] == pytest.approx(expected[metric].mean())
    hits = pl.read_parquet(path.with_suffix(".parquet"))
    assert len(hits) == (table["recall@10"] > 0).sum()


def test_no_piece_is_made_of_data_with_an_error(tmp_path: Path) -> None:
    sequences = tmp_path / "sequences.txt"
    lines = [" ".join(map(str, (user, *range(user, user + 6)))) for user in range(1, 41)]
    sequences.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = tmp_path / "sorted"
    command = ["prepare", "sequences", str(sequences), "--out", str(data), "--k-core", "1"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(command)
    with pytest.raises(DataError, match="order of the items' id"):
        make(data, tmp_path, "markov")
    assert not list((tmp_path / "out").rglob("*.json"))
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["baselines", str(data)])


@pytest.mark.parametrize(
    ("rows", "runs"),
    [([], []), ([4], [[4, 5]]), ([0, 1, 2], [[0, 3]]), ([1, 2, 5, 7, 8], [[1, 3], [5, 6], [7, 9]])],
)
def test_users_are_written_as_runs(rows: list[int], runs: list[list[int]]) -> None:
    assert quality_pieces.runs_of(np.array(rows, np.int64)) == runs
    assert quality_pieces.rows_of(runs).tolist() == rows


def test_users_without_a_hit_come_back_as_zeros(tmp_path: Path) -> None:
    users = np.array([3, 4, 9])
    earned = {metric: np.array([0.0, 0.5, 0.0]) for metric in quality_table.METRICS}
    nothing = {metric: np.zeros(3) for metric in quality_table.METRICS}
    path = tmp_path / "piece.parquet"
    quality_pieces.write_values(path, users, {"unmasked": earned, "masked": nothing})
    assert len(pl.read_parquet(path)) == 1
    told = {"row": "r", "seed": 7, "test_users": quality_pieces.runs_of(users)}
    table = quality_pieces.read_values(path, told)
    for masked, expected in ((False, earned), (True, nothing)):
        mine = table.filter(pl.col("masked") == masked)
        assert mine["user_row"].to_list() == [3, 4, 9]
        for metric in quality_table.METRICS:
            assert mine[metric].to_list() == expected[metric].tolist()


def test_a_finished_piece_is_made_again_only_when_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(folder, tmp_path, "item_knn")
    before = path.stat().st_mtime_ns
    assert make(folder, tmp_path, "item_knn") == path and path.stat().st_mtime_ns == before
    changed = {"name": "item_knn", "history_length": 2}
    monkeypatch.setitem(quality_rows.BASELINES, "item_knn", changed)
    with pytest.raises(UserError, match=r"item_knn-0.json in .* with other settings. Add --again"):
        make(folder, tmp_path, "item_knn")
    make(folder, tmp_path, "item_knn", again=True)
    assert read(path)["settings"] == changed
    other = tmp_path / "other"
    ring(num_items=24, num_users=30, length=6).save(other)
    name = path.parent.name
    with pytest.raises(UserError, match=r"with other data. Add --again"):
        make(other, tmp_path, "item_knn", name=name)


def test_the_table_adds_pieces_up(tiny: None, folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path, "markov", name="rings")
    for seed in (1, 2):
        make(folder, tmp_path, "sasrec-sampled", seed, name="rings")
    piece = read(make(folder, tmp_path, "genrec", 1, name="rings"))
    assert piece["seconds_fit"] > 0 and piece["seconds_rank"]["masked"] > 0
    assert "--name rings" in piece["command"] and "model.d_model=8" in piece["run_command"]
    assert "data" not in piece["details"]["config"]
    quality.main(["table", "--out", str(tmp_path / "out"), "--write", str(tmp_path / "docs")])
    found = read(tmp_path / "docs" / "quality.json")
    names = ["markov", "sasrec-sampled", "genrec"]
    assert [row["name"] for row in found["rows"]] == 2 * names
    assert [row["masked"] for row in found["rows"]] == 3 * [False] + 3 * [True]
    markov, sasrec, genrec = found["rows"][:3]
    assert sasrec["seeds"] == [1, 2] and sasrec["ndcg@10_sd"] >= 0 and markov["ndcg@10_sd"] is None
    pieces = [read(tmp_path / "out" / "rings" / f"sasrec-sampled-{seed}.json") for seed in (1, 2)]
    for metric in quality_table.METRICS:
        mean = np.mean([piece["metrics"]["unmasked"][metric] for piece in pieces])
        low, high = sasrec[f"{metric}_ci"]
        assert sasrec[metric] == pytest.approx(mean) and low <= mean <= high
    assert "vs_markov" not in markov and "vs_sasrec-sampled" not in sasrec
    assert found["references"] == {"rings": ["markov", "sasrec-sampled"]}
    test = genrec["vs_markov"]
    assert test["difference"] == pytest.approx(genrec["ndcg@10"] - markov["ndcg@10"])
    assert test["p_holm"] >= test["p"] and test["p_permutation_holm"] >= test["p_permutation"]
    assert {"seconds", "seconds_rank", "dates", "machines", "settings"} <= genrec.keys()
    assert "ease" in found["not_run"]["rings"] and "genrec" not in found["not_run"]["rings"]
    text = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "### rings: seen items kept in" in text and "- tiger: not run." in text
    assert "--seed {1,2} --out FOLDER`" in text and str(tmp_path) not in text
    assert (tmp_path / "docs" / "quality-rings.svg").read_text().startswith("<svg xmlns=")
    each = [piece["lists"]["unmasked"]["coverage"] for piece in pieces]
    assert sasrec["lists"]["coverage"] == pytest.approx(np.mean(each))
    assert sasrec["lists"]["seeds"] == [1, 2]
    assert text.count("| first ten places |") == 2 and f"| {np.mean(each):.3f} |" in text


def test_a_row_without_a_piece_stays_as_it_was(
    tiny: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make(folder, tmp_path, row, name="rings") for row in ("markov", "item_knn")]
    documents = ["--out", str(tmp_path / "out"), "--write", str(tmp_path / "docs")]
    quality.main(["table", *documents])
    before = read(tmp_path / "docs" / "quality.json")
    for path in (rows[1], rows[1].with_suffix(".parquet")):
        path.unlink()
    sasrec = make(folder, tmp_path, "sasrec-sampled", 1, name="rings")
    quality.main(["table", *documents])
    found = read(tmp_path / "docs" / "quality.json")
    assert [row["name"] for row in found["rows"][:3]] == ["item_knn", "markov", "sasrec-sampled"]
    kept, markov, _ = found["rows"][:3]
    old = next(row for row in before["rows"] if row["name"] == "item_knn")
    assert kept == {**old, "pieces": False} and markov["pieces"]
    assert "vs_sasrec-sampled" in markov and "vs_sasrec-sampled" not in kept
    assert "item_knn" not in found["not_run"]["rings"]
    text = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "| item_knn° |" in text and "| markov |" in text and "**°**" in text
    quality.main(["table", *documents])  # again: nothing changes
    assert read(tmp_path / "docs" / "quality.json") == found
    # Of other data: not mixed.
    ring(num_items=24, num_users=30, length=6).save(tmp_path / "other")
    make(tmp_path / "other", tmp_path, "markov", name="rings", again=True)
    for path in (sasrec, sasrec.with_suffix(".parquet")):
        path.unlink()
    with pytest.raises(MismatchError, match=r"item_knn on rings has no piece, and was made with"):
        quality.main(["table", *documents])


def test_lists_are_described_as_a_run_describes_them(
    tiny: None, folder: Path, tmp_path: Path
) -> None:
    told = read(make(folder, tmp_path, "genrec", 1))["lists"]
    run = tmp_path / "run"
    settings = [f"{key}={json.dumps(value)}" for key, value in GENERATOR.items()]
    settings += [f"data={folder}", "seeds=[1]", "evaluation.baselines=[markov]"]
    paths = [str(find_config("genrec")), "--out", str(run), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit, match="0"):
        main(["run", *paths, "--device", "cpu", *settings])
    markov = read(make(folder, tmp_path, "markov"))["lists"]
    for mode in ("unmasked", "masked"):
        expected = read(run / "results.json")["beyond_accuracy"][mode]
        for name in ("coverage", "gini", "popularity_lift_over_history"):
            assert told[mode][name] == pytest.approx(expected["genrec"][name])
            assert markov[mode][name] == pytest.approx(expected["markov"][name])


def test_a_piece_without_lists_leaves_them_out(folder: Path, tmp_path: Path) -> None:
    path = make(folder, tmp_path, "markov", name="rings")
    make(folder, tmp_path, "item_knn", name="rings")
    old = {key: value for key, value in read(path).items() if key != "lists"}
    path.write_text(json.dumps(old), encoding="utf-8")
    quality.main(["table", "--out", str(tmp_path / "out"), "--write", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    lists = text.split("| first ten places |")[1].split("###")[0]
    assert "| item_knn |" in lists and "| markov |" not in lists


def test_many_pieces_are_made_until_time_is_up(folder: Path, tmp_path: Path) -> None:
    data, out = [folder], ["--out", str(tmp_path / "out"), "--device", "cpu"]
    wanted = quality_many.pieces(["markov", "sasrec-bce"], data, [1, 2])
    assert [(row, seed) for row, _, seed in wanted] == [
        ("markov", 0),
        ("sasrec-bce", 1),
        ("sasrec-bce", 2),
    ]
    found = quality_many.make(wanted[:1], out, minutes=5, processes=2)
    assert [what for _, what in found] == ["done"]
    assert list((tmp_path / "out").rglob("markov-0.json"))
    broken = quality_many.make([("markov", tmp_path / "none", 0)], out, minutes=5, processes=1)
    assert broken[0][1] == "failed"
    late = quality_many.make(wanted, out, minutes=0, processes=1)
    assert {what for _, what in late} == {"not begun"}
    with pytest.raises(UserError, match="--rows: got 'markof'"):
        quality_many.pieces(["markof"], data, [1])


def test_a_piece_that_takes_too_long_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = tmp_path / "python"
    begun.write_text("#!/bin/sh\nexec sleep 60\n")
    begun.chmod(0o755)
    monkeypatch.setattr(quality_many.sys, "executable", str(begun))
    monkeypatch.setattr(quality_many, "GRACE_S", 0.5)
    found = quality_many.make([("markov", tmp_path, 0)], [], minutes=1.0 / 60, processes=1)
    assert [what for _, what in found] == ["stopped"]


def test_seeds_of_a_row_must_agree(
    tiny: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'out' holds no pieces. Make some"):
        quality_table.read_cells(tmp_path / "out", quality_rows.row_names())
    make(folder, tmp_path, "sasrec-sampled", 1, name="rings")
    monkeypatch.setitem(quality_rows.BASELINES, "sasrec-sampled", {**SASREC, "epochs": 1})
    make(folder, tmp_path, "sasrec-sampled", 2, name="rings")
    with pytest.raises(MismatchError, match=r"on rings: settings of seed 2 is not that of seed 1"):
        quality_table.read_cells(tmp_path / "out", quality_rows.row_names())


def test_the_committed_table_is_what_its_pieces_say() -> None:
    """Every piece stands in the table, with its figures; the users are those of the data set."""
    results = Path(__file__).resolve().parent.parent / "docs" / "results"
    found = read(results / "quality.json")
    rows = {(row["dataset"], row["name"], row["masked"]): row for row in found["rows"]}
    pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((results / "pieces").glob("*/*.json")):
        told = read(path)
        pieces.setdefault((path.parent.name, told["row"]), []).append(told)
        table = quality_pieces.read_values(path.with_suffix(".parquet"), told)
        for masked, mode in ((False, "unmasked"), (True, "masked")):
            mine = table.filter(pl.col("masked") == masked)
            assert len(mine) == rows[path.parent.name, told["row"], masked]["num_users"]
            for metric in quality_table.METRICS:
                assert mine[metric].mean() == pytest.approx(told["metrics"][mode][metric])
    assert pieces
    with_pieces = {key[:2] for key, row in rows.items() if row["pieces"]}
    assert with_pieces == set(pieces)
    for (dataset, name), mine in pieces.items():
        for masked, mode in ((False, "unmasked"), (True, "masked")):
            row = rows[dataset, name, masked]
            assert row["seeds"] == sorted(told["seed"] for told in mine)
            for metric in quality_table.METRICS:
                mean = np.mean([told["metrics"][mode][metric] for told in mine])
                assert row[metric] == pytest.approx(mean)
