"""How likely is each listed item to be the next one? Item-wise maps: Platt, isotonic, beta.

Each map turns one item's log-probability (for Platt, with facts about its list) into its own hit
probability, learned from (user, listed item) pairs. It knows nothing about items outside the list
and does not normalise: the probabilities of a list are expected hits, not a distribution, and what
they lack to 1 is the chance that none of the listed items is next. Only a sum above 1 is scaled
down to 1, which keeps the order. They hold for lists of the whole catalogue, as they were fitted;
with candidates or rules a log-probability means something else (temperature holds there too).

Shapes: U users, k list length, M (user, listed item) pairs, F inputs of a logistic regression.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from itertools import combinations
from typing import Any, ClassVar, Literal, Self

import numpy as np

from genrec.calibration.base import (
    Calibrator,
    CalibratorConfig,
    ListContext,
    Need,
    checked,
    finite_number,
    fit_input,
    log_rest_item,
)
from genrec.errors import UserError
from genrec.runtime import get_logger

# 1 - p is not resolved below this: float32 log-probabilities round there.
MISS_EPS = 1e-7
# Weight of the model's own probability in an isotonic map; far below any base rate.
TIE_WEIGHT = 1e-6

Feature = Literal["rank", "list_entropy", "history_length"]

_log = get_logger(__name__)


class ItemwiseCalibrator(Calibrator):
    """Fits on all (user, listed item) pairs at once and caps each list's sum at 1."""

    whole_catalogue: ClassVar[bool] = False

    def fit(
        self,
        logprobs_Uk: np.ndarray,
        target_rank_U: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> Self:
        """Learn the map; see the base class.

        Raises:
            UserError: shapes that do not fit, NaN, or no listed item at all.
        """
        logprobs_Uk, rank_U, num_rest_U, _ = fit_input(logprobs_Uk, target_rank_U, num_rest_U)
        real_Uk = np.isfinite(logprobs_Uk)
        if not real_Uk.any():
            raise UserError(
                "calibrator: got no listed item to learn from. Expected validation lists; check "
                "the split and the filters."
            )
        if np.ptp(logprobs_Uk[real_Uk]) == 0:
            _log.warning(
                "calibrator: all scores are equal, so every listed item gets the same "
                "probability. Check the model before trusting probabilities."
            )
        hits_Uk = rank_U[:, None] == np.arange(logprobs_Uk.shape[1])
        inputs_MF = self._inputs(logprobs_Uk, num_rest_U, context)
        self._learn(inputs_MF, hits_Uk[real_Uk])
        return self

    def probabilities(
        self,
        logprobs_Uk: np.ndarray,
        num_rest_U: np.ndarray,
        context: ListContext | None = None,
    ) -> np.ndarray:
        """Return each listed item's hit probability, (U, k) float64; a list's sum is at most 1."""
        logprobs_Uk, num_rest_U = checked(logprobs_Uk, num_rest_U)
        p_Uk = np.zeros(logprobs_Uk.shape)
        real_Uk = np.isfinite(logprobs_Uk)
        if real_Uk.any():
            p_Uk[real_Uk] = self._map(self._inputs(logprobs_Uk, num_rest_U, context))
        return p_Uk / np.maximum(p_Uk.sum(axis=1, keepdims=True), 1.0)

    def _inputs(
        self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, context: ListContext | None
    ) -> np.ndarray:
        """Return (M, F) inputs of the listed items, in the order of the flattened mask."""
        return np.minimum(logprobs_Uk[np.isfinite(logprobs_Uk)], 0.0)[:, None]

    @abstractmethod
    def _learn(self, inputs_MF: np.ndarray, hit_M: np.ndarray) -> None: ...

    @abstractmethod
    def _map(self, inputs_MF: np.ndarray) -> np.ndarray: ...


class LogisticCalibrator(ItemwiseCalibrator):
    """A logistic regression on named inputs, some with weights that may not be negative."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.weights: dict[str, float] = dict.fromkeys(self.input_names, 0.0)
        self.intercept = 0.0

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""

    @property
    @abstractmethod
    def signs(self) -> tuple[int, ...]:
        """+1: the weight may not be negative, -1: not positive, 0: free."""

    def _learn(self, inputs_MF: np.ndarray, hit_M: np.ndarray) -> None:
        weights_F, self.intercept = signed_logistic(inputs_MF, hit_M, self.signs)
        self.weights = dict(zip(self.input_names, weights_F.tolist(), strict=True))

    def _map(self, inputs_MF: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        weights_F = np.array([self.weights[name] for name in self.input_names])
        return np.asarray(expit(inputs_MF @ weights_F + self.intercept))

    def state(self) -> dict[str, Any]:
        """Return {"weights": {input: number}, "intercept": number}."""
        return {"weights": dict(self.weights), "intercept": self.intercept}

    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Restore weights and intercept.

        Raises:
            UserError: other inputs than this calibrator's, or values that are no numbers.
        """
        weights = state.get("weights")
        if not isinstance(weights, Mapping) or set(weights) != set(self.input_names):
            got = sorted(weights) if isinstance(weights, Mapping) else weights
            raise UserError(
                f"calibrator state: got weights of {got}, expected {list(self.input_names)}. Run "
                "`genrec calibrate` again."
            )
        self.weights = {name: finite_number(weights, name) for name in self.input_names}
        self.intercept = finite_number(state, "intercept")
        return self


class PlattCalibrator(LogisticCalibrator):
    """p = sigmoid(a x + b + ...), x = the logit or the log-probability of an item.

    a >= 0, and the weight of the rank may not be positive, so that no list changes its order;
    list entropy and history length move whole lists.

    Source: Platt 1999, "Probabilistic Outputs for Support Vector Machines", including its smoothed
    targets.
    """

    class Config(CalibratorConfig):
        """What the logistic regression reads."""

        name: Literal["platt"] = "platt"
        """Name in the registry."""
        score: Literal["logit", "logprob"] = "logit"
        """log p - log(1 - p), or log p; they differ where p is large."""
        features: tuple[Feature, ...] = ()
        """What is read beside the score: `rank` (log of 1 + place), `list_entropy` (nats, of the
        list with its rest spread evenly), `history_length` (log of 1 + interactions)."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """History lengths, where they are a feature."""
        return ("history_lengths",) if "history_length" in self.config.features else ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The score and the features."""
        return (self.config.score, *dict.fromkeys(self.config.features))

    @property
    def signs(self) -> tuple[int, ...]:
        """The score raises, the rank lowers, the rest is free."""
        return tuple({"rank": -1, "logit": 1, "logprob": 1}.get(n, 0) for n in self.input_names)

    def _inputs(
        self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, context: ListContext | None
    ) -> np.ndarray:
        real_Uk = np.isfinite(logprobs_Uk)
        users_M = np.nonzero(real_Uk)[0]
        columns = []
        for name in self.input_names:
            if name in ("logit", "logprob"):
                logprob_M = np.minimum(logprobs_Uk[real_Uk], 0.0)
                columns.append(logprob_M + (_minus_log_miss(logprob_M) if name == "logit" else 0))
            elif name == "rank":
                columns.append(np.log1p(np.nonzero(real_Uk)[1]))
            elif name == "list_entropy":
                columns.append(list_entropy(logprobs_Uk, num_rest_U)[users_M])
            else:
                lengths_U = self.needed(context, "history_lengths", (len(logprobs_Uk),))
                columns.append(np.log1p(lengths_U)[users_M])
        return np.column_stack(columns)


class BetaCalibrator(LogisticCalibrator):
    """logit p = a log q - b log(1 - q) + c with a, b >= 0, q the model's probability.

    Source: Kull, Silva Filho & Flach 2017, "Beta calibration"; a negative a or b is set to 0 and
    the rest fitted again, as there.
    """

    class Config(CalibratorConfig):
        """Nothing beside the share of users."""

        name: Literal["beta"] = "beta"
        """Name in the registry."""

    input_names = ("logprob", "minus_log_miss")
    signs = (1, 1)

    def _inputs(
        self, logprobs_Uk: np.ndarray, num_rest_U: np.ndarray, context: ListContext | None
    ) -> np.ndarray:
        logprob_M = np.minimum(logprobs_Uk[np.isfinite(logprobs_Uk)], 0.0)
        return np.column_stack([logprob_M, _minus_log_miss(logprob_M)])


class IsotonicCalibrator(ItemwiseCalibrator):
    """A rising step function of the log-probability, fitted by least squares.

    Steps would tie neighbours of a list, so a millionth of the model's own probability is mixed in:
    p = (1 - 1e-6) step(S) + 1e-6 exp(S) rises strictly. The steps stay 1 / (M + 2) away from 0 and
    1, for M pairs, so that no event is impossible.

    Source: Zadrozny & Elkan 2002, "Transforming Classifier Scores into Accurate Multiclass
    Probability Estimates"; fitted by scikit-learn.
    """

    class Config(CalibratorConfig):
        """Nothing beside the share of users."""

        name: Literal["isotonic"] = "isotonic"
        """Name in the registry."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.logprobs = np.zeros(1)
        self.steps = np.ones(1)

    def _learn(self, inputs_MF: np.ndarray, hit_M: np.ndarray) -> None:
        from sklearn.isotonic import IsotonicRegression

        floor = 1.0 / (len(hit_M) + 2)
        fitted = IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip")
        fitted.fit(inputs_MF[:, 0], hit_M.astype(np.float64))
        self.logprobs = np.asarray(fitted.X_thresholds_, dtype=np.float64)
        self.steps = np.asarray(fitted.y_thresholds_, dtype=np.float64)

    def _map(self, inputs_MF: np.ndarray) -> np.ndarray:
        logprob_M = inputs_MF[:, 0]
        # What scikit-learn's `predict` does between its thresholds, clipped at both ends.
        steps_M = np.interp(logprob_M, self.logprobs, self.steps)
        return (1 - TIE_WEIGHT) * steps_M + TIE_WEIGHT * np.exp(logprob_M)

    def state(self) -> dict[str, Any]:
        """Return {"logprobs": [...], "steps": [...]}: the corners of the function."""
        return {"logprobs": self.logprobs.tolist(), "steps": self.steps.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> Self:
        """Restore the corners.

        Raises:
            UserError: not two equally long lists of rising numbers, probabilities in the second.
        """
        try:
            x = np.asarray(state.get("logprobs"), dtype=np.float64)
            y = np.asarray(state.get("steps"), dtype=np.float64)
        except (TypeError, ValueError):
            x = y = np.empty((0, 0))
        rising = x.ndim == 1 and x.shape == y.shape and len(x) > 0
        rising = rising and bool((np.diff(x) >= 0).all() and (np.diff(y) >= 0).all())
        if not rising or not (np.isfinite(x).all() and y[0] >= 0 and y[-1] <= 1):
            raise UserError(
                "calibrator state: got no rising step function, expected equally long lists "
                "`logprobs` and `steps`. Run `genrec calibrate` again."
            )
        self.logprobs, self.steps = x, y
        return self


def list_entropy(logprobs_Uk: np.ndarray, num_rest_U: np.ndarray) -> np.ndarray:
    """Return the entropy of each list with its rest mass spread evenly over n items, (U,) nats."""
    item_U, log_n_U = log_rest_item(logprobs_Uk, num_rest_U)
    p_Uk = np.exp(logprobs_Uk)
    listed_U = -(p_Uk * np.where(p_Uk > 0, logprobs_Uk, 0.0)).sum(axis=1)
    mass_U = np.where(np.isfinite(log_n_U), np.exp(log_n_U + item_U), 0.0)
    return listed_U - mass_U * np.where(np.isfinite(item_U), item_U, 0.0)


def signed_logistic(
    inputs_MF: np.ndarray, hit_M: np.ndarray, signs: tuple[int, ...]
) -> tuple[np.ndarray, float]:
    """Return weights (F,) and intercept of a logistic regression whose weights keep given signs.

    The optimum of a convex loss under sign constraints is the unconstrained one of the inputs that
    it leaves free, so trying every set of inputs set to 0 finds it exactly. Targets are smoothed
    as Platt proposes, (N+ + 1) / (N+ + 2) and 1 / (N- + 2): finite weights for any data, and about
    the same total of hits.

    Args:
        inputs_MF: (M, F) finite numbers; constant ones get weight 0.
        hit_M: (M,) bool.
        signs: per input +1 (weight >= 0), -1 (<= 0) or 0 (free).
    """
    deviation_F = inputs_MF.std(axis=0)
    varies_F = deviation_F > 1e-9 * (1 + np.abs(inputs_MF).max(axis=0))
    mean_F, scale_F = inputs_MF.mean(axis=0), np.where(varies_F, deviation_F, 1.0)
    standard_MF = (inputs_MF - mean_F) / scale_F
    usable = [int(f) for f in np.flatnonzero(varies_F)]
    bound = [f for f in usable if signs[f]]
    best: tuple[float, np.ndarray, float] | None = None
    for num_zero in range(len(bound) + 1):
        for zeros in combinations(bound, num_zero):
            chosen = [f for f in usable if f not in zeros]
            found_F, offset, loss = _logistic(standard_MF[:, chosen], hit_M)
            weights_F = np.zeros(len(signs))
            weights_F[chosen] = found_F
            kept = all(weights_F[f] * signs[f] >= 0 for f in chosen)
            if kept and (best is None or loss < best[0]):
                best = (loss, weights_F, offset)
        if best is not None and num_zero == 0:
            break  # nothing had to be set to 0
    assert best is not None  # with every bound input at 0 nothing is violated
    weights_F = best[1] / scale_F
    return weights_F, float(best[2] - weights_F @ mean_F)


def _logistic(inputs_MF: np.ndarray, hit_M: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return weights, intercept and mean loss with Platt's smoothed targets."""
    positives = int(hit_M.sum())
    target_M = np.where(hit_M, (positives + 1) / (positives + 2), 1 / (len(hit_M) - positives + 2))
    if not inputs_MF.shape[1]:
        share = float(target_M.mean())
        loss = -share * np.log(share) - (1 - share) * np.log1p(-share)
        return np.empty(0), float(np.log(share) - np.log1p(-share)), float(loss)
    from sklearn.linear_model import LogisticRegression

    # A smoothed target is two weighted examples, one of each class.
    both_MF = np.concatenate([inputs_MF, inputs_MF])
    labels_M = np.repeat([1, 0], len(hit_M))
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8, max_iter=200)
    model.fit(both_MF, labels_M, sample_weight=np.concatenate([target_M, 1 - target_M]))
    logit_M = inputs_MF @ model.coef_[0] + model.intercept_[0]
    loss = float(np.mean(np.logaddexp(0, logit_M) - target_M * logit_M))
    return model.coef_[0].astype(np.float64), float(model.intercept_[0]), loss


def _minus_log_miss(logprob_M: np.ndarray) -> np.ndarray:
    """Return -log(1 - p), kept finite."""
    return -np.log(np.maximum(-np.expm1(logprob_M), MISS_EPS))
