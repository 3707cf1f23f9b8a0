"""Weights of a torch module as plain arrays and back, with names and shapes checked.

It knows nothing about files (see `genrec.artifacts`) nor about which module it is. A module that
stands on weights from elsewhere says which entries these are (`base_names()`); they are neither
returned nor expected.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from genrec.errors import ArtifactError


def model_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a module's own parameters and buffers as numpy arrays; tied weights once.

    bfloat16, which numpy has not, becomes float32; loading brings back the same values.
    """
    arrays: dict[str, np.ndarray] = {}
    base_names = getattr(model, "base_names", None)
    others: set[str] = base_names() if base_names is not None else set()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in others or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        values = tensor.detach().cpu()
        if values.dtype == torch.bfloat16:
            values = values.float()
        arrays[name] = values.numpy().copy()
    return arrays


def load_model_arrays(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Load what `model_arrays` gave; raises `ArtifactError` if names or shapes differ."""
    own = model_arrays(model)
    missing, unknown = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    shapes = [n for n in own if n in arrays and own[n].shape != arrays[n].shape]
    if missing or unknown or shapes:
        raise ArtifactError(
            f"the weights do not fit this model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {shapes[:3]}. Expected the configuration and index that it was trained "
            "with."
        )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    model.load_state_dict(tensors, strict=False)
