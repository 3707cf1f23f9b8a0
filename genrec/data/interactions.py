"""Interactions: who consumed what, in order, as flat arrays; and the examples cut from them.

Users are rows here: external user ids never enter a dataset folder (see docs/data.md). It does not
read files and does not decide the split; `genrec.data.prepare` does both.

Shapes: M interactions, U users, B examples, H history items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from genrec.artifacts import fingerprint

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}
SplitName = Literal["train", "valid", "test"]


@dataclass(frozen=True, eq=False)
class Examples:
    """(history, target) pairs in ragged form; history excludes the target.

    Args:
        user_rows: (B,) int64.
        target_rows: (B,) int64, the item row to predict.
        flat: item rows of all histories, one after the other, oldest first.
        offsets: (B + 1,) int64 into `flat`.
        times: int64 seconds of `flat` (0 where the source has none); None: not kept.
        target_times: (B,) int64 seconds of the targets; None: not kept.
    """

    user_rows: np.ndarray
    target_rows: np.ndarray
    flat: np.ndarray
    offsets: np.ndarray
    times: np.ndarray | None = None
    target_times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target_rows)

    def history(self, example: int) -> np.ndarray:
        """Return the item rows of one history, oldest first."""
        return self.flat[self.offsets[example] : self.offsets[example + 1]]

    def histories(self) -> list[np.ndarray]:
        """Return all histories."""
        return [self.history(i) for i in range(len(self))]

    def history_times(self) -> list[np.ndarray] | None:
        """Return the seconds of the items of all histories."""
        if self.times is None:
            return None
        return np.split(self.times, self.offsets[1:-1])[: len(self)]  # of nothing it makes one

    @cached_property
    def lengths(self) -> np.ndarray:
        """History lengths (B,)."""
        return np.diff(self.offsets)

    def select(self, examples: np.ndarray) -> Examples:
        """Return the examples at these positions, in that order."""
        times = self.history_times()
        return Examples.of(
            self.user_rows[examples],
            self.target_rows[examples],
            [self.history(int(i)) for i in examples],
            None if times is None else [times[int(i)] for i in examples],
            None if self.target_times is None else self.target_times[examples],
        )

    @classmethod
    def of(
        cls,
        user_rows: np.ndarray,
        target_rows: np.ndarray,
        histories: list[np.ndarray],
        times: list[np.ndarray] | None = None,
        target_times: np.ndarray | None = None,
    ) -> Examples:
        """Build from a list of histories, and of their items' seconds."""
        offsets = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64)

        def flat(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

        return cls(
            np.asarray(user_rows, np.int64),
            np.asarray(target_rows, np.int64),
            flat(histories),
            offsets,
            None if times is None else flat(times),
            None if target_times is None else np.asarray(target_times, np.int64),
        )


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions grouped by user, chronological within a user.

    Args:
        item_rows: (M,) int32 catalogue rows.
        offsets: (U + 1,) int64; user u owns [offsets[u], offsets[u + 1]).
        timestamps: (M,) int64 seconds (0 where the source has none).
        splits: (M,) uint8: 0 train, 1 valid, 2 test; never decreasing within a user.
        num_items: size of the catalogue.
        ratings: (M,) float32; None where they were not kept.
    """

    item_rows: np.ndarray
    offsets: np.ndarray
    timestamps: np.ndarray
    splits: np.ndarray
    num_items: int
    ratings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.item_rows)

    @property
    def num_users(self) -> int:
        """Number of users (U)."""
        return len(self.offsets) - 1

    @property
    def user_names(self) -> list[str]:
        """What users are called here: their rows as text (raw ids never enter a data set)."""
        return [str(row) for row in range(self.num_users)]

    def user(self, user_row: int) -> np.ndarray:
        """Return the item rows of one user, oldest first."""
        return self.item_rows[self.offsets[user_row] : self.offsets[user_row + 1]]

    @cached_property
    def user_rows(self) -> np.ndarray:
        """User row of each interaction, (M,) int64."""
        return np.repeat(np.arange(self.num_users), np.diff(self.offsets))

    def training(self) -> Interactions:
        """Return the training interactions only: the one view that anything may be fitted on."""
        keep = self.splits == TRAIN
        counts = np.bincount(self.user_rows[keep], minlength=self.num_users)
        return Interactions(
            self.item_rows[keep],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.timestamps[keep],
            self.splits[keep],
            self.num_items,
            None if self.ratings is None else self.ratings[keep],
        )

    def counts(self) -> np.ndarray:
        """Return how often each item occurs, (N,) int64."""
        return np.bincount(self.item_rows, minlength=self.num_items)

    def examples(self, split: SplitName) -> Examples:
        """Return one example per user: the first interaction of `split` with all before it.

        For "test" the history holds the validation items. For "train" the last training
        interaction is the target. Users without such an interaction are left out; so are users
        without any history.
        """
        wanted = SPLITS[split]
        users, targets, histories, times, target_times = [], [], [], [], []
        for u in range(self.num_users):
            start, stop = self.offsets[u], self.offsets[u + 1]
            places = np.flatnonzero(self.splits[start:stop] == wanted)
            if not len(places):
                continue
            place = places[-1] if wanted == TRAIN else places[0]
            if place == 0:
                continue
            users.append(u)
            targets.append(self.item_rows[start + place])
            histories.append(self.item_rows[start : start + place])
            times.append(self.timestamps[start : start + place])
            target_times.append(self.timestamps[start + place])
        return Examples.of(
            np.array(users), np.array(targets), histories, times, np.array(target_times)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all arrays."""
        ratings = () if self.ratings is None else (self.ratings,)
        return fingerprint(
            self.item_rows, self.offsets, self.timestamps, self.splits, self.num_items, *ratings
        )
