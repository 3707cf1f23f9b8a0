"""What does the best linear model of who-had-what recommend? EASE, in closed form.

Order and time do not exist here: a history is a set. The item-item matrix is dense, so catalogues
beyond a stated size are refused.

Shapes: B histories, N items, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.data.interactions import Examples, Interactions
from genrec.errors import UserError
from genrec.models.baselines.base import (
    Baseline,
    history_matrix,
    popularity_tie_break,
    seen_matrix,
)

if TYPE_CHECKING:
    from genrec.data import Catalog

_BLOCK = 2048  # rows worked on at a time: mirrors and scalings need no second matrix


class EASE(Baseline):
    """Each item predicted from the others by ridge regression (Steck 2019, 1905.03375, eq. 8).

    With P the inverse of X'X + regularization * I, the weights are B = -P / diag(P) by columns with
    a diagonal of zero; a history scores the sum of its items' rows of B.
    """

    class Config(StrictConfig):
        """Settings of EASE."""

        name: Literal["ease"] = "ease"
        """Name in the registry."""
        regularization: float = Field(default=200.0, gt=0, allow_inf_nan=False)
        """Added to the diagonal, in users (paper: 200 to 1000)."""
        history_length: int | None = Field(default=20, ge=1)
        """Last items of the history that are read, as in item-kNN (better than all of them on
        MovieLens-100K: docs/evaluation.md); null: all, as in the paper."""
        precision: Literal["float32", "float64"] = "float32"
        """Of the N by N matrix; float64 doubles memory and time."""
        max_items: int = Field(default=25_000, ge=1)
        """Larger catalogues are refused: 25,000 items take 2.5 GB in float32, and time grows with
        the cube."""

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        num_items, config = interactions.num_items, self.config
        if num_items > config.max_items:
            gigabytes = num_items**2 * np.dtype(config.precision).itemsize / 1e9
            raise UserError(
                f"ease: got {num_items:,} items, expected at most {config.max_items:,} "
                f"(max_items): the item-item matrix would take {gigabytes:,.1f} GB in "
                f"{config.precision}. Leave ease out, filter the catalogue, or raise max_items "
                "where memory and time allow."
            )
        seen_UN = seen_matrix(interactions).astype(config.precision)
        gram_NN = (seen_UN.T @ seen_UN).toarray(order="F")
        gram_NN[np.diag_indices(num_items)] += config.regularization
        inverse_NN = _inverse(gram_NN)
        inverse_NN /= -inverse_NN.diagonal().copy()
        inverse_NN[np.diag_indices(num_items)] = 0.0
        self._weights_NN = inverse_NN
        self._tie_break_N = popularity_tie_break(interactions)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        had_BN = history_matrix(histories, self.num_items, self.config.history_length)
        had_BN.data[:] = 1.0
        scores_BN = had_BN.astype(self.config.precision) @ self._weights_NN
        return scores_BN.astype(np.float64) + self._tie_break_N


def _inverse(matrix_NN: np.ndarray) -> np.ndarray:
    """Return the inverse of a symmetric positive definite matrix, in its own memory.

    Cholesky's factor and its inverse overwrite the matrix (Fortran order), so that the peak is one
    matrix: 586 MB for 12,101 items in float32.
    """
    from scipy.linalg import lapack

    kind: Any = "s" if matrix_NN.dtype == np.float32 else "d"
    factorise, invert = getattr(lapack, f"{kind}potrf"), getattr(lapack, f"{kind}potri")
    factor_NN, status = factorise(matrix_NN, lower=1, overwrite_a=1)
    if status == 0:
        factor_NN, status = invert(factor_NN, lower=1, overwrite_c=1)
    if status:
        raise UserError(
            f"ease: the item-item matrix is not positive definite in {matrix_NN.dtype} (LAPACK "
            f"status {status}). Raise regularization, or choose precision float64."
        )
    for start in range(0, len(factor_NN), _BLOCK):  # the lower triangle holds the result
        stop = min(start + _BLOCK, len(factor_NN))
        factor_NN[start:stop, stop:] = factor_NN[stop:, start:stop].T
        corner = np.tril(factor_NN[start:stop, start:stop])
        factor_NN[start:stop, start:stop] = corner + np.tril(corner, -1).T
    result_NN: np.ndarray = factor_NN.T  # symmetric: the same matrix, in C order
    return result_NN
