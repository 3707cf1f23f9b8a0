"""Where training figures go: always a JSON-lines file, optionally Weights & Biases.

Both receive the same values. Raw user ids never reach a tracker: nothing upstream of here has them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Protocol

from genrec import runtime
from genrec.config import StrictConfig
from genrec.errors import UserError

log = runtime.get_logger(__name__)


class TrackingConfig(StrictConfig):
    """Run-time option: changes no result and enters no stage key."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases mode; "online" needs a login, "offline" writes below the run folder."""
    project: str = "genrec"
    """W&B project."""
    group: str | None = None
    """W&B group, shared by the runs of one ablation."""
    tags: tuple[str, ...] = ()
    """W&B tags."""


class Tracker(Protocol):
    """Receives figures of one run."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record values at an optimizer step."""

    def summary(self, values: dict[str, Any]) -> None:
        """Record figures of the whole run."""

    def finish(self) -> None:
        """Flush and close."""


class JsonLinesTracker:
    """One JSON object a line: {"step": 10, "loss": ...}; the summary has "summary": true.

    Args:
        path: file to append to.
        resume_step: drop lines after this step first (they will be written again); None starts
            an empty file.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None and path.exists():
            lines = _whole_lines(path)
            kept = [x for x in lines if not x.get("summary") and x.get("step", 0) <= resume_step]
        path.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def summary(self, values: dict[str, Any]) -> None:
        """Append the summary line."""
        self._file.write(json.dumps({"summary": True, **values}) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file; a process that was killed may have left half a line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class WandbTracker:
    """The same figures in a W&B run below `folder`."""

    def __init__(
        self, options: TrackingConfig, *, name: str, config: dict[str, Any], folder: Path
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            self._run = wandb.init(
                project=options.project,
                group=options.group,
                tags=list(options.tags),
                name=name,
                config=config,
                dir=str(folder),
                mode=options.wandb,
                settings=wandb.Settings(console="off", disable_git=True, x_disable_stats=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking.wandb: got {options.wandb!r}, but W&B could not start: {error}. "
                "Log in with `wandb login`, or set tracking.wandb=offline."
            ) from None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log at a step."""
        self._run.log(values, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        """Set summary figures."""
        self._run.summary.update(values)

    def finish(self) -> None:
        """End the W&B run."""
        self._run.finish()


class Trackers:
    """Several trackers behind one; empty on ranks other than 0."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log everywhere."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def summary(self, values: dict[str, Any]) -> None:
        """Summarise everywhere."""
        for tracker in self.trackers:
            tracker.summary(values)

    def finish(self) -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.finish()


def open_trackers(
    options: TrackingConfig,
    folder: Path,
    *,
    name: str,
    config: dict[str, Any],
    resume_step: int | None = None,
) -> Trackers:
    """Open the trackers of a run on rank 0, and none elsewhere.

    Args:
        options: which trackers.
        folder: run folder; gets `metrics.jsonl` and, with W&B, `wandb/`.
        name: name of the run.
        config: resolved configuration and fingerprints to record.
        resume_step: step of the checkpoint that the run continues from.
    """
    if runtime.process_index() != 0:
        return Trackers([])
    trackers: list[Tracker] = [JsonLinesTracker(folder / "metrics.jsonl", resume_step=resume_step)]
    if options.wandb != "disabled":
        trackers.append(WandbTracker(options, name=name, config=config, folder=folder))
    return Trackers(trackers)
