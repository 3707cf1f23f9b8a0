"""What do simple systems recommend to the same users, and how good is it? The stage "baselines".

It fits, ranks and writes one artifact for all of them; what a baseline is, is in
`genrec.models.baselines`.

Shapes: U users with a target, k list length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genrec.artifacts import Artifact, save_artifact
from genrec.bundle import mode_name
from genrec.data import Catalog, Dataset
from genrec.evaluation import beyond_accuracy
from genrec.evaluation.evaluator import evaluate_scores
from genrec.models.baselines import Choice, make_baselines

LISTS = "lists"


def baselines(
    path: Path,
    dataset: Dataset,
    choices: Sequence[Choice],
    ks: Sequence[int],
    masked: Sequence[bool],
    catalog: Catalog | None = None,
) -> None:
    """Fit and evaluate baselines on the test split (artifact "baselines").

    Args:
        path: folder to write.
        dataset: what to fit and evaluate on.
        choices: names of baselines, with settings where there are any.
        ks: cut-offs.
        masked: whether seen items are left out; both are possible.
        catalog: with vectors, for baselines that need them; None takes the data set's.
    """
    examples = dataset.interactions.examples("test")
    validation = dataset.interactions.examples("valid")
    training = dataset.interactions.training()
    arrays: dict[str, np.ndarray] = {}
    for name, baseline in make_baselines(choices).items():
        scores = baseline.fit(training, catalog or dataset.catalog, validation).scores
        for mask in masked:
            rows_Uk = np.full((len(examples), beyond_accuracy.DEPTH), -1, np.int32)
            values = evaluate_scores(
                scores, examples, ks=tuple(ks), mask_seen=mask, out_rows=rows_Uk
            )
            arrays[f"{LISTS}/{name}/{mode_name(mask)}"] = rows_Uk
            for metric, array in values.items():
                arrays[f"{name}/{mode_name(mask)}/{metric}"] = array
    save_artifact(
        path,
        kind="baselines",
        arrays=arrays,
        config={"names": list(choices), "ks": list(ks)},
        upstream={"dataset": dataset.fingerprint},
    )


def read_values(artifact: Artifact, name: str, mode: str) -> dict[str, np.ndarray]:
    """Return metric -> (U,) of one baseline under one way of ranking."""
    prefix = f"{name}/{mode}/"
    arrays = artifact.arrays.items()
    return {key.removeprefix(prefix): a for key, a in arrays if key.startswith(prefix)}


def read_rows(artifact: Artifact, name: str, mode: str) -> np.ndarray:
    """Return the first places (U, k) of one baseline, -1 = padding; equal scores by row."""
    return artifact.arrays[f"{LISTS}/{name}/{mode}"]
