"""What is a calibrator? The contract of all of them, and the checks of what they are given.

It sees log-probabilities, the place of the target and how many eligible items are outside the
list; it knows neither models nor items, and never learns what a list looked like to its user.

Shapes: U users, k list length, L levels of the semantic IDs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.runtime import get_logger

FEW_HITS = 50
# Rest mass below this is rounding of float32 log-probabilities, not information.
REST_EPS = 1e-9

Need = Literal["history_lengths", "level_logprobs"]

_log = get_logger(__name__)


@dataclass(frozen=True)
class ListContext:
    """What some calibrators read beside the scores; each says in `needs` what it must have.

    Args:
        history_lengths: (U,) interactions before the list, the whole history (not cut to what the
            model reads).
        level_logprobs: (U, k, L) the parts of each log-probability, level by level; any value where
            padded.
    """

    history_lengths: np.ndarray | None = None
    level_logprobs: np.ndarray | None = None

    def select(self, users: np.ndarray) -> ListContext:
        """Return the context of some users (a mask or positions)."""
        lengths, levels = self.history_lengths, self.level_logprobs
        return ListContext(
            None if lengths is None else np.asarray(lengths)[users],
            None if levels is None else np.asarray(levels)[users],
        )


class CalibratorConfig(StrictConfig):
    """What every calibrator can be told."""

    recent_share: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto"] = "auto"
    """Share of validation users to fit on: those whose validation target is the latest in time.
    Below 1 the probabilities follow the newest period and rest on fewer users; 1 = all. "auto":
    the share that best foretells the latest quarter of the validation users from the earlier
    ones. Read by the pipeline, which knows the times."""


class Calibrator(ABC):
    """Turns the log-probabilities of lists into probabilities.

    They are fitted on validation users and judged on others. No calibrator reorders a list.
    """

    Config: type[CalibratorConfig]
    keeps_order: ClassVar[bool] = True
    """Whether probabilities never rise along a list that is ordered by log-probability."""
    whole_catalogue: ClassVar[bool] = True
    """True: a distribution over all eligible items, so it holds for filtered requests too. False:
    a hit probability for each listed item on its own, learned from lists of the whole catalogue."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()

    @property
    def needs(self) -> tuple[Need, ...]:
        """The fields of `ListContext` that this calibrator cannot do without."""
        return ()

    @abstractmethod
    def fit(
        self,
        logprobs_Uk: np.ndarray,
        target_rank_U: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> Self:
        """Learn the map.

        Args:
            logprobs_Uk: (U, k) natural log-probabilities, best first, -inf = padding.
            target_rank_U: (U,) place of the target in the list, -1 = not in it. Users without a
                target must be left out.
            num_rest_U: (U,) eligible items that are not in the list; 0 = the list is all there is.
            context: what `needs` names.

        Raises:
            UserError: shapes that do not fit, NaN, or nothing to learn from.
        """

    @abstractmethod
    def probabilities(
        self,
        logprobs_Uk: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> np.ndarray:
        """Return (U, k) float64 probabilities; 0 for padding; a list's sum is at most 1."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what was learned as JSON numbers and short lists of them."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Restore what `state` returned.

        Raises:
            UserError: a value that is missing or cannot be one.
        """

    def needed(self, context: ListContext | None, name: Need, shape: tuple[int, ...]) -> np.ndarray:
        """Return a field of the context as float64, checked.

        Args:
            context: as given to `fit` or `probabilities`.
            name: of the field.
            shape: what it must begin with.

        Raises:
            UserError: it is missing, has another shape, or holds NaN.
        """
        value = getattr(context, name) if context is not None else None
        if value is None:
            raise UserError(
                f"calibrator: got no {name}, which this {self.config.name!r} calibrator reads. "
                f"Expected ListContext({name}=...) with shape {shape}."
            )
        array = np.asarray(value, dtype=np.float64)
        if array.shape[: len(shape)] != shape or np.isnan(array).any():
            raise UserError(
                f"calibrator: got {name} of shape {array.shape}, expected it to begin with {shape} "
                "and to hold no NaN."
            )
        return array


def logsumexp(x_Uk: np.ndarray) -> np.ndarray:
    """Return log sum exp of each row, (U,); -inf where nothing is finite."""
    top_U = x_Uk.max(axis=1, initial=-np.inf)
    safe_U = np.where(np.isfinite(top_U), top_U, 0.0)
    with np.errstate(divide="ignore"):
        return safe_U + np.log(np.exp(x_Uk - safe_U[:, None]).sum(axis=1))


def log_rest_item(logprobs_Uk: np.ndarray, num_rest_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probability of one rest item and log of their number, (U,) each.

    The mass that a list leaves is spread evenly over the items outside it. Both are -inf where
    there is no rest.
    """
    rest_U = np.maximum(-np.expm1(np.minimum(logsumexp(logprobs_Uk), 0.0)), REST_EPS)
    with np.errstate(divide="ignore"):
        log_n_U = np.log(np.asarray(num_rest_U, dtype=np.float64))
    # Filled with 0 where n = 0, so that inf - inf never appears.
    filled_U = np.where(np.isfinite(log_n_U), log_n_U, 0.0)
    return np.where(np.isfinite(log_n_U), np.log(rest_U) - filled_U, -np.inf), log_n_U


def warn_if_few_hits(rank_U: np.ndarray) -> None:
    """Log a warning where fewer than `FEW_HITS` targets are in their lists, with the interval."""
    hits, users = int(np.count_nonzero(rank_U >= 0)), len(rank_U)
    if hits >= FEW_HITS or not users:
        return
    from scipy.stats import binomtest

    interval = binomtest(hits, users).proportion_ci(method="wilson")
    _log.warning(
        "calibrator: only %d of %d validation targets are in their lists (95%% interval of the "
        "hit rate %.4f to %.4f); fewer than %d make every probability uncertain by that much. Use "
        "more validation users or longer lists (beam width).",
        hits,
        users,
        interval.low,
        interval.high,
        FEW_HITS,
    )


def fit_input(
    logprobs_Uk: np.ndarray, target_rank_U: np.ndarray, num_rest_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what every `fit` begins with: checked arrays, and who has something to say.

    Users whose target is neither in the list nor among the rest (it was filtered out) say nothing
    about a distribution over items. Few hits among the others are warned about.

    Returns:
        log-probabilities (U, k), ranks (U,), rest counts (U,), and (U,) bool: the target could have
        been recommended.

    Raises:
        UserError: shapes that do not fit, NaN, or no such user.
    """
    logprobs_Uk, num_rest_U = checked(logprobs_Uk, num_rest_U, target_rank_U)
    rank_U = np.asarray(target_rank_U)
    useful_U = (rank_U >= 0) | (num_rest_U > 0)
    if not useful_U.any():
        raise UserError(
            "calibrator: got no user whose target could have been recommended. Expected "
            "validation users; check the split and the filters."
        )
    warn_if_few_hits(rank_U[useful_U])
    return logprobs_Uk, rank_U, num_rest_U, useful_U


def checked(
    logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, target_rank_U: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities as float64 and rest counts, or say what is wrong with them.

    Raises:
        UserError: shapes that do not fit, NaN or positive values, negative counts, impossible
            places.
    """
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
            f"values from -1 (not in the list) to {k - 1}. Leave out users without a target."
        )
    listed = rank_U >= 0
    if np.isneginf(logprobs_Uk[listed, rank_U[listed]]).any():
        raise UserError(
            "calibrator: a target stands on padding (log-probability -inf). Give -1 for targets "
            "that are not in the list."
        )


def finite_number(state: Mapping[str, Any], name: str, *, low: float = -np.inf) -> float:
    """Return a number of a state above `low`, or raise `UserError`."""
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < np.inf:
        what = "a positive number" if low == 0 else "a number"
        raise UserError(
            f"calibrator state: got {name} {value!r}, expected {what}. Run `genrec calibrate` "
            "again."
        )
    return float(value)
