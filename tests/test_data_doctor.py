"""Does the doctor find each defect exactly when it is planted, with the right count?"""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.data import Catalog, Dataset, Interactions
from genrec.data.doctor import Finding, examine, require_sound
from genrec.data.splits import leave_one_out
from genrec.data.synthetic import ring
from genrec.errors import DataError

NUM_ITEMS, NUM_USERS, LENGTH = 12, 30, 5


def build(
    sequences: list[list[int]],
    times: list[list[int]] | None = None,
    table: pl.DataFrame | None = None,
    **info,
) -> Dataset:
    """Make a dataset of given sequences (item rows) and times."""
    lengths = np.array([len(s) for s in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if times is None:
        times = [list(range(1, len(s) + 1)) for s in sequences]
    if table is None:
        ids = [str(n) for n in range(NUM_ITEMS)]
        table = pl.DataFrame({"item_id": ids, "title": [f"Item {n}" for n in ids]})
    interactions = Interactions(
        np.concatenate(sequences).astype(np.int32),
        offsets,
        np.concatenate(times).astype(np.int64),
        leave_one_out(offsets),
        len(table),
    )
    return Dataset(Catalog(table), interactions, {"name": "planted", "ties": "file", **info})


def clean() -> tuple[list[list[int]], list[list[int]]]:
    """Return sequences and times without any defect."""
    rng = np.random.default_rng(3)
    sequences = [rng.permutation(NUM_ITEMS)[:LENGTH].tolist() for _ in range(NUM_USERS)]
    return sequences, [list(range(10, 10 + LENGTH)) for _ in sequences]


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def only(dataset: Dataset, vectors: np.ndarray | None = None) -> Finding:
    """Return the single finding."""
    findings = examine(dataset, vectors)
    assert len(findings) == 1, codes(findings)
    return findings[0]


def test_clean_data_has_no_finding():
    sequences, times = clean()
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 4))
    assert examine(build(sequences, times), vectors) == []
    assert examine(ring(num_items=12, num_users=48, length=5)) == []


def test_bad_rows_come_from_the_record():
    facts = {"kinds": {"timestamp": 3, "json": 1}, "examples": [{"row": 9, "kind": "json"}]}
    finding = only(build(*clean(), bad_rows=facts, counts={"read": 1000}))
    assert (finding.level, finding.code, finding.count) == ("warning", "bad_rows", 4)
    assert finding.message.startswith("4 of 1,000 rows of the raw data could not be parsed")
    assert finding.examples == ("row 9 (json)",)


def test_duplicate_events_outside_the_target():
    sequences, times = clean()
    sequences[4][1] = sequences[4][0]
    finding = only(build(sequences, times))
    assert (finding.code, finding.level, finding.count) == ("duplicate_events", "warning", 1)
    row = sequences[4][0]
    assert finding.examples == (f"{row} (Item {row})",)


@pytest.mark.parametrize("place", [-1, -2])
def test_target_visible_in_the_history(place):
    sequences, times = clean()
    sequences[7][place] = sequences[7][0]
    findings = examine(build(sequences, times))
    assert codes(findings) == ["duplicate_events", "target_in_history"]
    assert (findings[1].count, findings[1].examples) == (1, ("user row 7",))


@pytest.mark.parametrize(("policy", "level"), [("file", "warning"), ("hash", "info")])
def test_ties(policy, level):
    sequences, times = clean()
    times[2] = [10, 10, 12, 13, 13]
    times[3] = [10, 11, 11, 13, 14]
    finding = only(build(sequences, times, ties=policy))
    assert (finding.code, finding.level, finding.count) == ("ties", level, 3)
    assert f"3 of {NUM_USERS * (LENGTH - 1)} neighbouring" in finding.message
    assert "for 1 users they are the last two" in finding.message
    assert finding.examples == ("user row 2",)


def test_items_without_text_and_shared_titles():
    titles = [f"Item {n}" for n in range(NUM_ITEMS)]
    titles[3], titles[5], titles[6] = None, " ", None
    titles[8] = titles[9] = titles[1]
    table = pl.DataFrame({"item_id": [f"i{n}" for n in range(NUM_ITEMS)], "title": titles})
    findings = examine(build(*clean(), table=table))
    assert codes(findings) == ["items_without_text", "shared_titles"]
    assert (findings[0].level, findings[0].count) == ("warning", 3)
    assert findings[0].examples == ("i3", "i5 ( )", "i6")
    assert (findings[1].level, findings[1].count) == ("info", 3)
    assert "3 items share 1 titles" in findings[1].message


def test_catalogue_of_bare_ids_has_no_text():
    table = pl.DataFrame({"item_id": [str(n) for n in range(NUM_ITEMS)]})
    finding = only(build(*clean(), table=table))
    assert (finding.code, finding.count) == ("items_without_text", NUM_ITEMS)
    assert "`features: auto` takes co-occurrence then" in finding.message


def test_users_too_short():
    sequences, times = clean()
    sequences[0], times[0] = sequences[0][:2], times[0][:2]
    sequences[9], times[9] = sequences[9][:1], times[9][:1]
    finding = only(build(sequences, times))
    assert (finding.code, finding.level, finding.count) == ("short_users", "warning", 2)
    assert finding.examples == ("user row 0", "user row 9")


def about_order(dataset: Dataset) -> list[Finding]:
    """Return the findings but one: where sequences are sorted, the largest item is always last."""
    return [finding for finding in examine(dataset) if finding.code != "items_only_in_test"]


@pytest.mark.parametrize("reverse", [False, True])
def test_sequences_sorted_by_item_id_instead_of_time(reverse):
    sequences, times = clean()
    sequences = [sorted(s, reverse=reverse) for s in sequences]
    none = [[0] * LENGTH for _ in times]
    findings = about_order(build(sequences, none))
    assert codes(findings) == ["sorted_by_item", "no_timestamps"]
    assert findings[0].level == "error"
    assert "order of the items' id, and no time says otherwise" in findings[0].message
    (finding,) = about_order(build(sequences, times))  # the times agree: not impossible
    assert (finding.code, finding.level) == ("sorted_by_item", "warning")


def test_nothing_is_measured_on_data_with_an_error(caplog):
    sequences, times = clean()
    assert require_sound(build(sequences, times)) == examine(build(sequences, times))
    data = build([sorted(s) for s in sequences], [[0] * LENGTH for _ in times])
    with pytest.raises(DataError, match="order of the items' id, and no time says otherwise"):
        require_sound(data)
    sequences[0], times[0] = sequences[0][:2], times[0][:2]
    with caplog.at_level("WARNING", logger="genrec"):
        require_sound(build(sequences, times))
    assert "doctor: 1 of 30 users have fewer than 3" in caplog.text


def test_sequences_sorted_by_item_id_as_text():
    sequences, _ = clean()
    sequences = [sorted(s, key=str) for s in sequences]
    findings = about_order(build(sequences, [[0] * LENGTH for _ in sequences]))
    assert codes(findings) == ["sorted_by_item", "no_timestamps"]
    assert "order of the items' id as text" in findings[0].message


def test_ties_in_the_order_of_another_code():
    sequences, times = clean()
    table = pl.DataFrame(
        {
            "item_id": [str(n) for n in range(NUM_ITEMS)],
            "title": [f"Item {n}" for n in range(NUM_ITEMS)],
            "asin": [f"B{n * 7 % NUM_ITEMS:02d}" for n in range(NUM_ITEMS)],
        }
    )
    key = table["asin"].to_list()
    times = [[10, 10, 11, 11, 11] for _ in times]
    sequences = [
        [*sorted(s[:2], key=lambda r: key[r]), *sorted(s[2:], key=lambda r: key[r])]
        for s in sequences
    ]
    findings = examine(build(sequences, times, table))
    assert codes(findings) == ["ties", "ties_sorted_by_item"]
    assert "order of the items' asin: ties were broken by it" in findings[1].message
    assert findings[1].count == 3 * NUM_USERS
    rng = np.random.default_rng(0)
    shuffled = [[*rng.permutation(s[:2]), *rng.permutation(s[2:])] for s in sequences]
    assert codes(examine(build(shuffled, times, table))) == ["ties"]


def test_items_seen_only_in_test():
    sequences, times = clean()
    sequences = [[r % 10 for r in range(u, u + LENGTH)] for u in range(NUM_USERS)]
    rng = np.random.default_rng(1)
    sequences = [rng.permutation(s).tolist() for s in sequences]
    sequences[5][-1] = 11
    finding = only(build(sequences, times))
    assert (finding.code, finding.level, finding.count) == ("items_only_in_test", "warning", 1)
    assert finding.examples == ("11 (Item 11)",)


def test_timestamps_that_go_backwards():
    sequences, times = clean()
    times[3] = [10, 9, 11, 12, 11]
    finding = only(build(sequences, times))
    assert (finding.code, finding.level, finding.count) == ("backward_timestamps", "error", 2)
    assert finding.examples == ("user row 3",)


def test_users_without_timestamps():
    sequences, times = clean()
    times[3] = [0] * LENGTH
    finding = only(build(sequences, times))
    assert (finding.code, finding.level, finding.count) == ("no_timestamps", "info", 1)


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, 4)).astype(np.float32)


def test_vectors_that_do_not_align_with_the_items():
    dataset = build(*clean())
    finding = only(dataset, vectors()[:-1])
    assert (finding.code, finding.level) == ("vectors_count", "error")
    assert "(11, 4) for 12 items" in finding.message
    assert only(dataset, np.zeros(5)).code == "vectors_count"


def test_vectors_with_nan_zero_rows_or_all_equal():
    dataset = build(*clean())
    broken = vectors()
    broken[3, 1], broken[4, 0] = np.nan, np.inf
    finding = only(dataset, broken)
    assert (finding.code, finding.level, finding.count) == ("vectors_not_finite", "error", 2)
    assert finding.examples == ("3 (Item 3)", "4 (Item 4)")
    empty = vectors()
    empty[[2, 6]] = 0
    finding = only(dataset, empty)
    assert (finding.code, finding.level, finding.count) == ("vectors_zero", "warning", 2)
    finding = only(dataset, np.ones((NUM_ITEMS, 4)))
    assert (finding.code, finding.level) == ("vectors_constant", "error")
    assert only(dataset, np.zeros((NUM_ITEMS, 4))).code == "vectors_constant"


def test_vectors_of_the_catalogue_are_examined_by_default():
    dataset = build(*clean())
    embedded = dataset.catalog.with_vectors(np.ones((NUM_ITEMS, 4)))
    found = examine(Dataset(embedded, dataset.interactions, dataset.info))
    assert codes(found) == ["vectors_constant"]


def test_errors_come_first_and_findings_are_json():
    sequences, times = clean()
    times[3] = [10, 9, 11, 12, 12]
    findings = examine(build(sequences, times, ties="hash"))
    assert [finding.level for finding in findings] == ["error", "info"]
    assert findings[0].to_dict() == {
        "level": "error",
        "code": "backward_timestamps",
        "message": findings[0].message,
        "count": 1,
        "examples": ["user row 3"],
    }
