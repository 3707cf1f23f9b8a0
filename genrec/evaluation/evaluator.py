"""How good is a scorer of the whole catalogue? Full ranking, item level, ties by expectation.

Scorers come in as callables, so that it knows no model; rows of results go out. It does not choose
the split or fit anything.

Masked means that the items of a user's history leave that user's ranking. In data with repeated
consumption the target may itself be in the history: masked, it can then never be hit, and counts
as a miss.

Shapes: S seeds, U users, B users of a chunk, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from genrec.data.interactions import Examples
from genrec.errors import UserError
from genrec.evaluation.metrics import (
    expected_mrr_at,
    expected_ndcg_at,
    expected_rank,
    expected_recall_at,
    mrr_at,
    ndcg_at,
    recall_at,
    tied_ranks,
)
from genrec.evaluation.significance import detectable_prior, mean_ci, paired_test, per_user

ScoreFunction = Callable[[list[np.ndarray]], np.ndarray]
TiePolicy = Literal["expected_rank", "expected_metric"]
DEFAULT_KS = (5, 10)


def evaluate_scores(
    score_fn: ScoreFunction,
    examples: Examples,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    mask_seen: bool,
    ties: TiePolicy = "expected_rank",
    chunk: int = 128,
    on_progress: Callable[[int], None] | None = None,
    out_rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Rank the whole catalogue for every example and return metrics per user.

    Args:
        score_fn: histories (list of B arrays of item rows) -> scores (B, N), higher is better.
        examples: U histories and targets.
        ks: cut-offs, each >= 1; a cut-off beyond N counts every item as listed.
        mask_seen: remove the history's items from the ranking.
        ties: "expected_rank", the metric of the mean place of the tied items (as in the
            tables of docs/evaluation.md), or "expected_metric", the metric's mean over them.
        chunk: users scored at a time; memory is about 3 * chunk * N * 8 bytes.
        on_progress: called with the number of users done after each chunk.
        out_rows: (U, k) int, filled with each user's best items by `best_rows`.

    Returns:
        `recall@k`, `ndcg@k` and `mrr@k` for each k: (U,) float64.

    Raises:
        UserError: no examples, scores of another shape, or NaN scores.
    """
    if not len(examples):
        raise UserError("evaluation: got no examples. The split has no user with a target.")
    above, tied = [], []
    for start in range(0, len(examples), chunk):
        stop = min(start + chunk, len(examples))
        histories = [examples.history(i) for i in range(start, stop)]
        scores_BN = np.asarray(score_fn(histories))
        if scores_BN.ndim != 2 or len(scores_BN) != len(histories):
            raise UserError(
                f"evaluation: the scorer returned shape {scores_BN.shape} for {len(histories)} "
                "histories, expected (histories, items)."
            )
        if mask_seen:
            scores_BN = mask_histories(scores_BN, histories)
        above_B, tied_B = tied_ranks(scores_BN, examples.target_rows[start:stop])
        if out_rows is not None:
            out_rows[start:stop] = best_rows(scores_BN, out_rows.shape[1])
        above.append(above_B)
        tied.append(tied_B)
        if on_progress is not None:
            on_progress(stop - start)
    above_U, tied_U = np.concatenate(above), np.concatenate(tied)
    return _metrics(above_U, tied_U, ks, ties)


def best_rows(scores_BN: np.ndarray, k: int) -> np.ndarray:
    """Return the k best items of each user, (B, k) int64; equal scores by ascending row.

    Places without an item are -1: beyond N, and where a score is -inf (a seen item).
    """
    import torch

    found_Bk = np.full((len(scores_BN), k), -1, np.int64)
    k = min(k, scores_BN.shape[1])
    more = min(k + 1, scores_BN.shape[1])  # one more tells whether the last place is tied
    top = torch.topk(torch.from_numpy(np.ascontiguousarray(scores_BN)), more, dim=1)
    values, rows = top.values.numpy(), top.indices.numpy()
    order = np.lexsort((rows, -values), axis=-1)
    found_Bk[:, :k] = np.take_along_axis(rows, order, 1)[:, :k]
    torn_B = values[:, k - 1] == values[:, more - 1] if more > k else np.zeros(len(values), bool)
    for user in np.flatnonzero(torn_B):
        scores_N = scores_BN[user]
        last = values[user, k - 1]
        above = np.flatnonzero(scores_N > last)
        tied = np.flatnonzero(scores_N == last)[: k - len(above)]
        chosen = np.concatenate([above, tied])
        found_Bk[user, :k] = chosen[np.argsort(-scores_N[chosen], kind="stable")]
    listed = np.where(found_Bk >= 0, np.take_along_axis(scores_BN, found_Bk.clip(0), 1), -np.inf)
    found_Bk[listed == -np.inf] = -1
    return found_Bk


def _metrics(
    above_U: np.ndarray, tied_U: np.ndarray, ks: Sequence[int], ties: TiePolicy
) -> dict[str, np.ndarray]:
    if ties == "expected_rank":
        rank_U = expected_rank(above_U, tied_U)
        at_rank = {"recall": recall_at, "ndcg": ndcg_at, "mrr": mrr_at}
        return {f"{m}@{k}": f(rank_U, k) for m, f in at_rank.items() for k in ks}
    if ties != "expected_metric":
        raise UserError(f"ties: got {ties!r}, expected 'expected_rank' or 'expected_metric'.")
    over_places = {"recall": expected_recall_at, "ndcg": expected_ndcg_at, "mrr": expected_mrr_at}
    return {f"{m}@{k}": f(above_U, tied_U, k) for m, f in over_places.items() for k in ks}


def mask_histories(scores_BN: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
    """Return a copy of the scores with each user's own history at -inf."""
    masked_BN = np.array(scores_BN, dtype=np.float64)
    users = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    if len(users):
        masked_BN[users, np.concatenate(histories).astype(np.int64)] = -np.inf
    return masked_BN


def summarise(
    name: str,
    split: str,
    masked: bool,
    metrics: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray] | None = None,
    *,
    reference_name: str = "most_popular",
    seed: int = 0,
    num_samples: int = 2000,
) -> dict[str, Any]:
    """Return one row of a result table (see docs/evaluation.md).

    Args:
        name: of the system.
        split: "valid" or "test".
        masked: whether seen items were removed.
        metrics: name -> (U,) or (S, U), one line per training seed.
        reference: metrics of another system on the same users, to compare with.
        reference_name: what the reference is called.
        seed: of the bootstrap.
        num_samples: resamples of the bootstrap.

    Returns:
        JSON types: `name`, `split`, `masked`, `num_users`, `num_seeds`; for each metric its mean
        and `<metric>_ci` [low, high] over users; with several seeds `<metric>_seeds`, the mean of
        each; `detectable`: metric -> smallest true difference to an independent system of the same
        spread that these users would show; with a reference `vs_<reference_name>`: metric ->
        difference, ci, p, p_permutation, detectable.
    """
    row: dict[str, Any] = {"name": name, "split": split, "masked": bool(masked)}
    shapes = {np.atleast_2d(values).shape for values in metrics.values()}
    if len(shapes) != 1:
        raise UserError(
            f"results of {name!r}: got metrics of shapes {sorted(shapes)}, expected one shape "
            "(seeds, users) for all."
        )
    row["num_seeds"], row["num_users"] = shapes.pop()
    for metric, values in metrics.items():
        mean, low, high = mean_ci(values, seed, num_samples)
        row[metric], row[f"{metric}_ci"] = mean, [low, high]
        if row["num_seeds"] > 1:
            row[f"{metric}_seeds"] = [float(x) for x in np.asarray(values).mean(axis=1)]
    row["detectable"] = {metric: detectable_prior(values) for metric, values in metrics.items()}
    if reference is not None:
        row[f"vs_{reference_name}"] = {
            metric: paired_test(values, per_user(reference[metric]), seed, num_samples)
            for metric, values in metrics.items()
            if metric in reference
        }
    return row
