"""What are a model's weights on average over the last steps? An exponential moving average.

The average is a copy of the weights that train, moved towards them after every step (Polyak &
Juditsky 1992 in the exponential form of `torch.optim.swa_utils`); frozen weights have none. It
knows nothing of losses and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from genrec.trainers.sharding import full_array, put


class Average:
    """Moving average of a module's trainable weights.

    The decay of step n (from 1) is min(decay, n / (n + 9)): the beginning of a run is forgotten
    soon, however short the run is. A pure function of the weights and the step, so that a resumed
    run averages as an uninterrupted one.

    Args:
        module: whose weights; they may be shards (FSDP2), the average is sharded alike.
        decay: of late steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
        self._names = list(weights)
        self._weights: list[torch.Tensor] = list(weights.values())
        self._decay = decay
        self._average = [weight.detach().clone() for weight in self._weights]

    def update(self, step: int) -> None:
        """Move the average; `step` counts the optimizer steps made, this one included."""
        decay = min(self._decay, step / (step + 9.0)) if step > 1 else 0.0
        get_ema_multi_avg_fn(decay)(self._average, self._weights, torch.tensor(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for a while; the weights come back bit for bit."""
        kept = [weight.detach().clone() for weight in self._weights]
        self.apply()
        try:
            yield
        finally:
            self._copy(self._weights, kept)

    def apply(self) -> None:
        """Put the average into the module for good."""
        self._copy(self._weights, self._average)

    @torch.no_grad()
    def _copy(self, to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for weight, value in zip(to, values, strict=True):
            weight.copy_(value)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the average by the weights' names."""
        pairs = zip(self._names, self._average, strict=True)
        return {name: full_array(tensor) for name, tensor in pairs}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put back what `arrays` gave."""
        for name, tensor in zip(self._names, self._average, strict=True):
            put(tensor, arrays[name])
