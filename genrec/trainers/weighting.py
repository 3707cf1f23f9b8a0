"""How much does each training target count? By how popular its item is and how old it is.

Weights follow from training interactions only; their mean is 1. How a loss uses them belongs to
the backbones.

Shapes: M interactions, N items.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.data import Interactions
from genrec.errors import ConfigError

DAY = 86_400.0


class WeightingConfig(StrictConfig):
    """Weights of training targets; both kinds multiply."""

    inverse_popularity: float = Field(default=0.0, ge=0.0, le=1.0)
    """Exponent p of weights proportional to count**-p, the item's training interactions; 0: all
    alike, 1: every item counts as much as any other."""
    half_life: float | None = Field(default=None, gt=0)
    """Days after which a target counts half, back from the latest training interaction; None: age
    does not matter."""


def target_weights(training: Interactions, config: WeightingConfig) -> np.ndarray | None:
    """Return a weight per training interaction, (M,) float32 of mean 1; None where all are alike.

    Args:
        training: training interactions only.
        config: which weights.

    Raises:
        ConfigError: a half-life for interactions without timestamps.
    """
    if not len(training) or (not config.inverse_popularity and config.half_life is None):
        return None
    weights = np.ones(len(training))
    if config.inverse_popularity:
        counts_M = training.counts()[training.item_rows].astype(np.float64)
        weights *= counts_M**-config.inverse_popularity
    if config.half_life is not None:
        times = training.timestamps.astype(np.float64)
        if times.max() == times.min():
            raise ConfigError(
                f"trainer.weights.half_life: got {config.half_life} days for interactions that all "
                "have the same time, expected timestamps. Leave it out, or prepare a source that "
                "has them."
            )
        weights *= np.exp2((times - times.max()) / (DAY * config.half_life))
    return (weights / weights.mean()).astype(np.float32)
