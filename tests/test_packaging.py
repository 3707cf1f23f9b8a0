"""What is installed is what is declared: dependencies, pins, the wheel, and the checks of CI."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from genrec import __version__

DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}
BRIEF = {"torch", "transformers", "peft", "scikit-learn", "accelerate", "numpy", "wandb"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in wanted)  # no path, no URL, no +
    return {canonicalize_name(name): v for name, _, v in (line.partition("==") for line in wanted)}


def requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    optional = [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in [*project["dependencies"], *optional]]


def names(found: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in found}


def third_party(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, distribution) for every import in genrec that is neither ours nor Python's."""
    for path in sorted((root / "genrec").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules}:
                if top != "genrec" and top not in sys.stdlib_module_names:
                    yield path.name, canonicalize_name(DISTRIBUTIONS.get(top, top))


def test_every_import_is_declared(root: Path, project: dict[str, Any]) -> None:
    declared = names(requirements(project, "text", "plots", "images"))
    found = set(third_party(root))
    assert found
    assert not {(where, name) for where, name in found if name not in declared}


def test_every_dependency_is_used_and_has_its_reason(root: Path, project: dict[str, Any]) -> None:
    required = names(requirements(project))
    used = {name for _, name in third_party(root)}
    assert BRIEF <= required
    assert required - used <= BRIEF
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8").lower()
    everything = names(requirements(project, *project["optional-dependencies"]))
    assert not [name for name in sorted(everything) if f"`{name}`" not in text]


def test_pins_cover_and_satisfy_the_ranges(project: dict[str, Any], pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"
    assert "genrec" not in pins
    installed_here = [n for n in project["optional-dependencies"] if n not in ("serving", "ray")]
    for requirement in requirements(project, *installed_here):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (str(requirement), version)


def test_version_is_one(project: dict[str, Any], root: Path) -> None:
    assert project["version"] == __version__
    assert f"## [{__version__}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_runs_what_the_readme_promises(root: Path) -> None:
    script = root / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    for command in ("make check", "make test", "make demo QUICK=1", "make wheel"):
        assert command in text
    assert not re.search(r"(?<![\w}])/(?:tmp|usr|opt|home)/", text.partition("\n")[2])


def test_licence_is_apache(root: Path) -> None:
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without isolation (no network) by the backend itself."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling (extra dev)")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return next(folder.glob("genrec-*.whl"))


def test_wheel_holds_the_package_the_configurations_and_nothing_else(
    wheel: Path, root: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        entry_points = archive.read(f"genrec-{__version__}.dist-info/entry_points.txt").decode()
    info = f"genrec-{__version__}.dist-info"
    assert {file.partition("/")[0] for file in files} == {"genrec", info}
    assert f"{info}/licenses/LICENSE" in files
    assert "genrec = genrec.cli:main" in entry_points
    ours = {p.relative_to(root).as_posix() for p in (root / "genrec").rglob("*.py")}
    assert ours <= files
    configs = {p.relative_to(root).as_posix() for p in (root / "configs").rglob("*.yaml")}
    assert {f"genrec/{name}" for name in configs} <= files
    assert not [file for file in files if file.endswith((".pyc", ".inter", ".safetensors"))]


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = (
        "from genrec.cli import main\n"
        "from genrec.configs_folder import find_config\n"
        "print(find_config('demo'))\n"
        "main(['run', str(find_config('demo')), '--dry-run'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place, _, resolved = done.stdout.partition("\n")
    assert Path(place) == tmp_path / "site" / "genrec" / "configs" / "demo.yaml"
    assert resolved.startswith("name: demo\n") and "tokenizer:" in resolved
