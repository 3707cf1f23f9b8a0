"""Artifacts: whole or absent, checked on load, no pickle, clear messages."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from genrec import artifacts
from genrec.artifacts import (
    atomic_directory,
    atomic_file,
    fingerprint,
    load_artifact,
    save_artifact,
    write_json_atomic,
)
from genrec.errors import ArtifactError, MismatchError


def _save(path: Path) -> artifacts.Artifact:
    return save_artifact(
        path,
        kind="vectors",
        arrays={"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])},
        config={"x": 1},
        upstream={"index": "abc"},
        extra={"n": 2},
    )


def test_save_and_load_are_equal(tmp_path: Path) -> None:
    saved = _save(tmp_path / "v")
    loaded = load_artifact(tmp_path / "v", kind="vectors")
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.config == {"x": 1} and loaded.extra == {"n": 2}
    assert (
        np.array_equal(loaded.arrays["a"], saved.arrays["a"]) and loaded.arrays["b"].dtype == bool
    )
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == [
        "arrays.safetensors",
        "manifest.json",
    ]


def test_the_fingerprint_is_of_content_only(tmp_path: Path) -> None:
    one, two = _save(tmp_path / "one"), _save(tmp_path / "two")
    other = save_artifact(tmp_path / "o", kind="vectors", arrays={"a": np.zeros(2)})
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_truncated_and_edited_files_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "v")
    file = tmp_path / "v" / "arrays.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"damaged: .* bytes"):
        load_artifact(tmp_path / "v", kind="vectors")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum"):
        load_artifact(tmp_path / "v", kind="vectors")
    file.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_artifact(tmp_path / "v", kind="vectors")


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "v")
    path = tmp_path / "v" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["x"] = 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="was edited"):
        load_artifact(tmp_path / "v", kind="vectors")
    path.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(tmp_path / "v", kind="vectors")


def test_other_kinds_versions_and_places_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "v")
    with pytest.raises(ArtifactError, match="'vectors' artifact, expected 'index'"):
        load_artifact(tmp_path / "v", kind="index")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_artifact(tmp_path / "none", kind="vectors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="not a genrec vectors"):
        load_artifact(tmp_path / "empty", kind="vectors")
    path = tmp_path / "v" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format_version"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="newer genrec"):
        load_artifact(tmp_path / "v", kind="vectors")


def test_a_mismatch_names_both_fingerprints(tmp_path: Path) -> None:
    saved = _save(tmp_path / "v")
    saved.require_upstream("index", "abc")
    with pytest.raises(MismatchError, match=r"abc.*def"):
        saved.require_upstream("index", "def")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "v") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "f.txt") as file:
        file.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_message_and_keeps_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = _save(tmp_path / "v")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "write_artifact", full)
    with pytest.raises(ArtifactError, match=r"disk is full.*free some space"):
        _save(tmp_path / "v")
    assert load_artifact(tmp_path / "v", kind="vectors").fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_a_replaced_artifact_is_the_new_one(tmp_path: Path) -> None:
    _save(tmp_path / "v")
    save_artifact(tmp_path / "v", kind="index", extra={"n": 1})
    assert load_artifact(tmp_path / "v", kind="index").extra == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a" / "r.json", {"é": [1.5]})
    assert json.loads((tmp_path / "a" / "r.json").read_text(encoding="utf-8")) == {"é": [1.5]}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.json"]


def test_fingerprints_tell_types_shapes_and_order_apart() -> None:
    values = [
        ("a", "b"),
        ("ab",),
        (1,),
        ("1",),
        (np.array([1, 2]),),
        (np.array([1, 2], np.int32),),
        (np.array([[1, 2]]),),
        (np.array(["1", "2"], dtype=object),),
        ({"a": 1, "b": 2},),
    ]
    assert len({fingerprint(*v) for v in values}) == len(values)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_strings_survive_packing(tmp_path: Path) -> None:
    strings = ["", "Alien", "Am\u00e9lie", "\U0001f47d", "a\nb"]
    encoded, offsets = artifacts.pack_strings(strings)
    assert encoded.dtype == np.uint8 and offsets.dtype == np.int64
    arrays = {"encoded": encoded, "offsets": offsets}
    save_artifact(tmp_path / "a", kind="names", arrays=arrays)
    again = load_artifact(tmp_path / "a", kind="names").arrays
    assert artifacts.unpack_strings(again["encoded"], again["offsets"]) == strings
    assert artifacts.unpack_strings(*artifacts.pack_strings([])) == []
