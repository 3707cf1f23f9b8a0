"""The tokenizer benchmark measures what it says, and its JSON has the documented shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tokenizers as bench
from benchmarks.tokenizer_memory import peak_gb, write_vectors
from benchmarks.tokenizer_peers import Setting, Tokenized, missing
from genrec.tokenizers.quantization import kmeans

TINY = Setting(num_codes=8, hidden=(16,), latent=8, batch_size=64, epochs=1)
SIZE = bench.Size(300, 32, 1, 400, 16, 1, TINY)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return bench.clustered(SIZE.num_items, SIZE.width)


def test_vectors_are_clustered_repeatable_and_of_length_one(vectors):
    assert vectors.dtype == np.float32 and vectors.shape == (300, 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors, bench.clustered(300, 32))


def test_products_are_counted_and_nearest_is_put_back(vectors):
    before = kmeans.nearest
    row = bench.case_rqkmeans_products(vectors, SIZE)
    assert kmeans.nearest is before
    assert 3 <= row.details["products"] <= 3 * 27
    assert row.baseline == "bare_gemm" and row.ratio == pytest.approx(row.theirs / row.ours)
    assert row.details["times_the_products"] == pytest.approx(1 / row.ratio)


def test_the_products_of_the_rqvae_are_those_of_its_layers(vectors):
    row = bench.case_rqvae_products(vectors, SIZE, TINY)
    assert row.case == "rqvae training, 32-16-8, 3 x 8, batch 64"
    assert row.unit == "cpu_s" and row.details["items_per_cpu_s"] > 0


def test_opq_and_pq_are_compared_by_their_errors(vectors):
    row = bench.case_opq(vectors, SIZE, 4)
    assert row.ours < row.theirs and row.ratio > 1
    assert row.ours == row.details["opq"]["relative_squared_error"]


def test_what_codes_are_worth_is_known_for_known_codes():
    vectors = np.array([[0.0], [0.0], [2.0], [2.0]])
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    found = bench.worth(vectors, Tokenized(codes, np.ones((4, 1))), 2)
    assert found == {
        "collision_rate": 0.25, "utilisation": [1.0, 1.0], "relative_squared_error": 1.0
    }  # fmt: skip


def test_peers_that_are_not_installed_are_named_with_the_reason(vectors, monkeypatch):
    def fit(vectors: np.ndarray, setting: Setting) -> Tokenized:
        print("noise that must not reach the report")
        codes = np.zeros((len(vectors), setting.num_levels), np.int64)
        return Tokenized(codes, np.zeros_like(vectors))

    monkeypatch.setattr(bench, "RQVAE_PEERS", {"gone": ("no_such_library", fit)})
    monkeypatch.setattr(bench, "RQKMEANS_PEERS", {"constant": ("json", fit)})
    rows, skipped = bench.cases_peers(vectors, SIZE)
    assert [(entry["baseline"], "not installed" in entry["reason"]) for entry in skipped] == [
        ("gone", True)
    ]
    (row,) = rows
    assert row.baseline == "constant"
    assert row.details["codes_of_theirs"]["collision_rate"] == 1 - 1 / 300
    assert row.details["codes_of_ours"]["relative_squared_error"] < 0.5
    assert missing("json") is None


def test_large_files_of_vectors_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.tokenizer_memory.BLOCK", 7)
    write_vectors(tmp_path / "v.npy", 20, 4)
    found = np.load(tmp_path / "v.npy")
    assert found.shape == (20, 4) and found.dtype == np.float32 and found.std(axis=0).min() > 0.1
    assert 0.01 < peak_gb() < 100


@pytest.mark.slow
def test_the_quick_benchmark_writes_the_documented_json(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizers.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.tokenizers", "--quick", "--json", str(path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=600,
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "versions", "commit", "rows", "skipped"} <= result.keys()
    for row in result["rows"]:
        assert {"case", "baseline", "ours", "theirs", "ratio", "unit", "equal"} <= row.keys()
    streamed = [row for row in result["rows"] if row["baseline"] == "read as a whole"]
    assert len(streamed) == 2 and all(row["equal"] for row in streamed)
    assert all(entry["reason"] for entry in result["skipped"])
