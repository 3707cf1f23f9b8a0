"""Backbone: what a network must do to be trained and searched, and what all of them share.

Owns where the code tokens stand in a model's vocabulary and the loss per item.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from genrec.data.history_length import HistoryConfig
from genrec.errors import ConfigError, UserError
from genrec.item_index import END, ItemIndex, level_offsets
from genrec.models.batch import (
    IGNORED,
    Batch,
    LossOutput,
    Order,
    RequestContext,
    Targets,
    Truncation,
    choice_nll,
    keep,
    pad_histories,
)
from genrec.models.catalogue_tree import CatalogueTree

if TYPE_CHECKING:
    from genrec.data import Catalog

__all__ = [
    "FIRST_TOKEN",
    "IGNORED",
    "PAD",
    "START",
    "Backbone",
    "Batch",
    "LossOutput",
    "RequestContext",
    "Targets",
    "Truncation",
    "keep",
    "pad_histories",
]

PAD, START, FIRST_TOKEN = 0, 1, 2


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

    class Config(HistoryConfig):
        """What every backbone can be told."""

        softmax: Literal["level", "vocabulary", "trie"] = "level"
        """Training loss normalises over the codes of the level, over all tokens, or over those
        codes only that lead on to an item of the catalogue (as the constrained search does)."""
        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of each training target that is spread evenly over the codes that the softmax
        normalises over (Szegedy et al. 2016)."""
        loss_temperature: float = Field(default=1.0, gt=0.0)
        """Training logits are divided by it (LETTER's ranking-guided loss); below 1, close rivals
        of a target weigh more. Search and evaluation do not use it."""
        truncation: Truncation = "last"
        """Which items of a longer history the model sees: its last ones, its first ones, or a
        quarter from its beginning and the rest from its end."""
        history_order: Order = "chronological"
        """Order in which a history is read; reversed: the last item first, for backbones that
        train on one target at a time."""

        @property
        def needs_vectors(self) -> bool:
            """Whether training reads the catalogue's vectors."""
            return False

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
        self._check_order(config)
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

    @property
    def reads_times(self) -> bool:
        """Whether `Batch.times_BH` changes what the model answers."""
        return False

    def meet_items(self, counts_N: np.ndarray, *, more: bool = False) -> None:
        """Take in how well the training data know items, before training; the default does not.

        Args:
            counts_N: int, training interactions of each item.
            more: items that were met before stay met: training goes on.
        """

    def meet_targets(self, batches: Iterable[Batch]) -> None:
        """Take in targets that training does not see, before each validation; the default does not.

        Args:
            batches: requests as `begin` reads them, with `target_B`, on the model's device.
        """

    @property
    def reads_content(self) -> bool:
        """Whether an item is also known by the vector that its features gave."""
        return False

    def describe(self, first: int, vectors_MC: np.ndarray) -> None:
        """Take in what describes items that join after training; the default does not.

        Args:
            first: row of the first of them; they are the last items of the index.
            vectors_MC: as `Catalog.content_vectors` of the others.
        """

    def meet_users(self, users: Sequence[str], has_history_U: np.ndarray) -> None:
        """Take in the users of the training data, before training; the default does not.

        Args:
            users: what each user is called; hashed, never kept.
            has_history_U: bool, whether there is anything to learn of them.
        """

    def user_rows(self, users: Sequence[str | None]) -> np.ndarray | None:
        """Return users' rows in the model's user table, (B,) int64, 0 = unknown; None: no table."""
        return None

    def read_history(self, history_BH: Tensor) -> Tensor:
        """Return the part of right-padded histories that the model reads, in its order."""
        config = self.config
        return keep(history_BH, config.max_history, config.truncation, config.history_order)

    @classmethod
    def _check_order(cls, config: Config) -> None:
        if config.history_order == "reversed" and cls.training_unit == "sequence":
            raise ConfigError(
                f"model.history_order: got 'reversed' for a {cls.__name__}, which learns every "
                "item from those before it in one pass, expected 'chronological'. Leave it out, or "
                "choose a backbone with one target per example (model.name=encoder_decoder)."
            )

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
        """Return `loss(batch)`: wrappers such as DistributedDataParallel call the module.

        Without `targets`: wrappers watch over all that a module hands out.
        """
        return replace(self.loss(batch), targets=None)

    def item_representations(self, rows: Tensor) -> Tensor:
        """Return what items are in the model's input, (...) -> (..., D): their codes' mean.

        For objectives of training; anything where a row is negative.

        Raises:
            ConfigError: a backbone that has no such vectors.
        """
        raise ConfigError(
            f"trainer.objectives: a {type(self).__name__} has no vectors of items, expected a "
            "backbone that has. Leave out item_text and reconstruction, or choose another model."
        )

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Compute activations twice while training, to save memory, or no longer do so.

        Raises:
            ConfigError: a backbone that cannot.
        """
        if enabled:
            raise ConfigError(
                f"trainer.gradient_checkpointing: got true for a {type(self).__name__}, which "
                "cannot. Set it to false, and trainer.accumulation higher."
            )

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

    def items_nll(
        self, hidden_MLD: Tensor, rows_M: Tensor, valid_M: Tensor, weights_M: Tensor | None = None
    ) -> LossOutput:
        """Return the loss of M items from the hidden states that predict their tokens.

        Args:
            hidden_MLD: state that predicts level l of item m; of fewer levels than there are, the
                loss of these.
            rows_M: int64 item rows (anything where not valid).
            valid_M: bool, which items count.
            weights_M: float32, how much each valid item counts; None: 1.
        """
        total = hidden_MLD.new_zeros((), dtype=torch.float32)
        known_M, counts_M = rows_M.clamp(min=0), valid_M
        tokens_ML = self.tokens_NL[known_M]
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
                logits = self.catalogue_tree.keep_children(logits, known_M, level)
            target_M = target_M.masked_fill(~counts_M, IGNORED)
            total = total + self.choice_nll(logits, target_M, weights_M)
        return self.loss_output(total, hidden_MLD[:, 0], rows_M, valid_M, weights_M)

    def choice_nll(self, logits_MK: Tensor, target_M: Tensor, weights_M: Tensor | None) -> Tensor:
        """Return the summed loss of choices among K, shaped as the configuration says.

        In evaluation mode it is the weighted negative log-likelihood. Arguments: `choice_nll`.
        """
        config = self.config
        if not self.training:
            return choice_nll(logits_MK, target_M, weights_M)
        if config.loss_temperature != 1.0:
            logits_MK = logits_MK / config.loss_temperature
        return choice_nll(logits_MK, target_M, weights_M, smoothing=config.label_smoothing)

    def loss_output(
        self,
        loss_sum: Tensor,
        states_MD: Tensor,
        rows_M: Tensor,
        valid_M: Tensor,
        weights_M: Tensor | None,
    ) -> LossOutput:
        """Return a loss with its weights and what it was made from; arguments as `items_nll`."""
        counted_M = valid_M.float() if weights_M is None else weights_M * valid_M
        return LossOutput.of(
            loss_sum,
            valid_M.sum(),
            None if weights_M is None else counted_M.sum(),
            targets=Targets(states_MD, rows_M, counted_M),
        )
