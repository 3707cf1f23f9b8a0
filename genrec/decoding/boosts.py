"""What do additive scores per item (business boosts) change, such that a search stays provable?

A boosted item ranks by log-probability plus boost. A prefix ranks by its log-probability plus the
largest boost below it: no item below can reach more, this bound only falls along a path, and at an
item it is the item's score itself. So beams, order and certificate work as without boosts. It knows
no model.

Shapes: N items, X any.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.csr import CSRIndex
from genrec.decoding.levels import take
from genrec.errors import UserError


class Boosts:
    """Additive log-scores of all items, with the largest below every node of an index.

    Costs O(N) once and 4 bytes per node; a search then looks bounds up for the children that it
    scores. Items that a rule of the index or a request's filter denies still count in the bounds of
    their prefixes: such a bound is loose, never wrong.

    Args:
        constraint: the index (`Boosts` belongs to it and stays on its device).
        values_N: (N,) natural-log units by catalogue row: log(2) doubles an item's odds, 0 leaves
            it alone.

    Raises:
        UserError: not one finite number per item.
    """

    def __init__(self, constraint: CSRIndex, values_N: np.ndarray | Tensor) -> None:
        values_N = torch.as_tensor(values_N, device=constraint.device).float()
        if values_N.shape != (constraint.num_items,) or not torch.isfinite(values_N).all():
            raise UserError(
                f"boosts: got shape {tuple(values_N.shape)} with "
                f"{int((~torch.isfinite(values_N)).sum())} values that are not finite, expected "
                f"one number per catalogue row, ({constraint.num_items},). To forbid items, use "
                "filters or a rule."
            )
        self.values_N = values_N
        self._bounds = _bounds(constraint, take(values_N, constraint.rows_N))

    def bound(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return the largest boost below nodes of a depth, float32."""
        return take(self._bounds[depth], nodes_X)

    def of_rows(self, rows_X: Tensor) -> Tensor:
        """Return the boosts of catalogue rows, 0 for rows of -1."""
        return take(self.values_N, rows_X.clamp(min=0)).masked_fill(rows_X < 0, 0.0)


def _bounds(constraint: CSRIndex, values_N: Tensor) -> list[Tensor]:
    """Return, per depth 0 ... L, the largest value below each node, from the leaves upwards."""
    bounds = [values_N]
    for level in reversed(constraint.levels):
        degrees = level.pointers.diff().long()
        # Nodes always have children, so no segment is empty.
        bounds.append(torch.segment_reduce(bounds[-1], "max", lengths=degrees))
    return bounds[::-1]
