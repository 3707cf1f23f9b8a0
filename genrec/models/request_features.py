"""What does a position know beside its item? Whose history it is, and when things happened.

Options of the causal backbones: a user's vector at START, and the logarithms of times between
items as learned vectors. What is predicted at a position never shows in it, but for the time of the
request, which is known when somebody asks. Raw user ids are hashed on the way in and kept nowhere.

Shapes: B requests, H history items, T = 1 + H positions, U users, D model width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.item_index import ItemIndex
from genrec.models.batch import Batch
from genrec.models.causal import CausalConfig, init_weights
from genrec.models.layers import rotary_tables
from genrec.models.scratch import ScratchBackbone, check_heads

UNKNOWN = 0
NUM_TIME_BUCKETS = 128
BUCKET_WIDTH = 0.301  # of the natural logarithm of seconds, as in the code of HSTU
KEY_BYTES = 16
NOBODY = -1  # no digest is negative


@dataclass(frozen=True)
class Reading:
    """Positions that are read: START, then one per item.

    Args:
        items_BH: int64 item rows, right-padded with -1.
        times_BT: int64 seconds at which each position's item was taken; 0 at START and where not
            known. None: no times.
        asked_BT: int64 seconds at which the item that each position predicts was asked for; 0
            where not known. None: no times.
        users_B: int64 rows of the user table; None: no users.
    """

    items_BH: Tensor
    times_BT: Tensor | None = None
    asked_BT: Tensor | None = None
    users_B: Tensor | None = None

    @classmethod
    def of_sequence(cls, batch: Batch) -> Reading:
        """Return what is read to predict every item of a sequence: all items but the last one."""
        items_BH, times_BH = batch.history_BH[:, :-1], batch.times_BH
        if times_BH is None:
            return cls(items_BH, users_B=batch.users_B)
        return cls(items_BH, F.pad(times_BH[:, :-1], (1, 0)), times_BH, batch.users_B)

    @classmethod
    def of_history(cls, batch: Batch) -> Reading:
        """Return what is read to predict the item after a history."""
        items_BH, times_BH, now_B = batch.history_BH, batch.times_BH, batch.now_B
        if times_BH is None:
            return cls(items_BH, users_B=batch.users_B)
        if now_B is None:
            now_B = times_BH.new_zeros(len(times_BH))
        lengths_B1 = (items_BH >= 0).sum(1, keepdim=True)
        asked_BT = F.pad(times_BH, (0, 1)).scatter(1, lengths_B1, now_B[:, None])
        asked_BT = asked_BT * (now_B > 0)[:, None]  # as in training: of a sequence all or none
        return cls(items_BH, F.pad(times_BH, (1, 0)), asked_BT, batch.users_B)


def time_buckets(later: Tensor, earlier: Tensor) -> Tensor:
    """Return the bucket of the time between two points in seconds, where 0 is an unknown one.

    Returns:
        int64: 0 unknown, else 1 + floor(ln(max(1, |seconds|)) / 0.301), at most 128 (HSTU's
        buckets, moved by one).
    """
    seconds = (later - earlier).abs().clamp(min=1).float()
    bucket = (seconds.log() / BUCKET_WIDTH).floor().long().clamp(max=NUM_TIME_BUCKETS - 1) + 1
    return bucket.masked_fill((later == 0) | (earlier == 0), UNKNOWN)


class TimeFeatures(nn.Module):
    """Learned vectors of the time between neighbouring items, and from the last one to the request.

    Args:
        config: says which.
    """

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.unknown_share = config.unknown_share
        self.gap = nn.Embedding(1 + NUM_TIME_BUCKETS, config.d_model)
        if config.time_features == "gap_recency":
            self.recency = nn.Embedding(1 + NUM_TIME_BUCKETS, config.d_model)

    def forward(self, reading: Reading) -> Tensor:
        """Return what is added to the positions, (B, T, D)."""
        shape = len(reading.items_BH), 1 + reading.items_BH.shape[1]
        times_BT, asked_BT = reading.times_BT, reading.asked_BT
        if times_BT is None or asked_BT is None:
            times_BT = asked_BT = reading.items_BH.new_zeros(shape)
        gaps_BH = time_buckets(times_BT[:, 1:], times_BT[:, :-1])
        added: Tensor = self.gap(F.pad(gaps_BH, (1, 0), value=UNKNOWN))
        if "recency" in self._modules:
            waits_BT = time_buckets(asked_BT, times_BT)
            if self.training:
                waits_BT = waits_BT.masked_fill(_some(shape[0], self.unknown_share, waits_BT), 0)
            added = added + self.recency(waits_BT)
        return added


class UserTable(nn.Module):
    """A vector per user, or per bucket of users; row 0 is for users that are not known.

    Users are told apart by a keyed BLAKE2b digest of their ids. The key is drawn with the initial
    weights and kept among them: a saved model knows its users, and so does a model that goes on
    from it.

    Args:
        config: says how many rows there are.
    """

    key_X: Tensor
    digests_U: Tensor

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.unknown_share, self.init_std = config.unknown_share, config.init_std
        self.num_buckets = config.num_user_buckets if config.user_tokens == "hashed" else None
        self.table = nn.Embedding(1 + (self.num_buckets or 0), config.d_model)
        self.register_buffer("key_X", torch.randint(256, (KEY_BYTES,), dtype=torch.uint8))
        if self.num_buckets is None:
            self.register_buffer("digests_U", torch.empty(0, dtype=torch.int64))

    def make_rows(self, num_users: int) -> None:
        """Make an untrained row for each of so many users, none of whom is known yet."""
        weight = self.table.weight
        self.table = nn.Embedding(1 + num_users, weight.shape[1], device=weight.device)
        nn.init.normal_(self.table.weight, std=self.init_std)
        self.digests_U = torch.full((num_users,), NOBODY, device=weight.device)

    def meet(self, users: Sequence[str], has_history_U: np.ndarray) -> None:
        """Give each user a row of its own; those without a history stay unknown."""
        self.make_rows(len(users))
        digests_U = np.where(has_history_U, self._digests(users), NOBODY)
        self.digests_U = torch.from_numpy(np.sort(digests_U)).to(self.digests_U.device)

    def rows(self, users: Sequence[str | None]) -> np.ndarray:
        """Return the users' rows, (B,) int64."""
        digests_B = self._digests(users)
        if self.num_buckets is not None:
            return np.where(digests_B == NOBODY, UNKNOWN, 1 + digests_B % self.num_buckets)
        known_U = self.digests_U.cpu().numpy()
        if not len(known_U):
            return np.full(len(digests_B), UNKNOWN)
        place_B = np.searchsorted(known_U, digests_B).clip(max=len(known_U) - 1)
        is_known_B = (known_U[place_B] == digests_B) & (digests_B != NOBODY)
        return np.where(is_known_B, 1 + place_B, UNKNOWN)

    def forward(self, reading: Reading) -> Tensor:
        """Return the vectors of the requests' users, (B, D)."""
        users_B = reading.users_B
        if users_B is None:
            users_B = torch.full((len(reading.items_BH),), UNKNOWN, device=reading.items_BH.device)
        if self.training:
            is_hidden_B = _some(len(users_B), self.unknown_share, users_B)[:, 0]
            users_B = users_B.masked_fill(is_hidden_B, UNKNOWN)
        vectors: Tensor = self.table(users_B)
        return vectors

    def _digests(self, users: Sequence[str | None]) -> np.ndarray:
        """Return 63-bit keyed digests of ids, (B,) int64; NOBODY where there is none."""
        key = bytes(self.key_X.tolist())

        def digest(user: str) -> int:
            hashed = hashlib.blake2b(str(user).encode(), key=key, digest_size=8)
            return int.from_bytes(hashed.digest(), "big") >> 1

        digests = [NOBODY if user is None else digest(user) for user in users]
        return np.array(digests, dtype=np.int64)


def _some(count: int, share: float, like: Tensor) -> Tensor:
    """Draw which sequences a training step reads as if less were known, bool (B, 1)."""
    return torch.rand(count, 1, device=like.device) < share


class RequestFeaturesBackbone(ScratchBackbone):
    """A causal backbone from scratch whose positions may know users and times.

    Constructors of leaves make their `layers` and what else they have, then call `complete`.
    """

    config: CausalConfig
    layers: Sequence[nn.Module]
    cos: Tensor
    sin: Tensor
    times: TimeFeatures
    users: UserTable

    def complete(self, num_positions: int) -> None:
        """Make the tables of times, users and rotary angles, then draw all weights.

        Args:
            num_positions: rows of the rotary tables `cos` and `sin`: the longest sequence.

        Raises:
            ConfigError: heads that do not divide the model.
        """
        config, head_width = self.config, check_heads(self.config)
        if config.time_features != "none":
            self.times = TimeFeatures(config)
        if config.user_tokens != "none":
            self.users = UserTable(config)
        cos, sin = rotary_tables(num_positions, head_width, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        init_weights(self, self.layers, config.init_std)

    @property
    def has_request_features(self) -> bool:
        """Whether anything is added to positions."""
        return self.config.time_features != "none" or self.config.user_tokens != "none"

    @property
    def reads_times(self) -> bool:
        """Whether times change what it answers; see `Backbone.reads_times`."""
        return self.config.time_features != "none"

    def meet_users(self, users: Sequence[str], has_history_U: np.ndarray) -> None:
        """Take in the users of the training data; see `Backbone.meet_users`."""
        if self.config.user_tokens == "learned":
            self.users.meet(users, has_history_U)

    def user_rows(self, users: Sequence[str | None]) -> np.ndarray | None:
        """Return rows of the user table; see `Backbone.user_rows`."""
        return None if self.config.user_tokens == "none" else self.users.rows(users)

    def facts(self) -> dict[str, Any]:
        """Return how many users have a row, where they have one each."""
        if self.config.user_tokens != "learned":
            return super().facts()
        return {**super().facts(), "num_users": len(self.users.digests_U)}

    @classmethod
    def for_saved(
        cls, config: Any, index: ItemIndex, facts: Mapping[str, Any], *, base: str | None = None
    ) -> Self:
        """Build a backbone that saved weights are loaded into; see `Backbone.for_saved`."""
        model = super().for_saved(config, index, facts, base=base)
        if config.user_tokens == "learned":
            model.users.make_rows(facts["num_users"])
        return model

    def with_request(self, x_BTD: Tensor, reading: Reading) -> Tensor:
        """Return embedded positions with what is known beside their items, (B, T, D)."""
        if self.config.time_features != "none":
            x_BTD = x_BTD + self.times(reading)
        if self.config.user_tokens != "none":
            users_B1D = self.users(reading)[:, None]
            x_BTD = torch.cat([x_BTD[:, :1] + users_B1D, x_BTD[:, 1:]], dim=1)
        return x_BTD
