"""What does a generator learn when identifiers say nothing, or little, about the items?

Three controls of Hua et al. 2023 (2305.06569): numbers in the order of first appearance, numbers
drawn at random, and one code per item. None of them reads texts, vectors or attributes.

Shapes: N items, L levels (digits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.tokenizers.base import IntArray
from genrec.tokenizers.fixed import FixedCodes, id_order, training_interactions

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

Order = Literal["original", "short_to_long", "long_to_short", "random"]


class Sequential(FixedCodes):
    """SID: items are numbered in the order of their first appearance in training.

    Users are walked one after the other, each from the oldest interaction on, so that items that
    follow each other in some history get neighbouring numbers, and share leading digits.

    Args:
        config: see `Sequential.Config`.
    """

    class Config(StrictConfig):
        """Settings of sequential numbers."""

        name: Literal["sequential"] = "sequential"
        """Name in the registry."""
        base: int = Field(default=32, ge=2)
        """Codes per digit: a number is written with as many digits as the largest one needs (the
        paper leaves the writing to a language model's sub-words)."""
        order: Order = "original"
        """Order of the users: as in the data set, by number of training interactions, or drawn."""
        seed: int = Field(default=0, ge=0)
        """Seed of the numbers of items without training interactions, and of order: random."""

    config: Sequential.Config
    needs: ClassVar[frozenset[str]] = frozenset({"interactions"})

    def number_items(
        self, item_ids: list[str], catalog: Catalog, interactions: Interactions | None
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Number by first appearance, then the items that never appear, shuffled."""
        training = training_interactions(interactions, catalog, name=self.name)
        rng = np.random.default_rng(self.config.seed)
        users = _user_order(training, self.config.order, rng)
        seen = first_appearances(training, users)
        unseen = np.ones(len(item_ids), dtype=bool)
        unseen[seen] = False
        by_id = id_order(item_ids)
        rest = rng.permutation(by_id[unseen[by_id]])
        numbers = np.empty(len(item_ids), np.int64)
        numbers[np.concatenate([seen, rest])] = np.arange(len(item_ids))
        return digits(numbers, self.config.base)


class Random(FixedCodes):
    """RID: items are numbered at random. The control for every method that claims meaning.

    Args:
        config: see `Random.Config`.
    """

    class Config(StrictConfig):
        """Settings of random numbers."""

        name: Literal["random"] = "random"
        """Name in the registry."""
        base: int = Field(default=32, ge=2)
        """Codes per digit: a number is written with as many digits as the largest one needs."""
        seed: int = Field(default=0, ge=0)
        """Seed of the numbers."""

    config: Random.Config
    needs: ClassVar[frozenset[str]] = frozenset()

    def number_items(
        self, item_ids: list[str], catalog: Catalog, interactions: Interactions | None
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Number by a permutation of the items in the order of their ids."""
        numbers = np.empty(len(item_ids), np.int64)
        drawn = np.random.default_rng(self.config.seed).permutation(len(item_ids))
        numbers[id_order(item_ids)] = drawn
        return digits(numbers, self.config.base)


class Independent(FixedCodes):
    """IID: every item has one code of its own, so that nothing is shared between items.

    Args:
        config: see `Independent.Config`.
    """

    class Config(StrictConfig):
        """Settings of one code per item."""

        name: Literal["independent"] = "independent"
        """Name in the registry."""

    config: Independent.Config
    needs: ClassVar[frozenset[str]] = frozenset()

    def number_items(
        self, item_ids: list[str], catalog: Catalog, interactions: Interactions | None
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Number the items in the order of their ids, at one level of N codes."""
        numbers = np.empty(len(item_ids), np.int64)
        numbers[id_order(item_ids)] = np.arange(len(item_ids))
        return numbers[:, None], (len(item_ids),)


def digits(numbers_N: IntArray, base: int) -> tuple[IntArray, tuple[int, ...]]:
    """Write numbers 0..N-1 with a fixed number of digits.

    Args:
        numbers_N: each number below N once.
        base: codes per digit.

    Returns:
        codes (N, L) int32, leading digit first, and the sizes of the levels: `base`, but as many
        as are used at the first.
    """
    last = len(numbers_N) - 1
    num_digits = 1
    while base**num_digits <= last:
        num_digits += 1
    powers = base ** np.arange(num_digits - 1, -1, -1)
    codes = numbers_N[:, None] // powers % base
    leading = last // base ** (num_digits - 1) + 1
    return codes.astype(np.int32), (leading, *([base] * (num_digits - 1)))


def first_appearances(interactions: Interactions, users_U: IntArray) -> IntArray:
    """Return item rows in the order in which they first appear.

    Args:
        interactions: the training split.
        users_U: user rows in the order in which they are walked.
    """
    starts, stops = interactions.offsets[users_U], interactions.offsets[users_U + 1]
    lengths = stops - starts
    # Position of each interaction of the walk in the data set's arrays.
    shifts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    walk = interactions.item_rows[np.arange(lengths.sum()) + shifts]
    rows, places = np.unique(walk, return_index=True)
    return rows[np.argsort(places)].astype(np.int64)


def _user_order(interactions: Interactions, order: Order, rng: np.random.Generator) -> IntArray:
    lengths = np.diff(interactions.offsets)
    if order == "short_to_long":
        return np.argsort(lengths, kind="stable")
    if order == "long_to_short":
        return np.argsort(-lengths, kind="stable")
    if order == "random":
        return rng.permutation(interactions.num_users)
    return np.arange(interactions.num_users)
