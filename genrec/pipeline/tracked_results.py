"""How do a run's results reach Weights & Biases? As a run of their own, beside those of training.

Training is tracked while it goes on; a cell of an ablation whose models come from the cache trains
nothing and would leave no trace. Group and tags are those of the configuration. Figures only: no
users, no lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genrec.bundle import mode_name
from genrec.pipeline.config import RunConfig
from genrec.trainers.tracking import WandbTracker

FOLDER = "results"
CALIBRATION = ("ece_before", "ece_after", "nll_before", "nll_after")


def track_results(config: RunConfig, folder: Path, found: Mapping[str, Any]) -> None:
    """Log the figures of a finished run, where W&B is on; nothing otherwise.

    Args:
        config: of the run.
        folder: of the run; W&B writes below `results/wandb/` there.
        found: content of its results.json.
    """
    if config.tracking.wandb == "disabled":
        return
    told = {**config.to_dict(), "fingerprints": found["fingerprints"]}
    name = f"{config.name}-{FOLDER}"
    tracker = WandbTracker(config.tracking, name=name, config=told, folder=folder / FOLDER)
    tracker.summary(flat_figures(found))
    tracker.finish()


def flat_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return `system/masked|unmasked/metric` -> value, calibration errors and collisions."""
    figures: dict[str, float] = {}
    for row in found["rows"]:
        place = f"{row['name']}/{mode_name(row['masked'])}"
        for metric, value in row.items():
            if "@" in metric and isinstance(value, float):
                figures[f"{place}/{metric}"] = value
    calibration = found.get("calibration") or {}
    figures |= {f"calibration/{n}": calibration[n] for n in CALIBRATION if n in calibration}
    collisions = (found.get("tokens") or {}).get("collisions")
    if collisions:
        figures["tokens/collision_rate"] = float(collisions["rate"])
    return figures
