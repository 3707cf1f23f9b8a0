"""What are the whole values of a tensor that may lie in shards on several processes (FSDP2)?

Every process must ask together, for the same tensors in the same order. It knows no files and no
training.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from genrec.weights import check_fit, own_tensors, to_array


def full_array(tensor: Tensor) -> np.ndarray:
    """Return a copy of all values of a tensor; bfloat16 becomes float32."""
    whole = getattr(tensor.detach(), "full_tensor", None)  # of shards; their import takes seconds
    return to_array(tensor if whole is None else whole())


@torch.no_grad()
def put(tensor: Tensor, array: np.ndarray) -> None:
    """Write whole values into a tensor; of shards, each process writes its own."""
    values = torch.from_numpy(np.array(array)).to(tensor.device, tensor.dtype)
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def whole_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Return what `genrec.weights.model_arrays` gives, of a module that may lie in shards."""
    return {name: full_array(tensor) for name, tensor in own_tensors(module).items()}


def load_whole_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load what `whole_arrays` gave; raises `ArtifactError` if names or shapes differ."""
    own = own_tensors(module)
    check_fit(own, arrays)
    for name, tensor in own.items():
        put(tensor, arrays[name])
