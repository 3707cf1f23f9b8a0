"""The decode benchmarks run, their lists equal the peer's, their JSON has the documented shape."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.decoding_quality import Case
from genrec.inference import RankedLists


def run(root, tmp_path, name):
    path = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(path)],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=600,
    )
    result = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "rows"} <= result.keys()
    for row in result["rows"]:
        assert {"case", "baseline", "ours", "theirs", "ratio", "unit", "equal"} <= row.keys()
    return result


@pytest.mark.slow
def test_quick_benchmark_writes_equal_lists_and_the_documented_json(root, tmp_path):
    result = run(root, tmp_path, "decoding")
    peers = [row for row in result["rows"] if row["baseline"] == "hf_generate"]
    assert len(peers) == 5 and all(row["equal"] for row in peers)
    twins = [row for row in result["rows"] if row["baseline"] == "ours_vector_by_vector"]
    assert len(twins) == 2 and all(row["equal"] for row in twins)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_and_says_what_it_left_out(root, tmp_path):
    result = run(root, tmp_path, "decoding_gpu")
    if torch.cuda.is_available():
        assert result["device"] == torch.cuda.get_device_name() and result["measured"]
    else:
        assert result["device"] == "cpu" and not result["measured"]
    assert [case["case"].split(":")[0] for case in result["skipped"]] == ["case_static"] * 2
    assert all("static_decoding" in case["reason"] for case in result["skipped"])
    found = {row["baseline"] for row in result["rows"]}
    assert found == {"hf_generate", "ours_eager", "ours_float32", "torch_compile"}
    for row in result["rows"]:
        assert (
            row["equal"] is not False and row["details"]["ours_p99"] >= row["details"]["ours_p50"]
        )
        if row["baseline"] == "ours_float32":
            assert 0 < row["details"]["overlap"] <= 1


def test_a_case_that_fails_or_comes_too_late_is_named_and_leaves_the_others(root, tmp_path):
    from benchmarks.common import Row
    from benchmarks.decoding_gpu import Report

    path = tmp_path / "gpu.json"
    report = Report(path, torch.device("cpu"), budget_s=1e9)
    report.add("broken", lambda: [][0])
    report.add("fine", lambda: [Row("fine", "peer", 1.0, 2.0, 2.0, "wall_s", True)])
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["fine"]
    report.budget_s = -1.0
    report.add("late", lambda: [Row("late", "peer", 1.0, 2.0, 2.0, "wall_s", True)])
    result = report.finish()
    assert [row["case"] for row in result["rows"]] == ["fine"]
    reasons = {case["case"]: case["reason"] for case in result["skipped"]}
    assert reasons["broken"].startswith("IndexError") and "TimeoutError" in reasons["late"]


def test_matrix_products_are_counted_and_repeated():
    from benchmarks.bare_gemm import replay_of

    left, right, bias = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    query = torch.randn(2, 2, 6, 8)
    calls = []

    def call():
        calls.append(1)
        torch.addmm(bias, left, right).relu()
        scaled_dot_product_attention(query, query, query)

    replay, flops = replay_of(call)
    attention = 2 * (2 * 4 * 6 * 6 * 8)  # two products of 4 heads
    assert flops == 2 * 3 * 4 * 5 + attention
    replay()
    assert calls == [1]  # only the products are repeated


def test_a_target_in_the_first_place_is_a_whole_hit():
    """The first place has discount 1, the tenth still counts, the eleventh does not."""
    case = Case.__new__(Case)
    case.targets = np.array([7, 7, 7, 7])
    rows = np.tile(np.arange(100, 112), (4, 1))
    for user, place in enumerate((0, 9, 10)):
        rows[user, place] = 7
    unproven, all_items = np.zeros(4, dtype=bool), np.full(4, 200)
    lists = RankedLists(rows, np.zeros((4, 12)), unproven, all_items)
    found = case.metrics(lists)
    assert found["recall@10"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found["ndcg@10"] == pytest.approx([1.0, 1 / np.log2(11), 0.0, 0.0])
