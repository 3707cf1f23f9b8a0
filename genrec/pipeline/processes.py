"""Which processes and which device does a run use? Knows accelerate, and no stage."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from genrec import runtime

BARRIER_SECONDS = 6 * 3600


def make_accelerator(*, device: str | None = None) -> Accelerator:
    """Return the accelerator of this process; long stages of the first process do not time out."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=BARRIER_SECONDS))
    chosen = runtime.choose_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # accelerate takes the current one
    return Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=[waiting])
