"""How is the catalogue laid out so that a search touches each level with a few tensor operations?

Items are sorted by semantic ID; a node of depth d is a range of sorted positions, and its children
are consecutive nodes of depth d + 1 (a "flat trie": code and child pointer arrays per level). It
knows no network and no scores. The readable twin is `trie.Trie`; both are tested to be equal.

Shapes: N items, L levels, R rows, C columns of children, K codes, X any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.protocol import Children
from genrec.errors import UserError
from genrec.item_index import ItemIndex

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
    """

    pointers: Tensor
    codes: Tensor
    mask: Tensor | None
    max_degree: int
    num_codes: int

    @property
    def num_columns(self) -> int:
        """C: K columns (column = code) if dense, else one per possible child."""
        return self.max_degree if self.mask is None else self.num_codes

    def columns(self, parents_X: Tensor, children_X: Tensor) -> Tensor:
        """Return the column in which each child stands in its parent's row, int64."""
        if self.mask is not None:
            return _take(self.codes, children_X).long()
        return children_X - _take(self.pointers, parents_X)

    def find(self, parents_X: Tensor, codes_X: Tensor) -> Tensor:
        """Return the child of each parent that has a code, int64 (any child where none has it).

        Binary search with a fixed number of steps, so that nothing waits for the data.
        """
        low_X = _take(self.pointers, parents_X).long()
        high_X = _take(self.pointers, parents_X + 1).long() - 1
        for _ in range(self.max_degree.bit_length()):
            middle_X = (low_X + high_X) >> 1
            below_X = _take(self.codes, middle_X) < codes_X
            low_X = torch.where(below_X, torch.minimum(middle_X + 1, high_X), low_X)
            high_X = torch.where(below_X, high_X, middle_X)
        return low_X

    def expand(self, states_R: Tensor) -> Expansion:
        """Return the children of nodes."""
        if self.mask is not None:
            return Expansion(self, states_R, self.mask.index_select(0, states_R), None, None)
        first_R = self.pointers.index_select(0, states_R)
        last_R = self.pointers.index_select(0, states_R + 1)
        columns_C = torch.arange(self.max_degree, device=states_R.device, dtype=torch.int32)
        children_RC = first_R[:, None] + columns_C
        valid_RC = children_RC < last_R[:, None]
        children_RC.clamp_(max=len(self.codes) - 1)
        return Expansion(self, states_R, valid_RC, children_RC, _take(self.codes, children_RC))


@dataclass(frozen=True)
class Expansion:
    """Children of R nodes in C columns; where the level is dense, column = code and children are
    looked up for the winners only.
    """

    level: Level
    states_R: Tensor
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
        rank_RC = self.valid_RC.cumsum(1) - 1
        return (first_R[:, None] + rank_RC).clamp_(min=0)

    def select(self, rows_X: Tensor, columns_X: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes, child nodes), int64, of chosen cells (any valid ones for invalid cells)."""
        cells_X = rows_X * self.valid_RC.shape[1] + columns_X
        if self.children_RC is not None and self.codes_RC is not None:
            return _take(self.codes_RC, cells_X).long(), _take(self.children_RC, cells_X).long()
        return columns_X, self.level.find(_take(self.states_R, rows_X), columns_X)


class CSRIndex:
    """The vectorised `ConstraintIndex`; states are node numbers within their depth.

    Args:
        levels: one `Level` per level of codes.
        rows_N: int32 catalogue row at each sorted position.
        codebook_sizes: K of each level.
        num_nodes: number of nodes of each depth, L + 1 numbers from 1 (root) to N (leaves).
        num_shared: of these, nodes with more than one item.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        rows_N: Tensor,
        codebook_sizes: tuple[int, ...],
        num_nodes: tuple[int, ...],
        num_shared: tuple[int, ...],
    ) -> None:
        self.levels = tuple(levels)
        self.rows_N = rows_N
        self._codebook_sizes = codebook_sizes
        self.num_nodes = num_nodes
        self.num_shared = num_shared
        self._positions_N: Tensor | None = None

    @classmethod
    def from_index(cls, index: ItemIndex) -> CSRIndex:
        """Build from an item index (rows are the item index's rows)."""
        return cls.from_codes(index.codes, index.codebook_sizes)

    @classmethod
    def from_codes(cls, codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> CSRIndex:
        """Build from unique code rows.

        Args:
            codes_NL: (N, L) integers, unique rows, within the sizes.
            codebook_sizes: L sizes.

        Raises:
            UserError: no items.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        codes_NL = np.asarray(codes_NL)
        if len(codes_NL) == 0:
            raise UserError(
                "CSRIndex: got a catalogue of 0 items, expected at least 1. Check the items file "
                "and the filters of the dataset."
            )
        order_N = _lexicographic_order(codes_NL, sizes)
        codes_NL = codes_NL[order_N]
        starts = _node_starts(codes_NL)
        levels = [
            _build_level(codes_NL[starts[l + 1], l], starts[l], starts[l + 1], size, len(codes_NL))
            for l, size in enumerate(sizes)
        ]
        spans = [np.diff(start, append=len(codes_NL)) for start in starts]
        return cls(
            levels,
            torch.from_numpy(order_N.astype(np.int32)),
            sizes,
            tuple(len(start) for start in starts),
            tuple(int((span > 1).sum()) for span in spans),
        )

    @property
    def depth(self) -> int:
        """Number of levels L."""
        return len(self.levels)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return self._codebook_sizes

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return len(self.rows_N)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.rows_N.device

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.rows_N, *(t for level in self.levels for t in _tensors(level).values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> CSRIndex:
        """Return the index on a device (itself if it is there)."""
        if torch.device(device) == self.device:
            return self
        levels = [
            replace(level, **{name: t.to(device) for name, t in _tensors(level).items()})
            for level in self.levels
        ]
        return CSRIndex(
            levels, self.rows_N.to(device), self.codebook_sizes, self.num_nodes, self.num_shared
        )

    # The ConstraintIndex protocol.

    def root(self, num_rows: int) -> Tensor:
        """Return the root node `num_rows` times, int64."""
        return torch.zeros(num_rows, dtype=torch.int64, device=self.device)

    def children(self, states_R: Tensor, level: int) -> Children:
        """Return all children of nodes of depth `level`."""
        expansion = self.levels[level].expand(states_R)
        codes_RC = expansion.codes_RC
        if codes_RC is None:
            columns_C = torch.arange(expansion.valid_RC.shape[1], device=self.device)
            codes_RC = columns_C.expand(expansion.valid_RC.shape)
        return Children(codes_RC.long(), expansion.states(), expansion.valid_RC)

    def row(self, states_R: Tensor) -> Tensor:
        """Return the catalogue rows of leaves, int64."""
        return _take(self.rows_N, states_R).long()

    # What the fast search needs beyond it.

    def only_child(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return the first child of nodes of a depth (the only one where there is one item)."""
        return _take(self.levels[depth].pointers, nodes_X).long()

    def first_position(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return the sorted position at which each node's range of items begins, int64.

        One past the last node gives N. Composing pointers saves 4 bytes per node and depth.
        """
        for level in self.levels[depth:]:
            nodes_X = _take(level.pointers, nodes_X)
        return nodes_X.long()

    def num_items_below(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return how many items begin with each node's prefix, int64."""
        return self.first_position(nodes_X + 1, depth) - self.first_position(nodes_X, depth)

    def positions(self, rows_X: Tensor) -> Tensor:
        """Return the sorted positions of catalogue rows, int64 (4 bytes an item on first use)."""
        if self._positions_N is None:
            positions_N = torch.empty_like(self.rows_N)
            positions_N[self.rows_N.long()] = torch.arange(
                self.num_items, dtype=torch.int32, device=self.device
            )
            self._positions_N = positions_N
        return _take(self._positions_N, rows_X).long()

    def ancestors(self, positions_X: Tensor) -> list[Tensor]:
        """Return the nodes above leaves, int64, one tensor per depth 0 ... L."""
        nodes_X = positions_X.to(torch.int32)
        path = [nodes_X]
        for level in reversed(self.levels):
            nodes_X = torch.searchsorted(level.pointers, nodes_X, right=True, out_int32=True) - 1
            path.append(nodes_X)
        return [nodes.long() for nodes in reversed(path)]

    def codes(self, positions_X: Tensor) -> Tensor:
        """Return the semantic IDs of leaves, (..., L) int64."""
        path = self.ancestors(positions_X)[1:]
        found = [_take(level.codes, at) for level, at in zip(self.levels, path, strict=True)]
        return torch.stack([codes.long() for codes in found], dim=-1)


def _take(values: Tensor, index_X: Tensor) -> Tensor:
    """Return values.flatten()[index] in the shape of the index; no synchronisation."""
    return values.reshape(-1).index_select(0, index_X.reshape(-1)).view(index_X.shape)


def _tensors(level: Level) -> dict[str, Tensor]:
    found = {field.name: getattr(level, field.name) for field in fields(level)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _lexicographic_order(codes_NL: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    bits = [max(size - 1, 1).bit_length() for size in sizes]
    if sum(bits) > 63:
        return np.lexsort(codes_NL.T[::-1])
    keys_N = np.zeros(len(codes_NL), dtype=np.int64)
    for level, width in enumerate(bits):
        keys_N = (keys_N << width) | codes_NL[:, level]
    return np.argsort(keys_N, kind="stable")


def _node_starts(sorted_NL: np.ndarray) -> list[np.ndarray]:
    """Return, per depth 0 ... L, the sorted position at which each node begins."""
    begins_N = np.zeros(len(sorted_NL), dtype=bool)
    begins_N[0] = True
    starts = [np.zeros(1, dtype=np.int64)]
    for level in range(sorted_NL.shape[1]):
        codes_N = sorted_NL[:, level]
        begins_N[1:] |= codes_N[1:] != codes_N[:-1]
        starts.append(np.flatnonzero(begins_N))
    return starts


def _build_level(
    child_codes: np.ndarray, starts: np.ndarray, child_starts: np.ndarray, size: int, num_items: int
) -> Level:
    first_child = np.searchsorted(child_starts, starts)
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
