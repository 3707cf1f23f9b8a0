"""How likely is each listed item to be the next one? Temperature on the catalogue distribution.

It knows neither models nor items. Metrics of the outcome live in
`genrec.evaluation.reliability`.

A beam list covers the head of a distribution over the whole catalogue. The tail is one number:
the rest mass r = 1 - sum exp(S), taken to be spread evenly over the n eligible items that are not
in the list. Temperature T acts on that distribution:

    p_T(i) = exp(S_i / T) / Z,    Z = sum_list exp(S_j / T) + n (r / n)^(1/T)

T = 1 is the identity, T > 1 flattens, and the order of a list never changes. The target of a user
whose list misses it is scored as one rest item, (r/n)^(1/T) / Z: a density over items, comparable
with exact scoring of the whole catalogue. Scoring it as "the rest class" would add log n per such
user, which does not depend on T, so both choices fit the same temperature.

Shapes: U users, k list length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from genrec.calibration.base import (
    FEW_HITS,
    Calibrator,
    CalibratorConfig,
    ListContext,
    checked,
    finite_number,
    fit_input,
    log_rest_item,
    logsumexp,
)
from genrec.errors import UserError
from genrec.runtime import get_logger

__all__ = [
    "FEW_HITS",
    "Calibrator",
    "IdentityCalibrator",
    "TemperatureCalibrator",
    "TemperatureConfig",
    "target_nll",
    "tempered_logprobs",
]

_log = get_logger(__name__)


class IdentityCalibrator(Calibrator):
    """Probabilities are exp(log-probability): nothing is learned."""

    class Config(CalibratorConfig):
        """Nothing to learn."""

        name: Literal["identity"] = "identity"
        """Name in the registry."""

    def fit(
        self,
        logprobs_Uk: np.ndarray,
        target_rank_U: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> Self:
        """Check the input and learn nothing."""
        checked(logprobs_Uk, num_rest_U, target_rank_U)
        return self

    def probabilities(
        self,
        logprobs_Uk: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> np.ndarray:
        """Return exp(logprobs), (U, k) float64."""
        logprobs_Uk, _ = checked(logprobs_Uk, num_rest_U)
        return np.exp(logprobs_Uk)

    def state(self) -> dict[str, Any]:
        """Return {}."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Do nothing."""
        return self


class TemperatureConfig(CalibratorConfig):
    """Range in which temperatures are searched."""

    min_temperature: float = Field(default=0.05, gt=0.0)
    """Smallest temperature tried (no unit)."""
    max_temperature: float = Field(default=20.0, gt=0.0)
    """Largest temperature tried (no unit)."""

    def check_range(self) -> None:
        """Raise `UserError` where the range is empty."""
        if self.min_temperature >= self.max_temperature:
            raise UserError(
                f"calibrator: min_temperature {self.min_temperature} is not below "
                f"max_temperature {self.max_temperature}. Swap or widen them."
            )


class TemperatureCalibrator(Calibrator):
    """One temperature on the catalogue distribution, fitted by the NLL of the validation targets.

    The NLL is convex in 1/T (a log-partition function minus a linear term), so the bounded search
    over log T finds its only minimum.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", applied here to items
    rather than classes.
    """

    class Config(TemperatureConfig):
        """Range of the search."""

        name: Literal["temperature"] = "temperature"
        """Name in the registry."""

    def __init__(self, config: TemperatureCalibrator.Config | None = None) -> None:
        super().__init__(config)
        self.config.check_range()
        self.temperature = 1.0

    def fit(
        self,
        logprobs_Uk: np.ndarray,
        target_rank_U: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> Self:
        """Choose the temperature with the lowest mean target NLL; see the base class for shapes.

        Users whose target is neither in the list nor among the rest (rank -1 with no rest items:
        it was filtered out) say nothing about T and are left out.

        Raises:
            UserError: shapes that do not fit, NaN, or no user to learn from.
        """
        from scipy.optimize import minimize_scalar

        *arrays, useful = fit_input(logprobs_Uk, target_rank_U, num_rest_U)
        logprobs_Uk, rank_U, num_rest_U = (array[useful] for array in arrays)
        bounds = np.log([self.config.min_temperature, self.config.max_temperature])
        found = minimize_scalar(
            lambda log_t: target_nll(logprobs_Uk, rank_U, num_rest_U, np.exp(log_t)).mean(),
            bounds=tuple(bounds),
            method="bounded",
            options={"xatol": 1e-7},
        )
        identity = target_nll(logprobs_Uk, rank_U, num_rest_U, 1.0).mean()
        # The search may stop a hair beside an optimum at 1; never end worse than the identity.
        self.temperature = float(np.exp(found.x)) if found.fun < identity else 1.0
        to_end_2 = abs(np.log(self.temperature) - bounds)
        if min(to_end_2) < 1e-4:
            _log.warning(
                "calibrator: the temperature %.3g lies at the end of its range [%g, %g]. %s before "
                "trusting probabilities.",
                self.temperature,
                self.config.min_temperature,
                self.config.max_temperature,
                "The scores hardly predict the target; check the model"
                if to_end_2[1] < to_end_2[0]
                else "The scores put nearly every target first, so certainty would fit better "
                "still; check whether something tells the targets (genrec audit)",
            )
        return self

    def probabilities(
        self,
        logprobs_Uk: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> np.ndarray:
        """Return p_T, (U, k) float64; the rest of the mass belongs to items outside the list.

        Args:
            logprobs_Uk: (U, k) natural log-probabilities, -inf = padding.
            num_rest_U: (U,) eligible items outside the list.
            context: not read.
        """
        logprobs_Uk, num_rest_U = checked(logprobs_Uk, num_rest_U)
        return np.exp(tempered_logprobs(logprobs_Uk, num_rest_U, self.temperature)[0])

    def state(self) -> dict[str, Any]:
        """Return {"temperature": T}."""
        return {"temperature": self.temperature}

    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Restore the temperature.

        Raises:
            UserError: no temperature, or one that is not a positive number.
        """
        self.temperature = finite_number(state, "temperature", low=0)
        return self


def tempered_logprobs(
    logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p_T of the listed items and of one rest item (see the top of the file).

    Args:
        logprobs_Uk: (U, k) natural log-probabilities, -inf = padding.
        num_rest_U: (U,) eligible items outside the list.
        temperature: T > 0.

    Returns:
        (U, k) float64 and (U,) float64; the latter is -inf where there is no rest item.
    """
    S_Uk = np.asarray(logprobs_Uk, dtype=np.float64)
    log_item_U, log_n_U = log_rest_item(S_Uk, num_rest_U)
    tempered_Uk, item_U = S_Uk / temperature, log_item_U / temperature
    log_z_U = logsumexp(np.column_stack([tempered_Uk, log_n_U + item_U]))
    log_z_U = np.where(np.isfinite(log_z_U), log_z_U, 0.0)  # nothing listed and no rest: all zero
    return tempered_Uk - log_z_U[:, None], item_U - log_z_U


def target_nll(
    logprobs_Uk: np.ndarray,
    target_rank_U: np.ndarray,
    num_rest_U: np.ndarray,
    temperature: float = 1.0,
) -> np.ndarray:
    """Return -log p_T(target) per user, (U,) float64 nats.

    A target outside the list is scored as one rest item; inf where there is no such item.
    """
    listed_Uk, rest_item_U = tempered_logprobs(logprobs_Uk, num_rest_U, temperature)
    rank_U = np.asarray(target_rank_U)
    if not listed_Uk.shape[1]:
        return -rest_item_U
    found_U = listed_Uk[np.arange(len(rank_U)), np.maximum(rank_U, 0)]
    return -np.where(rank_U >= 0, found_U, rest_item_U)
