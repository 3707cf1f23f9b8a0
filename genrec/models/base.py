"""Backbone: what a network must do to be trained and searched, and what all of them share.

Owns where the code tokens stand in a model's vocabulary, the loss per item and the batch format.
Two kinds follow: `genrec.models.scratch` brings a table of its own (two special tokens, then the
codes of all levels), `genrec.models.pretrained` stands on a language model from elsewhere. It knows
nothing about tries, beams, optimizers or item ids: a history is item rows, an answer is logits over
one level's codes.

Shapes: B requests, H history items, N items, L levels, K codes of a level, V vocabulary,
R = B*W live rows of a search, T tokens, D model width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.item_index import END, ItemIndex, level_offsets
from genrec.models.catalogue_tree import CatalogueTree

if TYPE_CHECKING:
    from genrec.data import Catalog

PAD, START, FIRST_TOKEN = 0, 1, 2
IGNORED = -100  # what torch's cross_entropy skips


@dataclass(frozen=True)
class Batch:
    """Histories, and for training optionally what follows them.

    Args:
        history_BH: int64 item rows, oldest first, right-padded with -1; a row of only -1 is an
            empty history.
        target_B: int64 item rows to predict; needed by `loss` where `training_unit` is "target".
    """

    history_BH: Tensor
    target_B: Tensor | None = None

    def __len__(self) -> int:
        return self.history_BH.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""
        target = self.target_B
        return Batch(
            self.history_BH.to(device, non_blocking=non_blocking),
            None if target is None else target.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class LossOutput:
    """Negative log-likelihood of items in nats; `loss` is the mean of -log p(item).

    Args:
        loss: scalar, `loss_sum / num_targets` (0 for a batch without targets).
        loss_sum: scalar, summed over levels and items.
        num_targets: int64 scalar, number of items predicted. Both are needed to average exactly
            over accumulated batches and processes.
    """

    loss: Tensor
    loss_sum: Tensor
    num_targets: Tensor

    @classmethod
    def of(cls, loss_sum: Tensor, num_targets: Tensor) -> LossOutput:
        """Divide, without a host synchronisation and without 0/0."""
        return cls(loss_sum / num_targets.clamp(min=1), loss_sum, num_targets)


def pad_histories(
    histories: Sequence[np.ndarray | Sequence[int]],
    max_history: int,
    *,
    targets: Sequence[int] | np.ndarray | None = None,
) -> Batch:
    """Collate histories of item rows into a right-padded batch.

    Args:
        histories: B arrays of item rows, oldest first; may be empty.
        max_history: only the last `max_history` items of each are kept.
        targets: B item rows.

    Returns:
        a CPU batch as wide as its longest kept history (at least 1).

    >>> pad_histories([[4, 5, 6], []], max_history=2).history_BH.tolist()
    [[5, 6], [-1, -1]]
    """
    kept = [np.asarray(h, dtype=np.int64)[-max_history:] for h in histories]
    padded = np.full((len(kept), max((len(h) for h in kept), default=1) or 1), -1, dtype=np.int64)
    for row, history in zip(padded, kept, strict=True):
        row[: len(history)] = history
    target_B = None if targets is None else torch.as_tensor(np.asarray(targets, dtype=np.int64))
    return Batch(torch.from_numpy(padded), target_B)


def keep_last(history_BH: Tensor, limit: int) -> Tensor:
    """Return the last `limit` items of each right-padded history, right-padded again."""
    if history_BH.shape[1] <= limit:
        return history_BH
    start_B1 = ((history_BH >= 0).sum(1, keepdim=True) - limit).clamp(min=0)
    return history_BH.gather(1, start_B1 + torch.arange(limit, device=history_BH.device))


class Backbone(nn.Module, ABC):
    """A network that turns histories into the codes of the next item, level by level.

    Args:
        config: the leaf's `Config`.
        tokens_NL: (N, L) int64 code tokens of all items, level offsets included, specials not
            (`ItemIndex.tokens(0)`).
        codebook_sizes: L sizes.
        shared_vocabulary: all levels draw from one vocabulary and code 0 ends a semantic ID (see
            `ItemIndex`).

    Raises:
        UserError: tokens whose shape or range does not fit `codebook_sizes`.
    """

    class Config(StrictConfig):
        """What every backbone can be told."""

        max_history: int = Field(default=50, ge=1)
        """Items of the history that the model sees; older ones are dropped."""
        softmax: Literal["level", "vocabulary", "trie"] = "level"
        """Training loss normalises over the codes of the level, over all tokens, or over those
        codes only that lead on to an item of the catalogue (as the constrained search does)."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return digests of what else decides where training starts, for keys of results."""
            return {}

    config: Config
    item_tables: ClassVar[tuple[str, ...]] = ()
    """Weights with a row per item. Items that came after training have rows of zeros."""
    training_unit: ClassVar[Literal["target", "sequence"]]
    """"target": `loss` predicts `target_B` from the history. "sequence": `history_BH` is a whole
    sequence and every item in it is a target (`target_B` is ignored)."""

    spans_vocabulary: bool = False
    """Whether `begin` and `step` give log-probabilities over all tokens (see `over_vocabulary`)."""
    catalogue_tree: CatalogueTree
    tokens_NL: Tensor
    level_offsets_L: Tensor

    def __init__(
        self,
        config: Config,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
        *,
        first_token: int = FIRST_TOKEN,
    ) -> None:
        super().__init__()
        self.config = config
        self.first_token = first_token
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.shared_vocabulary = shared_vocabulary
        self.num_levels = len(self.codebook_sizes)
        firsts = level_offsets(self.codebook_sizes, shared_vocabulary)
        self.num_codes = int((firsts + np.array(self.codebook_sizes)).max())
        self.num_tokens = first_token + self.num_codes
        offsets = torch.from_numpy(firsts) + first_token
        self._first_tokens = tuple(offsets.tolist())
        # Not persistent: the item index is an artifact of its own, with its own fingerprint.
        self.register_buffer("level_offsets_L", offsets, persistent=False)
        self.register_buffer("tokens_NL", self._checked(tokens_NL), persistent=False)
        if config.softmax == "trie":
            self.catalogue_tree = CatalogueTree(self.tokens_NL, self.level_offsets_L)

    @classmethod
    def from_index(cls, config: Config, index: ItemIndex) -> Self:
        """Build a backbone with fresh weights for an item index."""
        tokens_NL = torch.from_numpy(index.tokens())
        return cls(config, tokens_NL, index.codebook_sizes, index.shared_vocabulary)

    @classmethod
    def for_saved(
        cls, config: Any, index: ItemIndex, facts: Mapping[str, Any], *, base: str | None = None
    ) -> Self:
        """Build a backbone that saved weights are loaded into.

        Args:
            config: as it was saved.
            index: as it was trained on.
            facts: what `facts()` gave when it was saved.
            base: where the language model lies that it stands on, if it has moved.

        Raises:
            UserError: `base` for a backbone that stands on none.
        """
        if base is not None:
            raise UserError(
                f"base: got {base!r} for a {cls.__name__}, which stands on no other model. Leave "
                "it out."
            )
        return cls.from_index(config, index)

    def facts(self) -> dict[str, Any]:
        """Return what `for_saved` needs beside the configuration (JSON types)."""
        return {}

    def start_from(self, catalog: Catalog) -> None:
        """Start weights from what is known of the items, before training; the default does not."""

    def _checked(self, tokens_NL: Tensor) -> Tensor:
        tokens_NL = torch.as_tensor(tokens_NL, dtype=torch.int64) + self.first_token
        if tokens_NL.ndim != 2 or tokens_NL.shape[1] != self.num_levels:
            raise UserError(
                f"tokens_NL: got shape {tuple(tokens_NL.shape)}, expected (items, "
                f"{self.num_levels}) for the codebook sizes {self.codebook_sizes}. Pass "
                "index.tokens() and index.codebook_sizes of one item index."
            )
        codes_NL = tokens_NL - self.level_offsets_L
        if ((codes_NL < 0) | (codes_NL >= torch.tensor(self.codebook_sizes))).any():
            raise UserError(
                f"tokens_NL: tokens lie outside their levels' ranges {self.codebook_sizes}. Pass "
                "index.tokens() (first token 0), not bare codes."
            )
        return tokens_NL

    @abstractmethod
    def loss(self, batch: Batch) -> LossOutput:
        """Return the mean over target items of -log p(item | history), and its parts."""

    @abstractmethod
    def begin(self, batch: Batch) -> tuple[Tensor, Any]:
        """Read the histories once.

        Returns:
            unnormalised float32 logits of level 0, (B, K_0), column = code; and a state for
            `step`, whose rows are the B requests.
        """

    @abstractmethod
    def step(self, codes_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Extend live rows by one code and score the next level.

        Args:
            codes_R: int64 codes of the level that was scored last, one per new row. R = B*W, the
                rows of a request contiguous; W is the same for all requests and may change from
                step to step.
            state: what the previous `begin` or `step` returned.
            parents_R: int64, which row of that call (of `begin`: which request) each new row
                extends; a row of the same request.

        Returns:
            unnormalised float32 logits (R, K_l) of the next level, and the new state. The old
            state stays valid.
        """

    def over_vocabulary(self) -> Self:
        """Return a view on these weights whose logits are log-probabilities over all tokens.

        Codes then compete with those of other levels and with special tokens, as in a model that
        nothing constrains; the constrained search needs this for scoring="raw".
        """
        view = copy.copy(self)
        view.spans_vocabulary = True
        return view

    def forward(self, batch: Batch) -> LossOutput:
        """Return `loss(batch)`: wrappers such as DistributedDataParallel call the module."""
        return self.loss(batch)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def code_scores(self, hidden: Tensor, level: int) -> Tensor:
        """Return float32 logits over the codes of one level, (..., D) -> (..., K_l).

        Only the level's rows of the output matrix are multiplied: with a large vocabulary the
        other rows are most of the cost.
        """

    @abstractmethod
    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Return float32 logits over all tokens, (..., D) -> (..., V)."""

    def code_tokens(self, codes_R: Tensor, level: int) -> Tensor:
        """Return the model tokens of codes of one level."""
        return codes_R + self._first_tokens[level]

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Return logits over the codes of one level, as a search wants them, (..., K_l)."""
        logits = self.code_scores(hidden, level)
        if self.spans_vocabulary:
            logits = logits - self.vocabulary_scores(hidden).logsumexp(-1, keepdim=True)
        return logits

    def items_nll(self, hidden_MLD: Tensor, rows_M: Tensor, valid_M: Tensor) -> LossOutput:
        """Return the loss of M items from the hidden states that predict their tokens.

        Args:
            hidden_MLD: state that predicts level l of item m; of fewer levels than there are, the
                loss of these.
            rows_M: int64 item rows (anything where not valid).
            valid_M: bool, which items count.
        """
        total = hidden_MLD.new_zeros((), dtype=torch.float32)
        rows_M, counts_M = rows_M.clamp(min=0), valid_M
        tokens_ML = self.tokens_NL[rows_M]
        for level in range(hidden_MLD.shape[1]):
            if level and self.shared_vocabulary:  # what follows the end of a semantic ID is certain
                counts_M = counts_M & (tokens_ML[:, level - 1] != self.first_token + END)
            hidden_MD, target_M = hidden_MLD[:, level], tokens_ML[:, level]
            if self.config.softmax == "vocabulary":
                logits = self.vocabulary_scores(hidden_MD)
            else:
                logits = self.level_logits(hidden_MD, level)
                target_M = target_M - self._first_tokens[level]
            if self.config.softmax == "trie":
                logits = self.catalogue_tree.keep_children(logits, rows_M, level)
            target_M = target_M.masked_fill(~counts_M, IGNORED)
            total = total + F.cross_entropy(logits, target_M, reduction="sum")
        return LossOutput.of(total, valid_M.sum())
