"""Which items share the first p codes, and what does a score per item say about the next code?

For backbones that end a semantic ID with a choice among real items. A group is the items below one
prefix of length p; the next codes' probabilities are sums over the items of the group. It knows no
network: vectors and scores are given.

Shapes: N items, M look-ups, C items of the largest group, K codes of a level, p prefix length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NO_ITEM = -1


class ItemGroups(nn.Module):
    """Items by the first `prefix_length` codes of their semantic IDs.

    Nothing is saved with the weights: the groups follow from the item index. They take at most 8
    bytes per item and level of the prefix, and 48 per item.

    Args:
        codes_NL: int64 codes of all items.
        codebook_sizes: K of each level.
        prefix_length: p, from 0 (one group of all items) to L - 1.
    """

    order_N: Tensor
    place_N: Tensor
    starts_G: Tensor
    ends_G: Tensor
    group_N: Tensor
    codes_NL: Tensor

    def __init__(self, codes_NL: Tensor, codebook_sizes: Sequence[int], prefix_length: int) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        self.prefix_length = prefix_length
        group_N = torch.zeros(len(codes_NL), dtype=torch.int64)
        for level in range(prefix_length):
            # A longer prefix is a (prefix, code); numbers stay below N * K, however long it gets.
            keys_N = group_N * self.codebook_sizes[level] + codes_NL[:, level]
            keys_G, group_N = keys_N.unique(return_inverse=True)
            self.register_buffer(f"keys_{level}", keys_G, persistent=False)
        counts_G = group_N.bincount()
        ends_G = counts_G.cumsum(0)
        self.largest = int(counts_G.max()) if len(counts_G) else 0
        order_N = group_N.argsort(stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N)) - (ends_G - counts_G)[group_N[order_N]]
        for name, values in (
            ("starts_G", ends_G - counts_G),
            ("ends_G", ends_G),
            ("group_N", group_N),
            ("order_N", order_N),
            ("place_N", place_N),
            ("codes_NL", codes_NL),
        ):
            self.register_buffer(name, values, persistent=False)

    def extend(self, prefixes_M: Tensor, codes_M: Tensor, level: int) -> Tensor:
        """Return the numbers of prefixes that are one code longer; the empty prefix is 0.

        -1 for prefixes of no item, and for what extends them.
        """
        known_G = self.get_buffer(f"keys_{level}")
        keys_M = prefixes_M * self.codebook_sizes[level] + codes_M
        found_M = torch.searchsorted(known_G, keys_M).clamp(max=len(known_G) - 1)
        is_known_M = (known_G[found_M] == keys_M) & (prefixes_M >= 0)
        return found_M.masked_fill(~is_known_M, NO_ITEM)

    def below(self, prefixes_M: Tensor) -> Tensor:
        """Return the items (M, C) below prefixes of length p, -1 where there are no more."""
        items_MC = self._items(prefixes_M.clamp(min=0))
        return items_MC.masked_fill((prefixes_M == NO_ITEM)[:, None], NO_ITEM)

    def around(self, rows_M: Tensor) -> Tensor:
        """Return the items (M, C) of the groups that items belong to, themselves among them."""
        return self._items(self.group_N[rows_M])

    def _items(self, group_M: Tensor) -> Tensor:
        columns_C = torch.arange(self.largest, device=group_M.device)
        places_MC = self.starts_G[group_M][:, None] + columns_C
        exists_MC = places_MC < self.ends_G[group_M][:, None]
        items_MC = self.order_N[places_MC.clamp(max=len(self.order_N) - 1)]
        return items_MC.masked_fill(~exists_MC, NO_ITEM)

    def code_logits(self, scores_MC: Tensor, items_MC: Tensor, level: int) -> Tensor:
        """Return the log of the summed exponentials of scores per code of a level, (M, K).

        Args:
            scores_MC: float32, -inf for items that do not count.
            items_MC: int64 rows, -1 for filling.
            level: whose codes.

        Returns:
            -inf for codes without an item.
        """
        codes_MC = self.codes_NL[items_MC.clamp(min=0), level]
        shape = (len(scores_MC), self.codebook_sizes[level])
        most_MK = scores_MC.new_full(shape, -torch.inf)
        most_MK = most_MK.scatter_reduce(1, codes_MC, scores_MC, "amax")
        # Nothing below is infinite, which a CPU takes several times as long for: a part of e**-87
        # is lost beside the largest, which is 1, so a code with an item has a sum of 1 or more.
        most_MC = most_MK.gather(1, codes_MC).clamp(min=torch.finfo(most_MK.dtype).min)
        parts_MC = (scores_MC - most_MC).clamp(min=-87.0).exp()
        sums_MK = scores_MC.new_zeros(shape).scatter_add(1, codes_MC, parts_MC)
        return most_MK + sums_MK.clamp(min=1.0).log()

    def keep_code(self, scores_MC: Tensor, items_MC: Tensor, codes_M: Tensor, level: int) -> Tensor:
        """Return the scores with -inf for items whose code of `level` is another one."""
        other_MC = self.codes_NL[items_MC.clamp(min=0), level] != codes_M[:, None]
        return scores_MC.masked_fill(other_MC, -torch.inf)
