"""Collaborative: which items are consumed by the same people, as one vector per item.

Vectors come from training interactions alone, so an item that nobody consumed in training has the
zero vector. Texts and images are read elsewhere; the sequence model is in `sasrec.py`.

Shapes: N items, U users, E vector width, M interactions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from genrec.config import StrictConfig, parse
from genrec.data.interactions import TRAIN, Interactions
from genrec.errors import UserError
from genrec.features.base import ALONE, FeatureExtractor, Workplace, finished
from genrec.features.sasrec import SASRec, SASRecConfig

if TYPE_CHECKING:
    from genrec.data import Catalog

WINDOW = 10


class CollaborativeConfig(StrictConfig):
    """How collaborative vectors are made."""

    method: Literal["svd", "sasrec"] = "svd"
    """svd: truncated SVD of the item co-occurrence matrix, in seconds. sasrec: the item embeddings
    of a SASRec trained on the sequences, in minutes."""
    width: int = Field(default=64, ge=1)
    """Width E of the vectors. Where the data support fewer dimensions the rest is zero."""
    window: int | None = Field(default=WINDOW, ge=1)
    """svd: two items of a user co-occur if they are at most this many steps apart (10 was best on
    MovieLens-100K and Amazon Beauty, docs/features.md); null: anywhere in the history, counted
    once per user."""
    weighting: Literal["ppmi", "cosine", "sqrt", "count"] = "ppmi"
    """svd: what the counts become. ppmi: positive pointwise mutual information (Levy and Goldberg
    2014). cosine: divided by the root of both items' counts. sqrt: the root of the count."""
    smoothing: float = Field(default=0.75, gt=0, le=1)
    """ppmi: exponent on the context item's count; below 1 rare items gain less (Levy, Goldberg and
    Dagan 2015: 0.75)."""
    power: float = Field(default=0.5, ge=0)
    """svd: exponent on the singular values (Levy, Goldberg and Dagan 2015: 0.5; 0 drops them)."""
    num_iterations: int = Field(default=7, ge=1)
    """svd: power iterations of the randomized SVD."""
    sasrec: SASRecConfig = SASRecConfig()
    """sasrec: settings of the network; its `d_model` is replaced by `width`."""
    normalize: bool = True
    """Scale vectors to length 1; items without training interactions stay zero."""
    seed: int = Field(default=0, ge=0)
    """Seed of the randomized SVD and of SASRec."""


class Collaborative(FeatureExtractor):
    """Collaborative vectors as the vectors of a catalogue.

    Args:
        config: see `Collaborative.Config`.
    """

    class Config(CollaborativeConfig):
        """Settings of collaborative vectors."""

        name: Literal["collaborative"] = "collaborative"
        """Name in the registry."""

    config: Collaborative.Config
    needs_interactions = True
    embeds_alone = False

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item without training interactions gets zeros.

        Raises:
            UserError: no interactions, held-out ones among them, or of another catalogue.
        """
        if interactions is None:
            raise UserError(
                "features.collaborative: needs the training interactions. Pass "
                "embed(catalog, interactions.training())."
            )
        if interactions.num_items != len(catalog):
            raise UserError(
                f"features.collaborative: the interactions are of {interactions.num_items} items, "
                f"the catalogue has {len(catalog)}. Use the two of one data set."
            )
        return finished(
            collaborative_vectors(interactions, self.config), catalog.item_ids, normalize=False
        )


def collaborative_vectors(interactions: Interactions, config: CollaborativeConfig) -> np.ndarray:
    """Return one vector per item from training interactions.

    Args:
        interactions: `interactions.training()` of a data set.
        config: method and settings.

    Returns:
        (N, width) float32; items without an interaction have zeros.

    Raises:
        UserError: nothing to learn from, or validation or test interactions among them.
    """
    held_out = int(np.count_nonzero(interactions.splits != TRAIN))
    if held_out:
        raise UserError(
            f"collaborative vectors: got {held_out} validation or test interactions. Pass "
            "interactions.training(): vectors that have seen the targets leak them."
        )
    if not len(interactions):
        raise UserError(
            "collaborative vectors: got no training interactions. Check the data set's split."
        )
    vectors = (
        _svd(interactions, config) if config.method == "svd" else _sasrec(interactions, config)
    )
    vectors[interactions.counts() == 0] = 0
    if config.normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def cooccurrence(interactions: Interactions, window: int | None = None) -> sp.csr_array:
    """Return how often two items occur together, (N, N) float64, symmetric, without a diagonal.

    Args:
        interactions: grouped by user, oldest first.
        window: count each pair of places at most this many steps apart; None: count each user once
            for each pair of different items.
    """
    size = (interactions.num_items, interactions.num_items)
    if window is None:
        shape = (interactions.num_users, interactions.num_items)
        ones = np.ones(len(interactions))
        seen_UN = sp.csr_array((ones, (interactions.user_rows, interactions.item_rows)), shape)
        seen_UN.data[:] = 1.0  # repeats were summed by the constructor
        counts = sp.csr_array(seen_UN.T @ seen_UN)
    else:
        items, users = interactions.item_rows.astype(np.int64), interactions.user_rows
        counts = sp.csr_array(size)
        for step in range(1, window + 1):
            same = users[step:] == users[:-step]
            pair = (items[:-step][same], items[step:][same])
            counts = counts + sp.csr_array((np.ones(len(pair[0])), pair), size)
        counts = sp.csr_array(counts + counts.T)
    counts.setdiag(0)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def ppmi(counts_NN: sp.csr_array, smoothing: float = 0.75) -> sp.csr_array:
    """Return positive pointwise mutual information, max(0, log p(i, j) / (p(i) q(j))).

    q is the share of each item to the power `smoothing`, normalised; the two orders of a pair are
    averaged, so that the result is symmetric.
    """
    sums = np.asarray(counts_NN.sum(axis=1)).reshape(-1)
    if not sums.any():
        return counts_NN.copy()
    share, context = sums / sums.sum(), sums**smoothing / (sums**smoothing).sum()
    pairs = counts_NN.tocoo()
    joint = np.log(pairs.data / sums.sum())
    with np.errstate(divide="ignore"):
        logs = (np.log(share) + np.log(context)) / 2
    values = np.maximum(joint - logs[pairs.row] - logs[pairs.col], 0)
    result = sp.csr_array((values, (pairs.row, pairs.col)), counts_NN.shape)
    result.eliminate_zeros()
    return result


def _weighted(
    counts: sp.csr_array, interactions: Interactions, config: CollaborativeConfig
) -> sp.csr_array:
    if config.weighting == "ppmi":
        return ppmi(counts, config.smoothing)
    if config.weighting == "cosine":
        scale = sp.diags_array(np.maximum(interactions.counts(), 1) ** -0.5)
        return sp.csr_array(scale @ counts @ scale)
    if config.weighting == "sqrt":
        return counts.sqrt()
    return counts


def _svd(interactions: Interactions, config: CollaborativeConfig) -> np.ndarray:
    from sklearn.utils.extmath import randomized_svd

    counts = cooccurrence(interactions, config.window)
    matrix = _weighted(counts, interactions, config)
    vectors = np.zeros((interactions.num_items, config.width))
    if not matrix.nnz:
        raise UserError(
            "collaborative vectors: no two items occur together (every user has one item, or "
            "weights are zero). Expected histories of at least two different items."
        )
    width = min(config.width, interactions.num_items)
    left, singular, _ = randomized_svd(
        matrix, width, n_iter=config.num_iterations, random_state=config.seed
    )
    kept = singular > singular[0] * 1e-7  # directions of rounding noise carry nothing
    left, singular = left[:, kept], singular[kept]
    largest = np.abs(left).argmax(axis=0)
    left = left * np.sign(left[largest, np.arange(left.shape[1])])
    vectors[:, : left.shape[1]] = left * singular**config.power
    return vectors


def _sasrec(interactions: Interactions, config: CollaborativeConfig) -> np.ndarray:
    changed = {"d_model": config.width, "seed": config.sasrec.seed + config.seed}
    settings = parse(SASRecConfig, {**config.sasrec.to_dict(), **changed}, path="sasrec")
    return SASRec(settings).fit(interactions).item_vectors()
