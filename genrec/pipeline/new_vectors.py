"""Where do the vectors of new items come from, and do they lie in the space of the old ones?

Given in a file, or computed by the extractor that the index records; then some items that the index
holds are embedded again and must get the codes that they have.

Shapes: M new items, E width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genrec.artifacts import load_artifact
from genrec.config import parse_component
from genrec.data import Catalog
from genrec.errors import DataError, MismatchError, UserError
from genrec.features import FEATURES
from genrec.features.base import FeatureExtractor
from genrec.features.file import VectorFile
from genrec.pipeline.indexing import KNOWN_VECTORS, OWN_CODES, BuiltIndex
from genrec.tokenizers.base import ItemTokenizer

NO_TEXT, NOTHING_KNOWN = "it has no text", "the features find nothing in it"
NOT_FINITE = "its vector holds NaN or infinity"
NO_VECTOR = "the file of vectors has none for it"
NUM_CHECKED, MIN_AGREEMENT, MIN_COSINE = 32, 0.9, 0.99


def embed_new_items(
    catalog: Catalog,
    *,
    vectors: Path | None,
    tokenizer: ItemTokenizer,
    built: BuiltIndex,
    known: Catalog | None,
) -> tuple[np.ndarray, dict[str, str]]:
    """Return vectors (M, E) float32, and by item id why an item has none that can be used.

    Args:
        catalog: M new items.
        vectors: see `genrec.pipeline.growth.add_items`.
        tokenizer: what will code them.
        built: the index and its notes.
        known: catalogue of the index, where it is at hand: checks the extractor.

    Raises:
        UserError: the recorded extractor cannot embed items that come later, or the file does not
            fit.
        MismatchError: the extractor gives known items other codes, or vectors, than they have.
    """
    if vectors is not None:
        found, missing = _given(vectors, catalog)
    else:
        extractor, fitted = _recorded_extractor(built)
        then = built.arrays.get(KNOWN_VECTORS)
        if then is None:
            _check_codes(extractor, tokenizer, built, known)
        elif known is not None:
            _check_vectors(extractor, fitted, then, built, known.select(np.arange(len(then))))
        found = extractor.embed_later(catalog, fitted, then)
        missing = np.logical_not(found.any(axis=1))  # zeros: nothing is known
    finite = np.isfinite(found).all(axis=1)
    reasons = {}
    for row, item in enumerate(catalog.item_ids):
        if missing[row]:
            silent = NOTHING_KNOWN if any(catalog.select([row]).texts()) else NO_TEXT
            reasons[item] = silent if vectors is None else NO_VECTOR
        elif not finite[row]:
            reasons[item] = NOT_FINITE
    return found, reasons


def _given(path: Path, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors from a file or a vectors artifact, and which items it lacks."""
    if path.is_dir():
        found, ids = load_artifact(path, kind="vectors").arrays["vectors"], None
    else:
        found, ids = VectorFile(VectorFile.Config(path=str(path))).read()
    found = np.asarray(found, dtype=np.float32)
    if ids is None:
        if len(found) != len(catalog):
            raise DataError(
                f"--vectors: {path.name!r} holds {len(found)} vectors without ids for "
                f"{len(catalog)} new item(s). Expected one per new item (without those that are in "
                "the index already) in their order; use a parquet file with ids."
            )
        return found, np.zeros(len(catalog), bool)
    if len(set(ids)) != len(ids):
        raise DataError(f"--vectors: item ids repeat in {path.name!r}. Expected one vector each.")
    place = {item: row for row, item in enumerate(ids)}
    rows = np.array([place.get(item, -1) for item in catalog.item_ids], dtype=np.int64)
    aligned = np.zeros((len(rows), found.shape[1]), np.float32)
    aligned[rows >= 0] = found[rows[rows >= 0]]
    return aligned, rows < 0


def _recorded_extractor(built: BuiltIndex) -> tuple[FeatureExtractor, dict[str, np.ndarray]]:
    """Return the extractor that made the vectors of an index, and what it fitted then."""
    features: dict[str, Any] | None = built.notes.get("features")
    if not features or not features.get("name"):
        raise UserError(
            "the index does not say how its items were embedded. Give the vectors of the new "
            "items: --vectors FILE."
        )
    name = features["name"]
    cls, config = parse_component(FEATURES, features, path="features")
    extractor: FeatureExtractor = cls(config)
    if name == "file":
        raise UserError(
            "the index was built from a file of vectors, which has none for new items. Give theirs "
            "from the same source: --vectors FILE."
        )
    if not extractor.embeds_later:
        why = (
            "needs interactions, which new items have not"
            if extractor.needs_interactions
            else "fits on the catalogue that it embeds"
        )
        raise UserError(
            f"features {name!r} cannot embed items that come later: it {why}. Use an index whose "
            "items were embedded by a pretrained encoder (features.name=sentence_encoder), or give "
            "vectors of the same space: --vectors FILE."
        )
    return extractor, built.fitted_features


def _check_vectors(
    extractor: FeatureExtractor,
    fitted: dict[str, np.ndarray],
    then: np.ndarray,
    built: BuiltIndex,
    known: Catalog,
) -> None:
    """Raise unless known items, embedded again, are described by the vectors that they have.

    Of a part that needs interactions a new item has no more than a guess, so that is not compared.
    """
    rows = np.unique(np.linspace(0, len(known) - 1, NUM_CHECKED).astype(int))
    columns = built.notes.get("content_columns")
    before, now = then[rows], extractor.embed_later(known.select(rows), fitted, then)
    if columns is not None:
        before, now = before[:, columns], now[:, columns]
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(now, axis=1)
    nothing = ~before.any(axis=1) & ~now.any(axis=1)  # nothing then, nothing now: the same
    cosine = np.divide((before * now).sum(1), lengths, out=nothing * 1.0, where=lengths > 0)
    same = int((cosine >= MIN_COSINE).sum())
    if same < MIN_AGREEMENT * len(rows):
        raise MismatchError(
            "the extractor that the index records gives other vectors here than when the index "
            f"was built: only {same} of {len(rows)} known items get the vector that they have. "
            "Install the same model, or give vectors of the new items: --vectors FILE."
        )


def _check_codes(
    extractor: FeatureExtractor, tokenizer: ItemTokenizer, built: BuiltIndex, known: Catalog | None
) -> None:
    """Raise unless known items, embedded again, get the codes that they have."""
    own_codes = built.arrays.get(OWN_CODES)
    if known is None or own_codes is None or not len(known):
        return
    rows = np.unique(np.linspace(0, len(known) - 1, NUM_CHECKED).astype(int))
    sample = known.select(rows)
    try:
        found = tokenizer.encode(sample.with_vectors(extractor.embed(sample)))
    except UserError as error:
        raise MismatchError(
            f"the extractor that the index records ({extractor.config.to_dict()['name']}) cannot "
            f"embed its items again: {error}"
        ) from None
    same = int((found == own_codes[rows]).all(axis=1).sum())
    if same < MIN_AGREEMENT * len(rows):
        raise MismatchError(
            "the extractor that the index records gives other vectors here than when the index "
            f"was built: only {same} of {len(rows)} known items get the codes that they have. "
            "Install the same model, or give vectors of the new items: --vectors FILE."
        )
