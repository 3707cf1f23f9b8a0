"""Do the policies of preparation do what they say? Hand-computed cases, naive twins, no leak."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import TEST, TRAIN, VALID, Dataset
from genrec.data.events import Events
from genrec.data.filters import chronological, keep_core, keep_duplicates, tie_statistics
from genrec.data.prepare import PrepareConfig, make_source, prepare
from genrec.data.splits import global_time, leave_one_out
from genrec.errors import AssetError, ConfigError, DataError, UserError

HEADER = "user_id,item_id,rating,timestamp\n"


def raw(folder: Path, rows: list[tuple], *, name: str = "events.csv") -> dict[str, str]:
    """Write (user, item, rating, time) rows as csv and return the source."""
    path = folder / name
    text = HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return {"name": "tabular", "path": str(path)}


def config(**choices) -> PrepareConfig:
    return PrepareConfig(
        **{"min_user_interactions": 1, "min_item_interactions": 1, "ties": "file", **choices}
    )


def sequences(dataset: Dataset) -> list[list[str]]:
    """Return the item ids of each user row."""
    ids, events = dataset.catalog.item_ids, dataset.interactions
    return [[ids[row] for row in events.user(u)] for u in range(events.num_users)]


ROWS = [
    ("zoe", "b", 5, 30),
    ("ann", "a", 1, 10),
    ("zoe", "a", 4, 10),
    ("zoe", "c", 2, 20),
    ("ann", "b", 3, 5),
    ("zoe", "a", 5, 40),
]


@pytest.mark.parametrize(
    ("policy", "zoe", "dropped"),
    [
        ("first", ["a", "c", "b"], 1),
        ("last", ["c", "b", "a"], 1),
        ("keep", ["a", "c", "b", "a"], 0),
    ],
)
def test_duplicates_policy(tmp_path, policy, zoe, dropped):
    dataset = prepare(raw(tmp_path, ROWS), config(duplicates=policy))
    assert sequences(dataset) == [zoe, ["b", "a"]]  # zoe comes first in the file
    assert dataset.info["counts"]["dropped_duplicates"] == dropped
    assert dataset.info["duplicates"] == policy


def test_rating_threshold_keeps_the_threshold_itself(tmp_path):
    dataset = prepare(raw(tmp_path, ROWS), config(rating_threshold=3))
    assert sequences(dataset) == [["a", "b"], ["b"]]
    counts = dataset.info["counts"]
    assert (counts["read"], counts["dropped_below_rating"], counts["kept"]) == (6, 2, 3)


def test_counts_add_up(tmp_path):
    rows = [*ROWS, ("bad", "", 5, 1)]
    chosen = config(rating_threshold=2, bad_rows="skip", min_user_interactions=2)
    counts = prepare(raw(tmp_path, rows), chosen).info["counts"]
    drops = ("bad_rows", "below_rating", "duplicates", "sampling", "k_core")
    assert counts["read"] == 7
    assert [counts[f"dropped_{drop}"] for drop in drops] == [1, 1, 1, 0, 1]
    assert counts["kept"] == 3 == counts["train"] + counts["valid"] + counts["test"]


def test_a_sample_of_users_depends_on_their_ids_alone(tmp_path):
    rows = [(f"u{n}", f"i{k}", 1, k) for n in range(20) for k in range(3)]
    found = {}
    for size in (5, 9, 50):
        for name, order in (("a.csv", rows), ("b.csv", rows[::-1])):
            source = raw(tmp_path, order, name=name)
            users = tmp_path / "users.csv"
            dataset = prepare(source, config(sample_users=size), user_map=users)
            found[size, name] = {line.split(",")[0] for line in users.read_text().split()[1:]}
            sampled_out = 3 * (20 - min(size, 20))
            assert dataset.info["counts"]["dropped_sampling"] == sampled_out
    assert [len(found[size, "a.csv"]) for size in (5, 9, 50)] == [5, 9, 20]
    assert all(found[size, "a.csv"] == found[size, "b.csv"] for size in (5, 9, 50))
    assert found[5, "a.csv"] < found[9, "a.csv"]


def test_ties_by_file_and_by_hash(tmp_path):
    rows = [("u", item, 1, 7) for item in "abcdefgh"] + [("u", "z", 1, 1)]
    by_file = prepare(raw(tmp_path, rows), config(ties="file"))
    assert sequences(by_file) == [["z", *"abcdefgh"]]
    by_hash = prepare(raw(tmp_path, rows), config(ties="hash"))
    expected = sorted("abcdefgh", key=lambda i: hashlib.md5(f"u|{i}".encode()).hexdigest())
    assert sequences(by_hash) == [["z", *expected]]
    assert expected != list("abcdefgh")
    shuffled = prepare(raw(tmp_path, rows[::-1]), config(ties="hash"))
    assert sequences(shuffled) == sequences(by_hash)
    assert by_hash.info["ties"] == "hash"
    assert by_hash.info["tie_statistics"] == {
        "pairs": 8,
        "tied_pairs": 7,
        "users_with_ties": 1,
        "users_tied_at_the_end": 1,
    }


events_strategy = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=40
)


def coded(rows: list[tuple[int, int, int]]) -> Events:
    users, items, times = (np.array(column) for column in zip(*rows, strict=True))
    return Events(
        users.astype(np.int32),
        items.astype(np.int32),
        times.astype(np.int64),
        [f"u{n}" for n in range(6)],
        [f"i{n}" for n in range(7)],
    )


@settings(max_examples=60, deadline=None)
@given(events_strategy, st.integers(1, 4), st.integers(1, 4))
def test_k_core_equals_a_naive_loop(rows, min_user, min_item):
    events = coded(rows)
    left = list(range(len(rows)))
    while True:
        users = Counter(rows[place][0] for place in left)
        fewer = [place for place in left if users[rows[place][0]] >= min_user]
        items = Counter(rows[place][1] for place in fewer)
        fewer = [place for place in fewer if items[rows[place][1]] >= min_item]
        if fewer == left:
            break
        left = fewer
    keep, passes = keep_core(events.user_codes, events.item_codes, min_user, min_item)
    assert np.flatnonzero(keep).tolist() == left
    assert (passes == 0) == (len(left) == len(rows))


@settings(max_examples=60, deadline=None)
@given(events_strategy, st.sampled_from(["first", "last"]), st.booleans())
def test_duplicates_equal_a_naive_loop(rows, policy, by_time):
    best: dict[tuple[int, int], int] = {}
    for place, (user, item, time) in enumerate(rows):
        there = best.get((user, item))
        if there is None:
            best[user, item] = place
            continue
        later = time >= rows[there][2] if by_time else True
        if later == (policy == "last"):
            best[user, item] = place
    keep = keep_duplicates(coded(rows), policy, by_time=by_time)
    assert np.flatnonzero(keep).tolist() == sorted(best.values())


@settings(max_examples=60, deadline=None)
@given(events_strategy, st.sampled_from(["file", "hash"]))
def test_order_equals_a_naive_sort(rows, ties):
    def key(place: int) -> tuple:
        user, item, time = rows[place]
        hashed = ties == "hash" and time > 0  # 0: no time, so there is nothing but the file
        digest = hashlib.md5(f"u{user}|i{item}".encode()).hexdigest() if hashed else ""
        return user, time, digest, place

    order = chronological(coded(rows), ties)
    assert order.tolist() == sorted(range(len(rows)), key=key)


def test_hashing_in_parts_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [tuple(row) for row in rng.integers(0, 5, size=(200, 3)).tolist()]
    whole = chronological(coded(rows), "hash")
    monkeypatch.setattr("genrec.data.filters._HASH_ROWS", 7)
    assert chronological(coded(rows), "hash").tolist() == whole.tolist()


def test_tie_statistics_ignore_events_without_a_time():
    found = tie_statistics(np.array([0, 3, 5, 6]), np.array([5, 5, 6, 0, 0, 9]))
    assert found == {
        "pairs": 2,
        "tied_pairs": 1,
        "users_with_ties": 1,
        "users_tied_at_the_end": 0,
    }


def test_leave_one_out_by_hand():
    found = leave_one_out(np.array([0, 4, 6, 9, 9, 10]))
    expected = [TRAIN, TRAIN, VALID, TEST, TRAIN, TRAIN, TRAIN, VALID, TEST, TRAIN]
    assert found.tolist() == expected


def test_global_time_split(tmp_path):
    rows = [(f"u{n % 3}", f"i{n}", 1, 100 + n) for n in range(20)]
    chosen = config(split="global_time", valid_fraction=0.2, test_fraction=0.1)
    dataset = prepare(raw(tmp_path, rows), chosen)
    split, events = dataset.info["split"], dataset.interactions
    assert (split["valid_from"], split["test_from"]) == (114, 118)
    counts = dataset.info["counts"]
    assert (counts["train"], counts["valid"], counts["test"]) == (14, 4, 2)
    assert np.array_equal(events.splits == TEST, events.timestamps >= 118)
    for user in range(3):
        parts = events.splits[events.offsets[user] : events.offsets[user + 1]]
        assert (np.diff(parts.astype(int)) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=50), st.integers(0, 50), st.integers(0, 9))
def test_global_time_puts_each_cut_into_the_later_part(times, valid_from, gap):
    found = global_time(np.array(times), valid_from, valid_from + gap)
    expected = [(time >= valid_from) + (time >= valid_from + gap) for time in times]
    assert found.tolist() == expected


def test_items_are_sorted_as_numbers_where_all_are(tmp_path):
    rows = [("u", item, 1, n) for n, item in enumerate(["10", "9", "100", "1"], start=1)]
    assert prepare(raw(tmp_path, rows), config()).catalog.item_ids == ["1", "9", "10", "100"]
    rows.append(("u", "x", 1, 9))
    assert prepare(raw(tmp_path, rows), config()).catalog.item_ids == ["1", "10", "100", "9", "x"]


def test_catalogue_holds_the_surviving_items_only(tmp_path):
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\na,Eh\na,Again\nq,Never\n", encoding="utf-8")
    source = {**raw(tmp_path, ROWS), "items": str(items)}
    dataset = prepare(source, config(min_item_interactions=2))
    assert dataset.catalog.item_ids == ["a", "b"]
    assert dataset.catalog.titles == ["Eh", None]
    assert dataset.info["items_table"] == {
        "given": True,
        "items_without_row": 1,
        "repeated_rows": 1,
    }


def test_same_input_same_fingerprint_and_each_choice_changes_it(tmp_path):
    source = raw(tmp_path, ROWS)
    first = prepare(source, config(), tmp_path / "one")
    again = prepare(source, config(), tmp_path / "elsewhere" / "two")
    assert first.fingerprint == again.fingerprint == Dataset.load(tmp_path / "one").fingerprint
    assert prepare(source, config()).fingerprint == prepare(source, config()).fingerprint
    choices = ({"duplicates": "last"}, {"ties": "hash"}, {"rating_threshold": 2.0}, {"name": "n"})
    prints = {prepare(source, config(**c), tmp_path / "three").fingerprint for c in choices}
    assert len(prints | {first.fingerprint}) == 5


def test_saved_and_loaded_datasets_are_equal(tmp_path):
    made = prepare(raw(tmp_path, ROWS), config(), tmp_path / "out")
    loaded = Dataset.load(tmp_path / "out")
    assert loaded.interactions.fingerprint == made.interactions.fingerprint
    assert loaded.catalog.fingerprint == made.catalog.fingerprint
    assert loaded.info == made.info


def test_no_raw_user_id_and_no_path_in_any_written_byte(tmp_path):
    rows = [(f"SECRETUSER{n % 4}", f"item{n}", 3, n + 1) for n in range(16)]
    rows.append(("SECRETUSER9", "item1", 3, "SECRETUSER9"))  # shifted columns: a bad timestamp
    source = raw(tmp_path, rows)
    prepare(source, config(bad_rows="skip", ties="hash"), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 3
    written = b"".join(path.read_bytes() for path in files)
    for path in tmp_path.glob("out/*.parquet"):  # their pages are compressed: look inside too
        table = pl.read_parquet(path)
        written += repr((table.columns, table.rows())).encode()
    assert b"item7" in written  # the search does find what is there
    assert b"SECRETUSER" not in written
    assert str(tmp_path).encode() not in written


def test_user_map_is_opt_in_and_stays_outside(tmp_path):
    source = raw(tmp_path, ROWS)
    with pytest.raises(UserError, match=r"inside the dataset folder.*choose a place outside"):
        prepare(source, config(), tmp_path / "out", user_map=tmp_path / "out" / "map.csv")
    assert not (tmp_path / "out").exists()
    prepare(source, config(), tmp_path / "out", user_map=tmp_path / "map.csv")
    assert (tmp_path / "map.csv").read_text(encoding="utf-8") == "user_id,user_row\nzoe,0\nann,1\n"


def test_user_rows_follow_the_first_appearance_in_the_file(tmp_path):
    rows = [("late", "a", 1, 90), ("early", "b", 1, 1), ("mid", "a", 1, 50), ("late", "b", 1, 2)]
    prepare(raw(tmp_path, rows), config(), user_map=tmp_path / "map.csv")
    lines = (tmp_path / "map.csv").read_text(encoding="utf-8").split()
    assert lines[1:] == ["late,0", "early,1", "mid,2"]


def test_manifest_records_every_choice(tmp_path):
    prepare(raw(tmp_path, ROWS), config(rating_threshold=2), tmp_path / "out")
    info = json.loads((tmp_path / "out" / "manifest.json").read_text())["extra"]
    assert info["source"] == "tabular"
    assert info["source_options"]["path"] == "events.csv"
    assert info["filters"] == {
        "min_user_interactions": 1,
        "min_item_interactions": 1,
        "sample_users": None,
        "rating_threshold": 2.0,
        "bad_rows": "error",
    }
    assert (info["duplicates"], info["ties"], info["order"]) == ("first", "file", "time")
    assert info["split"] == {"name": "leave_one_out", "users_without_held_out": 1}
    assert (info["num_users"], info["num_items"], info["name"]) == (2, 3, "events")


def test_hidden_items_are_unknown_to_training_only(tmp_path):
    rows = [(f"u{n}", f"i{(n + k) % 20}", 1, k + 1) for n in range(20) for k in range(8)]
    whole = prepare(raw(tmp_path, rows), config())
    some = prepare(raw(tmp_path, rows), config(hidden_items=0.1))
    more = prepare(raw(tmp_path, rows), config(hidden_items=0.3), tmp_path / "cold")
    x, y, z = whole.interactions, some.interactions, more.interactions
    hidden = [set(range(20)) - set(found.training().item_rows.tolist()) for found in (y, z)]
    assert [len(h) for h in hidden] == [2, 6] and hidden[0] < hidden[1]
    assert more.info["split"]["hidden_items"] == {"share": 0.3, "items": 6}
    kept = ~(np.isin(x.item_rows, sorted(hidden[1])) & (x.splits == TRAIN))
    assert more.info["counts"]["dropped_hidden"] == int((~kept).sum()) == 6 * 6
    assert np.array_equal(z.item_rows, x.item_rows[kept])
    assert np.array_equal(z.timestamps, x.timestamps[kept])
    for part in ("valid", "test"):
        before, after = x.examples(part), z.examples(part)
        assert np.array_equal(after.target_rows, before.target_rows)
        assert np.array_equal(after.user_rows, before.user_rows)
    assert Dataset.load(tmp_path / "cold").interactions.fingerprint == z.fingerprint
    with pytest.raises(DataError, match="no training interaction is left"):
        prepare(raw(tmp_path, rows), config(hidden_items=0.99))


def test_defaults_of_the_protocol(tmp_path):
    rows = [(f"u{n}", f"i{(n + k) % 6}", 1, k + 1) for n in range(6) for k in range(5)]
    info = prepare(raw(tmp_path, rows)).info
    assert (info["ties"], info["duplicates"], info["split"]["name"]) == (
        "hash",
        "first",
        "leave_one_out",
    )
    assert info["filters"]["min_user_interactions"] == 5


def test_held_out_items_do_not_influence_the_training_view(tmp_path):
    rows = [(f"u{n % 5}", f"i{n % 7}", 1, 10 + n) for n in range(35)]
    dataset = prepare(raw(tmp_path, rows), config())
    swapped = dataset.interactions.item_rows.copy()
    held_out = np.flatnonzero(dataset.interactions.splits != TRAIN)
    swapped[held_out] = np.random.default_rng(0).permutation(swapped[held_out])
    object.__setattr__(dataset.interactions, "item_rows", swapped)
    again = prepare(raw(tmp_path, rows), config())
    mine, other = dataset.interactions.training(), again.interactions.training()
    assert mine.fingerprint == other.fingerprint


def test_choices_that_contradict_each_other(tmp_path):
    source = raw(tmp_path, ROWS)
    with pytest.raises(ConfigError, match="expected a sum below 1"):
        prepare(source, config(split="global_time", valid_fraction=0.5, test_fraction=0.5))
    with pytest.raises(ConfigError, match=r"a hash would destroy. Use ties=file"):
        prepare({**source, "timestamp": None}, config(ties="hash"))


def test_a_path_may_name_an_asset(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_ASSETS", str(tmp_path))
    with pytest.raises(AssetError, match="genrec assets fetch ml-100k"):
        make_source({"name": "recbole", "path": "asset:ml-100k"})
    inside = tmp_path / "recbole/dataset_example/ml-100k"
    inside.mkdir(parents=True)
    (inside / "ml-100k.inter").write_text("x")
    source = make_source({"name": "recbole", "path": "asset:ml-100k"})
    assert source.config.path == inside
    assert source.options()["path"] == "ml-100k"
