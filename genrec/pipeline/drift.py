"""Do new items lie farther from their codes than items of the training catalogue would?

Shares and a sentence, from distances alone. Whether anything should be trained again is for people
to decide.

Shapes: M new items, Q percentiles (0 to 100).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest

from genrec.pipeline.indexing import FITTED, UNSEEN

HIGH, HIGHEST = 95, 99
SIGNIFICANT = 0.01


def drift_figures(
    distances_M: np.ndarray | None, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    """Compare distances to codes with those of the catalogue that the index was built from.

    Fitted items lie closer to their codes than unseen items of the same kind, the more so the fewer
    items there are per code; so there is a verdict only against items that a second fit left out.

    Args:
        distances_M: squared distances of new items; None where codes do not stand for vectors.
        arrays: percentiles (Q,) `fitted_distances` and perhaps `unseen_distances`.

    Returns:
        None or `reference` ("unseen" or "fitted"), `median` and `reference_median`, `share_above`
        (of the new items beyond the reference's 95th and 99th percentile), `p_value` (binomial, of
        so many beyond the 95th), `drifted` (None against fitted items) and `sentence`; and the
        percentile (M,) of each new item in the reference.
    """
    reference = arrays.get(UNSEEN, arrays.get(FITTED))
    if distances_M is None or reference is None or not len(distances_M):
        return None, None
    held_out = UNSEEN in arrays
    beyond = {q: int((distances_M > reference[q]).sum()) for q in (HIGH, HIGHEST)}
    test = binomtest(beyond[HIGH], len(distances_M), 1 - HIGH / 100, alternative="greater")
    drifted = bool(test.pvalue < SIGNIFICANT) if held_out else None
    figures = {
        "reference": "unseen" if held_out else "fitted",
        "median": float(np.median(distances_M)),
        "reference_median": float(reference[50]),
        "share_above": {str(q): count / len(distances_M) for q, count in beyond.items()},
        "p_value": float(test.pvalue),
        "drifted": drifted,
        "sentence": _sentence(len(distances_M), beyond, drifted),
    }
    return figures, _percentile(distances_M, reference)


def _percentile(distances_M: np.ndarray, reference_Q: np.ndarray) -> np.ndarray:
    """Return the share in percent of the reference that lies below each distance."""
    values, first = np.unique(reference_Q, return_index=True)
    return np.interp(distances_M, values, np.linspace(0, 100, len(reference_Q))[first])


def _sentence(num_items: int, beyond: Mapping[int, int], drifted: bool | None) -> str:
    kind = "fitted items" if drifted is None else "unseen items of the training catalogue"
    shares = (
        f"{beyond[HIGH]} of {num_items} new item(s) ({beyond[HIGH] / num_items:.0%}) lie farther "
        f"from their codes than {HIGH}% of the {kind}, {beyond[HIGHEST]} farther than {HIGHEST}%"
    )
    if drifted is None:
        return (
            f"{shares}. Fitted items lie closer to their codes than any unseen ones, so this alone "
            "is no sign of drift; an index that is built with index.drift_holdout=0.1 tells."
        )
    if drifted:
        return (
            f"{shares}; 5% and 1% are to be expected. The new items are unlike those that the "
            "tokenizer was fitted on: their codes describe them badly. Consider fitting it again."
        )
    return f"{shares}; 5% and 1% are to be expected. No sign of drift."
