"""How good is one ranked list for a user who has a set of targets? Arrays in, arrays out.

The general form of `genrec.evaluation.metrics`, which has one target per user: recall, precision,
hit, NDCG, MRR and MAP at k. It knows nothing about models or splits.

Where definitions in the literature differ: recall@k divides by all targets (not by min(k,
targets)); MAP@k divides by min(k, targets), so that a perfect list has 1; the ideal list of NDCG@k
holds min(k, targets) targets. precision@k divides by k, also where a list is shorter.

With one target recall = hit, MAP = MRR and precision = hit / k.

Shapes: U users, k list length, P (user, target) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from genrec.errors import UserError


def relevance(
    rows_Uk: np.ndarray, users_P: np.ndarray, targets_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which places of each list hold a target, and how many targets a user has.

    Args:
        rows_Uk: (U, k) int item rows, best first, -1 = padding. An item that stands twice counts
            where it stands first.
        users_P: (P,) int, the list (0 to U - 1) that a target belongs to, in any order.
        targets_P: (P,) int item rows; a pair that stands twice counts once.

    Returns:
        relevant_Uk: (U, k) bool.
        num_targets_U: (U,) int64, each >= 1.

    Raises:
        UserError: shapes that do not fit, a user outside the lists, or users without a target.
    """
    rows_Uk = np.asarray(rows_Uk)
    users_P, targets_P = np.asarray(users_P, np.int64), np.asarray(targets_P, np.int64)
    if rows_Uk.ndim != 2 or users_P.ndim != 1 or users_P.shape != targets_P.shape:
        raise UserError(
            f"target sets: got lists {rows_Uk.shape}, users {users_P.shape} and targets "
            f"{targets_P.shape}, expected (U, k), (P,) and (P,)."
        )
    num_users, k = rows_Uk.shape
    if len(users_P) and not (0 <= users_P.min() <= users_P.max() < num_users):
        raise UserError(f"target sets: got a user outside 0 .. {num_users - 1}, one per list.")
    if len(targets_P) and targets_P.min() < 0:
        raise UserError("target sets: got a negative item row. Leave missing targets out.")
    num_items = int(max(rows_Uk.max(initial=0), targets_P.max(initial=0))) + 1
    wanted = np.unique(users_P * num_items + targets_P)  # one number per (user, item)
    num_targets_U = np.bincount(wanted // num_items, minlength=num_users)
    if num_users and not num_targets_U.all():
        raise UserError(
            f"targets: {np.count_nonzero(num_targets_U == 0)} of {num_users} users have no "
            "target. Leave these users out before evaluating."
        )
    listed = np.where(rows_Uk >= 0, np.arange(num_users)[:, None] * num_items + rows_Uk, -1)
    relevant = np.isin(listed, wanted).reshape(-1)
    places = np.flatnonzero(relevant)
    _, first = np.unique(listed.reshape(-1)[places], return_index=True)
    result = np.zeros(num_users * k, bool)
    result[places[first]] = True
    return result.reshape(num_users, k), num_targets_U.astype(np.int64)


def hit_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return 1 where any of the first k items is a target, else 0; (U,) float64."""
    return np.asarray(_top(relevant_Uk, k).any(axis=1), np.float64)


def recall_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return the share of a user's targets among the first k items; (U,) float64."""
    return _top(relevant_Uk, k).sum(axis=1) / num_targets_U


def precision_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return the share of k places that hold a target; (U,) float64."""
    return _top(relevant_Uk, k).sum(axis=1) / k


def mrr_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return 1 / place (from 1) of the first target among the first k, else 0; (U,) float64."""
    top_Uk = _top(relevant_Uk, k)
    if not top_Uk.shape[1]:
        return np.zeros(len(top_Uk))
    return top_Uk.any(axis=1) / (top_Uk.argmax(axis=1) + 1.0)


def map_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return average precision at k: precision at each target's place, over min(k, targets)."""
    top_Uk = _top(relevant_Uk, k)
    places_k = np.arange(1, top_Uk.shape[1] + 1)
    precision_Uk = np.cumsum(top_Uk, axis=1) / places_k
    return (precision_Uk * top_Uk).sum(axis=1) / np.minimum(num_targets_U, k)


def ndcg_at(relevant_Uk: np.ndarray, num_targets_U: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG at k with gain 1 per target and discount 1 / log2(place + 1); (U,) float64."""
    top_Uk = _top(relevant_Uk, k)
    discounts_k = 1.0 / np.log2(np.arange(k) + 2.0)
    ideal = np.cumsum(discounts_k)[np.minimum(num_targets_U, k) - 1]
    gained_U = (top_Uk * discounts_k[: top_Uk.shape[1]]).sum(axis=1)
    return np.asarray(gained_U / ideal)


FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "recall": recall_at,
    "precision": precision_at,
    "hit": hit_at,
    "ndcg": ndcg_at,
    "mrr": mrr_at,
    "map": map_at,
}


def set_metrics(
    rows_Uk: np.ndarray,
    users_P: np.ndarray,
    targets_P: np.ndarray,
    ks: Sequence[int] = (5, 10),
) -> dict[str, np.ndarray]:
    """Return every metric of this file per user for every k of `ks`, as `<metric>@<k>`.

    Args:
        rows_Uk: (U, k) int item rows, best first, -1 = padding (a shorter list).
        users_P: (P,) int, the list that a target belongs to.
        targets_P: (P,) int item rows.
        ks: cut-offs, each between 1 and the width of `rows_Uk`.

    Returns:
        name -> (U,) float64.

    Raises:
        UserError: see `relevance`; a cut-off beyond the width of the lists.
    """
    width = np.asarray(rows_Uk).shape[-1]
    for k in ks:
        if not 1 <= k <= width:
            raise UserError(
                f"k: got {k}, but the lists hold {width} items. Use 1 <= k <= {width}, or ask for "
                f"lists of at least {k} items."
            )
    relevant_Uk, num_targets_U = relevance(rows_Uk, users_P, targets_P)
    return {
        f"{name}@{k}": function(relevant_Uk, num_targets_U, k)
        for name, function in FUNCTIONS.items()
        for k in ks
    }


def _top(relevant_Uk: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise UserError(f"k: got {k}, expected an integer >= 1.")
    return np.asarray(relevant_Uk)[:, :k]
