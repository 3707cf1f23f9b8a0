"""What is learned, by which loss, from which batches? The next item, by its likelihood.

`Trainer` is what registered trainers extend; how the loop goes is in `genrec.trainers.loop`, how a
step is made in `genrec.trainers.step`, where examples come from in `genrec.trainers.batching`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from genrec import runtime
from genrec.artifacts import fingerprint
from genrec.data import Catalog, Interactions
from genrec.errors import TrainingError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.config import LoopConfig
from genrec.trainers.loop import Run
from genrec.trainers.objectives import Learner, ObjectivesConfig
from genrec.trainers.place import Place, TrainResult
from genrec.trainers.stopping import Stop
from genrec.trainers.tracking import Trackers
from genrec.trainers.validation import Validator
from genrec.trainers.weighting import WeightingConfig, target_weights

log = runtime.get_logger(__name__)

__all__ = ["TrainResult", "Trainer"]


class Trainer:
    """Next-item likelihood with early stopping on validation NDCG@10.

    Args:
        config: hyper-parameters.
        seed: of shuffling, cutting and dropout.
    """

    class Config(LoopConfig):
        """Options of learning the next item."""

        name: Literal["next_item"] = "next_item"
        """Name in the registry."""
        weights: WeightingConfig = WeightingConfig()
        """How much each target counts."""
        objectives: ObjectivesConfig = ObjectivesConfig()
        """What is learned beside the next item."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return a digest of the item vectors where an objective reads them."""
            if not self.objectives.active or catalog.content_vectors is None:
                return {}
            return {"objective_vectors": fingerprint(catalog.content_vectors)}

    figures: tuple[str, ...] = ()
    """Names of `LossOutput.figures`, whose means are reported with the loss."""

    trains_shards: ClassVar[bool] = True
    """Whether its learner calls nothing but `forward` of the model (FSDP)."""

    goes_on: ClassVar[bool] = False
    """Whether `start` gives the model weights that were trained before."""

    def __init__(self, config: Any, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.stop = Stop()
        self._vectors_NE: torch.Tensor | None = None
        objectives = getattr(config, "objectives", None)
        if objectives is not None and objectives.active:
            self.figures = ("next_item", *objectives.active)

    # -- what a way of training decides -------------------------------------------------------

    def unit(self, model: Backbone) -> Literal["target", "sequence"]:
        """Return what an example is; by default what the model's loss reads."""
        return model.training_unit

    def sized(self, config: Any, training: Interactions) -> Any:
        """Return the configuration of the model to train, with the sizes that follow from the data.

        Args:
            config: of a backbone.
            training: training interactions only.
        """
        return config.for_histories(training)

    def start(self, model: Backbone, index: ItemIndex, catalog: Catalog) -> None:
        """Prepare a model with fresh weights for training, and take what is needed of the items.

        Args:
            model: changed in place.
            index: that the model is built on.
            catalog: of the index, with vectors where there are any.
        """
        model.start_from(catalog)
        if catalog.content_vectors is not None:
            self._vectors_NE = torch.from_numpy(np.asarray(catalog.content_vectors, np.float32))

    def weights(self, training: Interactions) -> np.ndarray | None:
        """Return how much each training interaction counts as a target; None: all alike."""
        return target_weights(training, self.config.weights)

    def examples(self, model: Backbone, training: Interactions) -> TrainingExamples:
        """Return what to train on; `start` comes first.

        Args:
            model: that is trained.
            training: training interactions only.
        """
        weights = self.weights(training)
        return TrainingExamples.for_model(model, training, self.unit(model), weights)

    def learner(self, model: Backbone) -> nn.Module:
        """Return the module whose call on a batch gives the loss; the model itself or one on it."""
        if not self.config.objectives.active:
            return model
        return Learner(model, self.config.objectives, self._vectors_NE, seed=self.seed)

    def helpers(self, learner: nn.Module) -> Mapping[str, nn.Module]:
        """Return modules that train beside the model, by the name that checkpoints keep them by."""
        return {"objectives": learner.heads} if isinstance(learner, Learner) else {}

    def make_batch(
        self, examples: TrainingExamples, spans: Spans, chosen: np.ndarray, place: Place
    ) -> Batch:
        """Return a batch on the CPU: a function of its examples and the place in the run only."""
        batch = examples.batch(spans, chosen)
        objectives = self.config.objectives
        if objectives.active and self._vectors_NE is not None:
            drawn = objectives.negatives(len(self._vectors_NE), self.seed, place.step)
            batch = replace(batch, negatives=drawn)
        return batch

    def compute_loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Return the loss of a batch; `model` is the learner, maybe wrapped by accelerate."""
        output: LossOutput = model(batch)
        return output

    def report(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return what trackers get of the means of `figures`, by name."""
        return {f"train/{name}": value for name, value in figures.items()}

    # -- the run ------------------------------------------------------------------------------

    def fit(
        self,
        model: Backbone,
        examples: TrainingExamples,
        validator: Validator | None,
        *,
        accelerator: Accelerator,
        folder: Path,
        key: str,
        open_trackers: Callable[[int | None], Trackers] = lambda step: Trackers([]),
    ) -> TrainResult:
        """Train in place; on return the model holds the weights of the best validation.

        Args:
            model: backbone on any device; moved by accelerate.
            examples: training data.
            validator: None trains for all epochs and keeps the last weights.
            accelerator: decides devices and processes.
            folder: gets `checkpoints/`; a checkpoint of the same `key` there is resumed.
            key: fingerprint of everything that determines the run.
            open_trackers: called with the step resumed from, or None.

        Raises:
            TrainingError: nothing to train on, NaN loss, or out of memory.
            ConfigError: options that the model or the data cannot serve.
            SystemExit: 0, after SIGTERM and a checkpoint.
        """
        if not len(examples.flat):
            raise TrainingError(
                "training: got no training interactions, expected at least one user with history. "
                "Check the split with `genrec doctor`."
            )
        if not any(weight.requires_grad for weight in model.parameters()):
            return self._nothing_to_train(model, validator, accelerator, open_trackers)
        run = Run(self, model, examples, validator, accelerator, folder / "checkpoints", key)
        resumed = run.resume()
        trackers = open_trackers(resumed)
        with self.stop:
            try:
                run.train(trackers)
            finally:
                trackers.finish()
        return run.place.result(resumed)

    def _nothing_to_train(
        self,
        model: Backbone,
        validator: Validator | None,
        accelerator: Accelerator,
        open_trackers: Callable[[int | None], Trackers],
    ) -> TrainResult:
        """Validate a model that stays as it is (zero-shot) and say so."""
        log.warning(
            "no weight of this %s trains (model.tuning.mode=frozen?): 0 steps are made, and what "
            "follows measures the model as it came. Choose another mode to train it.",
            type(model).__name__,
        )
        model.to(accelerator.device)
        found = validator(model, accelerator) if validator else {}
        values = {f"valid/{name}": value for name, value in found.items()}
        trackers = open_trackers(None)
        trackers.log(0, values)
        trackers.finish()
        best = found.get("ndcg@10", -1.0)
        return TrainResult(best, 0, 0, 0, [{"step": 0, **values}] if values else [], 0.0)
