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
        vectors_NE: float32, of about unit variance (`standardized`); zeros for items that nothing
            is known of.
        width: D.
        spread: standard deviation of what comes out at the start.
    """

    vectors_NE: Tensor

    def __init__(self, vectors_NE: Tensor, width: int, spread: float) -> None:
        super().__init__()
        self.register_buffer("vectors_NE", vectors_NE)
        self.projection = nn.Linear(vectors_NE.shape[1], width, bias=False)
        nn.init.normal_(self.projection.weight, std=spread / vectors_NE.shape[1] ** 0.5)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors of items, (...) -> (..., D)."""
        mapped: Tensor = self.projection(self.vectors_NE[rows])
        return mapped

    def table(self) -> Tensor:
        """Return the vectors of all items, (N, D)."""
        mapped_ND: Tensor = self.projection(self.vectors_NE)
        return mapped_ND


def standardized(vectors_NE: Tensor) -> Tensor:
    """Return vectors around 0 with entries of variance 1 on average; constant ones become 0."""
    centred_NE = vectors_NE - vectors_NE.mean(0)
    spread = centred_NE.square().mean().sqrt()
    return centred_NE / torch.where(spread > 0, spread, 1)
