"""How weights move: learning-rate schedule, optimizer, and whether a precision pays here.

Pure functions of a trainer's `Config`; when they are called is the loop's business.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from genrec import runtime

log = runtime.get_logger(__name__)


def learning_rate(config: Any, step: int, total_steps: int) -> float:
    """Return the learning rate of an optimizer step (0-based)."""
    warmup = max(1, round(config.warmup * total_steps)) if config.warmup else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def warn_of_slow_precision(config: Any, device: torch.device) -> None:
    """Log a warning, with the remedy, where bf16 would slow training down."""
    if config.precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        log.warning(
            "trainer.precision=bf16: this processor has no bf16 instructions, so training is many "
            "times slower than in fp32. Set trainer.precision=fp32."
        )


def cpu_has_bf16() -> bool:
    """Return whether the CPU kernels use bf16 instructions here (True if they do not say)."""
    says = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(says()) if says else True


def make_optimizer(model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
    """Return fused AdamW; weight decay is for matrices only (not for norms and biases)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
