"""Do groups of items get the exposure that is theirs? One bonus per group, fitted on many lists.

Exposure is position-discounted: place r (from 0) of a list gives 1 / log2(r + 2), shared equally by
the groups of an item. A bonus b_g is added to the scores of each group's items and lists are
ordered anew. For any bonuses, the lists have the largest discounted sum of scores among all lists
(of these candidates) that give the groups the same exposure (Everett 1963: a solution of the
Lagrangian solves the constrained problem at the resources that it uses). The bonuses are searched
so that the exposure shares come near their targets; how near is reported, never assumed.

Because a fitted bonus is one number per group, a user's list does not depend on who else is asked,
nor on the order of users.

Shapes: U users, M candidates, k list length, N items, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from genrec.calibration.lists.base import (
    PADDING,
    Candidates,
    Reranker,
    first_places,
    sorted_places,
)
from genrec.config import StrictConfig
from genrec.errors import UserError

Target = Literal["equal", "catalogue", "popularity"]
MAX_STEP = 2.0


class Exposure(Reranker):
    """Exposure shares of item groups over a batch of users.

    `fit` finds the bonuses on one batch and keeps them for later lists; without `fit`, `rerank`
    finds them for the lists that it is given and keeps nothing.
    Strength moves the target from the shares as they are (0) to the wanted ones (1).

    Attributes:
        bonuses_G: (G + 1,) natural-log units added to scores, the last for items without a value;
            None before `fit`.
        gap: largest |share - target| that was reached on the fitted batch.
    """

    class Config(StrictConfig):
        """Settings."""

        name: Literal["exposure"] = "exposure"
        strength: float = Field(default=0.5, ge=0, le=1)
        """How far targets move from the shares as they are (0) to the wanted ones (1)."""
        target: Target = "catalogue"
        """Wanted shares: the same for all groups, by number of items, or by popularity."""
        shares: tuple[float, ...] | None = None
        """Wanted shares of the groups in their order, adding up to 1, instead of `target`."""
        num_rounds: int = Field(default=200, ge=1)
        """Rounds of the search for the bonuses."""
        tolerance: float = Field(default=1e-3, gt=0)
        """The search ends when every share is this near its target."""

    needs: ClassVar[tuple[str, ...]] = ("groups_N",)

    def __init__(self, config: Any = None, facts: Any = None) -> None:
        super().__init__(config, facts)
        self.bonuses_G: np.ndarray | None = None
        self.gap = float("nan")
        self._wanted_G = self._targets()

    def _needed(self) -> tuple[str, ...]:
        by_popularity = self.config.target == "popularity" and self.config.shares is None
        return ("groups_N", "popularity_N") if by_popularity else ("groups_N",)

    def fit(self, candidates: Candidates, k: int) -> Exposure:
        """Search the bonuses on a batch of users.

        Args:
            candidates: lists of many users; more users, finer shares.
            k: list length.

        Raises:
            UserError: as for `rerank`, or no users.
        """
        self._check(candidates, k)
        self.bonuses_G, self.gap = self._search(candidates, k)
        return self

    def _search(self, candidates: Candidates, k: int) -> tuple[np.ndarray, float]:
        """Return bonuses and the largest gap to a target: steps by the log of what is missing."""
        if not candidates.real_UM.any():
            raise UserError("exposure: got no items to fit on, expected lists of some users.")
        strength, best_gap = self.config.strength, np.inf
        before_G = self.exposure(candidates, first_places(candidates, k))
        target_G = (1 - strength) * before_G + strength * self._wanted_G
        bonuses_G, best_G = np.zeros_like(target_G), np.zeros_like(target_G)
        for round_ in range(self.config.num_rounds):
            shares_G = self.exposure(candidates, self._ordered(candidates, k, bonuses_G))
            gap = float(np.abs(shares_G - target_G).max())
            if gap < best_gap:
                best_gap, best_G = gap, bonuses_G
            if gap <= self.config.tolerance:
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                step_G = np.nan_to_num(np.log(target_G) - np.log(shares_G), posinf=MAX_STEP)
            step_G = np.clip(step_G, -MAX_STEP, MAX_STEP)
            bonuses_G = bonuses_G + step_G / (1 + round_ / 20)
        return best_G, best_gap

    def exposure(self, candidates: Candidates, places_Uk: np.ndarray) -> np.ndarray:
        """Return the share of discounted exposure of each group, (G + 1,), last "no value".

        Args:
            candidates: what the places are of.
            places_Uk: (U, k) places, -1 = padding.
        """
        rows_Uk = np.take_along_axis(np.asarray(candidates.rows_UM), places_Uk, axis=1)
        real_Uk = (places_Uk != PADDING) & (rows_Uk >= 0)
        weight_Uk = real_Uk / np.log2(np.arange(places_Uk.shape[1]) + 2.0)
        exposure_N = np.bincount(
            rows_Uk[real_Uk], weights=weight_Uk[real_Uk], minlength=len(self.facts.shares_NG)
        )
        total = exposure_N.sum()
        shares_G: np.ndarray = exposure_N @ self.facts.shares_NG / (total if total else 1.0)
        return shares_G

    def _places(self, candidates: Candidates, k: int) -> np.ndarray:
        if self.config.strength == 0:
            return first_places(candidates, k)
        bonuses_G = self.bonuses_G
        if bonuses_G is None:
            bonuses_G, _ = self._search(candidates, k)
        return self._ordered(candidates, k, bonuses_G)

    def _choose(self, candidates: Candidates, k: int) -> np.ndarray:
        return self._places(candidates, k)

    def _ordered(self, candidates: Candidates, k: int, bonuses_G: np.ndarray) -> np.ndarray:
        bonus_N = self.facts.shares_NG @ bonuses_G
        values_UM = candidates.scores_UM + bonus_N[candidates.rows_UM]
        return sorted_places(values_UM, candidates.real_UM, k)

    def _targets(self) -> np.ndarray:
        shares_NG = self.facts.shares_NG
        if self.config.shares is not None:
            given = np.append(np.asarray(self.config.shares, np.float64), 0.0)
            if len(given) != shares_NG.shape[1] or (given < 0).any() or abs(given.sum() - 1) > 1e-6:
                raise UserError(
                    f"shares: got {list(self.config.shares)}, expected {shares_NG.shape[1] - 1} "
                    "numbers >= 0 that add up to 1, one per group."
                )
            return given
        weights: Mapping[str, Any] = {
            "equal": lambda: (shares_NG.sum(0) > 0).astype(np.float64),
            "catalogue": lambda: shares_NG.sum(0),
            "popularity": lambda: np.asarray(self.facts.popularity_N, np.float64) @ shares_NG,
        }
        wanted_G: np.ndarray = weights[self.config.target]()
        if not wanted_G.sum() > 0:
            raise UserError(
                f"exposure: the target {self.config.target!r} is zero for every group. Give "
                "groups with items (and popularity above 0)."
            )
        return wanted_G / wanted_G.sum()
