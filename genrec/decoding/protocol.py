"""What does the search need of a network and of an index, and what does it give back?

The protocols and data classes of the decoding room. Networks meet the search through `StepModel`
only; this file knows neither how logits are made nor how an index is stored.

Shapes: B requests, W beam width, R = B*W rows, C children, K codes, L levels, k list length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from genrec.errors import UserError

Scoring = Literal["renormalized", "level", "raw"]
NO_ROW = -1


class StepModel(Protocol):
    """A generator of semantic IDs, one level at a time.

    A state belongs to whoever got it: `step` returns a new one and leaves the given one usable, so
    that several searches can go on from the same prefill.
    """

    def begin(self, batch: Any) -> tuple[Tensor, Any]:
        """Read the histories of B requests.

        Returns:
            Unnormalised logits of level 0, (B, K_0) with column = code, and the state.
        """

    def step(self, codes_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Append one code to every row.

        Args:
            codes_R: int64, the code just chosen at the previous level; R = B*W, the W rows of a
                request side by side. W may differ from call to call.
            state: what the previous call returned.
            parents_R: int64, the row of the previous call that each row extends (for the first
                step: the request). Parents of a request's rows belong to that request.

        Returns:
            Unnormalised logits of the next level, (R, K_l), and the new state.
        """


@runtime_checkable
class VocabularyModel(Protocol):
    """A StepModel that can also say how likely codes are among all that it could say.

    Needed for scoring="raw" only.
    """

    def over_vocabulary(self) -> StepModel:
        """Return a step model on the same weights whose logits are log-probabilities (<= 0).

        They are normalised over the model's whole vocabulary: other levels' codes and special
        tokens compete too, as they do in a model that nothing constrains.
        """


@dataclass(frozen=True)
class Children:
    """The children of R nodes, padded to C columns, in ascending order of their codes.

    Args:
        codes_RC: int64 code of each child (any code where not valid).
        states_RC: int64 node of each child (any node of that depth where not valid).
        valid_RC: bool.
    """

    codes_RC: Tensor
    states_RC: Tensor
    valid_RC: Tensor


class ConstraintIndex(Protocol):
    """The catalogue as a tree: a node is a prefix of semantic IDs, a leaf is an item."""

    @property
    def depth(self) -> int:
        """Number of levels L."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""

    @property
    def num_items(self) -> int:
        """Number of leaves N."""

    def root(self, num_rows: int) -> Tensor:
        """Return the root node `num_rows` times, int64."""

    def children(self, states_R: Tensor, level: int) -> Children:
        """Return the children of nodes whose prefix has `level` codes (0 for the root)."""

    def row(self, states_R: Tensor) -> Tensor:
        """Return the catalogue rows of leaves, int64."""


@dataclass(frozen=True)
class Filters:
    """Which items a request may get; rows of -1 are padding and mean nothing.

    Both together mean "allowed and not excluded". Nothing left gives an empty (padded) list, not an
    error.

    Args:
        exclude: per request, catalogue rows that may not be returned (None: none).
        allow: per request, the only rows that may be returned (None: all).
    """

    exclude: Sequence[np.ndarray | None] | None = None
    allow: Sequence[np.ndarray | None] | None = None

    def rows_of_request(
        self, request: int, num_items: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return (denied rows, allowed rows) of a request; at most one of them is not None.

        Raises:
            UserError: a row outside the catalogue.
        """
        denied = _rows(self.exclude, request, num_items, "exclude")
        allowed = _rows(self.allow, request, num_items, "allow")
        if allowed is not None and denied is not None:
            return None, np.setdiff1d(allowed, denied, assume_unique=True)
        return denied, allowed

    def flat(self, num_requests: int, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what all requests list, in one sequence.

        Returns:
            requests (F,) int64 and distinct rows (F,) int64, in no particular order; and which
            requests allow their rows instead of denying them, (B,) bool.

        Raises:
            UserError: as `check` and `rows_of_request`.
        """
        self.check(num_requests)
        try:
            denied = _keys(self.exclude, num_items)
            allowed = _keys(self.allow, num_items)
        except ValueError:
            for request in range(num_requests):
                self.rows_of_request(request, num_items)
            raise
        allows_B = np.array([rows is not None for rows in self.allow or [None] * num_requests])
        if allows_B.any():
            allowed = np.setdiff1d(allowed, denied, assume_unique=True)
            denied = denied[~allows_B[denied // num_items]]
        requests_F, rows_F = np.divmod(np.concatenate([denied, allowed]), num_items)
        return requests_F, rows_F, allows_B

    def check(self, num_requests: int) -> None:
        """Raise `UserError` unless there is one entry per request."""
        for name, lists in (("exclude", self.exclude), ("allow", self.allow)):
            if lists is not None and len(lists) != num_requests:
                raise UserError(
                    f"filters.{name}: got {len(lists)} lists for {num_requests} requests. "
                    "Give one list of rows per request (None or an empty array for no rule)."
                )


def _rows(
    lists: Sequence[np.ndarray | None] | None, request: int, num_items: int, name: str
) -> np.ndarray | None:
    if lists is None or lists[request] is None:
        return None
    rows = np.unique(np.asarray(lists[request], dtype=np.int64).reshape(-1))
    rows = rows[rows != NO_ROW]
    if len(rows) and (rows[0] < 0 or rows[-1] >= num_items):
        wrong = rows[0] if rows[0] < 0 else rows[-1]
        raise UserError(
            f"filters.{name}[{request}]: got row {wrong}, expected 0 <= row < {num_items}. "
            "Take rows from the ItemIndex that the constraint was built from (rows_of)."
        )
    return rows


def _keys(lists: Sequence[np.ndarray | None] | None, num_items: int) -> np.ndarray:
    """Return request * N + row of all listed rows, each once; a wrong row is a `ValueError`."""
    arrays = [
        np.asarray([] if rows is None else rows, dtype=np.int64).reshape(-1) for rows in lists or []
    ]
    rows_F = np.concatenate([np.empty(0, np.int64), *arrays])
    if len(rows_F) and (rows_F.min() < NO_ROW or rows_F.max() >= num_items):
        raise ValueError("a row outside the catalogue")
    keys_F = np.repeat(np.arange(len(arrays)), [len(rows) for rows in arrays]) * num_items + rows_F
    keys_F = np.sort(keys_F[rows_F != NO_ROW])
    return keys_F[np.diff(keys_F, prepend=-1) > 0]


@dataclass(frozen=True)
class Beams:
    """Best-first lists, always k columns; ties are ordered by row.

    Args:
        rows_Bk: int64 catalogue rows, -1 where a list is shorter than k.
        logprobs_Bk: float32 natural log-probabilities, -inf where padded.
        codes_BkL: int64 semantic IDs, -1 where padded.
        certified_B: bool; True where the list provably is the top k of all items that the request
            may get, in the right order.
        boosts_Bk: float32, what each item's boost added to its rank; None where nothing is boosted.
        pruned_B: float32, the best score that anything below a dropped prefix could have; -inf
            where nothing was dropped, None where a search does not tell.
    """

    rows_Bk: Tensor
    logprobs_Bk: Tensor
    codes_BkL: Tensor
    certified_B: Tensor
    boosts_Bk: Tensor | None = None
    pruned_B: Tensor | None = None

    @property
    def scores_Bk(self) -> Tensor:
        """What ranks, float32: log-probability plus boost."""
        return self.logprobs_Bk if self.boosts_Bk is None else self.logprobs_Bk + self.boosts_Bk

    @property
    def num_proven_B(self) -> Tensor:
        """How many places from the top are proven, int64, 0 to k: the best j for every j up to it.

        A list that is not certified as a whole often is at its beginning.
        """
        full_B = self.certified_B.long() * self.rows_Bk.shape[1]
        if self.pruned_B is None:
            return full_B
        return torch.maximum(full_B, (self.scores_Bk > self.pruned_B[:, None]).sum(1))


def check_search(width: int, k: int, num_items: int, scoring: str) -> None:
    """Raise `UserError` on a width, k or scoring that no search can serve."""
    if width < 1:
        raise UserError(f"width: got {width}, expected an integer >= 1. Set e.g. width=20.")
    if k < 1:
        raise UserError(f"k: got {k}, expected an integer >= 1. Set e.g. k=10.")
    if min(k, num_items) > width:
        raise UserError(
            f"k: got {k} with width {width}; a beam of {width} gives at most {width} items. "
            f"Raise width to {min(k, num_items)} or more, or lower k."
        )
    check_scoring(scoring)


def check_scoring(scoring: str) -> None:
    """Raise `UserError` on a scoring that does not exist."""
    if scoring not in get_args(Scoring):
        raise UserError(
            f"scoring: got {scoring!r}, expected 'renormalized', 'level' or 'raw' "
            "(docs/decoding.md says how they differ)."
        )


def speaker(model: StepModel, scoring: Scoring) -> StepModel:
    """Return the step model whose logits a scoring reads: the given one, unless it is "raw".

    Raises:
        UserError: unknown scoring, or a model that knows no probabilities over its vocabulary.
    """
    check_scoring(scoring)
    if scoring != "raw":
        return model
    if not isinstance(model, VocabularyModel):
        raise UserError(
            f"scoring: got 'raw' with a {type(model).__name__}, which has no over_vocabulary() and "
            "gives the logits of one level only. Use scoring='level', or add that method."
        )
    return model.over_vocabulary()


def check_numbers(scores_BX: Tensor) -> None:
    """Raise `UserError` where a score is NaN; reads from the device once, after a search.

    The search lets NaN rank before everything, so that no NaN is lost on the way.
    """
    broken_B = scores_BX.isnan().any(1)
    if bool(broken_B.any()):
        requests = broken_B.nonzero().flatten().tolist()
        shown = ", ".join(map(str, requests[:5])) + (" ..." if len(requests) > 5 else "")
        raise UserError(
            f"model: got NaN logits for request(s) {shown} of {len(broken_B)}, expected numbers "
            "(-inf for what must not be). Check the weights: a training that diverged, or a "
            "precision that overflows."
        )
