"""Which nodes of the tree may a request enter, given the rows that it denies or allows?

Range counting: a node is closed when every item below it is denied, open when one is allowed. The
work is per listed row and level, whatever the width of the level, and the index is not rebuilt. The
equality with a rebuilt tree is a test. Rules for all requests at once are a view of the index
(`CSRIndex.restricted`), and what is listed here is counted among the items which that allows. It
knows no scores.

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
        self._allows_B = _upload(
            np.array([allowed is not None for _, allowed in pairs]), constraint
        )
        self._marks = self._compile(constraint, _upload(listed_BE, constraint))

    def _compile(self, constraint: CSRIndex, rows_BE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, per level, (parent nodes, columns) of the marked children, (B, E) each.

        Marked are, for a request that allows, all nodes above its rows; for one that denies, the
        nodes whose rows are all denied.
        """
        num_items, num_listed = constraint.num_items, rows_BE.shape[1]
        # Padding stands behind all items, each at a place of its own: positions stay distinct.
        places_E = num_items + torch.arange(num_listed, device=rows_BE.device)
        positions_BE = constraint.positions(rows_BE.clamp(min=0))
        nowhere_BE = rows_BE < 0
        if constraint.allowed_before is not None:  # what the index's rule denies is not there
            nowhere_BE |= constraint.rank(positions_BE + 1) == constraint.rank(positions_BE)
        positions_BE = torch.where(nowhere_BE, places_E, positions_BE).sort(dim=1).values
        padding_BE = positions_BE >= num_items
        path = constraint.ancestors(positions_BE.clamp(max=num_items - 1))
        marks = []
        for depth, level in enumerate(constraint.levels, start=1):
            nodes_BE, parents_BE = path[depth], path[depth - 1]
            full_BE = _is_full(positions_BE, constraint, nodes_BE, depth)
            marked_BE = (self._allows_B[:, None] | full_BE) & ~padding_BE
            columns_BE = level.columns(parents_BE, nodes_BE)
            marks.append((parents_BE.masked_fill(~marked_BE, _NOWHERE), columns_BE))
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


def _is_full(positions_BE: Tensor, constraint: CSRIndex, nodes_BE: Tensor, depth: int) -> Tensor:
    """Return whether all items below the node of each listed position are listed.

    Positions ascend and are distinct, so a range is complete exactly when its first and its last
    item stand as far from each other in the list as in the catalogue. Items are counted by rank:
    those that a rule of the index denies do not exist.
    """
    if depth == constraint.depth:
        return torch.ones_like(nodes_BE, dtype=torch.bool)
    num_items = constraint.num_items
    ranks_BE = constraint.rank(positions_BE.clamp(max=num_items))
    ranks_BE = ranks_BE + (positions_BE - num_items).clamp(min=0)  # padding stays distinct
    first_BE = constraint.rank(constraint.first_position(nodes_BE, depth))
    last_BE = constraint.rank(constraint.first_position(nodes_BE + 1, depth)) - 1
    end = positions_BE.shape[1] - 1
    shift_BE = torch.arange(end + 1, device=positions_BE.device) - ranks_BE
    from_BE, to_BE = shift_BE + first_BE, shift_BE + last_BE
    inside_BE = (from_BE >= 0) & (to_BE <= end)
    first_listed_BE = ranks_BE.gather(1, from_BE.clamp(0, end))
    last_listed_BE = ranks_BE.gather(1, to_BE.clamp(0, end))
    return inside_BE & (first_listed_BE == first_BE) & (last_listed_BE == last_BE)
