"""Does each kind of bad raw data give one clear error, or get skipped and counted?"""

from __future__ import annotations

import errno
import gzip
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.data import reading
from genrec.data.events import read_events
from genrec.data.prepare import PrepareConfig, make_source, prepare
from genrec.errors import ArtifactError, ConfigError, DataError

ALL = PrepareConfig(min_user_interactions=1, min_item_interactions=1)
GOOD = "user_id,item_id,timestamp\nann,x,100\nbob,y,200\n"


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(tmp_path: Path, match: str, config: PrepareConfig = ALL, **source) -> None:
    """Preparing must raise one DataError and write nothing at all."""
    out = tmp_path / "made" / "out"
    with pytest.raises(DataError, match=match) as caught:
        prepare({"name": "tabular", **source}, config, out)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_missing_file_names_the_nearest(tmp_path):
    put(tmp_path / "events.csv", GOOD)
    refused(
        tmp_path, r"no file at .*Did you mean 'events\.csv'\?", path=str(tmp_path / "event.csv")
    )


@pytest.mark.parametrize("data", [b"", b"\n \n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, data):
    path = put(tmp_path / "e.csv", data)
    refused(tmp_path, r"'.*e\.csv' is empty.*Expected data in it", path=str(path))


def test_header_without_rows(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\n")
    refused(tmp_path, r"e\.csv: no usable event. Read 0 rows", path=str(path))


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "e.csv").mkdir()
    refused(tmp_path, "is a folder, expected a file", path=str(tmp_path / "e.csv"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_missing_column_names_the_nearest(tmp_path, kind):
    path = tmp_path / f"e.{kind}"
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamps": [1]})
    writers = {"csv": "write_csv", "jsonl": "write_ndjson", "parquet": "write_parquet"}
    getattr(frame, writers[kind])(path)
    match = (
        rf"e\.{kind}: no column 'timestamp'\. It has: user_id, item_id, timestamps\. "
        r"Did you mean 'timestamps'\?"
    )
    refused(tmp_path, match, path=str(path))


def test_two_columns_of_the_wanted_name(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id,item_id,timestamp\nu,i,j,1\n")
    refused(tmp_path, "2 columns are named 'item_id', expected one", path=str(path))


def test_rating_threshold_without_a_rating_column(tmp_path):
    path = put(tmp_path / "e.csv", GOOD)
    chosen = ALL.model_copy(update={"rating_threshold": 3.0})
    refused(tmp_path, "no column 'rating'", chosen, path=str(path))


BAD_ROWS = [
    (
        "cat,z,yesterday",
        "timestamp",
        r"timestamp 'yesterday' is not a time; expected a number of s",
    ),
    ("cat,z,-5", "timestamp", r"timestamp '-5' is not a time"),
    ("cat,z,1e300", "timestamp", r"timestamp '1e300' is not a time"),
    ("cat,z,", "timestamp", r"timestamp is missing"),
    (",z,5", "user", r"it has no user id"),
    ("cat,,5", "item", r"it has no item id"),
    ("cat,z", "item|timestamp", r"timestamp is missing|got 2 fields, expected 3"),
    ("cat,z,5,6", "fields", r"got 4 fields, expected 3"),
]


@pytest.mark.parametrize(("line", "kind", "reason"), BAD_ROWS)
def test_bad_row_is_named_or_skipped_and_counted(tmp_path, line, kind, reason):
    path = put(tmp_path / "e.csv", GOOD + line + "\ndan,x,300\n")
    match = rf"e\.csv: row 4: ({reason}).*--bad-rows skip"
    refused(tmp_path, match, path=str(path))
    source = make_source({"name": "tabular", "path": str(path)})
    found = read_events(source, bad_rows="skip")
    assert (len(found), found.facts["read"]) == (3, 4)
    assert sum(found.facts["bad_rows"].values()) == 1
    assert found.facts["bad_row_examples"][0]["row"] == 4
    assert found.facts["bad_row_examples"][0]["kind"] in [*kind.split("|"), "fields"]


def test_bad_row_number_counts_lines_even_inside_quotes_and_blocks(tmp_path, monkeypatch):
    lines = [f"u{n},i{n},{n + 1}" for n in range(50)]
    lines[2] = '"two\nlines",i,3'
    lines[40] = "u40,i40,never"
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    refused(tmp_path, r"row 43: timestamp 'never'", path=str(path))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 40)
    refused(tmp_path, r"row 43: timestamp 'never'", path=str(path))


def test_bad_iso_time(tmp_path):
    text = "user_id,item_id,timestamp\nann,x,2014-05-13\nbob,y,13.5.2014\n"
    path = put(tmp_path / "e.csv", text)
    match = r"row 3: timestamp '13\.5\.2014' is not a time; expected an ISO date"
    refused(tmp_path, match, path=str(path))


def test_no_time_anywhere(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\nann,x,soon\n")
    refused(tmp_path, "expected epoch seconds, epoch milliseconds or an ISO date", path=str(path))


def test_bad_rating(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp,rating\nann,x,1,good\n")
    chosen = ALL.model_copy(update={"rating_threshold": 3.0})
    refused(tmp_path, r"row 2: rating 'good' is not a number", chosen, path=str(path))


def test_bad_json_line(tmp_path):
    good = '{"user_id": "u", "item_id": "i", "timestamp": 1}\n'
    path = put(tmp_path / "e.jsonl", good + '{"user_id": \n[1]\n' + good)
    refused(tmp_path, r"e\.jsonl: row 2: the line is not a JSON object", path=str(path))
    found = read_events(make_source({"name": "tabular", "path": str(path)}), bad_rows="skip")
    assert (len(found), found.facts["bad_rows"]) == (2, {"json": 2})


def test_bytes_that_are_not_utf_8(tmp_path, monkeypatch):
    data = GOOD.encode() + "zoë,x,3\n".encode("latin-1")
    place = data.index(b"\xeb")
    match = rf"e\.csv: row 4: byte {place} \(0xeb\) is not UTF-8 text.*--encoding latin-1"
    path = put(tmp_path / "e.csv", data)
    refused(tmp_path, match, path=str(path))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 9)
    refused(tmp_path, match, path=str(path))
    refused(tmp_path, match, path=str(put(tmp_path / "e.csv", gzip.compress(data))))


def test_truncated_gzip_and_zip_and_parquet(tmp_path):
    whole = gzip.compress((GOOD + "u,i,1\n" * 1000).encode(), mtime=0)
    path = put(tmp_path / "e.csv.gz", whole[:-12])
    refused(tmp_path, "truncated or damaged.*again", path=str(path))
    path = put(tmp_path / "ml.zip", b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="not a whole zip archive"):
        prepare({"name": "movielens", "path": str(path)})
    path = put(tmp_path / "e.parquet", b"PAR1 nothing")
    refused(tmp_path, "is not a parquet file", path=str(path))


def test_quote_that_never_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 64)
    monkeypatch.setattr(reading, "QUOTED_BYTES", 256)
    text = "user_id,item_id,timestamp\n" + 'u,5" pan,3\n' + "u,i,4\n" * 200
    path = put(tmp_path / "e.csv", text)
    refused(tmp_path, "double quote that opens after row .*--no-quotes", path=str(path))
    found = read_events(make_source({"name": "tabular", "path": str(path), "quotes": False}))
    assert (len(found), found.item_ids[0]) == (201, '5" pan')


def test_nothing_left_after_the_k_core_says_the_counts(tmp_path):
    path = put(tmp_path / "e.csv", GOOD)
    match = (
        r"nothing is left: of 2 interactions \(2 users, 2 items\) none is in the core of users "
        r"with at least 5 and items with at least 5.*--k-core 1"
    )
    refused(tmp_path, match, PrepareConfig(), path=str(path))


def test_nothing_reaches_the_rating_threshold(tmp_path):
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp,rating\nann,x,1,2\n")
    chosen = ALL.model_copy(update={"rating_threshold": 3.0})
    refused(tmp_path, r"no usable event. Read 1 rows: 0 bad, 1 rated below", chosen, path=str(path))


def test_unknown_format_column_title_and_source_option(tmp_path):
    refused(tmp_path, "does not say which format", path=str(put(tmp_path / "events.xyz", GOOD)))
    events = put(tmp_path / "e.csv", GOOD)
    items = put(tmp_path / "i.csv", "item_id,title,brand\nx,t,b\n")
    options = {"path": str(events), "items": str(items)}
    refused(tmp_path, r"i\.csv: no column 'brnd'.*'brand'", columns=["brnd"], **options)
    refused(tmp_path, r"i\.csv: no column 'titel'.*'title'", title="titel", **options)
    refused(tmp_path, r"i\.csv: no column 'asin'", items_id="asin", **options)
    with pytest.raises(ConfigError, match=r"source\.usr: unknown key.*'user'"):
        prepare({"name": "tabular", "path": "x", "usr": "u"})
    with pytest.raises(ConfigError, match=r"source\.name: got 'tabula'.*'tabular'"):
        prepare({"name": "tabula", "path": "x"})


def test_global_time_refuses_times_that_cannot_be_split(tmp_path):
    chosen = ALL.model_copy(update={"split": "global_time"})
    path = put(tmp_path / "e.csv", GOOD.replace("100", "200"))
    refused(tmp_path, "leaves a split empty.*split=leave_one_out", chosen, path=str(path))
    path = put(tmp_path / "n.csv", GOOD)
    match = "2 of 2 interactions have no timestamp.*split=leave_one_out"
    refused(tmp_path, match, chosen, path=str(path), timestamp=None)


def test_sources_say_what_they_expected_in_a_folder(tmp_path):
    cases = {
        "movielens": "Expected a folder or the official .zip archive with u.data",
        "recbole": "expected one .inter file, found none",
        "sequences": "no sequences file here. Expected sequences.txt",
        "amazon": "expected one reviews file here, found none",
    }
    for name, match in cases.items():
        with pytest.raises(DataError, match=match):
            prepare({"name": name, "path": str(tmp_path)}, ALL, tmp_path / "out")
        with pytest.raises(DataError, match="no file at"):
            prepare({"name": name, "path": str(tmp_path / "nowhere")}, ALL)
    assert list(tmp_path.iterdir()) == []


def test_amazon_that_is_none(tmp_path):
    path = put(tmp_path / "r.json", '{"who": 1}\n')
    with pytest.raises(DataError, match=r"not Amazon reviews: the first record has who\. Expected"):
        prepare({"name": "amazon", "path": str(path)})
    path = put(tmp_path / "r.json", '{"reviewerID": "a", "asin": "b", "unixReviewTime": 5}\n')
    with pytest.raises(DataError, match="got release=2023, but the keys are those of 2014"):
        prepare({"name": "amazon", "path": str(path), "release": "2023"})


def test_recbole_header_without_types(tmp_path):
    path = put(tmp_path / "d.inter", "user_id\titem_id\n1\t2\n")
    with pytest.raises(DataError, match="header field 'user_id' has no type"):
        prepare({"name": "recbole", "path": str(path)})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1 2 3\n1 4\n", "row 2: this user has a line already"),
        ("1 2 3\n2\n", "row 2: a user without items"),
    ],
)
def test_broken_sequences(tmp_path, text, match):
    path = put(tmp_path / "sequences.txt", text)
    with pytest.raises(DataError, match=match):
        prepare({"name": "sequences", "path": str(path)}, ALL)


def test_broken_files_beside_sequences(tmp_path):
    put(tmp_path / "sequences.txt", "1 2 3\n")
    put(tmp_path / "timestamps.jsonl", '{"user": 1}\n')
    with pytest.raises(DataError, match=r"timestamps\.jsonl: row 1: expected an object with user"):
        prepare({"name": "sequences", "path": str(tmp_path)}, ALL)
    put(tmp_path / "timestamps.jsonl", '{"user": 1, "ts": ["soon", 3]}\n')
    with pytest.raises(DataError, match=r"row 1: timestamp 'soon' is not a time"):
        prepare({"name": "sequences", "path": str(tmp_path)}, ALL)
    (tmp_path / "timestamps.jsonl").unlink()
    put(tmp_path / "items.jsonl", '{"title": "x"}\n')
    with pytest.raises(DataError, match=r"items\.jsonl: row 1: expected an object with item_id"):
        prepare({"name": "sequences", "path": str(tmp_path)}, ALL)
    with pytest.raises(DataError, match="hold no ratings"):
        chosen = ALL.model_copy(update={"rating_threshold": 3.0})
        prepare({"name": "sequences", "path": str(tmp_path)}, chosen)


def test_member_missing_from_an_archive_is_no_crash(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(DataError, match="holds no MovieLens ratings"):
        prepare({"name": "movielens", "path": str(tmp_path / "ml.zip")})


def test_full_disk_leaves_the_old_dataset_and_nothing_else(tmp_path, monkeypatch):
    source = {"name": "tabular", "path": str(put(tmp_path / "raw" / "e.csv", GOOD))}
    out = tmp_path / "made" / "out"
    before = prepare(source, ALL, out).fingerprint

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        prepare(source, ALL, out)
    monkeypatch.undo()
    assert prepare(source, ALL).interactions.num_users == 2
    from genrec.data import Dataset

    assert Dataset.load(out).fingerprint == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_users_whose_times_mix_units_are_bad_rows_not_1970(tmp_path):
    times = [1400000000, 1400000001, 1400000002000]
    lines = "".join(f"u,i{n},{time}\n" for n, time in enumerate(times))
    path = put(tmp_path / "e.csv", "user_id,item_id,timestamp\n" + lines)
    match = r"row 4: timestamp '1400000002000' is not a time; expected a number of s"
    refused(tmp_path, match, path=str(path))
    assert np.array(times).max() == 1400000002000
