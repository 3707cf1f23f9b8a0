"""What does a sequence model of bare item ids recommend? SASRec, with the loss of your choice.

The model is `genrec.features.sasrec`; this file only makes it stand beside the others.

Shapes: B histories, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from genrec.data.interactions import Examples, Interactions
from genrec.features import sasrec
from genrec.features.sasrec import SASRecConfig
from genrec.models.baselines.base import Baseline

if TYPE_CHECKING:
    from genrec.data import Catalog


class SASRec(Baseline):
    """A causal transformer over item ids (Kang and McAuley 2018, 1808.09781).

    It stops by the validation targets; without them by the last training interactions of the users,
    which it then does not train on. Minutes where counting takes seconds.
    """

    reads_validation: ClassVar[bool] = True

    class Config(SASRecConfig):
        """Settings of SASRec as a baseline."""

        name: Literal["sasrec"] = "sasrec"
        """Name in the registry."""

    def _fit(
        self, interactions: Interactions, catalog: Catalog | None, validation: Examples | None
    ) -> None:
        self._model = sasrec.SASRec(self.config).fit(interactions, validation)

    def _scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        return self._model.scores(histories)
