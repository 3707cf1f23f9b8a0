"""How much of a history does a model read? As configured, or less where histories are short.

Every sequence model shares these settings; what it makes of a history is its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data.interactions import Interactions

log = get_logger(__name__)


class HistoryConfig(StrictConfig):
    """Settings of histories that follow the lengths of those in the data."""

    max_history: int = Field(default=50, ge=1)
    """Items of a history that are read; older ones are dropped."""
    halve_history_to: int | None = Field(default=None, ge=1)
    """Halve `max_history` while half of the users' training histories fit whole into the half, but
    not below this: one configuration then serves data of short and of long histories. null:
    `max_history` as it is."""

    def for_histories(self, training: Interactions) -> Self:
        """Return the configuration with the `max_history` that these users get.

        Args:
            training: training interactions only; users without any do not count.
        """
        if self.halve_history_to is None:
            return self
        lengths_U = np.diff(training.offsets)
        lengths_U = lengths_U[lengths_U > 0]
        limit = self.max_history
        while limit // 2 >= self.halve_history_to and _half_fit(lengths_U, limit // 2):
            limit //= 2
        if limit != self.max_history:
            log.info(
                "histories: the last %d items instead of %d, into which half of %d users' training "
                "histories fit (halve_history_to).",
                limit, self.max_history, len(lengths_U),
            )  # fmt: skip
        return self.with_max_history(limit)

    def with_max_history(self, limit: int) -> Self:
        """Return the configuration with this `max_history`, whatever the data."""
        return self.model_copy(update={"max_history": limit, "halve_history_to": None})


def _half_fit(lengths_U: np.ndarray, limit: int) -> bool:
    return 2 * int((lengths_U <= limit).sum()) >= len(lengths_U)
