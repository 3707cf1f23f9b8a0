"""What are the codes of an index like? Gathers all that `genrec inspect tokens` shows.

It finds the tokenizer, the catalogue, the vectors and the training interactions that belong to an
index, as far as they are at hand, and says what is missing and therefore left out.

Shapes: N items, L levels, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec.artifacts import load_artifact, read_manifest
from genrec.config import parse_component
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.catalog import ITEM_ID
from genrec.data.dataset import CATALOG
from genrec.errors import ArtifactError, MismatchError, UserError
from genrec.features import FEATURES
from genrec.features.file import VectorFile
from genrec.pipeline.indexing import OWN_CODES, BuiltIndex
from genrec.runtime import get_logger
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.diagnostics.branches import branch_tree
from genrec.tokenizers.diagnostics.figures import code_figures, diagnose

log = get_logger(__name__)

MIN_AGREEMENT = 0.9
MAX_POINTS = 5000
MapMethod = Literal["pca", "tsne"]


@dataclass
class TokenSources:
    """What belongs to an index; None where it is not at hand, and `notes` say why.

    Args:
        built: the index with its notes.
        catalog: its items (ids alone where no catalogue is at hand), with vectors where found.
        tokenizer: what coded them.
        interactions: of the training split.
        complete: whether the catalogue describes every item of the index.
        notes: sentences about what is missing.
    """

    built: BuiltIndex
    catalog: Catalog
    tokenizer: ItemTokenizer | None = None
    interactions: Interactions | None = None
    complete: bool = False
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return the figures of `diagnose` (as far as the parts allow), the tree and the notes."""
        index, catalog = self.built.index, self.catalog
        own = self.built.arrays.get(OWN_CODES)
        tokenizer = self.tokenizer
        if tokenizer is not None and (
            catalog.vectors is not None or (own is None and "vectors" not in tokenizer.needs)
        ):
            found = diagnose(tokenizer, index, catalog, self.interactions, codes_NL=own)
        elif own is not None:
            sizes = index.codebook_sizes[: own.shape[1]]
            if tokenizer is not None:
                sizes = tokenizer.codebook_sizes
            found = code_figures(own, sizes, index, index.item_ids, interactions=self.interactions)
        else:
            self.notes.append(
                "The tokenizer's own codes are not recorded, so nothing can be said about "
                "collisions before they were resolved: 'before' shows the index's codes."
            )
            found = code_figures(
                index.codes,
                index.codebook_sizes,
                index,
                index.item_ids,
                interactions=self.interactions,
            )
        return {
            "index_fingerprint": index.fingerprint,
            "policy": self.built.notes.get("collisions"),
            "tokenizer": tokenizer.name if tokenizer is not None else None,
            **found,
            "tree": branch_tree(
                index.codes,
                index.item_ids,
                catalog.titles,
                shared_vocabulary=index.shared_vocabulary,
            ),
            "notes": self.notes,
        }

    def usage(self) -> list[np.ndarray]:
        """Return for each level of the index how many items hold each code (END not counted)."""
        index = self.built.index
        counts = [
            np.bincount(index.codes[:, level], minlength=size)
            for level, size in enumerate(index.codebook_sizes)
        ]
        if index.shared_vocabulary:
            counts = [np.concatenate([[0], level[1:]]) for level in counts]
        return counts

    def points(self, method: MapMethod = "pca") -> tuple[np.ndarray, np.ndarray] | None:
        """Return a 2-D map of at most 5,000 items, (P, 2), and their rows; None without vectors.

        Args:
            method: principal components, or t-SNE (slow: minutes for thousands of items).
        """
        vectors = self.catalog.vectors
        if vectors is None or len(vectors) < 3:
            return None
        draw = np.random.default_rng(0).permutation(len(vectors))[:MAX_POINTS]
        rows = np.sort(draw)
        if method == "tsne":
            from sklearn.manifold import TSNE

            perplexity = min(30.0, (len(rows) - 1) / 3)
            made = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
        else:
            from sklearn.decomposition import PCA

            made = PCA(2, random_state=0)
        return made.fit_transform(vectors[rows]), rows


def gather(
    path: Path,
    *,
    dataset: Path | None = None,
    vectors: Path | None = None,
    cache: Path | None = None,
) -> TokenSources:
    """Find what belongs to an index.

    Args:
        path: a bundle, a folder of `genrec tokenize`, or an index.
        dataset: prepared data set, for training interactions (and the catalogue); default: the
            stage cache is searched for the one that the bundle names.
        vectors: artifact or file with the items' vectors; default: the stage cache is searched,
            else the items are embedded again as the index records.
        cache: stage cache to search.

    Raises:
        ArtifactError: no index here, or damaged parts.
        MismatchError: a data set or vectors of other items.
    """
    folder = path / "index" if (path / "index").is_dir() else path
    built = BuiltIndex.load(folder)
    loaded, notes = _dataset(path, built, dataset, cache)
    catalog, complete = _catalog(folder, built, loaded)
    found = TokenSources(built, catalog, complete=complete, notes=notes)
    if loaded is not None:
        found.interactions = loaded.interactions.training()
    tokenizer = folder.parent / "tokenizer"
    if not tokenizer.is_dir():
        notes.append("No tokenizer beside the index: no figures of reconstruction and neighbours.")
        return found
    load_artifact(folder, kind="index").require_upstream(
        "tokenizer", load_artifact(tokenizer, kind="tokenizer").fingerprint
    )
    found.tokenizer = ItemTokenizer.load(tokenizer)
    if "vectors" in found.tokenizer.needs:
        _add_vectors(found, vectors, cache)
    return found


def _dataset(
    path: Path, built: BuiltIndex, given: Path | None, cache: Path | None
) -> tuple[Dataset | None, list[str]]:
    if given is not None:
        loaded = Dataset.load(given)
        if loaded.catalog.item_ids != list(built.index.item_ids[: len(loaded.catalog)]):
            raise MismatchError(
                f"data set {loaded.name!r} ({loaded.fingerprint}) does not list the items of the "
                f"index ({built.index.fingerprint}) in its order. Give the data set that the "
                "index was built from."
            )
        return loaded, []
    wanted = _bundle_facts(path).get("dataset", {}).get("fingerprint")
    for folder, manifest in _cached(cache, "dataset"):
        if wanted is not None and manifest["fingerprint"] == wanted:
            log.info("data set: %s", folder)
            return Dataset.load(folder), []
    return None, [
        "No training interactions at hand: no correlation with co-occurrence. Give --dataset DIR."
    ]


def _bundle_facts(path: Path) -> dict[str, Any]:
    for folder in (path, path.parent):
        try:
            return dict(read_manifest(folder, kind="bundle")["extra"])
        except ArtifactError:
            continue
    return {}


def _cached(cache: Path | None, stage: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in sorted((cache / stage).glob("*")) if cache is not None else ():
        try:
            yield folder, read_manifest(folder)
        except ArtifactError:
            continue


def _catalog(folder: Path, built: BuiltIndex, dataset: Dataset | None) -> tuple[Catalog, bool]:
    """Return the items of the index, and whether all of them are described."""
    ids = list(built.index.item_ids)
    for place in (folder.parent, folder):
        if (place / CATALOG).is_file():
            catalog = Catalog(pl.read_parquet(place / CATALOG))
            if catalog.item_ids == ids:
                return catalog, True
    if dataset is None:
        return Catalog(pl.DataFrame({ITEM_ID: ids})), False
    known = dataset.catalog.table
    if len(known) == len(ids):
        return dataset.catalog, True
    added = pl.DataFrame({ITEM_ID: ids[len(known) :]})  # items that came later, texts unknown
    return Catalog(pl.concat([known, added], how="diagonal")), False


def _add_vectors(found: TokenSources, given: Path | None, cache: Path | None) -> None:
    """Put vectors into the catalogue if they give the codes that the index records."""
    assert found.tokenizer is not None
    ways: list[Callable[[], np.ndarray | None]] = [
        lambda: _cached_vectors(found, cache),
        lambda: _embedded_again(found),
    ]
    if given is not None:
        ways = [lambda: _given_vectors(found, given)]
    for way in ways:
        try:
            vectors = way()
            if vectors is None:
                continue
            catalog = found.catalog.with_vectors(vectors)
            _check_codes(found, catalog)
        except UserError as error:
            if given is not None:
                raise
            found.notes.append(f"Vectors could not be used: {error}")
            continue
        found.catalog = catalog
        return
    found.notes.append(
        "No item vectors at hand: no figures of reconstruction and neighbours, and no map. Give "
        "--vectors DIR (of `genrec embed`)."
    )


def _given_vectors(found: TokenSources, path: Path) -> np.ndarray:
    if not path.is_dir():
        return VectorFile(VectorFile.Config(path=str(path))).embed(found.catalog)
    vectors = load_artifact(path, kind="vectors").arrays["vectors"]
    if len(vectors) != len(found.catalog):
        raise MismatchError(
            f"--vectors: {str(path)!r} holds {len(vectors)} vectors, the index "
            f"({found.built.index.fingerprint}) {len(found.catalog)} items. Give the vectors that "
            "it was built from."
        )
    return vectors


def _cached_vectors(found: TokenSources, cache: Path | None) -> np.ndarray | None:
    features = found.built.notes.get("features")
    for folder, manifest in _cached(cache, "vectors"):
        same = manifest["upstream"].get("catalog") == found.catalog.fingerprint
        if same and features and manifest["config"] == features:
            return load_artifact(folder, kind="vectors").arrays["vectors"]
    return None


def _embedded_again(found: TokenSources) -> np.ndarray | None:
    features = found.built.notes.get("features") or {}
    if not features.get("name") or not found.complete:
        return None
    cls, config = parse_component(FEATURES, features, path="features")
    extractor = cls(config)
    if extractor.needs_interactions and found.interactions is None:
        return None
    log.info(
        "embedding %d items again (%s); --vectors DIR saves this.",
        len(found.catalog), features["name"],
    )  # fmt: skip
    training = found.interactions if extractor.needs_interactions else None
    vectors: np.ndarray = extractor.embed(found.catalog, training)
    return vectors


def _check_codes(found: TokenSources, catalog: Catalog) -> None:
    """Raise unless the tokenizer gives these vectors the codes that the index records."""
    own = found.built.arrays.get(OWN_CODES)
    assert found.tokenizer is not None
    if own is None:
        return
    rows = np.unique(np.linspace(0, len(catalog) - 1, 256).astype(int))
    same = (found.tokenizer.encode(catalog.select(rows)) == own[rows]).all(axis=1)
    if same.mean() < MIN_AGREEMENT:
        raise MismatchError(
            f"only {int(same.sum())} of {len(rows)} items get the codes that index "
            f"{found.built.index.fingerprint} records. Expected the vectors that it was built from."
        )
