"""Stage cache: each stage's artifact is kept under the fingerprint of everything that decides it.

It knows folders and keys, not what a stage does. Under several processes the first one builds and
the others wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec import runtime
from genrec.artifacts import Artifact, fingerprint, load_artifact
from genrec.errors import ArtifactError

log = runtime.get_logger(__name__)

# Raise when a change of code makes cached results of a stage wrong.
STAGE_VERSION = 2


@dataclass
class StageCache:
    """Finds or builds stage artifacts below `root`.

    Args:
        root: folder of the cache.
        barrier: called to let all processes meet (accelerate's wait_for_everyone).
        is_main: whether this process builds.
    """

    root: Path
    barrier: Callable[[], None] = lambda: None
    is_main: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    reused: dict[str, bool] = field(default_factory=dict)

    def place(self, stage: str, determinants: Mapping[str, Any]) -> tuple[Path, str]:
        """Return where the artifact of a stage lies, and its key."""
        key = fingerprint(stage, STAGE_VERSION, dict(determinants))
        return self.root / stage / key, key

    def get(
        self,
        stage: str,
        kind: str,
        determinants: Mapping[str, Any],
        build: Callable[[Path], Any],
        *,
        label: str | None = None,
        together: bool = False,
    ) -> Artifact:
        """Return the stage's artifact, building it where it is not there yet.

        Args:
            stage: folder below the root.
            kind: artifact kind that `build` writes.
            determinants: everything that decides the result (JSON values).
            build: writes the artifact at the path it is given, atomically.
            label: how the stage is called in logs and timings; default the stage.
            together: every process takes part in `build` (which then writes on the first only).
        """
        label = label or stage
        path, key = self.place(stage, determinants)
        artifact = self._find(path, kind)
        self.barrier()
        begun = time.perf_counter()
        self.reused[label] = artifact is not None
        if artifact is None:
            log.info("%s: running", label)
            if together or self.is_main:
                build(path)
            self.barrier()
            artifact = load_artifact(path, kind=kind)
            log.info("%s: done in %.1f s", label, time.perf_counter() - begun)
        else:
            log.info("%s: reused %s", label, key[:12])
        self.seconds[label] = round(time.perf_counter() - begun, 3)
        return artifact

    def _find(self, path: Path, kind: str) -> Artifact | None:
        if not path.exists():
            return None
        try:
            return load_artifact(path, kind=kind)
        except ArtifactError as error:
            log.warning("cached %s is damaged and will be made again (%s)", kind, error)
            return None
