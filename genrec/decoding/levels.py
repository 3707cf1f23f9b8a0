"""How are the children of all nodes of one depth stored, read, found and chosen?

One `Level` per level of codes; `csr.CSRIndex` stacks them. A level that is well filled is read
through a mask (column = code), another by gathering each node's children side by side. It knows
neither items nor scores.

Shapes: N items, L levels, R rows, C columns of children, K codes, X any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# A level is read through a mask where it is well filled and the mask is small beside the rest.
DENSE_FILL = 1 / 16
DENSE_BYTES_PER_ITEM = 1.0
DENSE_BYTES_FREE = 1 << 20


@dataclass(frozen=True)
class Level:
    """The children of all nodes of one depth.

    Args:
        pointers: (nodes + 1,) int32; node j's children are pointers[j] ... pointers[j + 1] - 1.
        codes: (children,) uint8, int16 or int32, ascending within a node.
        mask: (nodes, K) bool where the level is dense, else None.
        max_degree: the largest number of children of a node; C of a level that is not dense.
        num_codes: K.
        open_children: (children,) bool where a rule closes some, else None.
        open_mask: the mask without closed children, where there are both.
    """

    pointers: Tensor
    codes: Tensor
    mask: Tensor | None
    max_degree: int
    num_codes: int
    open_children: Tensor | None = None
    open_mask: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """C: K columns (column = code) if dense, else one per possible child."""
        return self.max_degree if self.mask is None else self.num_codes

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the level."""
        tensors = (self.pointers, self.codes, self.mask, self.open_children, self.open_mask)
        return [tensor for tensor in tensors if tensor is not None]

    def to(self, device: torch.device | str) -> Level:
        """Return the level on a device."""
        names = ("pointers", "codes", "mask", "open_children", "open_mask")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t.to(device) for n, t in found.items() if t is not None})

    def restricted(self, open_children: Tensor) -> Level:
        """Return the level with closed children; everything else is shared with this one."""
        open_mask = None
        if self.mask is not None:
            # Cells of the mask in reading order are the children in theirs.
            open_mask = torch.zeros_like(self.mask)
            open_mask[self.mask] = open_children
        return replace(self, open_children=open_children, open_mask=open_mask)

    def columns(self, parents_X: Tensor, children_X: Tensor) -> Tensor:
        """Return the column in which each child stands in its parent's row, int64."""
        if self.mask is not None:
            return take(self.codes, children_X).long()
        return children_X - take(self.pointers, parents_X)

    def find(self, parents_X: Tensor, codes_X: Tensor) -> Tensor:
        """Return the child of each parent that has a code, int64 (any child where none has it).

        Binary search with a fixed number of steps, so that nothing waits for the data.
        """
        low_X = take(self.pointers, parents_X).long()
        high_X = take(self.pointers, parents_X + 1).long() - 1
        for _ in range(self.max_degree.bit_length()):
            middle_X = (low_X + high_X) >> 1
            below_X = take(self.codes, middle_X) < codes_X
            low_X = torch.where(below_X, torch.minimum(middle_X + 1, high_X), low_X)
            high_X = torch.where(below_X, high_X, middle_X)
        return low_X

    def expand(self, states_R: Tensor) -> Expansion:
        """Return the children of nodes, and which of them are open."""
        if self.mask is not None:
            present_RC = valid_RC = self.mask.index_select(0, states_R)
            if self.open_mask is not None:
                valid_RC = self.open_mask.index_select(0, states_R)
            return Expansion(self, states_R, present_RC, valid_RC, None, None)
        first_R = self.pointers.index_select(0, states_R)
        last_R = self.pointers.index_select(0, states_R + 1)
        columns_C = torch.arange(self.max_degree, device=states_R.device, dtype=torch.int32)
        children_RC = first_R[:, None] + columns_C
        present_RC = valid_RC = children_RC < last_R[:, None]
        children_RC.clamp_(max=len(self.codes) - 1)
        if self.open_children is not None:
            valid_RC = present_RC & take(self.open_children, children_RC)
        codes_RC = take(self.codes, children_RC)
        return Expansion(self, states_R, present_RC, valid_RC, children_RC, codes_RC)


@dataclass(frozen=True)
class Expansion:
    """Children of R nodes in C columns; where the level is dense, column = code and children are
    looked up for the winners only.

    Args:
        level: where they are stored.
        states_R: their parents.
        present_RC: cells that hold a child of the whole catalogue; probabilities are among these.
        valid_RC: cells whose child a rule of the index leaves open (all of them without a rule).
        children_RC: the children, None where the level is dense.
        codes_RC: their codes, None where the level is dense.
    """

    level: Level
    states_R: Tensor
    present_RC: Tensor
    valid_RC: Tensor
    children_RC: Tensor | None
    codes_RC: Tensor | None

    def at_columns(self, values_RK: Tensor) -> Tensor:
        """Return (R, C): of each row's K values those that belong to its columns."""
        return values_RK if self.codes_RC is None else values_RK.gather(1, self.codes_RC.long())

    def states(self) -> Tensor:
        """Return all children (R, C) int64 (any node where not valid)."""
        if self.children_RC is not None:
            return self.children_RC.long()
        first_R = self.level.pointers.index_select(0, self.states_R)
        rank_RC = self.present_RC.cumsum(1) - 1
        return (first_R[:, None] + rank_RC).clamp_(min=0)

    def select(self, rows_X: Tensor, columns_X: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes, child nodes), int64, of chosen cells (any child for invalid cells)."""
        cells_X = rows_X * self.valid_RC.shape[1] + columns_X
        if self.children_RC is not None and self.codes_RC is not None:
            return take(self.codes_RC, cells_X).long(), take(self.children_RC, cells_X).long()
        return columns_X, self.level.find(take(self.states_R, rows_X), columns_X)


def take(values: Tensor, index_X: Tensor) -> Tensor:
    """Return values.flatten()[index] in the shape of the index; no synchronisation."""
    return values.reshape(-1).index_select(0, index_X.reshape(-1)).view(index_X.shape)


def sorted_items(
    codes_NL: np.ndarray, sizes: tuple[int, ...]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the catalogue rows in the order of their semantic IDs, int32, and the codes by level.

    Sorting numbers that hold code and row is several times faster than an order of numbers, and
    gives the codes back without a gather. Where a number has no room for the row, or not even for
    the codes, an order it is.
    """
    bits = [max(size - 1, 1).bit_length() for size in sizes]
    if sum(bits) > 63:
        order_N = np.lexsort(codes_NL.T[::-1]).astype(np.int32)
        return order_N, list(codes_NL[order_N].T)
    keys_N = np.zeros(len(codes_NL), dtype=np.int64)
    for level, width in enumerate(bits):
        keys_N <<= width
        keys_N |= codes_NL[:, level]
    row_bits = len(keys_N).bit_length()
    if sum(bits) + row_bits > 63:
        order_N = np.argsort(keys_N, kind="stable").astype(np.int32)
        keys_N = keys_N[order_N]
    else:
        keys_N <<= row_bits
        keys_N |= np.arange(len(keys_N))
        keys_N.sort()
        order_N = (keys_N & ((1 << row_bits) - 1)).astype(np.int32)
        keys_N >>= row_bits
    codes_LN = []
    for width in reversed(bits):
        codes_LN.append((keys_N & ((1 << width) - 1)).astype(np.int32))
        keys_N >>= width
    return order_N, codes_LN[::-1]


def node_starts(codes_LN: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return, per depth 0 ... L, the sorted position at which each node begins."""
    begins_N = np.zeros(len(codes_LN[0]), dtype=bool)
    begins_N[0] = True
    starts = [np.zeros(1, dtype=np.int64)]
    for codes_N in codes_LN:
        begins_N[1:] |= codes_N[1:] != codes_N[:-1]
        starts.append(np.flatnonzero(begins_N))
    return starts


def build_level(
    child_codes: np.ndarray, starts: np.ndarray, child_starts: np.ndarray, size: int, num_items: int
) -> Level:
    """Lay out one level.

    Args:
        child_codes: the children's codes, in sorted order.
        starts: the sorted position at which each parent begins.
        child_starts: the same of each child.
        size: K.
        num_items: N.
    """
    begins_N = np.zeros(num_items, dtype=bool)
    begins_N[starts] = True
    first_child = np.flatnonzero(begins_N[child_starts])  # a parent begins with its first child
    pointers = np.append(first_child, len(child_starts))
    degrees = np.diff(pointers)
    dtype = np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32
    mask = None
    num_bytes = len(starts) * size
    budget = max(DENSE_BYTES_FREE, DENSE_BYTES_PER_ITEM * num_items)
    if degrees.mean() > size * DENSE_FILL and num_bytes <= budget:
        mask = np.zeros((len(starts), size), dtype=bool)
        mask[np.repeat(np.arange(len(starts)), degrees), child_codes] = True
    return Level(
        torch.from_numpy(pointers.astype(np.int32)),
        torch.from_numpy(child_codes.astype(dtype)),
        None if mask is None else torch.from_numpy(mask),
        int(degrees.max()),
        size,
    )
