"""How is the catalogue laid out so that a search touches each level with a few tensor operations?

Items are sorted by semantic ID; a node of depth d is a range of sorted positions, and its children
are consecutive nodes of depth d + 1 (a "flat trie": code and child pointer arrays per level). It
knows no network and no scores. The readable twin is `trie.Trie`; both are tested to be equal.

Shapes: N items, L levels, R rows, C columns of children, X any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.levels import Level, build_level, take
from genrec.decoding.protocol import Children
from genrec.errors import UserError
from genrec.item_index import ItemIndex


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
            build_level(codes_NL[starts[n + 1], n], starts[n], starts[n + 1], size, len(codes_NL))
            for n, size in enumerate(sizes)
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
        tensors = [self.rows_N, *(t for level in self.levels for t in level.tensors)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> CSRIndex:
        """Return the index on a device (itself if it is there)."""
        if torch.device(device) == self.device:
            return self
        levels = [level.to(device) for level in self.levels]
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
        return take(self.rows_N, states_R).long()

    # What the fast search needs beyond it.

    def only_child(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return the first child of nodes of a depth (the only one where there is one item)."""
        return take(self.levels[depth].pointers, nodes_X).long()

    def first_position(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return the sorted position at which each node's range of items begins, int64.

        One past the last node gives N. Composing pointers saves 4 bytes per node and depth.
        """
        for level in self.levels[depth:]:
            nodes_X = take(level.pointers, nodes_X)
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
        return take(self._positions_N, rows_X).long()

    def ancestors(self, positions_X: Tensor) -> list[Tensor]:
        """Return the nodes above leaves, int64, one tensor per depth 0 ... L."""
        nodes_X = positions_X.to(torch.int32)
        path = [nodes_X]
        for level in reversed(self.levels[1:]):
            nodes_X = torch.searchsorted(level.pointers, nodes_X, right=True, out_int32=True) - 1
            path.append(nodes_X)
        path.append(torch.zeros_like(nodes_X))
        return [nodes.long() for nodes in reversed(path)]

    def codes(self, positions_X: Tensor) -> Tensor:
        """Return the semantic IDs of leaves, (..., L) int64."""
        path = self.ancestors(positions_X)[1:]
        found = [take(level.codes, at) for level, at in zip(self.levels, path, strict=True)]
        return torch.stack([codes.long() for codes in found], dim=-1)


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
