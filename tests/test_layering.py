"""The architecture as a test: imports go down the layers, heavy imports stay out of the way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "genrec"

# The table of docs/architecture.md. Siblings of one layer may import each other only where listed.
LAYERS = [
    {
        "errors",
        "config",
        "artifacts",
        "runtime",
        "assets",
        "configs_folder",
        "weights",
        "sampled_softmax",
        "repeats",
    },
    {"item_index"},
    {"data", "features"},
    {"tokenizers", "models", "decoding", "calibration", "evaluation", "instructions"},
    {
        "inference",
        "bundle",
        "request_rows",
        "answers",
        "asking",
        "titles",
        "trainers",
        "recommender",
        "pipeline",
        "testing",
    },
    {"serving", "cli"},
]
SIBLINGS_APART = LAYERS[3]
DECODING_SEES = LAYERS[0] | LAYERS[1] | {"decoding"}


def layer_of(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            yield parts[0], path


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def genrec_imports(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imports(path) if name.startswith("genrec.")}
    return {name for name in found if any(name in names for names in LAYERS)}


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {name for name, _ in modules()} <= known


def test_imports_only_go_down() -> None:
    wrong = []
    for name, path in modules():
        for other in genrec_imports(path) - {name}:
            up = layer_of(other) > layer_of(name)
            sideways = layer_of(other) == layer_of(name) and {name, other} <= SIBLINGS_APART
            if up or sideways:
                wrong.append(f"{path.relative_to(PACKAGE)} imports genrec.{other}")
    assert not wrong, wrong


def test_item_index_sees_layer_zero_only_and_decoding_layers_zero_and_one() -> None:
    for name, path in modules():
        if name == "item_index":
            assert genrec_imports(path) <= LAYERS[0]
        if name == "decoding":
            assert genrec_imports(path) <= DECODING_SEES, path


def test_only_main_modules_are_scripts() -> None:
    scripts = [p for _, p in modules() if '__name__ == "__main__"' in p.read_text(encoding="utf-8")]
    assert scripts == []


def _loaded_by(code: str, cwd: Path) -> set[str]:
    script = f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=cwd
    )
    return set(done.stdout.split())


def test_importing_genrec_is_cheap(root: Path) -> None:
    heavy = {"torch", "transformers", "polars", "sklearn", "pydantic", "numpy", "wandb", "peft"}
    assert not _loaded_by("import genrec", root) & heavy


def test_the_command_line_starts_without_heavy_libraries(root: Path) -> None:
    heavy = {"torch", "transformers", "polars", "sklearn", "wandb", "peft", "accelerate"}
    loaded = _loaded_by("from genrec.cli import build_app; build_app()", root)
    assert not loaded & heavy


def test_the_recommender_never_loads_training_code(root: Path) -> None:
    loaded = _loaded_by("import genrec.recommender, sys", root)
    assert "torch" in loaded and not loaded & {"wandb", "peft"}
    code = (
        "import genrec.recommender, sys;"
        "assert not [m for m in sys.modules if m.startswith(('genrec.trainers','genrec.pipeline'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_tokenizers_from_the_repository_root_is_hugging_faces(root: Path) -> None:
    """A top-level folder of that name would shadow it, and transformers would not import."""
    code = "import tokenizers; print(tokenizers.__file__); print(tokenizers.Tokenizer)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert "site-packages" in done.stdout and str(root / "tokenizers") not in done.stdout
    assert not (root / "tokenizers").exists()


@pytest.mark.parametrize("word", ["pickle", "joblib"])
def test_nothing_is_pickled(word: str) -> None:
    users = [path for _, path in modules() if word in {n.split(".")[0] for n in imports(path)}]
    assert users == []


def test_no_unsafe_torch_files() -> None:
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "torch.save(" not in text, path
        assert "allow_pickle=True" not in text, path
