"""For whom does it work? The mean of a per-user value by group, the gap and the worst group.

Groups come as one number per user; it knows three ways of making them (history length, popularity
of the target, target seen in training or not) and takes any other.

Shapes: S seeds, U users, N items, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genrec.errors import UserError
from genrec.evaluation.exposure import in_head
from genrec.evaluation.significance import mean_ci, per_user

LENGTH_BOUNDS = (5, 10, 20, 50)


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each user belongs to.

    Args:
        name: of the division.
        labels: G names.
        group_U: (U,) int, 0 to G - 1; -1 = in none.
    """

    name: str
    labels: Sequence[str]
    group_U: np.ndarray


def by_history_length(lengths_U: np.ndarray, bounds: Sequence[int] = LENGTH_BOUNDS) -> Groups:
    """Return users by how long their history is: up to each bound, and beyond the last."""
    starts = [1, *(bound + 1 for bound in bounds)]
    labels = [f"{a}-{b}" for a, b in zip(starts, bounds, strict=False)] + [f"{starts[-1]}+"]
    return Groups("history_length", labels, np.searchsorted(bounds, lengths_U, side="left"))


def by_target_popularity(target_U: np.ndarray, counts_N: np.ndarray) -> Groups:
    """Return users by whether their target is among the most popular fifth of the catalogue."""
    head_U = in_head(counts_N)[np.asarray(target_U)]
    return Groups("target_popularity", ("head", "tail"), np.where(head_U, 0, 1))


def by_target_seen(target_U: np.ndarray, counts_N: np.ndarray) -> Groups:
    """Return users by whether anyone consumed their target in training: warm or cold."""
    warm_U = np.asarray(counts_N)[np.asarray(target_U)] > 0
    return Groups("target_in_training", ("warm", "cold"), np.where(warm_U, 0, 1))


def group_figures(
    metrics: Mapping[str, np.ndarray],
    groups: Groups,
    *,
    seed: int = 0,
    num_samples: int = 2000,
) -> dict[str, Any]:
    """Return each group's means with intervals, the gap and the worst group of every metric.

    Args:
        metrics: name -> (U,) or (S, U), higher is better.
        groups: of the same U users. Empty groups are left out.
        seed: of the bootstrap.
        num_samples: resamples of the bootstrap.

    Returns:
        JSON types: `groups` (a line each: `group`, `num_users`, `<metric>`, `<metric>_ci`), `gap`
        (metric -> largest minus smallest mean) and `worst` (metric -> group); both are None with
        fewer than two groups. A small group's mean is uncertain: read the gap with the intervals.

    Raises:
        UserError: another number of users, or a group without a label.
    """
    group_U = np.asarray(groups.group_U)
    if len(group_U) and group_U.max() >= len(groups.labels):
        raise UserError(
            f"groups {groups.name!r}: got group {group_U.max()}, but {len(groups.labels)} labels."
        )
    values = {name: per_user(array, what=name) for name, array in metrics.items()}
    for name, values_U in values.items():
        if len(values_U) != len(group_U):
            raise UserError(
                f"groups {groups.name!r}: got {len(group_U)} users in groups and {len(values_U)} "
                f"values of {name}. Expected the same users."
            )
    lines: list[dict[str, Any]] = []
    for number, label in enumerate(groups.labels):
        mine_U = group_U == number
        if not mine_U.any():
            continue
        line: dict[str, Any] = {"group": label, "num_users": int(mine_U.sum())}
        for name, values_U in values.items():
            mean, low, high = mean_ci(values_U[mine_U], seed, num_samples)
            line[name], line[f"{name}_ci"] = mean, [low, high]
        lines.append(line)
    found: dict[str, Any] = {"groups": lines, "gap": {}, "worst": {}}
    for name in values:
        if len(lines) < 2:
            found["gap"][name], found["worst"][name] = None, None
            continue
        means = [line[name] for line in lines]
        found["gap"][name] = max(means) - min(means)
        found["worst"][name] = lines[int(np.argmin(means))]["group"]
    return found
