"""Everything that exact resuming needs, in one atomic artifact: no pickle, checksummed.

A checkpoint holds model and optimizer state and the best weights so far as arrays, and the place in
the run as JSON (random numbers are a function of the place). What the place means is the trainer's
business.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genrec.artifacts import Artifact, load_artifact, save_artifact
from genrec.weights import load_model_arrays, model_arrays

KIND = "checkpoint"
_STEP = re.compile(r"^step-(\d{9})$")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, np.ndarray],
    place: dict[str, Any],
    key: str,
    keep: int,
) -> Path:
    """Write `folder/step-<step>` and delete all but the newest `keep` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        model: weights of now.
        optimizer: its state, moment by moment.
        best: weights of the best validation so far (may be empty).
        place: JSON: epoch, batch, early-stopping state.
        key: fingerprint of everything that determines the run; resuming asks for the same.
        keep: how many to keep.
    """
    arrays = {f"model/{k}": v for k, v in model_arrays(model).items()}
    arrays |= {f"best/{k}": v for k, v in best.items()}
    arrays |= {f"optimizer/{k}": v for k, v in _optimizer_arrays(optimizer).items()}
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


def restore(
    artifact: Artifact, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, np.ndarray]:
    """Put model and optimizer states back; return the best weights so far."""
    parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, array in artifact.arrays.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = array
    load_model_arrays(model, parts["model"])
    _load_optimizer(optimizer, parts["optimizer"])
    return parts["best"]


def _optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    arrays = {}
    for number, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            arrays[f"{number}/{name}"] = torch.as_tensor(value).detach().cpu().numpy().copy()
    return arrays


def _load_optimizer(optimizer: torch.optim.Optimizer, arrays: dict[str, np.ndarray]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        number, _, moment = name.partition("/")
        state.setdefault(int(number), {})[moment] = torch.from_numpy(np.array(array))
    groups = optimizer.state_dict()["param_groups"]  # set by the configuration, not by the file
    optimizer.load_state_dict({"state": state, "param_groups": groups})
