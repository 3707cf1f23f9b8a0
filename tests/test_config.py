"""Strict configs: types, dotted paths, nearest names, overrides, every file in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genrec.config import StrictConfig, apply_overrides, load_yaml, parse, to_yaml
from genrec.errors import ConfigError
from genrec.pipeline.config import check_run_config, load_run_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


class Inner(StrictConfig):
    rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)


class Outer(StrictConfig):
    inner: Inner = Inner()
    name: str = "x"


def test_values_are_typed_and_lists_become_tuples() -> None:
    config = parse(Outer, {"inner": {"rate": 1, "sizes": [3]}})
    assert config.inner.rate == 1.0 and config.inner.sizes == (3,)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"inner": {"rat": 1}}, ["inner.rat", "unknown key", "'rate'"]),
        ({"inner": {"rate": "fast"}}, ["inner.rate", "'fast'", "number"]),
        ({"name": 3}, ["name", "3 (int)", "string"]),
        ({"inner": {"sizes": 5}}, ["inner.sizes", "5 (int)"]),
    ],
)
def test_errors_name_the_dotted_path(data: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Outer, data)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_overrides_are_yaml_and_leave_the_original_alone() -> None:
    data = {"a": {"b": 1}}
    changed = apply_overrides(data, ["a.b=1e-3", "a.c=[1, 2]", "d=text", "e.f=null"])
    assert changed == {"a": {"b": 0.001, "c": [1, 2]}, "d": "text", "e": {"f": None}}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize("text", ["novalue", "=3", "a.b.c=1"])
def test_bad_overrides_say_what_is_expected(text: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"a": {"b": 1}}, [text])


def test_yaml_reads_scientific_notation_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("x: 1e-3\ny: 3\nz: 1.5\nt: abc\nd: 1e5x\n")
    assert load_yaml(tmp_path / "c.yaml") == {"x": 0.001, "y": 3, "z": 1.5, "t": "abc", "d": "1e5x"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"- 1\n", "expected a mapping"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_yaml(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file at"):
        load_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_its_dump_parses_to_itself(path: Path) -> None:
    config = load_run_config(path)
    again = check_run_config(yaml.safe_load(config.to_yaml()))
    assert again.to_dict() == config.to_dict()


def test_there_are_config_files() -> None:
    assert {"demo", "demo-quick"} <= {path.stem for path in CONFIGS}


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_run_config(
            {
                "data": "folder",
                "tokeniser": {},
                "tokenizer": {"name": "rqkmean"},
                "model": {"name": "decoder_only", "d_modell": 3},
                "trainer": {"epochs": 0},
                "seeds": [1, 1],
            }
        )
    message = str(error.value)
    for words in (
        "tokeniser: unknown key",
        "'tokenizer'",
        "'rqkmeans'",
        "model.d_modell",
        "'d_model'",
        "trainer.epochs: got 0",
        "seeds",
    ):
        assert words in message, message


def test_data_may_be_a_folder_name() -> None:
    config = check_run_config({"data": "some/folder"})
    assert config.data.dataset == "some/folder" and config.to_dict()["data"] == {
        "dataset": "some/folder"
    }


@pytest.mark.parametrize("data", [None, {}, 3, {"dataset": "x", "source": {"name": "recbole"}}])
def test_data_must_be_exactly_one_thing(data: object) -> None:
    with pytest.raises(ConfigError, match="data"):
        check_run_config({"data": data})


def test_width_must_cover_the_cut_offs() -> None:
    with pytest.raises(ConfigError, match=r"decoding\.width: got 5.*10"):
        check_run_config({"data": "x", "decoding": {"width": 5}})


def test_a_shorthand_gives_way_to_a_dotted_override() -> None:
    assert apply_overrides({"data": "x"}, ["data.dataset=y"]) == {"data": {"dataset": "y"}}
    changed = apply_overrides({}, ["features=lsa", "features.num_dimensions=4"])
    assert changed == {"features": {"name": "lsa", "num_dimensions": 4}}


def test_to_yaml_round_trips() -> None:
    assert yaml.safe_load(to_yaml(Outer())) == {
        "inner": {"rate": 0.001, "sizes": [1, 2]},
        "name": "x",
    }
