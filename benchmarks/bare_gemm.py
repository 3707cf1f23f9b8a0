"""How long do the matrix products of a call take by themselves?

Records every matrix product that a call makes (attention counts as its two), then replays these on
the same operands and nothing else: a floor for any implementation that needs the same products. It
does not judge whether the call needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm": torch.mm, "bmm": torch.bmm}
WITH_BIAS = {"addmm": torch.mm, "baddbmm": torch.bmm}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Products(TorchDispatchMode):
    """Collects (function, left, right) of the products inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = []
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self._add(PRODUCTS[name], args[0], args[1])
        elif name in WITH_BIAS:
            self._add(WITH_BIAS[name], args[1], args[2])
        elif name == ATTENTION:
            query, key, value = (tensor.flatten(0, 1).contiguous() for tensor in args[:3])
            self._add(torch.bmm, query, key.transpose(1, 2))
            self._add(torch.bmm, query.new_ones(*query.shape[:2], key.shape[1]), value)
        return function(*args, **(kwargs or {}))

    def _add(self, function: Callable[..., Tensor], left: Tensor, right: Tensor) -> None:
        self.calls.append((function, left.detach(), right.detach()))
        self.flops += 2 * left.numel() * right.shape[-1]


def replay_of(call: Callable[[], Any]) -> tuple[Callable[[], None], int]:
    """Return a function that repeats only the matrix products of `call`, and their FLOPs."""
    with torch.no_grad(), Products() as products:
        call()

    def replay() -> None:
        with torch.inference_mode():
            for function, left, right in products.calls:
                function(left, right)

    return replay, products.flops
