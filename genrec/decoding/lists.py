"""Which k of a wider ranked list keep the rules about the whole list, at the least cost?

Rules: at most so many of a group, at least a share of some kind, a distance between two of a group.
The choice is exact: a 0/1 program over the candidates maximises the sum of scores among the longest
lists that keep all rules. A second one, in which unseen items are as good as they can possibly be,
says whether a wider list could have helped. It knows neither models nor item ids.

Shapes: M candidates, k list length, N items, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.errors import UserError

NO_GROUP = -1


@dataclass(frozen=True, eq=False)
class MaxPerGroup:
    """At most `limit` items of each group.

    Args:
        groups_N: (N,) integer group of each item, -1 for none; or (N, G) bool where items may
            belong to several.
        limit: >= 0.
    """

    groups_N: np.ndarray
    limit: int


@dataclass(frozen=True, eq=False)
class MinShare:
    """At least ceil(share * length) items of a kind.

    Args:
        members_N: (N,) bool.
        share: 0 to 1 of the list's length.
    """

    members_N: np.ndarray
    share: float


@dataclass(frozen=True, eq=False)
class Spacing:
    """Two items of one group stand at least `distance` places apart (1 forbids nothing).

    Args:
        groups_N: (N,) integer group of each item, -1 for none.
        distance: >= 1; 2 means "never side by side".
    """

    groups_N: np.ndarray
    distance: int


ListRule = MaxPerGroup | MinShare | Spacing


@dataclass(frozen=True)
class Selection:
    """A list that keeps the rules.

    Args:
        places: places in the candidate list, in the order of the new list; fewer than k where no
            k candidates keep the rules.
        cost: the sum of scores given up against the same number of candidates without rules (>= 0).
        proven: no list of the whole catalogue keeps the rules with more items, or as many and a
            larger sum: neither do items below the last candidate help.
    """

    places: np.ndarray
    cost: float
    proven: bool


def select(
    rows_M: np.ndarray,
    scores_M: np.ndarray,
    k: int,
    rules: Sequence[ListRule],
    *,
    certified: bool = False,
) -> Selection:
    """Choose and order k candidates under rules.

    The longest lists that keep all rules come first, among them the largest sum of scores. They are
    ordered by score as far as a spacing rule allows: each place takes the best item with which the
    rest can still be placed. Without a rule that bites, the first k candidates come back as they
    are.

    Args:
        rows_M: catalogue rows, best first; -1 is padding, which says that nothing else is left.
        scores_M: what to maximise, falling. Log-probabilities multiply, probabilities add up to
            expected hits: give what the list is to be judged by.
        k: list length, >= 1.
        rules: any number, of them at most one `Spacing`.
        certified: the candidates are the true best M (`Beams.certified_B`); needed for a proof.

    Raises:
        UserError: k, limits, shares or distances out of range, several spacing rules, or scores
            that rise.
    """
    rows_M, scores_M = np.asarray(rows_M), np.asarray(scores_M, dtype=np.float64)
    _check(rows_M, scores_M, k, rules)
    exhausted = bool((rows_M < 0).any())
    rows_M, scores_M = rows_M[rows_M >= 0], scores_M[rows_M >= 0]
    bound = -np.inf if exhausted or not len(rows_M) else float(scores_M[-1])
    first = np.arange(min(k, len(rows_M)))
    if _keeps(rows_M[first], rules):
        return Selection(first, 0.0, exhausted or (certified and len(first) == k))
    problem = _Problem(rows_M, scores_M, rules)
    for length in range(len(first), -1, -1):
        chosen = problem.best(length)
        if chosen is not None:
            break
    assert chosen is not None  # the empty list keeps every rule
    total = float(scores_M[chosen].sum())
    places = _ordered(rows_M, chosen, [r for r in rules if isinstance(r, Spacing)])
    proven = exhausted or (certified and not problem.improves(k, len(chosen), total, bound))
    return Selection(places, float(scores_M[: len(chosen)].sum()) - total, proven)


def _check(rows_M: np.ndarray, scores_M: np.ndarray, k: int, rules: Sequence[ListRule]) -> None:
    if k < 1:
        raise UserError(f"k: got {k}, expected an integer >= 1.")
    if rows_M.shape != scores_M.shape or rows_M.ndim != 1:
        raise UserError(
            f"select: got rows {rows_M.shape} and scores {scores_M.shape}, expected two arrays of "
            "one length."
        )
    real_M = scores_M[rows_M >= 0]
    if (
        not np.isfinite(real_M).all()
        or (np.diff(real_M) > 0).any()
        or (np.diff((rows_M < 0).astype(int)) < 0).any()
    ):
        raise UserError("select: expected finite scores, best first, and padding only at the end.")
    for rule in rules:
        if isinstance(rule, MaxPerGroup) and rule.limit < 0:
            raise UserError(f"MaxPerGroup.limit: got {rule.limit}, expected an integer >= 0.")
        if isinstance(rule, MinShare) and not 0 <= rule.share <= 1:
            raise UserError(f"MinShare.share: got {rule.share}, expected a number from 0 to 1.")
        if isinstance(rule, Spacing) and rule.distance < 1:
            raise UserError(f"Spacing.distance: got {rule.distance}, expected an integer >= 1.")
    if sum(isinstance(rule, Spacing) for rule in rules) > 1:
        raise UserError(
            "select: got several Spacing rules, expected at most one. Combine their groups, or "
            "bound the others by MaxPerGroup."
        )


def _required(share: float, length: int) -> int:
    """Return ceil(share * length), forgiving what floating point adds."""
    return math.ceil(share * length - 1e-9)


def _members(groups_N: np.ndarray, rows_M: np.ndarray) -> np.ndarray:
    """Return which candidate is in which group that occurs, (G, M) float."""
    groups_M = np.asarray(groups_N)[rows_M]
    if groups_M.ndim == 2:
        return groups_M.T.astype(float)
    present = np.unique(groups_M[groups_M != NO_GROUP])
    return (groups_M == present[:, None]).astype(float)


def _keeps(rows: np.ndarray, rules: Sequence[ListRule]) -> bool:
    """Return whether a list keeps all rules as it stands."""
    for rule in rules:
        if isinstance(rule, MinShare):
            if np.asarray(rule.members_N)[rows].sum() < _required(rule.share, len(rows)):
                return False
        elif isinstance(rule, MaxPerGroup):
            if (_members(rule.groups_N, rows).sum(1) > rule.limit).any():
                return False
        else:
            for member in _members(rule.groups_N, rows) > 0:
                if (np.diff(np.flatnonzero(member)) < rule.distance).any():
                    return False
    return True


class _Problem:
    """The 0/1 program: variables are the candidates, then one number of unseen items, then one
    helper per group of the spacing rule.
    """

    def __init__(self, rows_M: np.ndarray, scores_M: np.ndarray, rules: Sequence[ListRule]) -> None:
        self.scores_M, self.rules = scores_M, rules
        self.members = [
            np.asarray(rule.members_N, dtype=float)[rows_M][None]
            if isinstance(rule, MinShare)
            else _members(rule.groups_N, rows_M)
            for rule in rules
        ]
        spacing = (
            len(m) for m, r in zip(self.members, rules, strict=True) if isinstance(r, Spacing)
        )
        self.num_helpers = next(spacing, 0)

    def best(self, length: int) -> np.ndarray | None:
        """Return the candidates (in their order) of the best list of a length, if there is one."""
        if length == 0:
            return np.empty(0, dtype=np.int64)
        found = self._solve(length, unseen=0, bound=0.0)
        return None if found is None else np.flatnonzero(found[: len(self.scores_M)] > 0.5)

    def improves(self, k: int, length: int, total: float, bound: float) -> bool:
        """Return whether unseen items, at most `bound` each and free of all rules, could help.

        It errs on the side of "yes", never of "no".
        """
        for longer in range(k, length, -1):
            if self._solve(longer, unseen=longer, bound=bound) is not None:
                return True
        found = self._solve(length, unseen=length, bound=bound)
        if found is None:
            return False
        reached = float(np.append(self.scores_M, bound) @ found[: len(self.scores_M) + 1])
        return reached > total + 1e-9 * max(1.0, abs(total))

    def _solve(self, length: int, *, unseen: int, bound: float) -> np.ndarray | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        num_candidates = len(self.scores_M)
        size = num_candidates + 1 + self.num_helpers
        every = np.r_[np.ones(num_candidates + 1), np.zeros(self.num_helpers)]
        rows, low, high = [every], [float(length)], [float(length)]

        def add(weights: np.ndarray, least: float, most: float) -> None:
            rows.append(np.pad(weights, (0, size - len(weights))))
            low.append(least)
            high.append(most)

        for rule, members in zip(self.rules, self.members, strict=True):
            if isinstance(rule, MinShare):
                add(np.append(members[0], 1.0), _required(rule.share, length), np.inf)
            elif isinstance(rule, MaxPerGroup):
                for member in members:
                    add(member, 0, rule.limit)
            else:
                self._add_spacing(add, members, rule.distance, length)
        upper = np.ones(size)
        upper[num_candidates] = unseen
        objective = np.r_[-self.scores_M, -bound, np.zeros(self.num_helpers)]
        constraint = LinearConstraint(np.array(rows), np.array(low), np.array(high))
        result = milp(
            objective,
            integrality=np.ones(size),
            bounds=Bounds(0, upper),
            constraints=constraint,
            options={"mip_rel_gap": 0.0},
        )
        return np.round(result.x) if result.success else None

    def _add_spacing(
        self,
        add: Callable[[np.ndarray, float, float], None],
        members: np.ndarray,
        distance: int,
        length: int,
    ) -> None:
        """Add what is needed and enough for an order to exist.

        A group fits at most ceil(length / distance) times, and only as many groups fit so often as
        the last incomplete stretch of `distance` places has room for.
        """
        most = -(-length // distance)
        room = length - (most - 1) * distance
        offset = len(self.scores_M) + 1
        for group, member in enumerate(members):
            helper = np.zeros(offset + group + 1)
            helper[: len(member)], helper[-1] = member, -1.0
            add(helper, -np.inf, most - 1)
        add(np.r_[np.zeros(offset), np.ones(len(members))], 0, room)


def _ordered(rows_M: np.ndarray, chosen: np.ndarray, spacing: Sequence[Spacing]) -> np.ndarray:
    """Order chosen places by score, each place taking the best with which the rest still fits."""
    if not spacing:
        return chosen
    distance = spacing[0].distance
    groups = np.asarray(spacing[0].groups_N)[rows_M[chosen]].tolist()
    # An item without a group is a group of its own.
    groups = [(group, 0) if group != NO_GROUP else (i, 1) for i, group in enumerate(groups)]
    order: list[int] = []
    left = list(range(len(chosen)))
    while left:
        place = next(
            i for i in left if _fits([groups[j] for j in [*order, i]], left, i, groups, distance)
        )
        order.append(place)
        left.remove(place)
    return chosen[np.array(order, dtype=np.int64)]


def _fits(
    placed: list[tuple[int, int]],
    left: list[int],
    candidate: int,
    groups: list[tuple[int, int]],
    distance: int,
) -> bool:
    """Return whether `placed` keeps the distance and the rest can follow.

    The group with the most items left goes first among those that may stand: its last item has the
    earliest deadline, and this rule is optimal for unit jobs with equal delays.
    """
    last = {group: place for place, group in enumerate(placed[:-1])}
    if placed[-1] in last and len(placed) - 1 - last[placed[-1]] < distance:
        return False
    last[placed[-1]] = len(placed) - 1
    counts: dict[tuple[int, int], int] = {}
    for i in left:
        if i != candidate:
            counts[groups[i]] = counts.get(groups[i], 0) + 1
    for place in range(len(placed), len(placed) + sum(counts.values())):
        ready = [g for g, n in counts.items() if n and place - last.get(g, -distance) >= distance]
        if not ready:
            return False
        group = max(ready, key=lambda g: counts[g])
        counts[group] -= 1
        last[group] = place
    return True
