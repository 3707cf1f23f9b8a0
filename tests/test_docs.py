"""The documents are true: links lead somewhere, commands parse, tables equal what they describe."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from genrec.calibration import CALIBRATORS
from genrec.cli import build_app
from genrec.data import SOURCES
from genrec.features import FEATURES
from genrec.models import BACKBONES
from genrec.models.baselines import BASELINES
from genrec.tokenizers import COLLISIONS, TOKENIZERS
from genrec.trainers import TRAINERS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
FOLDERS = ("genrec", "tests", "docs", "configs", "benchmarks")
# Written in two parts, so that this file does not find itself.
NOT_HERE = [
    "/wo" + "rk/",
    "/ro" + "ot/",
    "/ho" + "me/",
    "py" + "pi.",
    "python" + "hosted",
    "download.py" + "torch",
    "npm" + "js",
    "artifact" + "ory",
    "--index" + "-url",
]


def tracked() -> list[Path]:
    """Return the files of the repository, new ones too, ignored ones not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.M | re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it; raises what the command line would print."""
    command = typer.main.get_command(build_app())
    name = "genrec"
    context = None
    while hasattr(command, "commands"):
        context = command.make_context(name, list(arguments), parent=context)
        name, command, arguments = command.resolve_command(context, list(arguments))
    command.make_context(name, list(arguments), parent=context)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(name))
    local = [t.partition("#")[0] for t in targets if not t.startswith(("http", "#", "mailto:"))]
    missing = [t for t in local if not ((ROOT / name).parent / t).exists()]
    assert not missing


def test_paths_that_are_named_exist() -> None:
    """In documents (between backticks), and documents that the code points to.

    Pages add-a-*.md name files that their reader is going to write.
    """
    pattern = rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`"
    pages = [name for name in NAMES if "/add-a-" not in name]
    named = [(name, path) for name in pages for path in re.findall(pattern, text_of(name))]
    for source in sorted(p for folder in FOLDERS[:1] for p in (ROOT / folder).rglob("*.py")):
        found = re.findall(r"\bdocs/[\w-]+\.md", source.read_text(encoding="utf-8"))
        named += [(source.relative_to(ROOT).as_posix(), path) for path in found]
    assert named
    concrete = [(name, path) for name, path in named if not re.search(r"/[A-Z]+\.", path)]
    missing = [(name, path) for name, path in concrete if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_parse(name: str, tmp_path: Path) -> None:
    for line in shell_lines(text_of(name)):
        line = line.partition("-m genrec ")[2] or line.partition("genrec ")[2]
        if not line or re.search(r"[\[|<]|\.\.\.", line) or line.endswith(".whl"):
            continue
        parse(shlex.split(line, comments=True))


def test_parsing_does_find_mistakes() -> None:
    for wrong in (["nonsense"], ["recommend", "x", "--histori", "1"], ["assets", "get"]):
        with pytest.raises(Exception, match=r"(?i)no such"):
            parse(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_are_named_exist(name: str) -> None:
    commands = set(typer.main.get_command(build_app()).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"`genrec ([a-z]+)\b", text_of(name)))
    assert named <= commands


@pytest.mark.parametrize("name", [*NAMES, ".ci/run", "constraints.txt", ".pre-commit-config.yaml"])
def test_make_targets_that_are_named_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), flags=re.M))
    text = text_of(name)
    named = set(re.findall(r"`make ([a-z]+)", text)) | set(
        re.findall(r"^make ([a-z]+)", text, re.M)
    )
    named |= set(re.findall(r'^step "[^"]*" make ([a-z]+)', text, re.M))
    assert named <= targets, named - targets


def test_every_command_is_in_the_readme() -> None:
    readme = text_of("README.md")
    missing = [
        name
        for name in typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
        if f"genrec {name}" not in readme
    ]
    assert not missing


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    rows = {
        (row["dataset"], row["masked"], row["name"]): row
        for row in json.loads(text_of("docs/results/quality.json"))["rows"]
    }
    columns = {False: "kept in", True: "left out"}
    expected = []
    for data, masked in dict.fromkeys((data, masked) for data, masked, _ in rows):
        here = {name: row for (d, m, name), row in rows.items() if (d, m) == (data, masked)}
        tested = [name for name in here if f"vs_{name}" in here["genrec"]]
        sasrecs = [name for name in tested if name.startswith("sasrec-")]
        best = max(sasrecs, key=lambda name: here[name]["ndcg@10"])
        figures = {n: f"{r['recall@10']:.4f} / {r['ndcg@10']:.4f}" for n, r in here.items()}
        p = here["genrec"][f"vs_{best}"]["p_holm"]
        cells = [f"`{data}`", columns[masked], figures["genrec"], f"{figures[best]} (`{best}`)"]
        cells += [f"{p:.3f}", figures["ease"], figures["markov"]]
        expected.append(" | ".join(cells).replace("0.", "."))
    _, table, _ = text_of("README.md").split("<!-- quality -->")
    found = [line.strip("| ") for line in table.strip().splitlines()[2:]]
    assert sorted(found) == sorted(expected)


def test_no_machine_and_no_registry_is_named() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT).as_posix()
        found += [(name, word) for word in NOT_HERE if word in text.lower()]
    assert not found


def test_nothing_points_outside_the_repository() -> None:
    outside = re.compile(r"\bshared/|\b(?:methods|design|performance|reference-numbers|style)\.md")
    readers = [p for p in tracked() if p.relative_to(ROOT).parts[0] != "tests"]
    found = [
        (path.relative_to(ROOT).as_posix(), match.group())
        for path in readers
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt"}
        for match in outside.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_layers_of_the_architecture_are_those_of_the_test() -> None:
    tree = ast.parse(text_of("tests/test_layering.py"))
    layers = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS"
    )
    rows = re.findall(r"^\| (\d) \| (.*) \|$", text_of("docs/architecture.md"), flags=re.M)
    assert [set(re.findall(r"`(\w+)`", modules)) for _, modules in rows] == layers
    assert [int(number) for number, _ in rows] == list(range(len(layers)))


@pytest.mark.parametrize("name", ["docs/architecture.md", "README.md"])
def test_rooms_are_named(name: str) -> None:
    """Every sub-package has its line where newcomers look for it."""
    rooms = {path.parent.name for path in (ROOT / "genrec").glob("*/__init__.py")}
    prefix = "genrec/" if name == "README.md" else "`"
    assert not [room for room in sorted(rooms) if f"{prefix}{room}" not in text_of(name)]


def test_every_method_has_a_row_in_the_paper_index() -> None:
    text = text_of("docs/paper_index.md")
    methods = [*TOKENIZERS, *COLLISIONS, *BACKBONES, *TRAINERS, *CALIBRATORS, *BASELINES]
    vectors = [name for name in FEATURES if name not in ("auto", "file")]
    sources = [name for name in SOURCES if name != "tabular"]
    assert not [name for name in [*methods, *vectors, *sources] if name not in text]
