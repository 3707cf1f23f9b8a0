"""How good is one ranked list, or one vector of scores, for one user? Arrays in, arrays out.

Every accuracy metric is a per-user float64 array, the currency of this package: means, intervals
and tests are made elsewhere (`genrec.evaluation.significance`). It knows nothing about models,
users or splits, and a hit is an item row, never a semantic ID.

With one target per user recall@k equals hit@k, MAP@k equals MRR@k, and precision@k is recall@k / k;
sets of targets are in `target_sets.py`. Ranks count from 0; -1 means "not in the list".

Ties, two ways (they differ: .0120 and .0113 for the most popular items of Amazon Beauty):
`expected_rank` takes the mean of the places that the tied items share and then the metric of that
one place, as in the tables of docs/evaluation.md; `expected_*_at` takes the mean of the metric over
those places.

Shapes: U users, B users of a chunk, N items, k list length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from genrec.errors import UserError

ABSENT = -1

PRINTED = ("recall@10", "ndcg@10")
"""What tables of runs show and what is tested. Everything else is in results.json."""


def ranks_in_lists(rows_Bk: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """Return where each target stands in its user's list.

    Args:
        rows_Bk: (B, k) int item rows, best first, -1 = padding.
        target_B: (B,) int item rows, each >= 0.

    Returns:
        (B,) int64: 0-based place of the first match, -1 where the target is absent.

    Raises:
        UserError: shapes that do not fit, or a user without a target (negative row).
    """
    rows_Bk, target_B = np.asarray(rows_Bk), np.asarray(target_B)
    if rows_Bk.ndim != 2 or target_B.shape != (len(rows_Bk),):
        raise UserError(
            f"lists: got rows {rows_Bk.shape} and targets {target_B.shape}, expected (B, k) and "
            "(B,). Give one list and one target per user."
        )
    _check_targets(target_B)
    match_Bk = rows_Bk == target_B[:, None]
    if not match_Bk.shape[1]:
        return np.full(len(rows_Bk), ABSENT, np.int64)
    return np.where(match_Bk.any(1), match_Bk.argmax(1), ABSENT).astype(np.int64)


def recall_at(rank_U: np.ndarray, k: int) -> np.ndarray:
    """Return recall@k (= hit@k with one target): 1 where 0 <= rank < k, else 0; (U,) float64."""
    rank_U = _ranks(rank_U, k)
    return ((rank_U >= 0) & (rank_U < k)).astype(np.float64)


def ndcg_at(rank_U: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k with one target: 1 / log2(rank + 2) where 0 <= rank < k, else 0; (U,)."""
    rank_U = _ranks(rank_U, k)
    return recall_at(rank_U, k) / np.log2(np.maximum(rank_U, 0) + 2.0)


def mrr_at(rank_U: np.ndarray, k: int) -> np.ndarray:
    """Return the reciprocal rank cut at k: 1 / (rank + 1) where 0 <= rank < k, else 0; (U,)."""
    rank_U = _ranks(rank_U, k)
    return recall_at(rank_U, k) / (np.maximum(rank_U, 0) + 1.0)


def list_metrics(
    rows_Bk: np.ndarray, target_B: np.ndarray, ks: Sequence[int] = (5, 10)
) -> dict[str, np.ndarray]:
    """Return `recall@k`, `ndcg@k` and `mrr@k` per user for every k of `ks`.

    Args:
        rows_Bk: (B, k) int item rows, best first, -1 = padding (a shorter list).
        target_B: (B,) int item rows.
        ks: cut-offs, each between 1 and the width of `rows_Bk`.

    Returns:
        name -> (B,) float64.

    Raises:
        UserError: a cut-off beyond the width of the lists: it would silently equal a smaller one.
    """
    width = np.asarray(rows_Bk).shape[-1]
    for k in ks:
        if k > width:
            raise UserError(
                f"k: got {k}, but the lists hold {width} items. Use k <= {width}, or ask for "
                f"lists of at least {k} items."
            )
    rank_B = ranks_in_lists(rows_Bk, target_B)
    return {
        f"{name}@{k}": function(rank_B, k)
        for name, function in (("recall", recall_at), ("ndcg", ndcg_at), ("mrr", mrr_at))
        for k in ks
    }


def tied_ranks(scores_BN: np.ndarray, target_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each target stands among all scores, with its ties.

    Args:
        scores_BN: (B, N) float scores, higher is better, -inf = not eligible (masked).
        target_B: (B,) int item rows.

    Returns:
        above_B: (B,) int64, how many eligible items score strictly higher.
        tied_B: (B,) int64, how many score the same, the target included; 0 where the target
            itself is not eligible, and can therefore never be hit.

    Raises:
        UserError: NaN scores, or a target outside [0, N).
    """
    scores_BN, target_B = np.asarray(scores_BN), np.asarray(target_B)
    _check_targets(target_B, scores_BN.shape[1])
    if np.isnan(scores_BN).any():
        raise UserError("scores: got NaN, expected numbers (-inf = not eligible). Check the model.")
    score_B = scores_BN[np.arange(len(target_B)), target_B]
    above_B = np.count_nonzero(scores_BN > score_B[:, None], axis=1)
    tied_B = np.count_nonzero(scores_BN == score_B[:, None], axis=1)
    return above_B.astype(np.int64), np.where(score_B == -np.inf, 0, tied_B).astype(np.int64)


def expected_rank(above_U: np.ndarray, tied_U: np.ndarray) -> np.ndarray:
    """Return the mean place of the target when the order of ties is drawn uniformly.

    Args:
        above_U: (U,) int, items strictly above the target.
        tied_U: (U,) int, items with the target's score, the target included; 0 = never hit.

    Returns:
        (U,) float64: above + (tied - 1) / 2, possibly halfway between two places; -1 where the
        target can never be hit. `recall_at`, `ndcg_at` and `mrr_at` take it as it is.
    """
    above_U, tied_U = np.asarray(above_U), np.asarray(tied_U)
    return np.where(tied_U > 0, above_U + (tied_U - 1) / 2, float(ABSENT))


def expected_recall_at(above_U: np.ndarray, tied_U: np.ndarray, k: int) -> np.ndarray:
    """Return recall@k expected when the order of ties is drawn uniformly.

    The target's rank is then uniform over above .. above + tied - 1, so this is the share of
    those places that lie before k. Without ties it equals `recall_at(above_U, k)`.

    Args:
        above_U: (U,) int, items strictly above the target.
        tied_U: (U,) int, items with the target's score, the target included; 0 = never hit.
        k: cut-off >= 1.

    Returns:
        (U,) float64 in [0, 1].
    """
    return _expected(above_U, tied_U, k, np.ones)


def expected_ndcg_at(above_U: np.ndarray, tied_U: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k expected when the order of ties is drawn uniformly; see expected_recall_at."""
    return _expected(above_U, tied_U, k, lambda n: 1.0 / np.log2(np.arange(n) + 2.0))


def expected_mrr_at(above_U: np.ndarray, tied_U: np.ndarray, k: int) -> np.ndarray:
    """Return MRR@k expected when the order of ties is drawn uniformly; see expected_recall_at."""
    return _expected(above_U, tied_U, k, lambda n: 1.0 / (np.arange(n) + 1.0))


def _expected(
    above_U: np.ndarray, tied_U: np.ndarray, k: int, gains: Callable[[int], np.ndarray]
) -> np.ndarray:
    _check_k(k)
    above_U, tied_U = np.asarray(above_U), np.asarray(tied_U)
    total = np.concatenate([[0.0], np.cumsum(gains(k))])  # gain of the first 0..k places
    gain_U = total[np.minimum(above_U + tied_U, k)] - total[np.minimum(above_U, k)]
    return np.where(tied_U > 0, gain_U / np.maximum(tied_U, 1), 0.0)


def _ranks(rank_U: np.ndarray, k: int) -> np.ndarray:
    _check_k(k)
    return np.asarray(rank_U)


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k: got {k}, expected an integer >= 1.")


def _check_targets(target_B: np.ndarray, num_items: int | None = None) -> None:
    if len(target_B) and target_B.min() < 0:
        raise UserError(
            f"targets: {np.count_nonzero(target_B < 0)} of {len(target_B)} users have no target "
            "(negative row). Leave these users out before evaluating."
        )
    if num_items is not None and len(target_B) and target_B.max() >= num_items:
        raise UserError(
            f"targets: got row {target_B.max()}, but there are scores for {num_items} items. "
            "Score the catalogue that the targets come from."
        )
