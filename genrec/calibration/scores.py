"""How likely is each listed item to be the next one? Maps list log-probabilities to probabilities.

It sees log-probabilities, the place of the target and how many eligible items are outside the
list; it knows neither models nor items. Metrics of the outcome live in
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

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.runtime import get_logger

FEW_HITS = 50
# Rest mass below this is rounding of float32 log-probabilities, not information.
REST_EPS = 1e-9

_log = get_logger(__name__)


class Calibrator(ABC):
    """Turns the log-probabilities of lists into probabilities.

    Subclasses keep each list's order. They are fitted on validation users and judged on others.
    """

    Config: type[StrictConfig]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()

    @abstractmethod
    def fit(
        self, logprobs_Uk: np.ndarray, target_rank_U: np.ndarray, num_rest_U: np.ndarray
    ) -> Self:
        """Learn the map.

        Args:
            logprobs_Uk: (U, k) natural log-probabilities, best first, -inf = padding.
            target_rank_U: (U,) place of the target in the list, -1 = not in it.
            num_rest_U: (U,) eligible items that are not in the list; 0 = the list is all there is.
        """

    @abstractmethod
    def probabilities(self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray) -> np.ndarray:
        """Return (U, k) float64 probabilities; 0 for padding."""

    @abstractmethod
    def state(self) -> dict[str, float]:
        """Return what was learned as JSON numbers."""

    @abstractmethod
    def load_state(self, state: Mapping[str, float]) -> Self:
        """Restore what `state` returned."""


class IdentityCalibrator(Calibrator):
    """Probabilities are exp(log-probability): nothing is learned."""

    class Config(StrictConfig):
        """No settings."""

        name: Literal["identity"] = "identity"
        """Name in the registry."""

    def fit(
        self, logprobs_Uk: np.ndarray, target_rank_U: np.ndarray, num_rest_U: np.ndarray
    ) -> Self:
        """Check the input and learn nothing."""
        _checked(logprobs_Uk, num_rest_U, target_rank_U)
        return self

    def probabilities(self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray) -> np.ndarray:
        """Return exp(logprobs), (U, k) float64."""
        logprobs_Uk, _ = _checked(logprobs_Uk, num_rest_U)
        return np.exp(logprobs_Uk)

    def state(self) -> dict[str, float]:
        """Return {}."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> Self:
        """Do nothing."""
        return self


class TemperatureCalibrator(Calibrator):
    """One temperature on the catalogue distribution, fitted by the NLL of the validation targets.

    The NLL is convex in 1/T (a log-partition function minus a linear term), so the bounded search
    over log T finds its only minimum.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", applied here to items
    rather than classes.
    """

    class Config(StrictConfig):
        """Range of the search."""

        name: Literal["temperature"] = "temperature"
        """Name in the registry."""
        min_temperature: float = Field(default=0.05, gt=0.0)
        """Smallest temperature tried (no unit)."""
        max_temperature: float = Field(default=20.0, gt=0.0)
        """Largest temperature tried (no unit)."""

    def __init__(self, config: TemperatureCalibrator.Config | None = None) -> None:
        super().__init__(config)
        if self.config.min_temperature >= self.config.max_temperature:
            raise UserError(
                f"calibrator: min_temperature {self.config.min_temperature} is not below "
                f"max_temperature {self.config.max_temperature}. Swap or widen them."
            )
        self.temperature = 1.0

    def fit(
        self, logprobs_Uk: np.ndarray, target_rank_U: np.ndarray, num_rest_U: np.ndarray
    ) -> Self:
        """Choose the temperature with the lowest mean target NLL; see the base class for shapes.

        Users whose target is neither in the list nor among the rest (rank -1 with no rest items:
        it was filtered out) say nothing about T and are left out.

        Raises:
            UserError: shapes that do not fit, NaN, or no user to learn from.
        """
        from scipy.optimize import minimize_scalar

        logprobs_Uk, num_rest_U = _checked(logprobs_Uk, num_rest_U, target_rank_U)
        rank_U = np.asarray(target_rank_U)
        useful = (rank_U >= 0) | (num_rest_U > 0)
        logprobs_Uk, rank_U, num_rest_U = logprobs_Uk[useful], rank_U[useful], num_rest_U[useful]
        if not len(rank_U):
            raise UserError(
                "calibrator: got no user whose target could have been recommended. Expected "
                "validation users; check the split and the filters."
            )
        _warn_if_few_hits(rank_U)
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
        if min(abs(np.log(self.temperature) - bounds)) < 1e-4:
            _log.warning(
                "calibrator: the temperature %.3g lies at the end of its range [%g, %g]. The "
                "scores hardly predict the target; check the model before trusting probabilities.",
                self.temperature,
                self.config.min_temperature,
                self.config.max_temperature,
            )
        return self

    def probabilities(self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray) -> np.ndarray:
        """Return p_T, (U, k) float64; the rest of the mass belongs to items outside the list.

        Args:
            logprobs_Uk: (U, k) natural log-probabilities, -inf = padding.
            num_rest_U: (U,) eligible items outside the list.
        """
        logprobs_Uk, num_rest_U = _checked(logprobs_Uk, num_rest_U)
        return np.exp(tempered_logprobs(logprobs_Uk, num_rest_U, self.temperature)[0])

    def state(self) -> dict[str, float]:
        """Return {"temperature": T}."""
        return {"temperature": self.temperature}

    def load_state(self, state: Mapping[str, float]) -> Self:
        """Restore the temperature.

        Raises:
            UserError: no temperature, or one that is not a positive number.
        """
        value = state.get("temperature")
        if not isinstance(value, int | float) or not 0 < value < np.inf:
            raise UserError(
                f"calibrator state: got temperature {value!r}, expected a positive number. "
                "Run `genrec calibrate` again."
            )
        self.temperature = float(value)
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
    n_U = np.asarray(num_rest_U, dtype=np.float64)
    rest_U = np.maximum(-np.expm1(np.minimum(_logsumexp(S_Uk), 0.0)), REST_EPS)
    with np.errstate(divide="ignore"):
        log_n_U = np.log(n_U)
    # Filled with 0 where n = 0, so that inf - inf never appears; masked again below.
    log_item_U = np.where(n_U > 0, np.log(rest_U) - np.where(n_U > 0, log_n_U, 0.0), -np.inf)
    tempered_Uk, item_U = S_Uk / temperature, log_item_U / temperature
    log_z_U = _logsumexp(np.column_stack([tempered_Uk, log_n_U + item_U]))
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


def _logsumexp(x_Uk: np.ndarray) -> np.ndarray:
    top_U = x_Uk.max(axis=1, initial=-np.inf)
    safe_U = np.where(np.isfinite(top_U), top_U, 0.0)
    with np.errstate(divide="ignore"):
        return safe_U + np.log(np.exp(x_Uk - safe_U[:, None]).sum(axis=1))


def _warn_if_few_hits(rank_U: np.ndarray) -> None:
    hits = int(np.count_nonzero(rank_U >= 0))
    if hits < FEW_HITS:
        _log.warning(
            "calibrator: only %d of %d validation targets are in their lists; fewer than %d make "
            "the temperature uncertain. Use more validation users or longer lists (beam width).",
            hits,
            len(rank_U),
            FEW_HITS,
        )


def _checked(
    logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, target_rank_U: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    logprobs_Uk = np.asarray(logprobs_Uk, dtype=np.float64)
    num_rest_U = np.asarray(num_rest_U)
    if logprobs_Uk.ndim != 2 or num_rest_U.shape != (len(logprobs_Uk),):
        raise UserError(
            f"calibrator: got log-probabilities {logprobs_Uk.shape} and rest counts "
            f"{num_rest_U.shape}, expected (users, k) and (users,)."
        )
    if np.isnan(logprobs_Uk).any() or (logprobs_Uk > 1e-3).any():
        raise UserError(
            "calibrator: got NaN or positive log-probabilities. Expected natural logs of "
            "probabilities (<= 0, -inf = padding), not raw scores."
        )
    if len(num_rest_U) and num_rest_U.min() < 0:
        raise UserError("calibrator: got a negative number of rest items, expected >= 0.")
    if target_rank_U is not None:
        _check_ranks(logprobs_Uk, np.asarray(target_rank_U))
    return logprobs_Uk, num_rest_U


def _check_ranks(logprobs_Uk: np.ndarray, rank_U: np.ndarray) -> None:
    users, k = logprobs_Uk.shape
    if rank_U.shape != (users,) or (users and not -1 <= rank_U.min() <= rank_U.max() < k):
        raise UserError(
            f"calibrator: got target ranks of shape {rank_U.shape}, expected ({users},) with "
            f"values from -1 (not in the list) to {k - 1}."
        )
    listed = rank_U >= 0
    if np.isneginf(logprobs_Uk[listed, rank_U[listed]]).any():
        raise UserError(
            "calibrator: a target stands on padding (log-probability -inf). Give -1 for targets "
            "that are not in the list."
        )
