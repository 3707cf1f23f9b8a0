"""Which nodes of the tree may a request enter, given the rows that it denies or allows?

Range counting: a node is closed when every item below it is denied, open when one is allowed. The
work is per listed row and level, whatever the width of the level, and the index is not rebuilt. The
equality with a rebuilt tree is a test. It knows no scores.

Shapes: B requests, W live rows of a request, R = B*W, C columns, E listed rows (padded).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.csr import CSRIndex
from genrec.decoding.protocol import Filters

_NOWHERE = torch.iinfo(torch.int64).max


class NodeFilter:
    """The filters of B requests, compiled for an index.

    Args:
        constraint: the index.
        filters: rules per request.
        num_requests: B.

    Raises:
        UserError: a number of lists other than B, or rows outside the catalogue.
    """

    def __init__(self, constraint: CSRIndex, filters: Filters, num_requests: int) -> None:
        filters.check(num_requests)
        pairs = [filters.rows_of_request(b, constraint.num_items) for b in range(num_requests)]
        rows = [_either(denied, allowed) for denied, allowed in pairs]
        listed_BE = np.full((num_requests, max(map(len, rows))), -1, dtype=np.int64)
        for b, listed in enumerate(rows):
            listed_BE[b, : len(listed)] = listed
        self._allows_B = _upload(np.array([allowed is not None for _, allowed in pairs]), constraint)
        self._marks = self._compile(constraint, _upload(listed_BE, constraint))

    def _compile(self, constraint: CSRIndex, rows_BE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, per level, (parent nodes, columns) of the marked children, (B, E) each.

        Marked are, for a request that allows, all nodes above its rows; for one that denies, the
        nodes whose rows are all denied.
        """
        padding_BE = rows_BE < 0
        positions_BE = constraint.positions(rows_BE.clamp(min=0))
        positions_BE = positions_BE.masked_fill(padding_BE, constraint.num_items - 1)
        order_BE = positions_BE.argsort(dim=1)
        positions_BE = positions_BE.gather(1, order_BE)
        padding_BE = padding_BE.gather(1, order_BE)
        path = constraint.ancestors(positions_BE)
        marks = []
        for depth, level in enumerate(constraint.levels, start=1):
            nodes_BE = path[depth]
            counts_BE = _count_equal(nodes_BE, padding_BE)
            full_BE = counts_BE == constraint.num_items_below(nodes_BE, depth)
            marked_BE = (self._allows_B[:, None] | full_BE) & ~padding_BE
            parents_BE = path[depth - 1].masked_fill(~marked_BE, _NOWHERE)
            marks.append((parents_BE, level.columns(path[depth - 1], nodes_BE)))
        return marks

    def apply(self, valid_RC: Tensor, states_BW: Tensor, live_BW: Tensor, level: int) -> Tensor:
        """Return the valid cells that the requests may enter.

        Args:
            valid_RC: bool, cells that are children.
            states_BW: the nodes of the rows; nodes of live rows differ within a request.
            live_BW: bool; what other rows' cells become does not matter.
            level: their depth.
        """
        parents_BE, columns_BE = self._marks[level]
        num_requests, width = states_BW.shape
        num_columns = valid_RC.shape[1]
        sorted_BW, order_BW = states_BW.masked_fill(~live_BW, _NOWHERE - 1).sort(dim=1)
        found_BE = torch.searchsorted(sorted_BW, parents_BE).clamp_(max=width - 1)
        hit_BE = sorted_BW.gather(1, found_BE) == parents_BE
        cells_BE = order_BW.gather(1, found_BE) * num_columns + columns_BE
        # Marks of nodes outside the beam go to one spare cell at the end.
        cells_BE = torch.where(hit_BE, cells_BE, width * num_columns)
        marked_BX = torch.zeros(
            num_requests, width * num_columns + 1, dtype=torch.bool, device=valid_RC.device
        )
        marked_BX.scatter_(1, cells_BE, True)
        open_BX = marked_BX[:, :-1] == self._allows_B[:, None]
        return valid_RC & open_BX.reshape(valid_RC.shape)


def _either(denied: np.ndarray | None, allowed: np.ndarray | None) -> np.ndarray:
    if allowed is not None:
        return allowed
    return np.empty(0, dtype=np.int64) if denied is None else denied


def _upload(array: np.ndarray, constraint: CSRIndex) -> Tensor:
    return torch.from_numpy(array).to(constraint.device)


def _count_equal(nodes_BE: Tensor, padding_BE: Tensor) -> Tensor:
    """Return how many listed rows lie below each node; nodes ascend within a request."""
    first_BE = torch.searchsorted(nodes_BE, nodes_BE)
    last_BE = torch.searchsorted(nodes_BE, nodes_BE, right=True)
    padded_BE = torch.nn.functional.pad(padding_BE.cumsum(1), (1, 0))
    padded_below_BE = padded_BE.gather(1, last_BE) - padded_BE.gather(1, first_BE)
    return last_BE - first_BE - padded_below_BE


