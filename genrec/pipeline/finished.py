"""What belongs to a finished run? Its results, its data set, its lists and vectors, where at hand.

It reads run folders and the stage cache and changes neither. What is not at hand is None; why, and
what to do about it, is said by the callers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrec import runtime
from genrec.artifacts import Artifact, load_artifact, read_manifest
from genrec.data import Catalog, Dataset
from genrec.errors import ArtifactError, MismatchError
from genrec.evaluation.runs import RESULTS

log = runtime.get_logger(__name__)


@dataclass(frozen=True)
class FinishedRun:
    """A folder that `genrec run` wrote.

    Args:
        folder: with results.json and bundle/.
        results: content of results.json.
        cache: stage cache to look into; None: no cache.
        given: folder of the prepared data set, where a user named one.
    """

    folder: Path
    results: Mapping[str, Any]
    cache: Path | None = None
    given: Path | None = None

    @classmethod
    def open(
        cls, folder: str | Path, cache: Path | None = None, dataset: Path | None = None
    ) -> FinishedRun:
        """Read the results of a run.

        Args:
            folder: what `genrec run` wrote.
            cache: stage cache to look into.
            dataset: folder of the prepared data set.

        Raises:
            ArtifactError: no finished run there.
        """
        folder = Path(folder)
        path = folder / RESULTS
        if not path.is_file():
            raise ArtifactError(
                f"{str(folder)!r} has no {RESULTS}. Give the folder of a finished `genrec run`, "
                "e.g. runs/demo."
            )
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            _ = results["dataset"]["fingerprint"], results["fingerprints"]["model"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{str(path)!r} cannot be read ({type(error).__name__}: {error}). Expected what "
                "`genrec run` writes; run it again."
            ) from error
        return cls(folder, results, cache, dataset)

    @property
    def bundle(self) -> Path:
        """Folder of the bundle (of the first seed)."""
        return self.folder / "bundle"

    @property
    def dataset_fingerprint(self) -> str:
        """Digest of the data set that the run was evaluated on."""
        return str(self.results["dataset"]["fingerprint"])

    def dataset(self) -> Dataset | None:
        """Return the data set: the given folder, else the cached or the configured one.

        Raises:
            MismatchError: the given folder holds another data set (both fingerprints).
        """
        wanted = self.dataset_fingerprint
        if self.given is not None:
            found = Dataset.load(self.given)
            if found.fingerprint != wanted:
                raise MismatchError(
                    f"--dataset: {str(self.given)!r} is data set {found.fingerprint}, but run "
                    f"{str(self.folder)!r} was evaluated on {wanted}. Give the one it names."
                )
            return found
        for folder, manifest in self._cached("dataset"):
            if manifest["fingerprint"] == wanted:
                return Dataset.load(folder)
        configured = (self.results.get("config") or {}).get("data", {}).get("dataset")
        if configured and self._is_dataset(Path(configured), wanted):
            return Dataset.load(configured)
        return None

    def lists(self, masked: bool, *, width: int | None = None) -> Artifact | None:
        """Return the first seed's cached lists of the test users, at least `width` long.

        Of the scoring that the run was evaluated with: its calibrator knows no other.
        """
        model = self.results["fingerprints"]["model"][0]
        scoring = self.results["config"]["decoding"]["scoring"]
        for folder, manifest in self._cached("lists"):
            upstream, extra = manifest["upstream"], manifest["extra"]
            same = upstream.get("model") == model
            same &= upstream.get("dataset") == self.dataset_fingerprint
            same &= (extra["split"], extra["masked"]) == ("test", masked)
            same &= extra["scoring"] == scoring
            if same and (width is None or extra["width"] >= width):
                return load_artifact(folder, kind="lists")
        return None

    def vectors(self, catalog: Catalog) -> np.ndarray | None:
        """Return the cached vectors that the run's items had, (N, E) float32."""
        features = self.results.get("features") or {}
        for folder, manifest in self._cached("vectors"):
            same = manifest["upstream"].get("catalog") == catalog.fingerprint
            if same and manifest["config"] == features:
                vectors: np.ndarray = load_artifact(folder, kind="vectors").arrays["vectors"]
                return vectors
        return None

    @staticmethod
    def _is_dataset(path: Path, wanted: str) -> bool:
        try:
            return bool(read_manifest(path)["fingerprint"] == wanted)
        except ArtifactError:
            return False

    def _cached(self, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        for folder in sorted((self.cache / stage).glob("*")) if self.cache is not None else ():
            try:
                yield folder, read_manifest(folder)
            except ArtifactError:
                continue
