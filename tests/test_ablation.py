"""Ablations: which cells there are, what is run again, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from genrec.errors import ConfigError, MismatchError
from genrec.evaluation.comparison import compare
from genrec.evaluation.comparison_page import to_html
from genrec.evaluation.comparison_tables import to_markdown
from genrec.evaluation.runs import Cell
from genrec.pipeline.ablation import (
    compare_in_groups,
    load_ablation,
    run_ablation,
    variations,
)

RUN: dict[str, Any] = {"data": {"dataset": "somewhere"}, "seeds": [1]}


def write(folder: Path, **content: Any) -> Path:
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "run": RUN, **content}, sort_keys=False))
    return path


def names(path: Path) -> list[str]:
    return [cell.name for cell in variations(load_ablation(path))]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    grid = {"tokenizer.num_levels": [2, 3], "tokenizer.codebook_size": [64, 128]}
    found = variations(load_ablation(write(tmp_path, grid=grid)))
    assert [cell.name for cell in found] == [
        f"num_levels={levels}, codebook_size={size}" for levels in (2, 3) for size in (64, 128)
    ]
    assert [cell.config.tokenizer.num_levels for cell in found] == [2, 2, 3, 3]
    assert found[0].config.tracking.group == "test"
    assert found[0].config.tracking.tags == (f"cell:{found[0].name}",)


def test_cells_and_grid_multiply(tmp_path: Path) -> None:
    cells = [{"name": "one"}, {"name": "two", "set": {"tokenizer": {"name": "rqvae"}}}]
    path = write(tmp_path, cells=cells, grid={"model.max_history": [5, 10]})
    assert names(path) == [f"{c}, max_history={h}" for c in ("one", "two") for h in (5, 10)]


def test_overrides_hold_for_every_cell(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"model.max_history": [5, 10]})
    found = variations(load_ablation(path, ["trainer.epochs=2", "seeds=[4]"]))
    assert {cell.config.trainer.epochs for cell in found} == {2}
    assert {cell.config.seeds for cell in found} == {(4,)}


def test_every_problem_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither `cells` nor `grid`"):
        load_ablation(write(tmp_path))
    cells = [{"name": "a", "set": {"tokenizer.levels": 3}}, {"name": "b"}, {"name": "b"}]
    with pytest.raises(ConfigError) as caught:
        variations(load_ablation(write(tmp_path, cells=cells, reference="bb")))
    text = str(caught.value)
    assert "cell 'a': tokenizer.levels: unknown key" in text and "b: a name stands for" in text
    assert "reference: no cell 'bb'. Did you mean 'b'?" in text


def test_ready_files_are_complete(root: Path) -> None:
    """Every cell of every file is a run that would start, and the reference is one of them."""
    paths = sorted((root / "configs" / "ablations").glob("*.yaml"))
    axes = ("tokenizer", "levels", "collisions", "backbone", "tuning", "decoding", "history", "tie")
    assert all(any(path.name.startswith(axis) for path in paths) for axis in axes)
    for path in paths:
        config = load_ablation(path)
        cells = variations(config)
        assert config.name == path.stem and len(cells) >= 3
        assert f"configs/ablations/{path.name}" in path.read_text()


def test_sizes_are_varied_of_the_default_generator(root: Path) -> None:
    default = yaml.safe_load((root / "configs" / "genrec.yaml").read_text())
    found = load_ablation(root / "configs/ablations/scaling-movielens.yaml", ["trainer.epochs=3"])
    assert found.run == {
        **default,
        "seeds": [1],
        "trainer": {**default["trainer"], "epochs": 3},
    }


def test_a_run_is_laid_over_a_ready_configuration(tmp_path: Path) -> None:
    text = {"name": "a", "grid": {"model.dropout": [0.1]}, "run_from": "genrec"}
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({**text, "run": {"model.d_ff": 64, "seeds": [7]}}))
    (cell,) = variations(load_ablation(path))
    assert (cell.config.model.d_ff, cell.config.model.d_model) == (64, 128)
    assert cell.config.seeds == (7,)
    path.write_text(yaml.safe_dump({**text, "run": {}, "run_from": "genrek"}))
    with pytest.raises(
        ConfigError, match=r"^run_from: got 'genrek', expected one of .*Did you mean 'genrec'"
    ):
        load_ablation(path)


def test_an_ablation_runs_is_kept_and_tells_its_failures(
    small_config: Path, small_cache: Path, small_run: Path, tmp_path: Path
) -> None:
    run = yaml.safe_load(small_config.read_text())
    cells = [
        {"name": "as it is"},
        {"name": "longer", "set": {"model.max_history": 4}},
        {"name": "impossible", "set": {"tokenizer.codebook_size": 4000}},
    ]
    config = load_ablation(write(tmp_path, run=run, cells=cells))
    out = tmp_path / "out"
    found = run_ablation(config, out, small_cache, threads=1, device="cpu")
    assert [cell["name"] for cell in found["cells"]] == ["as it is", "longer"]
    assert "codebook_size" in found["failed"]["impossible"]
    own, other = (cell["rows"][0] for cell in found["cells"])
    assert own["vs_reference"]["ndcg@10"]["difference"] == 0.0
    assert 0 < other["vs_reference"]["ndcg@10"]["p_holm"] <= 1
    first = json.loads((small_run / "results.json").read_text())
    assert own["recall@10"] == first["rows"][0]["recall@10"]  # the same run, from the same cache
    assert {"ablation.json", "ablation.md", "ablation.html"} <= {p.name for p in out.iterdir()}
    assert "as it is" in (out / "ablation.md").read_text()
    stamp = (out / "cells" / "longer" / "results.json").stat().st_mtime_ns
    again = run_ablation(config, out, small_cache, threads=1, device="cpu")
    assert (out / "cells" / "longer" / "results.json").stat().st_mtime_ns == stamp
    assert again["cells"] == found["cells"]


def cell(name: str, hits: np.ndarray, *, dataset: str = "d", ties: str = "hash") -> Cell:
    seeds, users = hits.shape
    table = pl.concat(
        pl.DataFrame({"user_row": np.arange(users), "ndcg@10": hits[s], "recall@10": hits[s]})
        .with_columns(name=pl.lit("genrec"), seed=pl.lit(s), masked=pl.lit(False))
        for s in range(seeds)
    )  # fmt: skip
    mean = float(hits.mean())
    row = {"name": "genrec", "masked": False, "split": "test", "num_users": users}
    row |= {m: mean for m in ("recall@10", "ndcg@10")}
    row |= {f"{m}_ci": [mean, mean] for m in ("recall@10", "ndcg@10")}
    row["ndcg@10_seeds"] = hits.mean(1).tolist()
    counts = {"num_users": users, "num_items": 9, "num_interactions": 99}
    results = {
        "rows": [row],
        "dataset": {"name": dataset, "fingerprint": dataset, **counts},
        "protocol": {"ties": ties},
        "seeds": list(range(seeds)),
        "versions": {"genrec": "x"},
    }
    return Cell(name, {"model.max_history": len(name)}, results, table)


def draw(share: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((2, 400)) < share).astype(float)


def test_differences_are_paired_and_corrected() -> None:
    base = draw(0.2, 1)
    better = np.maximum(base, draw(0.15, 2))
    found = compare([cell("a", base), cell("b", better), cell("c", base)], reference="a")
    tests = {c["name"]: c["rows"][0]["vs_reference"]["ndcg@10"] for c in found["cells"]}
    assert tests["b"]["difference"] == pytest.approx((better - base).mean())
    assert tests["b"]["p"] <= tests["b"]["p_holm"] < 0.01
    assert tests["c"]["p_holm"] == 1.0 and "p_holm" not in tests["a"]
    text = to_markdown({"name": "t", **found, "failed": {}})
    assert "reference" in text and "Holm" in text
    page = to_html({"name": "<t>", **found, "failed": {"x": "boom"}}, ["model.max_history"])
    assert "&lt;t&gt;" in page and "boom" in page and "://" not in page


def test_other_data_or_protocol_cannot_be_compared() -> None:
    base = draw(0.2, 1)
    with pytest.raises(MismatchError, match="data set is e, not d"):
        compare([cell("a", base), cell("b", base, dataset="e")])
    with pytest.raises(MismatchError, match="ties is file, not hash"):
        compare([cell("a", base), cell("b", base, ties="file")])


def test_two_tie_breaks_are_two_tables_and_no_test_pairs_them() -> None:
    cells = [
        cell("hashed", draw(0.2, 1)),
        cell("by file", draw(0.3, 2), dataset="e", ties="file"),
        cell("hashed, better", draw(0.4, 3)),
        cell("by file, better", draw(0.5, 4), dataset="e", ties="file"),
    ]
    found = compare_in_groups(cells, "hashed, better")
    assert [c["name"] for c in found["cells"]] == ["hashed", "hashed, better"]
    assert found["reference"] == "hashed, better"
    (other,) = found["others"]
    assert (other["what"], other["reference"]) == ("ties file", "by file")
    assert [c["name"] for c in other["cells"]] == ["by file", "by file, better"]
    named = {"name": "t", **found, "failed": {}}
    text = to_markdown(named)
    assert "# t: ties file" in text and "compare them with each other" in text
    page = to_html(named, [])
    assert page.count("by file, better") >= 1 and "other-1-results-kept" in page
    assert compare_in_groups(cells[::2], None)["others"] == []
