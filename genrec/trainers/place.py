"""Where is a training run, and what does it leave behind? Plain figures that go into checkpoints.

It knows neither weights nor files.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainResult:
    """What a finished training leaves behind; the model itself holds the best weights."""

    best_metric: float
    best_step: int
    steps: int
    epochs: int
    curve: list[dict[str, float]]
    seconds: float
    resumed_from: int | None = None


@dataclass
class Place:
    """Where a run is; everything here is JSON and goes into the checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_metric: float = -1.0
    best_step: int = 0
    bad_validations: int = 0
    stopped: bool = False
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_weight: float = 0.0
    epoch_targets: float = 0.0
    epoch_figures: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def count(self, sums: list[float]) -> None:
        """Add what finished steps summed up: loss, weight, targets, then the trainer's figures."""
        self.epoch_loss += sums[0]
        self.epoch_weight += sums[1]
        self.epoch_targets += sums[2]
        before = self.epoch_figures or [0.0] * len(sums[3:])
        self.epoch_figures = [a + b for a, b in zip(before, sums[3:], strict=True)]

    def close_epoch(self) -> tuple[float, float, list[float]]:
        """Return mean loss, targets per second and mean figures of the epoch, and begin the next.

        Means are weighted as the loss is.
        """
        weight = self.epoch_weight or 1.0
        loss, speed = self.epoch_loss / weight, self.epoch_targets / max(self.epoch_seconds, 1e-9)
        figures = [value / weight for value in self.epoch_figures]
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_loss = self.epoch_weight = self.epoch_targets = self.epoch_seconds = 0.0
        self.epoch_figures = []
        return loss, speed, figures

    def judge(self, metric: float, patience: int) -> bool:
        """Take note of a validation; return whether it is the best so far."""
        if metric > self.best_metric:
            self.best_metric, self.best_step = metric, self.step
            self.bad_validations = 0
            return True
        self.bad_validations += 1
        self.stopped = self.bad_validations >= patience
        return False

    def result(self, resumed: int | None) -> TrainResult:
        """Return the figures of the run."""
        return TrainResult(
            self.best_metric,
            self.best_step or self.step,
            self.step,
            self.epoch,
            self.curve,
            self.seconds,
            resumed,
        )
