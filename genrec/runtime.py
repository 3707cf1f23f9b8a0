"""Where code runs: devices, seeds, versions, progress bars, logging, lazy class look-up.

Nothing here changes a result except `seed_everything`. Heavy libraries are imported inside
functions, so that `import genrec` and `genrec --help` stay fast.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from genrec.errors import ConfigError, UserError, nearest

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "scikit-learn", "numpy", "polars")


def get_logger(name: str) -> logging.Logger:
    """Return a logger below "genrec"; the command line decides how it prints."""
    return logging.getLogger(name if name.startswith("genrec") else f"genrec.{name}")


def load_object(path: str) -> Any:
    """Import "package.module:Name" and return the object."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def lookup(registry: Mapping[str, str], name: str, *, what: str) -> Any:
    """Return the class registered under `name`, or raise `ConfigError` with the nearest name."""
    if name not in registry:
        raise ConfigError(
            f"{what}: got {name!r}, expected one of {', '.join(sorted(registry))}."
            f"{nearest(name, registry)}"
        )
    return load_object(registry[name])


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_default_device: ContextVar[Any] = ContextVar("default_device", default=None)


@contextmanager
def default_device(device: Any) -> Iterator[None]:
    """Let `choose_device()` return this `torch.device` inside the block.

    For parts of a run that have no device setting of their own (encoders, quantizers).
    """
    token = _default_device.set(device)
    try:
        yield
    finally:
        _default_device.reset(token)


def choose_device(name: str | None = None) -> Any:
    """Return a `torch.device`: the named one, that of `default_device`, or the best at hand.

    Raises:
        UserError: the named device is not available here.
    """
    import torch

    if name is None:
        if _default_device.get() is not None:
            return _default_device.get()
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: got {name!r}, which is not available here ({str(error).splitlines()[0]}). "
            "Use 'cpu', or leave it out to let genrec choose."
        ) from None
    return device


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions of genrec, Python and the libraries that decide results."""
    found = {"python": sys.version.split()[0]}
    for name in ("genrec", *LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any]:
    """Return the commit of the checkout that genrec runs from ({} when installed from a wheel)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        run = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*run, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*run, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": bool(status)}


def process_index() -> int:
    """Return the rank of this process under accelerate or torchrun (0 when alone)."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with the time left; yields `advance(n)`.

    Silent on ranks other than 0, when GENREC_PROGRESS=0, and when standard error is no terminal.
    """
    quiet = process_index() != 0 or os.environ.get("GENREC_PROGRESS") == "0"
    if quiet or not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int = 1) -> None:
            bar.advance(task, count)

        yield advance


def _nothing(count: int = 1) -> None:
    """Stand in for the progress bar where none is shown."""
