"""Does each source read its layout: every event, in file order, and the items with their texts?"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zipfile
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genrec.data import SOURCES, formats, reading
from genrec.data.events import read_events
from genrec.data.prepare import PrepareConfig, make_source, prepare
from genrec.data.source import items_table
from genrec.errors import ConfigError

ALL = PrepareConfig(min_user_interactions=1, min_item_interactions=1)


def events_of(**source) -> list[tuple[str, str, int]]:
    """Return (user, item, seconds) in file order."""
    found = read_events(make_source(source))
    return [
        (found.user_ids[user], found.item_ids[item], time // 1000)
        for user, item, time in zip(
            found.user_codes.tolist(),
            found.item_codes.tolist(),
            found.times_ms.tolist(),
            strict=True,
        )
    ]


def items_of(**source) -> dict[str, dict]:
    """Return the catalogue of a source by item id."""
    table = prepare(make_source(source), ALL).catalog.table
    return {row.pop("item_id"): row for row in table.to_dicts()}


def put(path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    """Write a text file, gzipped if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ROWS = [("ann", "x", 100), ("bob", "y", 200), ("ann", "z", 300)]
CSV = "user_id,item_id,timestamp\nann,x,100\nbob,y,200\nann,z,300\n"


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tabular_text_formats_plain_and_gzipped(tmp_path, kind, suffix):
    texts = {
        "csv": CSV,
        "tsv": CSV.replace(",", "\t"),
        "jsonl": jsonl([{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in ROWS]),
    }
    path = put(tmp_path / f"events.{kind}{suffix}", texts[kind])
    assert events_of(name="tabular", path=str(path)) == ROWS


def test_tabular_parquet_with_dates_and_float_ids(tmp_path):
    table = pl.DataFrame(
        {"u": [1.0, 2.0], "i": [10, 11], "when": [datetime(1970, 1, 1, 0, 1), datetime(1970, 1, 2)]}
    )
    table.write_parquet(tmp_path / "e.parquet")
    found = events_of(
        name="tabular", path=str(tmp_path / "e.parquet"), user="u", item="i", timestamp="when"
    )
    assert found == [("1", "10", 60), ("2", "11", 86400)]


def test_tabular_column_names_separator_and_missing_header(tmp_path):
    path = put(tmp_path / "e.dat", "5;ann;x;100\n1;bob;y;200\n")
    found = events_of(
        name="tabular",
        path=str(path),
        format="csv",
        separator=";",
        header=["stars", "who", "what", "when"],
        user="who",
        item="what",
        timestamp="when",
    )
    assert found == ROWS[:2]


def test_csv_line_breaks_in_quotes_blank_lines_and_carriage_returns(tmp_path):
    lines = ['"two\r\nlines",ann,x,100', "", '"a ""b""",bob,"y,1",2', ""]
    path = put(tmp_path / "e.csv", "\r\n".join(["note,user_id,item_id,timestamp", *lines]))
    assert events_of(name="tabular", path=str(path)) == [("ann", "x", 100), ("bob", "y,1", 2)]


@pytest.mark.parametrize("block", [7, 16, 50, 10_000])
def test_block_size_changes_nothing(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block)
    rows = [(f"u{n}", f'i,"{n}\n' if n % 3 else f"é{n}", n) for n in range(1, 30)]
    quoted = "".join(f'{u},"{i.replace(chr(34), chr(34) * 2)}",{t}\n' for u, i, t in rows)
    path = put(tmp_path / "e.csv.gz", "user_id,item_id,timestamp\n" + quoted)
    assert events_of(name="tabular", path=str(path)) == rows
    records = [{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in rows]
    path = put(tmp_path / "e.jsonl", jsonl(records))
    assert events_of(name="tabular", path=str(path)) == rows


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
TABLES = st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=12)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TABLES, st.integers(1, 60))
def test_fast_readers_equal_python_ones(tmp_path, rows, block):
    """Whatever csv and json write is read back, whichever reader a block takes."""
    names = ["a", "b", "c"]
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([names, *rows])
    table = put(tmp_path / "t.csv", text.getvalue())
    lines = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    objects = put(tmp_path / "t.jsonl", lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        for chunks in (
            list(formats.delimited(reading.RawFile(table), columns=["c", "a"])),
            list(formats.json_lines(reading.RawFile(objects), ["c", "a"])),
        ):
            assert not [bad for chunk in chunks for bad in chunk.broken]
            frames = [chunk.frame.fill_null("") for chunk in chunks]
            found = [row for frame in frames for row in frame.select("c", "a").rows()]
            assert found == [(c, a) for a, _, c in rows]


def test_byte_order_mark_and_latin_1(tmp_path):
    path = put(tmp_path / "bom.csv", "\ufeff" + CSV)
    assert events_of(name="tabular", path=str(path)) == ROWS
    path = put(tmp_path / "latin.csv", CSV.replace("ann", "zoë"), encoding="latin-1")
    found = events_of(name="tabular", path=str(path), encoding="latin-1")
    assert [user for user, _, _ in found] == ["zoë", "bob", "zoë"]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (["1400000000", "1400000001"], [1400000000, 1400000001]),
        (["1400000000.9", "1.400000001e9"], [1400000000, 1400000001]),
        (["1400000000123", "1400000001999"], [1400000000, 1400000001]),
        (["1400000000123456", "1400000001999999"], [1400000000, 1400000001]),
        (["2014-05-13", "2014-05-14"], [1399939200, 1400025600]),
        (["2014-05-13 16:53:20", "2014-05-13T16:53:21Z"], [1400000000, 1400000001]),
        (["2014-05-13T18:53:20.5+02:00", "2014-05-13 16:53:21.25"], [1400000000, 1400000001]),
    ],
)
def test_time_formats_are_recognised(tmp_path, written, seconds):
    lines = "".join(f"u,i{n},{text}\n" for n, text in enumerate(written))
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\n" + lines)
    assert [time for _, _, time in events_of(name="tabular", path=str(path))] == seconds


def test_milliseconds_order_events_within_a_second(tmp_path):
    lines = "u,late,1400000000900\nu,early,1400000000100\nu,last,1400000001000\n"
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\n" + lines)
    dataset = prepare({"name": "tabular", "path": str(path)}, ALL)
    ids = [dataset.catalog.item_ids[row] for row in dataset.interactions.user(0)]
    assert ids == ["early", "late", "last"]


def test_without_timestamps_the_files_order_is_the_order(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id\nu,c\nv,a\nu,a\nu,b\n")
    dataset = prepare({"name": "tabular", "path": str(path), "timestamp": None}, ALL)
    assert dataset.interactions.user(0).tolist() == [2, 0, 1]
    assert (dataset.info["ties"], dataset.info["order"]) == ("file", "file")
    assert not dataset.interactions.timestamps.any()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tabular_items_file(tmp_path, kind):
    events = put(tmp_path / "events.csv", CSV)
    records = [
        {"id": "z", "label": "Zed", "brand": "B", "price": 2.5},
        {"id": "x", "label": "Ex", "brand": None, "price": 1.0},
        {"id": "unused", "label": "No", "brand": "C", "price": 0.5},
    ]
    path = tmp_path / f"items.{kind}"
    if kind == "parquet":
        pl.DataFrame(records).write_parquet(path)
    elif kind == "jsonl":
        put(path, jsonl(records))
    else:
        frame = pl.DataFrame(records)
        frame.write_csv(path, separator="," if kind == "csv" else "\t")
    options = {"items": str(path), "items_id": "id", "title": "label"}
    found = items_of(name="tabular", path=str(events), **options)
    number = str if kind in ("csv", "tsv") else float
    assert found == {
        "x": {"title": "Ex", "brand": None, "price": number(1.0)},
        "y": {"title": None, "brand": None, "price": None},
        "z": {"title": "Zed", "brand": "B", "price": number(2.5)},
    }
    only = items_of(name="tabular", path=str(events), **options, columns=["price"])
    assert list(only["x"]) == ["title", "price"]


def test_items_table_kinds_of_values():
    table = items_table(
        [
            {"item_id": 1, "a": [["x", "y"], ["x"]], "n": 1, "t": "s", "d": {"k": 1}, "e": ""},
            {"item_id": 2, "a": "z", "n": 2.5, "t": 3, "title": " T "},
        ]
    )
    assert table.to_dicts() == [
        {"item_id": "1", "title": None, "a": ["x", "y"], "n": 1.0, "t": "s"},
        {"item_id": "2", "title": " T ", "a": ["z"], "n": 2.5, "t": "3"},
    ]


def movielens_files(kind: str) -> dict[str, bytes]:
    """Return the files of one official layout."""
    flags = {"Toy Story (1995)": "0|0|0|1|1|1" + "|0" * 13, "Amélie (2001)": "1" + "|0" * 18}
    if kind == "100k":
        movies = "".join(
            f"{n}|{title}|01-Jan-1995||http://u|{flag}\n"
            for n, (title, flag) in enumerate(flags.items(), start=1)
        )
        return {
            "u.data": b"196\t2\t3\t881250949\n196\t1\t5\t881250950\n22\t1\t4\t878887116\n",
            "u.item": movies.encode("latin-1"),
        }
    if kind == "1m":
        movies = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Amélie (2001)::\n"
        return {
            "ratings.dat": b"196::2::3::881250949\n196::1::5::881250950\n22::1::4::878887116\n",
            "movies.dat": movies.encode("latin-1"),
        }
    movies = (
        "movieId,title,genres\n1,Toy Story (1995),Animation|Children's|Comedy\n"
        "2,Amélie (2001),(no genres listed)\n"
    )
    ratings = (
        "userId,movieId,rating,timestamp\n196,2,3.0,881250949\n196,1,5.0,881250950\n"
        "22,1,4.0,878887116\n"
    )
    return {"ratings.csv": ratings.encode(), "movies.csv": movies.encode()}


@pytest.mark.parametrize("place", ["folder", "nested", "zip"])
@pytest.mark.parametrize("kind", ["100k", "1m", "latest"])
def test_movielens_layouts(tmp_path, kind, place):
    files = movielens_files(kind)
    if place == "zip":
        path = tmp_path / "ml.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"ml/{name}", data)
    else:
        path = tmp_path / "data"
        folder = path / "ml" if place == "nested" else path
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    source = {"name": "movielens", "path": str(path)}
    assert events_of(**source) == [
        ("196", "2", 881250949),
        ("196", "1", 881250950),
        ("22", "1", 878887116),
    ]
    assert items_of(**source) == {
        "1": {"title": "Toy Story (1995)", "genres": ["Animation", "Children's", "Comedy"]},
        "2": {"title": "Amélie (2001)", "genres": None},
    }
    liked = read_events(make_source(source), rating_threshold=4)
    assert (len(liked), liked.facts["below_rating"]) == (2, 1)
    assert make_source(source).facts() == {"layout": kind}


REVIEWS = {
    "2014": [
        {"reviewerID": "A1", "asin": "0001", "overall": 5.0, "unixReviewTime": 1400000000},
        {"reviewerID": "A2", "asin": "B2", "overall": 2.0, "unixReviewTime": 1400000001},
    ],
    "2018": [
        {
            "reviewerID": "A1",
            "verified": True,
            "asin": "0001",
            "overall": 5.0,
            "unixReviewTime": 1400000000,
        },
        {
            "reviewerID": "A2",
            "verified": False,
            "asin": "B2",
            "overall": 2.0,
            "unixReviewTime": 1400000001,
        },
    ],
    "2023": [
        {
            "user_id": "A1",
            "asin": "v",
            "parent_asin": "0001",
            "rating": 5.0,
            "timestamp": 1400000000123,
        },
        {
            "user_id": "A2",
            "asin": "w",
            "parent_asin": "B2",
            "rating": 2.0,
            "timestamp": 1400000001456,
        },
    ],
}
METADATA = {
    "2014": {"asin": "B2", "title": "Lip &amp; Co", "brand": "O", "categories": [["Be", "Li"]]},
    "2018": {"asin": "B2", "title": "Lip &amp; Co", "brand": "O", "category": ["Be", "Li"]},
    "2023": {"parent_asin": "B2", "title": "Lip & Co", "store": "O", "categories": ["Be", "Li"]},
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("release", ["2014", "2018", "2023"])
def test_amazon_releases(tmp_path, release, suffix):
    name = "reviews_X_5.json" if release == "2014" else "X.jsonl"
    meta = "meta_X.json" if release == "2014" else "meta_X.jsonl"
    path = put(tmp_path / f"{name}{suffix}", jsonl(REVIEWS[release]))
    put(tmp_path / f"{meta}{suffix}", jsonl([METADATA[release]]))
    for place in (path, tmp_path):  # the file, or the folder that holds both
        source = {"name": "amazon", "path": str(place)}
        assert events_of(**source) == [("A1", "0001", 1400000000), ("A2", "B2", 1400000001)]
        assert items_of(**source) == {
            "0001": {"title": None, "brand": None, "categories": None},
            "B2": {"title": "Lip & Co", "brand": "O", "categories": ["Be", "Li"]},
        }
    assert make_source(source).facts() == {"release": release}
    assert len(read_events(make_source(source), rating_threshold=3)) == 1


def test_amazon_2014_python_literals_are_read_and_never_executed(tmp_path):
    trap = tmp_path / "executed"
    reviews = "".join(f"{record!r}\n" for record in REVIEWS["2014"])
    path = put(tmp_path / "reviews_X.json.gz", reviews)
    meta = {**METADATA["2014"], "title": "It's"}
    put(tmp_path / "meta_X.json.gz", f"{meta!r}\n")
    source = {"name": "amazon", "path": str(path)}
    assert events_of(**source) == [("A1", "0001", 1400000000), ("A2", "B2", 1400000001)]
    assert items_of(**source)["B2"]["title"] == "It's"
    put(path, reviews + f"open({str(trap)!r}, 'w')\n")
    found = read_events(make_source(source), bad_rows="skip")
    assert (len(found), found.facts["bad_rows"]) == (2, {"json": 1})
    assert not trap.exists()


def test_amazon_description_is_optional(tmp_path):
    path = put(tmp_path / "X.jsonl", jsonl(REVIEWS["2023"]))
    meta = {**METADATA["2023"], "description": ["a", "b"], "features": ["f"]}
    put(tmp_path / "meta_X.jsonl", jsonl([meta]))
    found = items_of(name="amazon", path=str(path), description=True)["B2"]
    assert (found["description"], found["features"]) == ("a b", ["f"])


def test_recbole_atomic_files(tmp_path):
    put(
        tmp_path / "d" / "d.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        'u"1\t7\t3\t881250949\nu2\t8\t5\t881250950.0\n',
    )
    put(
        tmp_path / "d" / "d.item",
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\tprice:float\temb:float_seq\n"
        "7\tToy Story\tComedy Drama\t1.5\t1 2\n8\tHeat\t\t\t3 4\n",
    )
    for path in (tmp_path / "d", tmp_path / "d" / "d.inter"):
        source = {"name": "recbole", "path": str(path)}
        assert events_of(**source) == [('u"1', "7", 881250949), ("u2", "8", 881250950)]
        assert items_of(**source) == {
            "7": {"title": "Toy Story", "class": ["Comedy", "Drama"], "price": 1.5},
            "8": {"title": "Heat", "class": None, "price": None},
        }
        assert make_source(source).default_name == "d"


def sequences_folder(tmp_path: Path, timestamps: list[dict] | None) -> Path:
    put(tmp_path / "s" / "sequences.txt", "1 30 4 5\n2 4 30\n3 5 4 30\n")
    items = [{"item_id": 4, "title": "four", "categories": [["a", "b"]]}, {"item_id": 30}]
    put(tmp_path / "s" / "items.jsonl", jsonl(items))
    if timestamps is not None:
        put(tmp_path / "s" / "timestamps.jsonl", jsonl(timestamps))
    return tmp_path / "s"


def test_sequences_keep_the_files_order_and_say_what_is_wrong_with_timestamps(tmp_path):
    times = [{"user": 1, "ts": [30, 20, 10]}, {"user": 2, "ts": [7]}]
    folder = sequences_folder(tmp_path, times)
    dataset = prepare({"name": "sequences", "path": str(folder)}, ALL)
    assert dataset.catalog.item_ids == ["4", "5", "30"]
    assert [dataset.interactions.user(u).tolist() for u in range(3)] == [
        [2, 0, 1],
        [0, 2],
        [1, 0, 2],
    ]
    assert dataset.interactions.timestamps.tolist() == [30, 20, 10, 0, 0, 0, 0, 0]
    assert dataset.info["source_facts"] == {
        "users_without_timestamps": 1,
        "users_with_misaligned_timestamps": 1,
        "time_format": "s",
    }
    assert dataset.catalog.titles == ["four", None, None]
    assert dataset.catalog.table["categories"].to_list() == [["a", "b"], None, None]


def test_sequences_ordered_by_their_times_with_hashed_ties(tmp_path):
    times = [{"user": 1, "ts": [30, 10, 10]}, {"user": 3, "ts": [9, 9, 9]}]
    folder = sequences_folder(tmp_path, times)
    source = {"name": "sequences", "path": str(folder)}
    dataset = prepare(source, ALL.model_copy(update={"ties": "hash"}))

    def hashed(user: int, *items: int) -> list[str]:
        return [
            str(item)
            for item in sorted(
                items, key=lambda item: hashlib.md5(f"{user}|{item}".encode()).hexdigest()
            )
        ]

    expected = [[*hashed(1, 4, 5), "30"], ["4", "30"], hashed(3, 5, 4, 30)]
    interactions, ids = dataset.interactions, dataset.catalog.item_ids
    assert [[ids[row] for row in interactions.user(u)] for u in range(3)] == expected
    assert interactions.timestamps.tolist() == [10, 10, 30, 0, 0, 9, 9, 9]
    test = interactions.examples("test")
    assert [ids[row] for row in test.target_rows] == ["30", hashed(3, 5, 4, 30)[-1]]
    assert (dataset.info["ties"], dataset.info["order"]) == ("hash", "time")
    assert dataset.info["counts"]["users_in_file_order"] == 1
    assert dataset.info["source_facts"]["users_without_timestamps"] == 1
    by_file = prepare(source, ALL)
    assert by_file.fingerprint != dataset.fingerprint
    assert "users_in_file_order" not in by_file.info["counts"]
    (folder / "timestamps.jsonl").unlink()
    with pytest.raises(ConfigError, match="or leave it out; or give timestamps"):
        prepare(source, ALL.model_copy(update={"ties": "hash"}))


def test_sequences_without_any_other_file(tmp_path):
    path = put(tmp_path / "beauty.txt", "7 a b c\n8 b a\n")
    dataset = prepare({"name": "sequences", "path": str(path)}, ALL)
    assert (dataset.name, dataset.catalog.columns) == ("beauty", [])
    assert [len(dataset.interactions.user(u)) for u in range(2)] == [3, 2]


def test_every_source_has_a_checked_config_and_documented_options():
    for name, place in SOURCES.items():
        module, cls = place.split(":")
        config = getattr(__import__(module, fromlist=[cls]), cls).Config(path="x")
        assert config.to_dict()["name"] == name
        for option, field in type(config).model_fields.items():
            assert option == "name" or field.description, (name, option)
