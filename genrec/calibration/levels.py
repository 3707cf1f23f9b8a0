"""How likely is each listed item? One temperature for each level of the semantic ID.

It reads the parts of each log-probability, level by level, and knows neither codes nor items.

With S_il the log-probability of item i's code at level l given its prefix,

    p(i) = exp(sum_l S_il / T_l) / Z,    Z over the list and n rest items

as in `genrec.calibration.scores`; a rest item's log-probability log(r / n) is split over the levels
as the list's are on average. Equal temperatures are that module's one temperature. This is the
tempered product, normalised once: temperatures inside the search would need every child's logit.

Temperatures that differ can contradict the order of the scores, so `keeps_order` is False: lists
stay ranked by score (certificates, rules and metrics speak about scores) and probabilities may rise
along a list. Whoever wants them sorted sorts by them.

Shapes: U users, k list length, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np

from genrec.calibration.base import (
    Calibrator,
    ListContext,
    Need,
    checked,
    fit_input,
    log_rest_item,
    logsumexp,
)
from genrec.calibration.scores import TemperatureConfig
from genrec.errors import UserError

# Levels must add up to the log-probability; float32 sums stray less than this.
TOLERANCE = 1e-2


class LevelTemperatureCalibrator(Calibrator):
    """One temperature per level, fitted by the NLL of the validation targets.

    The NLL is convex in the inverse temperatures (a log-partition function minus a linear term).

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", for each level of a
    semantic ID; the product form is ours.
    """

    keeps_order: ClassVar[bool] = False

    class Config(TemperatureConfig):
        """Range of the search, the same for all levels."""

        name: Literal["level_temperature"] = "level_temperature"
        """Name in the registry."""

    def __init__(self, config: LevelTemperatureCalibrator.Config | None = None) -> None:
        super().__init__(config)
        self.config.check_range()
        self.temperatures: tuple[float, ...] = ()

    @property
    def needs(self) -> tuple[Need, ...]:
        """The parts of the log-probabilities."""
        return ("level_logprobs",)

    def fit(
        self,
        logprobs_Uk: np.ndarray,
        target_rank_U: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> Self:
        """Choose the temperatures with the lowest mean target NLL; see the base class.

        A level that is certain everywhere (a collision level, say) says nothing and keeps 1.

        Raises:
            UserError: as the base class, or levels that do not add up to the log-probabilities.
        """
        from scipy.optimize import minimize

        logprobs_Uk, rank_U, num_rest_U, useful = fit_input(logprobs_Uk, target_rank_U, num_rest_U)
        levels_UkL = self._levels(logprobs_Uk, context)[useful]
        parts = _parts(logprobs_Uk[useful], levels_UkL, num_rest_U[useful])
        num_levels = levels_UkL.shape[2]
        bounds = [(1 / self.config.max_temperature, 1 / self.config.min_temperature)] * num_levels
        start = np.clip(np.ones(num_levels), *bounds[0])
        found = minimize(
            _mean_nll,
            start,
            args=(*parts, rank_U[useful]),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-14, "gtol": 1e-9},
        )
        self.temperatures = tuple((1 / found.x).tolist())
        return self

    def probabilities(
        self,
        logprobs_Uk: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> np.ndarray:
        """Return p, (U, k) float64; the rest of the mass belongs to items outside the list.

        Raises:
            UserError: not fitted, or levels that do not fit.
        """
        logprobs_Uk, num_rest_U = checked(logprobs_Uk, num_rest_U)
        levels_UkL = self._levels(logprobs_Uk, context)
        if levels_UkL.shape[2] != len(self.temperatures):
            raise UserError(
                f"calibrator: got log-probabilities of {levels_UkL.shape[2]} levels, expected "
                f"{len(self.temperatures)} (as many as it was fitted on; 0 = not fitted)."
            )
        parts = _parts(logprobs_Uk, levels_UkL, num_rest_U)
        listed_Uk, rest_U, log_n_U = _tempered(1 / np.array(self.temperatures), *parts)
        log_z_U = logsumexp(np.column_stack([listed_Uk, log_n_U + rest_U]))
        return np.exp(listed_Uk - np.where(np.isfinite(log_z_U), log_z_U, 0.0)[:, None])

    def state(self) -> dict[str, Any]:
        """Return {"temperatures": [T_1, ..., T_L]}."""
        return {"temperatures": list(self.temperatures)}

    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Restore the temperatures.

        Raises:
            UserError: no list of positive numbers.
        """
        values = state.get("temperatures")
        good = isinstance(values, list | tuple) and all(
            isinstance(v, int | float) and 0 < v < np.inf for v in values
        )
        if not good:
            raise UserError(
                f"calibrator state: got temperatures {values!r}, expected positive numbers. Run "
                "`genrec calibrate` again."
            )
        assert isinstance(values, list | tuple)
        self.temperatures = tuple(float(v) for v in values)
        return self

    def _levels(self, logprobs_Uk: np.ndarray, context: ListContext | None) -> np.ndarray:
        levels_UkL = self.needed(context, "level_logprobs", logprobs_Uk.shape)
        if levels_UkL.ndim != 3 or not levels_UkL.shape[2]:
            raise UserError(
                f"calibrator: got level_logprobs of shape {levels_UkL.shape}, expected "
                "(users, k, levels)."
            )
        real_Uk = np.isfinite(logprobs_Uk)
        gap = np.abs(levels_UkL[real_Uk].sum(axis=1) - logprobs_Uk[real_Uk]).max(initial=0.0)
        if gap > TOLERANCE:
            raise UserError(
                f"calibrator: got levels that miss their log-probabilities by up to {gap:.3g}, "
                "expected sums. Score the levels under the filters and scoring of the lists."
            )
        return np.where(real_Uk[..., None], levels_UkL, 0.0)


def _parts(
    logprobs_Uk: np.ndarray, levels_UkL: np.ndarray, num_rest_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the levels of listed items, those of a rest item (U, L), log n and which are real."""
    real_Uk = np.isfinite(logprobs_Uk)
    item_U, log_n_U = log_rest_item(logprobs_Uk, num_rest_U)
    sums_UL = levels_UkL.sum(axis=1)  # padding is 0
    total_U1 = sums_UL.sum(axis=1, keepdims=True)
    even = np.full_like(sums_UL, 1.0 / sums_UL.shape[1])
    share_UL = np.where(total_U1 < 0, sums_UL / np.where(total_U1 < 0, total_U1, 1.0), even)
    rest_UL = share_UL * np.where(np.isfinite(item_U), item_U, 0.0)[:, None]
    return levels_UkL, rest_UL, log_n_U, real_Uk


def _tempered(
    inverse_L: np.ndarray,
    levels_UkL: np.ndarray,
    rest_UL: np.ndarray,
    log_n_U: np.ndarray,
    real_Uk: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unnormalised log-weights of listed items and of a rest item, and log n."""
    listed_Uk = np.where(real_Uk, levels_UkL @ inverse_L, -np.inf)
    rest_U = np.where(np.isfinite(log_n_U), rest_UL @ inverse_L, -np.inf)
    return listed_Uk, rest_U, log_n_U


def _mean_nll(
    inverse_L: np.ndarray,
    levels_UkL: np.ndarray,
    rest_UL: np.ndarray,
    log_n_U: np.ndarray,
    real_Uk: np.ndarray,
    rank_U: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Return the mean target NLL and its gradient: expected minus observed level parts."""
    listed_Uk, rest_U, _ = _tempered(inverse_L, levels_UkL, rest_UL, log_n_U, real_Uk)
    log_z_U = logsumexp(np.column_stack([listed_Uk, log_n_U + rest_U]))
    users, listed = np.arange(len(rank_U)), rank_U >= 0
    place_U = np.maximum(rank_U, 0)
    target_U = np.where(listed, listed_Uk[users, place_U], rest_U)
    p_Uk = np.exp(listed_Uk - log_z_U[:, None])
    rest_p_U = np.exp(log_n_U + rest_U - log_z_U)
    expected_UL = np.einsum("uk,ukl->ul", p_Uk, levels_UkL) + rest_p_U[:, None] * rest_UL
    observed_UL = np.where(listed[:, None], levels_UkL[users, place_U], rest_UL)
    return float((log_z_U - target_U).mean()), (expected_UL - observed_UL).mean(axis=0)
