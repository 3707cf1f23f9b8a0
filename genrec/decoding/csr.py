"""How is the catalogue laid out so that a search touches each level with a few tensor operations?

Items are sorted by semantic ID; a node of depth d is a range of sorted positions, and its children
are consecutive nodes of depth d + 1 (a "flat trie": code and child pointer arrays per level). It
knows no network and no scores. The readable twin is `trie.Trie`; both are tested to be equal.

Shapes: N items, L levels, R rows, C columns of children, X any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.levels import Level, build_level, node_starts, sorted_items, take
from genrec.decoding.protocol import Children, Scoring
from genrec.errors import UserError
from genrec.item_index import END, ItemIndex


@dataclass(frozen=True, eq=False)
class CSRIndex:
    """The vectorised `ConstraintIndex`; states are node numbers within their depth.

    Args:
        levels: one `Level` per level of codes.
        rows_N: int32 catalogue row at each sorted position.
        codebook_sizes: K of each level.
        num_nodes: number of nodes of each depth, L + 1 numbers from 1 (root) to N (leaves).
        num_shared: of these, nodes with more than one item.
        num_running: of these, nodes whose semantic ID has not ended; None where none ends early.
        allowed_before: int32 (N + 1,), how many items before each position a rule allows; None
            where all are allowed (see `restricted`).
    """

    levels: tuple[Level, ...]
    rows_N: Tensor
    codebook_sizes: tuple[int, ...]
    num_nodes: tuple[int, ...]
    num_shared: tuple[int, ...]
    num_running: tuple[int, ...] | None = None
    allowed_before: Tensor | None = None

    @classmethod
    def from_index(cls, index: ItemIndex) -> CSRIndex:
        """Build from an item index (rows are the item index's rows)."""
        return cls.from_codes(index.codes, index.codebook_sizes, index.shared_vocabulary)

    @classmethod
    def from_codes(
        cls, codes_NL: np.ndarray, codebook_sizes: Sequence[int], shared_vocabulary: bool = False
    ) -> CSRIndex:
        """Build from unique code rows.

        Args:
            codes_NL: (N, L) integers, unique rows, within the sizes.
            codebook_sizes: L sizes.
            shared_vocabulary: code 0 ends a semantic ID and fills the rest of its row (see
                `ItemIndex`); what follows the end is certain and costs nothing.

        Raises:
            UserError: no items, or several items with one semantic ID.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        codes_NL = np.asarray(codes_NL)
        if len(codes_NL) == 0:
            raise UserError(
                "CSRIndex: got a catalogue of 0 items, expected at least 1. Check the items file "
                "and the filters of the dataset."
            )
        order_N, codes_LN = sorted_items(codes_NL, sizes)
        starts = node_starts(codes_LN)
        _check_unique(starts[-1], order_N)
        levels = [
            build_level(codes_LN[n][starts[n + 1]], starts[n], starts[n + 1], size, len(order_N))
            for n, size in enumerate(sizes)
        ]
        spans = [np.diff(start, append=len(codes_NL)) for start in starts]
        running = None
        if shared_vocabulary:
            running = (1, *(int((level.codes != END).sum()) for level in levels))
        return cls(
            tuple(levels),
            torch.from_numpy(order_N),
            sizes,
            tuple(len(start) for start in starts),
            tuple(int((span > 1).sum()) for span in spans),
            running,
        )

    def save(self, path: str | Path, *, upstream: Mapping[str, str] | None = None) -> None:
        """Write the index as an artifact folder, for `load`.

        Args:
            path: folder to create or replace.
            upstream: fingerprints of what it was built from, e.g. {"index": index.fingerprint}.

        Raises:
            UserError: the index is restricted by a rule; save the whole one.
        """
        from genrec.decoding.storage import save_index

        save_index(self, path, upstream=upstream)

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> CSRIndex:
        """Map a saved index into memory: nothing is copied, pages are read when touched.

        Args:
            path: a folder that `save` wrote. It must stay as it is while the index is in use.
            verify: compare checksums, which reads the files once. False checks names, shapes and
                sizes only and starts at once.

        Raises:
            ArtifactError: missing, truncated, edited, of another kind or a newer format.
        """
        from genrec.decoding.storage import load_index

        return load_index(path, verify=verify)

    @property
    def depth(self) -> int:
        """Number of levels L."""
        return len(self.levels)

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return len(self.rows_N)

    @property
    def num_allowed(self) -> int:
        """Number of items that the index's rule allows (N without a rule)."""
        return self.num_items if self.allowed_before is None else int(self.allowed_before[-1])

    @property
    def shared_vocabulary(self) -> bool:
        """Whether semantic IDs may end before the last level."""
        return self.num_running is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.rows_N.device

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.rows_N, *(t for level in self.levels for t in level.tensors)]
        if self.allowed_before is not None:
            tensors.append(self.allowed_before)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> CSRIndex:
        """Return the index on a device (itself if it is there)."""
        if torch.device(device) == self.device:
            return self
        counts = self.allowed_before
        return replace(
            self,
            levels=tuple(level.to(device) for level in self.levels),
            rows_N=self.rows_N.to(device),
            allowed_before=None if counts is None else counts.to(device),
        )

    def restricted(self, allowed_N: np.ndarray | Tensor) -> CSRIndex:
        """Return a view that holds only the items which a rule allows, for all requests.

        The tree is shared; closed nodes are marked once, by range counting, so that a search costs
        the same as without a rule. Rows keep their numbers. Views of views allow what all allow.

        Args:
            allowed_N: (N,) bool by catalogue row.

        Raises:
            UserError: not one bool per item.
        """
        allowed_N = torch.as_tensor(allowed_N, device=self.device)
        if allowed_N.shape != (self.num_items,) or allowed_N.dtype != torch.bool:
            raise UserError(
                f"rule: got {allowed_N.dtype} of shape {tuple(allowed_N.shape)}, expected one bool "
                f"per catalogue row, ({self.num_items},)."
            )
        allowed_N = take(allowed_N, self.rows_N) & self.allowed_positions()
        counts = torch.nn.functional.pad(allowed_N.cumsum(0, dtype=torch.int32), (1, 0))
        levels = []
        for depth, level in enumerate(self.levels, start=1):
            nodes = torch.arange(self.num_nodes[depth] + 1, device=self.device)
            firsts = self.first_position(nodes, depth)
            levels.append(level.restricted(counts[firsts[1:]] > counts[firsts[:-1]]))
        return replace(self, levels=tuple(levels), allowed_before=counts)

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

    def is_settled(self, nodes_X: Tensor, depth: int, scoring: Scoring) -> Tensor:
        """Return whether what lies below each node costs nothing, so that no model is needed.

        So it is when the semantic ID has ended, and under "renormalized" when one item is left.
        """
        if scoring == "renormalized":
            return self.num_items_below(nodes_X, depth) == 1
        if self.num_running is None or depth == 0:
            return torch.zeros_like(nodes_X, dtype=torch.bool)
        return take(self.levels[depth - 1].codes, nodes_X) == END

    def num_unsettled(self, depth: int, scoring: Scoring) -> int:
        """Return the number of nodes of a depth that are not settled."""
        if scoring == "renormalized":
            return self.num_shared[depth]
        return self.num_nodes[depth] if self.num_running is None else self.num_running[depth]

    def allowed_positions(self) -> Tensor:
        """Return which sorted positions hold items that the rule allows, (N,) bool."""
        if self.allowed_before is None:
            return torch.ones(self.num_items, dtype=torch.bool, device=self.device)
        return self.allowed_before.diff() > 0

    def rank(self, positions_X: Tensor) -> Tensor:
        """Return how many allowed items stand before each position (0 ... N), int64."""
        if self.allowed_before is None:
            return positions_X
        return take(self.allowed_before, positions_X).long()

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

    @cached_property
    def _positions_N(self) -> Tensor:
        positions_N = torch.empty_like(self.rows_N)
        positions_N[self.rows_N.long()] = torch.arange(
            self.num_items, dtype=torch.int32, device=self.device
        )
        return positions_N

    def positions(self, rows_X: Tensor) -> Tensor:
        """Return the sorted positions of catalogue rows, int64 (4 bytes an item on first use)."""
        return take(self._positions_N, rows_X).long()

    def num_allowed_below(self, nodes_X: Tensor, depth: int) -> Tensor:
        """Return how many items that the rule allows begin with each node's prefix, int64."""
        if self.num_nodes[depth] <= nodes_X.numel():
            nodes = torch.arange(self.num_nodes[depth] + 1, device=self.device)
            return take(self.rank(self.first_position(nodes, depth)).diff(), nodes_X)
        first_X = self.rank(self.first_position(nodes_X, depth))
        return self.rank(self.first_position(nodes_X + 1, depth)) - first_X

    def nodes_at(self, positions_X: Tensor, depth: int) -> Tensor:
        """Return the nodes of one depth above leaves, int64.

        Where the depth has few nodes they are found among these, else level by level from below.
        """
        if self.num_nodes[depth] <= positions_X.numel():
            nodes = torch.arange(self.num_nodes[depth], device=self.device)
            firsts = self.first_position(nodes, depth)
            return torch.searchsorted(firsts, positions_X, right=True) - 1
        nodes_X = positions_X.to(torch.int32)
        for level in reversed(self.levels[depth:]):
            nodes_X = torch.searchsorted(level.pointers, nodes_X, right=True, out_int32=True) - 1
        return nodes_X.long()

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


def _check_unique(leaf_starts: np.ndarray, order_N: np.ndarray) -> None:
    """Refuse several items on one leaf: a list of items could not say which of them is meant."""
    if len(leaf_starts) < len(order_N):
        spans = np.diff(leaf_starts, append=len(order_N))
        first = leaf_starts[np.argmax(spans > 1)]
        raise UserError(
            f"CSRIndex: {len(order_N)} items have {len(leaf_starts)} semantic IDs; rows "
            f"{order_N[first]} and {order_N[first + 1]} share one. Expected one each: resolve "
            "collisions first (index.collisions=extra_level)."
        )
