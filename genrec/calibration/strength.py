"""How strong is a user's preference? One number per list that means the same for every user.

Calibrated probabilities are frequencies, so their entropy H is the surprise (in nats) that the next
item will bring on average, for every user alike. The strength is the share of the surprise of a
blind guess among the n eligible items that the list takes away:

    strength = 1 - H / log n,    H = -sum_list p log p - r log(r / m)

with r the mass outside the list, spread evenly over its m items. 0: nothing is preferred; 1: one
item is certain. It does not depend on how many items of the list are shown, and for calibrated
probabilities the mean of -log p(next item) over users of strength s is (1 - s) log n: that can be
checked, and a test does. It says how much is known, not how personal it is: a user who gets the
most popular items has a strength too.

Shapes: U users, k list length.
"""

from __future__ import annotations

import numpy as np


def preference_strength(probabilities_Uk: np.ndarray, num_rest_U: np.ndarray) -> np.ndarray:
    """Return the strength of each list, (U,) float64 in [0, 1]; 0 where nothing is eligible.

    Args:
        probabilities_Uk: (U, k) calibrated probabilities of the whole list (not cut), 0 = padding.
        num_rest_U: (U,) eligible items outside the list.
    """
    p_Uk = np.asarray(probabilities_Uk, dtype=np.float64)
    rest_items_U = np.asarray(num_rest_U, dtype=np.float64)
    eligible_U = np.count_nonzero(p_Uk > 0, axis=1) + rest_items_U
    rest_U = np.maximum(1.0 - p_Uk.sum(axis=1), 0.0) * (rest_items_U > 0)
    surprise_U = -(p_Uk * np.log(np.where(p_Uk > 0, p_Uk, 1.0))).sum(axis=1)
    per_item_U = rest_U / np.maximum(rest_items_U, 1.0)
    surprise_U -= rest_U * np.log(np.where(per_item_U > 0, per_item_U, 1.0))
    blind_U = np.log(np.maximum(eligible_U, 1.0))
    share_U = np.where(blind_U > 0, surprise_U / np.where(blind_U > 0, blind_U, 1.0), 0.0)
    return np.where(eligible_U > 0, np.clip(1.0 - share_U, 0.0, 1.0), 0.0)
