"""Which codes lead on to an item, after the prefix of each item? For the loss `softmax: trie`.

Training walks true prefixes only, so that it needs no search: a look-up per item and level. It
knows neither networks nor scores; the search has a tree of its own (`genrec.decoding.csr`).

Shapes: N items, M looked-up items, L levels, K codes of a level, C children of a node at most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.errors import UserError


class CatalogueTree(nn.Module):
    """The children of every prefix of every item, as buffers that move with the model.

    Memory: 4 bytes per item and level for the item's node, and at most 16 per item and level for
    the children, less where items share prefixes (10^6 items x 4 levels: below 80 MB). Nothing is
    saved with the weights: the tree follows from the item index.

    Args:
        tokens_NL: int64 tokens of all items.
        level_offsets_L: the token of code 0 of each level.

    Raises:
        UserError: no items.
    """

    def __init__(self, tokens_NL: Tensor, level_offsets_L: Tensor) -> None:
        super().__init__()
        if len(tokens_NL) == 0:
            raise UserError(
                "model.softmax: got 'trie' for a catalogue of 0 items, expected at least 1. "
                "Check the item index, or set model.softmax=level."
            )
        codes_NL = tokens_NL - level_offsets_L
        num_levels = codes_NL.shape[1]
        self._widths: list[int] = []
        nodes_N = torch.zeros(len(codes_NL), dtype=torch.int64)
        nodes = []
        for level in range(num_levels):
            nodes.append(nodes_N.to(torch.int32))
            size = int(codes_NL[:, level].max()) + 1
            # A child is a (node, code); unique sorts, so the children of a node are neighbours.
            children, nodes_N = (nodes_N * size + codes_NL[:, level]).unique(return_inverse=True)
            num_nodes = int(nodes[level].max()) + 1
            degrees = torch.bincount(children // size, minlength=num_nodes)
            ends = degrees.cumsum(0)
            self._widths.append(int(degrees.max()))
            for name, values in (
                ("first", ends - degrees),
                ("end", ends),
                ("codes", children % size),
            ):
                self.register_buffer(f"{name}_{level}", values.to(torch.int32), persistent=False)
        self.register_buffer("nodes_NL", torch.stack(nodes, 1), persistent=False)

    def keep_children(self, logits_MK: Tensor, rows_M: Tensor, level: int) -> Tensor:
        """Return the logits with -inf for codes that follow no item with the same prefix.

        A mask instead of gathered logits: its gradient is the same from run to run on any device,
        and nothing is read back from it.

        Args:
            logits_MK: logits of one level.
            rows_M: int64 item rows, each >= 0, whose first `level` codes are the prefixes.
            level: the level that the logits score.
        """
        first, end, codes = (
            self.get_buffer(f"{name}_{level}") for name in ("first", "end", "codes")
        )
        nodes_M = self.get_buffer("nodes_NL")[rows_M, level]
        columns_C = torch.arange(self._widths[level], device=rows_M.device, dtype=torch.int32)
        children_MC = first[nodes_M][:, None] + columns_C
        exists_MC = children_MC < end[nodes_M][:, None]
        codes_MC = codes[children_MC.clamp(max=len(codes) - 1)].long()
        num_codes = logits_MK.shape[1]
        codes_MC = codes_MC.masked_fill(~exists_MC, num_codes)  # one spare column for filling
        open_MK = logits_MK.new_zeros((len(rows_M), num_codes + 1), dtype=torch.bool)
        open_MK = open_MK.scatter(1, codes_MC, True)[:, :-1]
        return logits_MK.masked_fill(~open_MK, -torch.inf)
