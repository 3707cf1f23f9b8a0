"""Everything that exact resuming needs, in one atomic artifact: no pickle, checksummed.

A checkpoint holds named groups of arrays (weights, optimizer, the best weights so far, ...) and the
place in the run as JSON (random numbers are a function of the place). What these mean is the
loop's business.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec.artifacts import Artifact, load_artifact, save_artifact
from genrec.trainers.sharding import full_array, put

KIND = "checkpoint"
_STEP = re.compile(r"^step-(\d{9})$")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    place: dict[str, Any],
    key: str,
    keep: int,
) -> Path:
    """Write `folder/step-<step>` and delete all but the newest `keep` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        parts: named groups of arrays: weights of now, the best ones so far, optimizer, ...
        place: JSON: epoch, batch, early-stopping state.
        key: fingerprint of everything that determines the run; resuming asks for the same.
        keep: how many to keep.
    """
    arrays = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
    path = folder / f"step-{step:09d}"
    save_artifact(path, kind=KIND, arrays=arrays, upstream={"run": key}, extra=place)
    for old in sorted(p for p in folder.iterdir() if _STEP.match(p.name))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def latest_checkpoint(folder: Path, *, key: str) -> Artifact | None:
    """Return the newest whole checkpoint of this very run, or None.

    A checkpoint of another run (other key) raises `MismatchError`; a damaged one `ArtifactError`.
    """
    if not folder.is_dir():
        return None
    paths = sorted(p for p in folder.iterdir() if _STEP.match(p.name))
    if not paths:
        return None
    artifact = load_artifact(paths[-1], kind=KIND)
    artifact.require_upstream("run", key)
    return artifact


def parts_of(artifact: Artifact) -> dict[str, dict[str, np.ndarray]]:
    """Return the groups of arrays of a checkpoint; empty groups are not there."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in artifact.arrays.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = array
    return parts


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Return an optimizer's moments, whole also where they lie in shards."""
    arrays = {}
    for number, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            arrays[f"{number}/{name}"] = full_array(torch.as_tensor(value))
    return arrays


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `optimizer_arrays` gave; learning rates come from the configuration."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        number, _, moment = name.partition("/")
        value = torch.from_numpy(np.array(array))
        weight = weights[int(number)]
        if moment != "step":  # shaped, and maybe sharded, as the weight
            value = torch.zeros_like(weight)
            put(value, array)
        state.setdefault(int(number), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]  # set by the configuration, not by the file
    optimizer.load_state_dict({"state": state, "param_groups": groups})
