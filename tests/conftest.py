"""Fixtures of the whole suite: one CPU thread, no network, a small trained run for many tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GENREC_PROGRESS"] = "0"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def beauty_folder() -> Path:
    """Amazon Beauty beside the checkout, or skip."""
    folder = SHARED / "data" / "amazon-beauty"
    if not folder.is_dir():
        pytest.skip("needs shared/data/amazon-beauty beside the checkout")
    return folder
