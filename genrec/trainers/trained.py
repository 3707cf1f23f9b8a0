"""Where is the trained model that a second stage starts from?

It reads artifacts and knows neither what they were trained on nor what comes next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genrec.artifacts import MANIFEST, Artifact, load_artifact
from genrec.bundle import history_of
from genrec.errors import UserError


def find_model(path: str | Path) -> Artifact:
    """Return the model of a run, of a bundle, or the model itself.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    for place in (folder, folder / "model", folder / "bundle" / "model"):
        name = "bundle" if place == folder and (folder / "model").is_dir() else "model"
        if name == "model" and (place / MANIFEST).is_file():
            return load_artifact(place, kind="model")
    raise UserError(
        f"trainer.start_from: no trained model at {str(path)!r}. Expected a run, a bundle or what "
        "`genrec train` wrote; train one with trainer.name=next_item first."
    )


def sized_like(config: Any, path: str | Path) -> Any:
    """Return a backbone's configuration with the `max_history` of the trained model at `path`.

    What the weights were made for decides, not the data that they go on with.

    Raises:
        UserError: there is no model.
    """
    return config.with_max_history(history_of(find_model(path)))
