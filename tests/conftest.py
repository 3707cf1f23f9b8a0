"""Fixtures of the whole suite: one CPU thread, no network, a small trained run for many tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GENREC_PROGRESS"] = "0"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def _restore_logging() -> None:
    logger = logging.getLogger("genrec")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers.clear()


@pytest.fixture(autouse=True)
def plain_logging() -> Iterator[None]:
    """Undo what the command line does to the logger "genrec", so that tests see its records."""
    _restore_logging()  # fixtures of a module run before this one
    yield
    _restore_logging()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Undo what `--threads` of an earlier test did to the process."""
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def ring_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset folder of 184 items ("0" to "183") that follow each other in a ring."""
    from genrec.data.synthetic import ring

    path = tmp_path_factory.mktemp("data") / "ring"
    ring(num_items=184, num_users=184, length=8).save(path)
    return path


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory, ring_dataset: Path) -> Path:
    """A complete configuration that runs in seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(
        f"""
name: small
seeds: [1]
data: {ring_dataset}
features: {{name: lsa, num_dimensions: 64}}
tokenizer: {{name: rqkmeans, num_levels: 2, codebook_size: 8}}
model: {{name: decoder_only, max_history: 6, d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32}}
trainer: {{epochs: 2, batch_size: 32, validation_users: 50, validation_width: 10}}
decoding: {{width: 12}}
evaluation: {{bootstrap_samples: 100}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage cache shared by the tests of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_cache: Path
) -> Path:
    """A run folder made by the pipeline itself: bundle/, results.json, report.html."""
    from genrec.pipeline.config import load_run_config
    from genrec.pipeline.run import Run

    out = tmp_path_factory.mktemp("runs") / "small"
    Run(load_run_config(small_config), out=out, cache=small_cache, device="cpu").execute(
        command="genrec run small.yaml"
    )
    return out
