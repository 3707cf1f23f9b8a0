"""How does a catalogue become an index, and what is kept beside it for items that come later?

It encodes, makes the codes unique and notes what placing a new item takes: the policy, the feature
extractor, and how far from their codes items lie. Adding items is in `growth.py`.

Shapes: N items, L levels, Q percentiles (0 to 100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from genrec.artifacts import load_artifact
from genrec.config import StrictConfig
from genrec.data import Catalog, Interactions
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.runtime import get_logger
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.diagnostics.agreement import reconstruction_distances

log = get_logger(__name__)

FITTED, UNSEEN, OWN_CODES = "fitted_distances", "unseen_distances", "own_codes"
EXTRACTOR, KNOWN_VECTORS = "extractor.", "vectors"  # a prefix of arrays, and one array
MAX_HELD_OUT = 5000


class IndexConfig(StrictConfig):
    """How codes become an index."""

    collisions: str = "extra_level"
    """Policy for items with equal codes (see docs/tokenizers.md)."""
    reserve: int = Field(default=0, ge=0)
    """Numbers beyond the largest group that `extra_level` keeps free for items added later."""
    drift_holdout: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the items that a second fit leaves out, to know how far from their codes unseen
    items of the same kind lie; 0: no second fit. `genrec tokenize --add` compares with it."""


@dataclass(frozen=True, eq=False)
class BuiltIndex:
    """An index and its notes.

    Args:
        index: the bijection.
        notes: `collisions`, `reserve`, `drift_holdout`, `features` (configuration of the extractor,
            None without one), `content_columns` (of its vectors, see `Catalog`) and `columns` of
            the catalogue.
        arrays: `own_codes` (N, L), the tokenizer's codes before the policy; and where codes stand
            for vectors the percentiles (Q,) of the squared distance from an item to its codes:
            `fitted_distances`, and `unseen_distances` of items that a second fit left out. Where
            the extractor fits something (a fusion): what it fitted, under names with the prefix
            `extractor.`, and `vectors` (N, E) of the items that the index was built with.
    """

    index: ItemIndex
    notes: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, path: Path, upstream: dict[str, str]) -> None:
        """Write the index with its notes (artifact "index")."""
        self.index.save(path, upstream=upstream, config=self.notes, arrays=self.arrays)

    @property
    def fitted_features(self) -> dict[str, np.ndarray]:
        """What the extractor fitted; see `FeatureExtractor.fitted`."""
        start = len(EXTRACTOR)
        return {n[start:]: array for n, array in self.arrays.items() if n.startswith(EXTRACTOR)}

    @classmethod
    def load(cls, path: Path) -> BuiltIndex:
        """Read an index with its notes ({} where it was saved without)."""
        artifact = load_artifact(path, kind="index")
        arrays = {name: array for name, array in artifact.arrays.items() if name != "codes"}
        return cls(ItemIndex.load(path), artifact.config, arrays)


def build(
    tokenizer: ItemTokenizer,
    catalog: Catalog,
    options: IndexConfig,
    *,
    features: Mapping[str, Any] | None = None,
    fitted: Mapping[str, np.ndarray] | None = None,
    interactions: Interactions | None = None,
) -> BuiltIndex:
    """Encode a catalogue, resolve collisions and note what new items will need.

    Args:
        tokenizer: fitted on this catalogue.
        catalog: N items.
        options: policy and reserve.
        features: configuration of the extractor that made the vectors, if one did.
        fitted: what it fitted (`FeatureExtractor.fitted`).
        interactions: training interactions, for a second fit.

    Raises:
        UserError: the policy cannot resolve the collisions.
    """
    policy = tokenizer.collision_policy(options.collisions, catalog, reserve=options.reserve)
    arrays: dict[str, np.ndarray] = {}

    def keeping(
        codes_NL: np.ndarray, codebook_sizes: Sequence[int], item_ids: Sequence[str]
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        arrays[OWN_CODES] = np.asarray(codes_NL, dtype=np.int32)
        return policy(codes_NL, codebook_sizes, item_ids)

    index = ItemIndex.build(tokenizer, catalog, collisions=keeping)
    if tokenizer.decodes and len(catalog):
        arrays[FITTED] = percentiles(
            reconstruction_distances(tokenizer, catalog, arrays[OWN_CODES])
        )
        unseen = _held_out_distances(tokenizer, catalog, options.drift_holdout, interactions)
        if unseen is not None:
            arrays[UNSEEN] = percentiles(unseen)
    if fitted and catalog.vectors is not None:
        arrays |= {f"{EXTRACTOR}{name}": np.asarray(array) for name, array in fitted.items()}
        arrays[KNOWN_VECTORS] = np.asarray(catalog.vectors, np.float32)
    columns = catalog.content_columns
    notes = {
        **options.to_dict(),
        "features": dict(features) if features else None,
        "content_columns": None if columns is None else list(columns),
        "columns": catalog.columns,
    }
    return BuiltIndex(index, notes, arrays)


def percentiles(distances: np.ndarray) -> np.ndarray:
    """Return the 0th to the 100th percentile, (101,) float64."""
    return np.quantile(distances.astype(np.float64), np.linspace(0, 1, 101))


def _held_out_distances(
    tokenizer: ItemTokenizer, catalog: Catalog, share: float, interactions: Interactions | None
) -> np.ndarray | None:
    """Fit once more without some of the items and return their distances; None if that fails."""
    num_items = len(catalog)
    count = min(int(share * num_items), MAX_HELD_OUT)
    if not count or not tokenizer.codes_new_items:
        return None
    drawn = np.random.default_rng(0).permutation(num_items)
    held, kept = np.sort(drawn[:count]), np.sort(drawn[count:])
    events = None if interactions is None else _among(interactions, kept)
    try:
        other = type(tokenizer)(tokenizer.config).fit(catalog.select(kept), events)
    except UserError as error:
        log.warning("index.drift_holdout: the second fit failed, so there is none (%s)", error)
        return None
    unseen = catalog.select(held)
    return reconstruction_distances(other, unseen, other.encode(unseen))


def _among(interactions: Interactions, rows: np.ndarray) -> Interactions:
    """Return the interactions with the items at `rows`, which are numbered anew."""
    new_rows = np.full(interactions.num_items, -1, dtype=np.int64)
    new_rows[rows] = np.arange(len(rows))
    items = new_rows[interactions.item_rows]
    keep = items >= 0
    counts = np.bincount(interactions.user_rows[keep], minlength=interactions.num_users)
    return Interactions(
        items[keep].astype(np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        interactions.timestamps[keep],
        interactions.splits[keep],
        len(rows),
    )
