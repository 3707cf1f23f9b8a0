"""How does a model go on when new interactions come? From its weights, on what is new, with replay.

The weights are found as for preference tuning (`trained.find_model`). What is new is a matter of
time; when an update pays is measured by `genrec.pipeline.incremental`.

Shapes: M interactions, U users.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from genrec.data import Catalog, Interactions
from genrec.errors import TrainingError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone
from genrec.trainers.base import Trainer
from genrec.trainers.batching import TrainingExamples
from genrec.trainers.trained import find_model, sized_like
from genrec.weights import load_model_arrays


class Incremental(Trainer):
    """Next-item likelihood of new interactions, from a trained model."""

    class Config(Trainer.Config):
        """Options of going on."""

        name: Literal["incremental"] = "incremental"  # type: ignore[assignment]
        """Name in the registry."""
        start_from: str
        """Trained model to go on from: a run, a bundle or what `genrec train` wrote; of the same
        index and `model` section."""
        new_from: int
        """Time in seconds: interactions at or after it are new."""
        replay: float = Field(default=0.2, ge=0, le=1)
        """Share of users whose older interactions are learned again, so that they are not
        forgotten."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return the fingerprint of the model to go on from, and what next_item reads."""
            start = find_model(self.start_from).fingerprint
            return {"start_from": start, **super().reads(catalog)}

    config: Config
    goes_on = True

    def sized(self, config: Any, training: Interactions) -> Any:
        """Return the configuration with the size of the model to go on from, whatever the data."""
        return sized_like(config, self.config.start_from)

    def start(self, model: Backbone, index: ItemIndex, catalog: Catalog) -> None:
        """Give the model the weights to go on from.

        Raises:
            UserError: no trained model there.
            MismatchError: a model of another index.
            ArtifactError: a model of another architecture.
        """
        artifact = find_model(self.config.start_from)
        artifact.require_upstream("index", index.fingerprint)
        super().start(model, index, catalog)
        load_model_arrays(model, artifact.arrays)

    def examples(self, model: Backbone, training: Interactions) -> TrainingExamples:
        """Return new targets with the history that they need, and everything of replayed users.

        Raises:
            TrainingError: no new interaction.
        """
        new_M = training.timestamps >= self.config.new_from
        if not new_M.any():
            raise TrainingError(
                f"trainer.new_from: got {self.config.new_from}, after all "
                f"{len(training)} training interactions. Expected some at or after it."
            )
        max_history = model.config.max_history
        rng = np.random.default_rng([self.seed, 3])
        replayed_U = rng.random(training.num_users) < self.config.replay
        replayed_M = replayed_U[training.user_rows]
        keep_M = replayed_M | _near_new(training, new_M, max_history)
        weights = self.weights(training)
        base_M = np.ones(len(training), np.float32) if weights is None else weights
        weights_M = np.where(new_M | replayed_M, base_M, np.float32(0))[keep_M]
        counts = np.bincount(training.user_rows[keep_M], minlength=training.num_users)
        kept = Interactions(
            training.item_rows[keep_M],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            training.timestamps[keep_M],
            training.splits[keep_M],
            training.num_items,
        )
        return TrainingExamples.for_model(model, kept, self.unit(model), weights_M)


def _near_new(training: Interactions, new_M: np.ndarray, max_history: int) -> np.ndarray:
    """Return which interactions are new or among the history of a user's first new one, (M,)."""
    place_M = np.arange(len(training))
    first_U = np.full(training.num_users, len(training), np.int64)
    np.minimum.at(first_U, training.user_rows[new_M], place_M[new_M])
    return place_M >= first_U[training.user_rows] - max_history
