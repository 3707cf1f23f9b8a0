"""What would be counted if a hit were a semantic ID instead of an item? For comparison only.

Papers whose items share semantic IDs count a hit where the generated semantic ID is the target's,
whichever of its items was meant. Here items have codes of their own, made unique by the collision
policy; this takes the codes before it. Such a figure is never below the item's and is never called
recall without "semantic ID" beside it.

Shapes: U users, k list length, N items, L levels.
"""

from __future__ import annotations

import numpy as np

from genrec.errors import UserError
from genrec.evaluation.exposure import chunks
from genrec.evaluation.metrics import ABSENT, ranks_in_lists


def semantic_id_numbers(codes_NL: np.ndarray) -> np.ndarray:
    """Return one number per item, (N,) int64, equal where the codes are equal."""
    codes_NL = np.asarray(codes_NL)
    if codes_NL.ndim != 2:
        raise UserError(f"codes: got shape {codes_NL.shape}, expected (items, levels).")
    _, numbers_N = np.unique(codes_NL, axis=0, return_inverse=True)
    return numbers_N.reshape(-1).astype(np.int64)


def semantic_id_ranks(
    rows_Uk: np.ndarray, target_U: np.ndarray, numbers_N: np.ndarray
) -> np.ndarray:
    """Return where the target's semantic ID stands among the distinct ones of its user's list.

    A semantic ID stands where its best item stands, and takes one place however many items it has:
    the list that a generator of semantic IDs would have made.

    Args:
        rows_Uk: (U, k) int item rows, best first, -1 = padding.
        target_U: (U,) int item rows.
        numbers_N: (N,) what `semantic_id_numbers` returned.

    Returns:
        (U,) int64: 0-based place, -1 where absent; never behind the item's own place.
    """
    rows_Uk, target_U = np.asarray(rows_Uk), np.asarray(target_U)
    found, start = [np.empty(0, np.int64)], 0
    for part_Bk in chunks(rows_Uk):
        listed_Bk = np.where(part_Bk >= 0, numbers_N[part_Bk], -1)
        wanted_B = numbers_N[target_U[start : start + len(part_Bk)]]
        rank_B = ranks_in_lists(listed_Bk, wanted_B)
        hits = np.flatnonzero(rank_B > 0)
        rank_B[hits] = [
            len(np.unique(listed_Bk[b, : rank_B[b]])) for b in hits
        ]  # distinct ones before it; padding never stands before a hit
        found.append(rank_B)
        start += len(part_Bk)
    ranks_U = np.concatenate(found)
    assert (ranks_U >= ABSENT).all()
    return ranks_U
