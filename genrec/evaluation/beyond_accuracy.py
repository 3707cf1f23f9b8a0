"""What stands in a result beside accuracy? The one place that says so, for one set of lists.

It calls the pure functions of this package on the top of each list and leaves out what the data
does not have (attributes, vectors, codes). Tables show those of `PRINTED`, results.json has all.

Shapes: S seeds, U users, k list length, N items, E vector width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrec.data.interactions import Examples
from genrec.errors import UserError
from genrec.evaluation import exposure as shown
from genrec.evaluation import groups, list_content, metrics, search_quality, semantic_id_hits

DEPTH = 10
PRINTED = {
    "coverage": "coverage",
    "gini": "Gini",
    "novelty_bits": "novelty, bits",
    "average_popularity": "popularity",
    "long_tail_share": "long tail",
}


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What is known about the users and items behind lists.

    Args:
        examples: of the U users: histories and targets.
        counts_N: (N,) training interactions of each item.
        attributes: labels of the items, if there are any.
        vectors_NE: (N, E) item vectors, if there are any.
        codes_NL: (N, L) codes before the collision policy, if there are any.
    """

    examples: Examples
    counts_N: np.ndarray
    attributes: list_content.ItemAttributes | None = None
    vectors_NE: np.ndarray | None = None
    codes_NL: np.ndarray | None = None


def list_figures(rows_Uk: np.ndarray, around: Surroundings, k: int = DEPTH) -> dict[str, float]:
    """Return what the first k places of all lists are like (docs/evaluation.md defines each).

    Args:
        rows_Uk: (U, k or more) int item rows, best first, -1 = padding.
        around: the same U users, and the items.
        k: places that are looked at.

    Returns:
        JSON numbers; what cannot be computed (no attributes, empty lists) is left out.

    Raises:
        UserError: lists of other users.
    """
    top_Uk = np.asarray(rows_Uk)[:, :k]
    if len(top_Uk) != len(around.examples):
        raise UserError(
            f"beyond accuracy: got {len(top_Uk)} lists and {len(around.examples)} users. Expected "
            "one list per user."
        )
    counts_N, attributes = around.counts_N, around.attributes
    placed_N = shown.exposure(top_Uk, len(counts_N))
    found = {
        "coverage": shown.coverage(placed_N),
        "gini": shown.gini(placed_N),
        "entropy_bits": shown.entropy(placed_N),
        "novelty_bits": shown.novelty(placed_N, counts_N),
        "average_popularity": shown.average_popularity(placed_N, counts_N),
        "popularity_lift": shown.popularity_lift(placed_N, counts_N),
        "popularity_lift_over_history": list_content.history_popularity_lift(
            top_Uk, around.examples, counts_N
        ),
        "long_tail_share": shown.long_tail_share(placed_N, counts_N),
        "invalid_rate": search_quality.invalid_rate(top_Uk),
    }
    if attributes is not None:
        found["diversity_attributes"] = _mean(list_content.attribute_diversity(top_Uk, attributes))
        found["calibration_miss"] = _mean(
            list_content.calibration_miss(top_Uk, around.examples, attributes)
        )
    if around.vectors_NE is not None:
        found["diversity_vectors"] = _mean(list_content.vector_diversity(top_Uk, around.vectors_NE))
    return {name: value for name, value in found.items() if np.isfinite(value)}


def printed(figures: Mapping[str, Any], names: Iterable[str] = PRINTED) -> list[str]:
    """Return figures as text, those of `PRINTED` unless told, empty where there is none."""
    values = [figures.get(name) for name in names]
    return [
        "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
        for value in values
    ]


def semantic_id_figures(
    rows_Uk: np.ndarray, around: Surroundings, ks: Sequence[int]
) -> dict[str, float]:
    """Return recall and NDCG as if a hit were the semantic ID before collisions were resolved.

    Returns:
        `recall@k` and `ndcg@k` for every k of `ks`, means over users; {} without codes.
    """
    if around.codes_NL is None:
        return {}
    numbers_N = semantic_id_hits.semantic_id_numbers(around.codes_NL)
    rank_U = semantic_id_hits.semantic_id_ranks(rows_Uk, around.examples.target_rows, numbers_N)
    return {
        f"{name}@{k}": float(function(rank_U, k).mean())
        for name, function in (("recall", metrics.recall_at), ("ndcg", metrics.ndcg_at))
        for k in ks
    }


def group_tables(
    values: Mapping[str, np.ndarray], around: Surroundings, *, num_samples: int = 2000
) -> dict[str, Any]:
    """Return the printed metrics by history length, popularity of the target, and warm or cold.

    Args:
        values: metric -> (U,) or (S, U).
        around: the same U users, and the items.
        num_samples: resamples behind each interval.
    """
    targets_U, counts_N = around.examples.target_rows, around.counts_N
    wanted = {name: values[name] for name in metrics.PRINTED if name in values}
    divisions = (
        groups.by_history_length(around.examples.lengths),
        groups.by_target_popularity(targets_U, counts_N),
        groups.by_target_seen(targets_U, counts_N),
    )
    return {
        division.name: groups.group_figures(wanted, division, num_samples=num_samples)
        for division in divisions
    }


def mean_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over seeds of figures that every seed has."""
    names = [name for name in figures[0] if all(name in each for each in figures)]
    return {name: float(np.mean([each[name] for each in figures])) for name in names}


def _mean(values_U: np.ndarray) -> float:
    """Mean over the users for whom it is defined."""
    known_U = values_U[np.isfinite(values_U)]
    return float(known_U.mean()) if len(known_U) else float("nan")
