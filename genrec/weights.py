"""Weights of a torch module as plain arrays and back, with names and shapes checked.

It knows nothing about files (see `genrec.artifacts`) nor about which module it is. A module that
stands on weights from elsewhere says which entries these are (`base_names()`); they are neither
returned nor expected.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from genrec.errors import ArtifactError


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers; tied weights once."""
    base_names = getattr(model, "base_names", None)
    others: set[str] = base_names() if base_names is not None else set()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in others and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a copy; bfloat16, which numpy has not, becomes float32."""
    values = tensor.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()


def model_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a module's own tensors as numpy arrays; loading brings back the same values."""
    return {name: to_array(tensor) for name, tensor in own_tensors(model).items()}


def load_model_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load what `model_arrays` gave; raises `ArtifactError` if names or shapes differ."""
    check_fit(own_tensors(model), arrays)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    model.load_state_dict(tensors, strict=False)


def check_fit(own: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `ArtifactError` unless arrays have the names and shapes of tensors."""
    missing, unknown = sorted(set(own) - set(arrays)), sorted(set(arrays) - set(own))
    shapes = [n for n in own if n in arrays and tuple(own[n].shape) != arrays[n].shape]
    if missing or unknown or shapes:
        raise ArtifactError(
            f"the weights do not fit this model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {shapes[:3]}. Expected the configuration and index that it was trained "
            "with."
        )
