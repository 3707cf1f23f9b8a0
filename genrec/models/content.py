"""What an item's features say, as a vector of the model's width: a linear map that is learned.

The features' vectors stay as they are and are saved with the weights, so that a model knows its
items without the extractor that made them. It knows no codes.

Shapes: N items, E width of the features' vectors, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Content(nn.Module):
    """Item vectors of the features, mapped to the model.

    Args:
        vectors_NE: float32, as the features gave them; kept around 0 with entries of variance 1 on
            average, constant ones 0.
        width: D.
        spread: standard deviation of what comes out at the start.
        half_at: interactions after which an item keeps half of its content; None: always all.
        new_as_rare: an item that nobody consumed keeps the mean over the items that someone did,
            most of them rare. False: over their interactions, most of them with popular items.
    """

    vectors_NE: Tensor
    mean_E: Tensor
    spread_1: Tensor
    share_N1: Tensor
    """What an item keeps of its content, 0 to 1; only with `half_at`."""

    def __init__(
        self,
        vectors_NE: Tensor,
        width: int,
        spread: float,
        *,
        half_at: float | None = None,
        new_as_rare: bool = False,
    ) -> None:
        super().__init__()
        self.half_at, self.new_as_rare = half_at, new_as_rare
        mean_E = vectors_NE.mean(0)
        centred_NE = vectors_NE - mean_E
        spread_1 = centred_NE.square().mean().sqrt()[None]
        spread_1 = torch.where(spread_1 > 0, spread_1, torch.ones_like(spread_1))
        self.register_buffer("mean_E", mean_E)
        self.register_buffer("spread_1", spread_1)
        self.register_buffer("vectors_NE", centred_NE / spread_1)
        if half_at is not None:
            self.register_buffer("share_N1", torch.ones(len(vectors_NE), 1))
        self.projection = nn.Linear(vectors_NE.shape[1], width, bias=False)
        nn.init.normal_(self.projection.weight, std=spread / vectors_NE.shape[1] ** 0.5)

    @torch.no_grad()
    def meet_items(self, counts_N: Tensor, *, more: bool = False) -> None:
        """Take in how often items were consumed in training: n times leave half_at / (half_at + n).

        Args:
            counts_N: interactions of each item.
            more: training goes on: no item gets back what it had lost. Without it, with
                `new_as_rare`, items that nobody consumed keep the mean instead of all.
        """
        if self.half_at is None:
            return
        counts_N1 = counts_N.to(self.share_N1)[:, None]
        share_N1 = self.half_at / (self.half_at + counts_N1)
        if self.new_as_rare and not more:
            consumed_N1 = counts_N1 > 0
            share_N1[~consumed_N1] = self._mean_share(share_N1[consumed_N1]).to(share_N1)
        self.share_N1.copy_(torch.minimum(share_N1, self.share_N1) if more else share_N1)

    @torch.no_grad()
    def describe(self, first: int, vectors_ME: Tensor) -> None:
        """Take in items that join after training, from row `first` on.

        They keep the mean share of the others (`new_as_rare` says which): with all of it they would
        outshine whatever is known better (docs/log.md).

        Args:
            first: their first row.
            vectors_ME: as the features gave them, in the space of the others.
        """
        new_ME = (vectors_ME.to(self.mean_E) - self.mean_E) / self.spread_1
        self.vectors_NE[first:] = new_ME
        if self.half_at is not None:
            self.share_N1[first:] = self._mean_share(self.share_N1[:first]).to(self.share_N1)

    def _mean_share(self, shares: Tensor) -> Tensor:
        """Return the mean of shares over items or interactions; 1 without any.

        A share says how often its item was consumed. Where nobody consumed anything, it is the mean
        over the items; items that were given the mean leave it as it is.
        """
        if not shares.numel():
            return torch.ones(())
        assert self.half_at is not None
        known = shares.double()
        if self.new_as_rare:
            return known.mean()
        counts = self.half_at * (1 / known - 1)
        total = counts.sum()
        return (counts * known).sum() / total if total > 0 else known.mean()

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors of items, (...) -> (..., D)."""
        mapped: Tensor = self.projection(self.vectors_NE[rows])
        return mapped if self.half_at is None else mapped * self.share_N1[rows]

    def table(self) -> Tensor:
        """Return the vectors of all items, (N, D)."""
        mapped_ND: Tensor = self.projection(self.vectors_NE)
        return mapped_ND if self.half_at is None else mapped_ND * self.share_N1
