"""Does the benchmark of single requests ask the bundle as a product does?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.requests import histories_of, main
from genrec.data import Dataset
from genrec.data.synthetic import ring
from genrec.errors import UserError


def test_requests_alone_and_in_batches_get_the_same_lists(
    small_run: Path, ring_dataset: Path, tmp_path: Path
) -> None:
    path = tmp_path / "requests.json"
    asked = ["--requests", "70", "--runs", "1", "--json", str(path)]
    main([str(small_run / "bundle"), str(ring_dataset), *asked])
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    details = row["details"]
    assert row["equal"] is True and row["unit"] == "cpu_ms"
    assert (details["requests"], details["items"], details["k"]) == (70, 184, 10)
    assert 0 < details["p50_cpu_ms"] <= details["p99_cpu_ms"]
    assert row["ours"] == details["p50_cpu_ms"]


def test_another_data_set_is_refused(small_run: Path, tmp_path: Path) -> None:
    ring(num_items=200, num_users=200, length=6).save(tmp_path / "other")
    with pytest.raises(UserError, match="184"):
        main([str(small_run / "bundle"), str(tmp_path / "other"), "--runs", "1"])


def test_requests_are_different_test_users(ring_dataset: Path) -> None:
    dataset = Dataset.load(ring_dataset)
    some, everyone = histories_of(dataset, 9), histories_of(dataset, 10_000)
    assert some == everyone[:9] and len(everyone) == 184
    known = set(dataset.catalog.item_ids)
    assert all(history and known.issuperset(history) for history in everyone)
    assert len({tuple(history) for history in everyone}) > 9
