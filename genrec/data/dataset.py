"""Dataset folder: `catalog.parquet`, `interactions.parquet` and a manifest with every choice made.

Written by `genrec prepare`, read by everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import atomic_directory, load_artifact, write_artifact
from genrec.data.catalog import Catalog
from genrec.data.interactions import Interactions

CATALOG = "catalog.parquet"
INTERACTIONS = "interactions.parquet"
RATING = "rating"
KIND = "dataset"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A catalogue, its interactions, and how they were prepared.

    Args:
        catalog: items.
        interactions: all splits together.
        info: name, source, choices (k-core, rating threshold, duplicates, ties, split) and counts
            of what was read, dropped and kept; recorded in every result as the protocol.
        fingerprint: digest of the folder's content.
    """

    catalog: Catalog
    interactions: Interactions
    info: dict[str, Any]
    fingerprint: str = ""

    @property
    def name(self) -> str:
        """Short name of the data set."""
        return str(self.info.get("name", "dataset"))

    def save(self, path: str | Path) -> Dataset:
        """Write the folder atomically and return the dataset with its fingerprint."""
        events = self.interactions
        table = pl.DataFrame(
            {
                "user_row": events.user_rows.astype(np.int64),
                "item_row": events.item_rows.astype(np.int32),
                "timestamp": events.timestamps.astype(np.int64),
                "split": events.splits.astype(np.uint8),
            }
        )
        if events.ratings is not None:
            table = table.with_columns(pl.Series(RATING, events.ratings.astype(np.float32)))
        with atomic_directory(path) as folder:
            self.catalog.table.write_parquet(folder / CATALOG)
            table.write_parquet(folder / INTERACTIONS)
            manifest = write_artifact(
                folder,
                kind=KIND,
                extra={**self.info, "num_users": events.num_users, "num_items": len(self.catalog)},
            )
        return Dataset(self.catalog, events, manifest["extra"], manifest["fingerprint"])

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read a dataset folder.

        Raises:
            ArtifactError: not a dataset folder, or damaged.
        """
        artifact = load_artifact(path, kind=KIND)
        catalog = Catalog(pl.read_parquet(Path(path) / CATALOG))
        table = pl.read_parquet(Path(path) / INTERACTIONS)
        users = table["user_row"].to_numpy()
        counts = np.bincount(users, minlength=artifact.extra["num_users"])
        interactions = Interactions(
            table["item_row"].to_numpy(),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            table["timestamp"].to_numpy(),
            table["split"].to_numpy(),
            len(catalog),
            table[RATING].to_numpy() if RATING in table.columns else None,
        )
        return cls(catalog, interactions, artifact.extra, artifact.fingerprint)
