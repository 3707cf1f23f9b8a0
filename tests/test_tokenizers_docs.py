"""Do the pages about tokenizers run as they stand, and list everything that exists?"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from genrec.config import parse_component
from genrec.features import FEATURES
from genrec.tokenizers import COLLISIONS, TOKENIZERS

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_example_of_the_walk_through_keeps_the_contract(monkeypatch):
    source, line, test = blocks("add-a-tokenizer.md", "python")
    assert len(source.splitlines()) < 60
    module = types.ModuleType("genrec.tokenizers.simhash")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)

    monkeypatch.setitem(TOKENIZERS, "simhash", "")  # undone after the test
    exec(line, {"TOKENIZERS": TOKENIZERS})
    section = yaml.safe_load(blocks("add-a-tokenizer.md", "yaml")[0])["tokenizer"]
    cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
    assert cls is module.SimHash and set(section) == set(config.to_dict())

    names: dict = {}
    exec(test, names)
    contract = names["TestSimHash"]()
    checks = [name for name in dir(contract) if name.startswith("test_")]
    assert len(checks) >= 10
    for name in checks:
        getattr(contract, name)()


@pytest.mark.parametrize(
    ("page", "table"),
    [("tokenizers", TOKENIZERS), ("tokenizers", COLLISIONS), ("features", FEATURES)],
)
def test_the_page_has_a_row_for_everything_that_exists(page, table):
    text = (DOCS / f"{page}.md").read_text()
    for name in table:
        assert re.search(rf"^\| `{name}` \|", text, flags=re.MULTILINE), name


def test_every_tokenizer_has_a_section_and_a_file():
    text = (DOCS / "tokenizers.md").read_text()
    assert all(f"\n## `{name}`" in text for name in TOKENIZERS)
    files = {path.stem for path in (DOCS.parent / "configs" / "tokenizer").glob("*.yaml")}
    assert files == set(TOKENIZERS)


def test_the_example_of_the_page_runs():
    names: dict = {}
    for source in blocks("tokenizers.md", "python"):
        exec(source, names)
    assert len(names["index"]) == 200
    assert names["report"]["index"]["num_distinct"] == 200
