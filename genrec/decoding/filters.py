"""Which nodes of the tree may a request enter, given the rows that it denies or allows?

Range counting: a node is closed when every item below it is denied, open when one is allowed. Only
listed rows below the beams are counted, level by level, and the index is not rebuilt. The equality
with a rebuilt tree is a test. Rules for all requests at once are a view of the index
(`CSRIndex.restricted`), and what is listed here is counted among the items which that allows. It
knows no scores.

Shapes: B requests, W rows of a request, R = B*W, C columns, F listed rows of all requests, T of
them below the R nodes, N items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.csr import CSRIndex
from genrec.decoding.levels import Expansion, take
from genrec.decoding.protocol import Filters


@dataclass(frozen=True)
class _Found:
    """Listed rows and the nodes that they are below.

    Args:
        rows_T: the place of the node, 0 ... R - 1.
        positions_T: sorted positions of the listed rows (any where not below a node).
        below_T: whether they are below one, None for all.
    """

    rows_T: Tensor
    positions_T: Tensor
    below_T: Tensor | None


class NodeFilter:
    """The filters of B requests, compiled for an index: each request's listed positions, sorted.

    Args:
        constraint: the index.
        filters: rules per request.
        num_requests: B.

    Raises:
        UserError: a number of lists other than B, or rows outside the catalogue.
    """

    def __init__(self, constraint: CSRIndex, filters: Filters, num_requests: int) -> None:
        listed = filters.flat(num_requests, constraint.num_items)
        requests_F, rows_F, self._allows_B = (
            torch.from_numpy(array).to(constraint.device) for array in listed
        )
        self._constraint = constraint
        self._keys_F = _sorted(self._keys(requests_F, rows_F))

    def _keys(self, requests_F: Tensor, rows_F: Tensor) -> Tensor:
        """Number all positions of all requests in one sequence; behind each request's is one spare.

        Rows of -1, and what the index's rule denies, are not there: they get the spare number.
        """
        constraint = self._constraint
        positions_F = constraint.positions(rows_F.clamp(min=0))
        nowhere_F = rows_F < 0
        if constraint.allowed_before is not None:
            nowhere_F |= constraint.rank(positions_F + 1) == constraint.rank(positions_F)
        positions_F = positions_F.masked_fill(nowhere_F, constraint.num_items)
        return requests_F * (constraint.num_items + 1) + positions_F

    def apply(
        self,
        expansion: Expansion,
        states_BW: Tensor,
        live_BW: Tensor,
        level: int,
        *,
        static_shapes: bool = False,
    ) -> Tensor:
        """Return the valid cells that the requests may enter, (R, C) bool.

        Args:
            expansion: the children of the rows' nodes.
            states_BW: these nodes; those of live rows differ within a request.
            live_BW: bool; what other rows' cells become does not matter.
            level: their depth.
            static_shapes: read nothing back from the device.
        """
        constraint, valid_RC = self._constraint, expansion.valid_RC
        find = self._find_static if static_shapes else self._find
        found = find(states_BW, live_BW, level)
        allows_R = self._allows_B.repeat_interleave(states_BW.shape[1])
        open_X = (~allows_R)[:, None].expand(valid_RC.shape).flatten()
        if not len(found.rows_T):
            return valid_RC & open_X.view(valid_RC.shape)
        children_T = constraint.nodes_at(found.positions_T, level + 1)
        parents_T = take(states_BW, found.rows_T)
        columns_T = constraint.levels[level].columns(parents_T, children_T)
        cells_T = found.rows_T * valid_RC.shape[1] + columns_T
        if found.below_T is not None:  # the others go to one spare cell at the end
            cells_T = torch.where(found.below_T, cells_T, valid_RC.numel())
        counts_X = torch.zeros(valid_RC.numel() + 1, dtype=torch.int32, device=cells_T.device)
        counts_X.index_add_(0, cells_T, torch.ones_like(cells_T, dtype=torch.int32))
        spared_T = take(counts_X, cells_T) < constraint.num_allowed_below(children_T, level + 1)
        # Listed rows below one child agree: who allows one may enter, who denies all may not.
        open_T = take(allows_R, found.rows_T) | spared_T
        open_X = torch.cat([open_X, open_X[:1]]).scatter_(0, cells_T, open_T)
        return valid_RC & open_X[:-1].view(valid_RC.shape)

    def _ranges(self, states_BW: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return where each row's numbers begin and end, and its request's first, (R,) each."""
        constraint = self._constraint
        requests_B1 = torch.arange(len(states_BW), device=states_BW.device)[:, None]
        base_BW = (requests_B1 * (constraint.num_items + 1)).expand(states_BW.shape)
        first_BW = base_BW + constraint.first_position(states_BW, level)
        last_BW = base_BW + constraint.first_position(states_BW + 1, level)
        return first_BW.flatten(), last_BW.flatten(), base_BW.flatten()

    def _find(self, states_BW: Tensor, live_BW: Tensor, level: int) -> _Found:
        """Find the listed rows below each node; their number is read from the device."""
        first_R, last_R, base_R = self._ranges(states_BW, level)
        bounds_2R = torch.searchsorted(self._keys_F, torch.cat([first_R, last_R]))
        begin_R, end_R = bounds_2R.chunk(2)
        counts_R = (end_R - begin_R) * live_BW.flatten()
        rows_T = torch.repeat_interleave(counts_R)
        shift_R = begin_R - (counts_R.cumsum(0) - counts_R)
        places_T = torch.arange(len(rows_T), device=rows_T.device) + take(shift_R, rows_T)
        return _Found(rows_T, take(self._keys_F, places_T) - take(base_R, rows_T), None)

    def _find_static(self, states_BW: Tensor, live_BW: Tensor, level: int) -> _Found:
        """Find the node above each listed row, if there is one: T = F."""
        first_R, last_R, base_R = self._ranges(states_BW, level)
        first_R = first_R.masked_fill(~live_BW.flatten(), torch.iinfo(torch.int64).max)
        sorted_R, order_R = first_R.sort()
        places_F = torch.searchsorted(sorted_R, self._keys_F, right=True) - 1
        rows_F = take(order_R, places_F.clamp(min=0))
        below_F = (places_F >= 0) & (self._keys_F < take(last_R, rows_F))
        below_F &= take(live_BW, rows_F)
        positions_F = self._keys_F - take(base_R, rows_F)
        return _Found(rows_F, positions_F.masked_fill(~below_F, 0), below_F)


class PaddedFilter(NodeFilter):
    """Rows that requests may not get, from a tensor alone: fit for shapes that never change.

    Args:
        constraint: the index.
        rows_BE: int64 distinct rows of each request, -1 where there are fewer.
    """

    def __init__(self, constraint: CSRIndex, rows_BE: Tensor) -> None:
        self._allows_B = torch.zeros(len(rows_BE), dtype=torch.bool, device=rows_BE.device)
        requests_B1 = torch.arange(len(rows_BE), device=rows_BE.device)[:, None]
        self._constraint = constraint
        requests_BE = requests_B1.expand(rows_BE.shape)
        self._keys_F = self._keys(requests_BE.flatten(), rows_BE.flatten()).sort().values


def _sorted(values_F: Tensor) -> Tensor:
    """Return the values in ascending order; on a CPU numpy's sort is several times faster."""
    if values_F.device.type == "cpu":
        return torch.from_numpy(np.sort(values_F.numpy()))
    return values_F.sort().values
