"""Which of the items below a prefix is it? A softmax over real items, of which codes are sums.

For backbones that end a semantic ID so: the codes from level `items_from` on follow from scores of
the items' own vectors (hierarchical softmax of Goodman 2001 and Morin & Bengio 2005, with semantic
IDs as its classes). It refuses to know layers, and how the codes before were chosen: it is given
the vectors that items are scored with.

Shapes: B sequences, H items of them, N items, M predictions, R live rows, P rows before them,
C items of a group, X random items, U groups, V units of S slots, L levels, D model width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from genrec.errors import ConfigError
from genrec.models.base import IGNORED
from genrec.models.item_groups import NO_ITEM, ItemGroups
from genrec.models.item_vectors import ItemVectorsBackbone, ItemVectorsConfig
from genrec.models.new_items import NewItemBias
from genrec.repeats import RepeatBias
from genrec.sampled_softmax import sampled_logits, seen_items

RUNS_BY_GROUP = ("cpu",)  # devices on which predictions of one group share a product
GATHER_COST = 16  # reading a vector per candidate costs as much as so many products in a matrix


class ItemChoiceConfig(ItemVectorsConfig):
    """Whether a semantic ID ends with a choice among items, and how that is trained."""

    items_from: int | None = Field(default=None, ge=0)
    """Codes from this level on follow from a softmax over the items below the prefix. None: no
    level; 0: all, a softmax over the whole catalogue (SASRec's, with shared code vectors)."""
    num_negatives: int | None = Field(default=None, ge=1)
    """Train with a softmax over the target, the items seen and so many random ones, instead of
    the whole catalogue. For `items_from: 0`; null: all items."""
    repeat_bias: bool = False
    """Learn how much more or less likely an item becomes by standing in the history, by how
    long ago (RepeatNet, Ren et al. 2019, asks the same). Needs `items_from`."""


class ItemChoiceBackbone(ItemVectorsBackbone):
    """A backbone whose last choice may be among items; see the module's text.

    Leaves call `make_item_choice` in their constructor.
    """

    config: ItemChoiceConfig
    groups: ItemGroups
    first_code_groups: ItemGroups
    repeats: RepeatBias
    new_items: NewItemBias

    def make_item_choice(self) -> None:
        """Make the groups of items and the bias that the configuration asks for.

        Raises:
            ConfigError: settings that contradict one another or the semantic IDs.
        """
        self._check_items_from()
        if self.has_items:
            codes_NL = self.tokens_NL - self.level_offsets_L
            self.groups = ItemGroups(codes_NL, self.codebook_sizes, self.num_code_levels)
            self._slices: tuple[Tensor, list[Tensor]] | None = None
            if not self.num_code_levels:
                self.first_code_groups = ItemGroups(codes_NL, self.codebook_sizes, 1)
        if self.config.repeat_bias:
            self.repeats = RepeatBias(self.config.max_history)
        if self.config.consumed_only:
            self.new_items = NewItemBias()

    def _check_items_from(self) -> None:
        first = self.config.items_from
        if first is not None and first >= self.num_levels:
            raise ConfigError(
                f"model.items_from: got {first} for semantic IDs of {self.num_levels} codes, "
                f"expected at most {self.num_levels - 1}. Leave it out to score codes only."
            )
        if self.config.num_negatives and first != 0:
            raise ConfigError(
                f"model.num_negatives: got {self.config.num_negatives} with items_from {first}, "
                "expected items_from 0, the softmax over the whole catalogue that they stand for. "
                "Set model.items_from=0 or model.num_negatives=null."
            )
        if first is None and self.config.consumed_only:
            raise ConfigError(
                "model.consumed_only: got true without model.items_from, expected a choice among "
                "items, some of which it leaves out. Set model.items_from=1."
            )
        if first is None and self.config.repeat_bias:
            raise ConfigError(
                "model.repeat_bias: got true without model.items_from, expected a level from which "
                "items are scored, since codes do not tell which item was seen. Set "
                "model.items_from=1."
            )

    @property
    def has_items(self) -> bool:
        """Whether a semantic ID ends with a choice among items."""
        return self.config.items_from is not None

    @property
    def num_code_levels(self) -> int:
        """Levels whose codes are scored by code vectors."""
        first = self.config.items_from
        return self.num_levels if first is None else first

    def item_choice_nll(
        self,
        query_MD: Tensor,
        rows_M: Tensor,
        valid_M: Tensor,
        weights_M: Tensor | None,
        sequence_BH: Tensor,
    ) -> Tensor:
        """Return the summed loss of the choice among the items of each target's group.

        Args:
            query_MD: what items are scored with, one for each place of `sequence_BH` (M = B*H).
            rows_M: int64 items to predict; anything where not valid.
            valid_M: bool, which predictions count.
            weights_M: how much each counts; None: 1.
            sequence_BH: int64 item rows of the sequences, -1 for padding.
        """
        if self.training and self.config.num_negatives:
            logits_MX = self._sampled_logits(query_MD, rows_M, sequence_BH)
            target_M = torch.zeros_like(rows_M).masked_fill(~valid_M, IGNORED)
            return self.choice_nll(logits_MX, target_M, weights_M)
        known_M = rows_M.clamp(min=0)
        group_M = self.groups.group_N[known_M]
        scores_MC = self._training_scores(query_MD, group_M)
        if self.config.repeat_bias:
            bias_BHH = self.repeats.between(sequence_BH)
            seen_MH = sequence_BH.clamp(min=0)[:, None].expand_as(bias_BHH).flatten(0, 1)
            scores_MC = self._biased(scores_MC, group_M, seen_MH, bias_BHH.flatten(0, 1))
        if self.config.consumed_only:
            is_new_MC = self.is_new(self.groups.below(group_M))
            if self.training:
                scores_MC = scores_MC.masked_fill(is_new_MC, -torch.inf)
            else:
                scores_MC = self.new_items(scores_MC, is_new_MC)
        place_M = self.groups.place_N[known_M].masked_fill(~valid_M, IGNORED)
        return self.choice_nll(scores_MC, place_M, weights_M)

    def scores_below(
        self, query_RD: Tensor, prefixes_R: Tensor, seen: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the items (R, C) below prefixes, -1 for filling, and their float32 scores.

        Args:
            query_RD: what items are scored with.
            prefixes_R: numbers of prefixes of `items_from` codes (`ItemGroups.extend`).
            seen: items of each row's history (R, H), and what `RepeatBias` says of them.
        """
        items_RC = self.groups.below(prefixes_R)
        if query_RD.device.type in RUNS_BY_GROUP and not (self.training or torch.is_grad_enabled()):
            scores_RC = self._scores_by_slice(query_RD, prefixes_R)
        else:
            scores_RC = self._scores(query_RD, items_RC)
        if seen is not None:
            scores_RC = self._biased(scores_RC, prefixes_R, *seen)
        if self.config.consumed_only:
            scores_RC = self.new_items(scores_RC, self.is_new(items_RC))
        return items_RC, scores_RC

    def is_new(self, items: Tensor) -> Tensor:
        """Return whether items are some that nobody consumed in training; False for filling."""
        return (items != NO_ITEM) & ~self.consumed_N1[items.clamp(min=0), 0]

    def log_odds_of_new(self, items_PC: Tensor, scores_PC: Tensor) -> Tensor:
        """Return the log-odds (P,) of the new ones among items, as training alone would have them.

        Args:
            items_PC: int64 items below the first codes of targets, -1 for filling.
            scores_PC: their scores, with the bias of new items as it is (`scores_below`).
        """
        is_new_PC = self.is_new(items_PC)
        scores_PC = scores_PC - self.new_items.value_1 * is_new_PC
        new_P = scores_PC.masked_fill(~is_new_PC, -torch.inf).logsumexp(1)
        return new_P - scores_PC.masked_fill(is_new_PC, -torch.inf).logsumexp(1)

    def scores_after(
        self,
        items_PC: Tensor,
        scores_PC: Tensor,
        parents_R: Tensor,
        codes_R: Tensor,
        level: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the items that may still be meant once a code is chosen, and their scores.

        Of a choice among the whole catalogue only the items below the first code are carried on:
        a wide search would otherwise hold the catalogue once per beam.

        Args:
            items_PC: int64 items that could be meant so far, one row per earlier prefix.
            scores_PC: their scores, -inf where they no longer can.
            parents_R: int64, which row each new row extends.
            codes_R: int64 codes of `level`.
            level: of the codes.
        """
        if level or self.num_code_levels:
            items_RC, scores_RC = items_PC[parents_R], scores_PC[parents_R]
            return items_RC, self.groups.keep_code(scores_RC, items_RC, codes_R, level)
        prefixes_R = self.first_code_groups.extend(torch.zeros_like(codes_R), codes_R, 0)
        items_RC = self.first_code_groups.below(prefixes_R)
        places_RC = self.groups.place_N[items_RC.clamp(min=0)]
        scores_RC = scores_PC[parents_R[:, None], places_RC]
        return items_RC, scores_RC.masked_fill(items_RC == NO_ITEM, -torch.inf)

    def _sampled_logits(self, query_MD: Tensor, rows_M: Tensor, sequence_BH: Tensor) -> Tensor:
        """Return logits (M, 1 + X + H) of the target, X random items and those seen."""
        every_N = torch.arange(len(self.tokens_NL), device=self.device)
        every_ND = self.item_vectors(every_N)
        pool_N = every_N[self.consumed_N1[:, 0]] if self.config.consumed_only else every_N
        order_N = torch.randperm(len(pool_N), device=self.device)
        drawn_X = pool_N[order_N[: self.config.num_negatives]]
        query_BHD = query_MD.view(*sequence_BH.shape, -1)
        read_HH = torch.ones_like(sequence_BH[0, :, None] == sequence_BH[0]).tril(-1)
        vectors_BHD = F.embedding(sequence_BH.clamp(min=0), every_ND)
        seen_scores_BHH = (query_BHD @ vectors_BHD.transpose(1, 2)).float()
        target_scores_BH = (query_BHD * vectors_BHD).sum(-1).float()
        if self.config.repeat_bias:
            bias_BHH = self.repeats.of_items(sequence_BH)
            seen_scores_BHH = seen_scores_BHH + bias_BHH
            target_scores_BH = target_scores_BH + bias_BHH.diagonal(dim1=1, dim2=2)
        return sampled_logits(
            target_scores_BH.flatten(),
            F.linear(query_MD, every_ND[drawn_X]).float(),
            seen_scores_BHH.flatten(0, 1),
            targets_P=rows_M.clamp(min=0),
            drawn_M=drawn_X,
            seen_PT=seen_items(sequence_BH, read_HH).flatten(0, 1),
            num_items=len(every_N),
            num_possible=len(pool_N),
        )

    def _training_scores(self, query_MD: Tensor, group_M: Tensor) -> Tensor:
        """Return float32 scores (M, C) of the items of each prediction's group, -inf for filling.

        On a CPU predictions of one group share one product. A GPU, which would have to tell the
        host how many groups there are, reads vectors per prediction, or multiplies with all items
        where that reads less. The three are equal (test).
        """
        if query_MD.device.type in RUNS_BY_GROUP:
            return self._scores_by_group(query_MD, group_M)
        items_MC, num_items = self.groups.below(group_M), len(self.tokens_NL)
        if items_MC.shape[1] * GATHER_COST <= num_items:
            return self._scores(query_MD, items_MC)
        every_ND = self.item_vectors(torch.arange(num_items, device=items_MC.device))
        scores_MC = F.linear(query_MD, every_ND).gather(1, items_MC.clamp(min=0))
        return scores_MC.float().masked_fill(items_MC == NO_ITEM, -torch.inf)

    def _scores_by_group(self, query_MD: Tensor, group_M: Tensor) -> Tensor:
        """Read the items' vectors once for up to S predictions of one group.

        S is twice the mean per group: a popular group takes several units of S, so that it does not
        make all others as long as itself.
        """
        group_U, which_M = group_M.unique(return_inverse=True)
        counts_U = which_M.bincount()
        order_M = which_M.argsort(stable=True)
        number_M = torch.empty_like(order_M)  # of a prediction within its group
        firsts_U = counts_U.cumsum(0) - counts_U
        number_M[order_M] = torch.arange(len(order_M)) - firsts_U[which_M[order_M]]
        slots = min(int(counts_U.max()), 2 * -(-len(group_M) // len(group_U)))
        units_U = -(-counts_U // slots)
        unit_M = (units_U.cumsum(0) - units_U)[which_M] + number_M // slots
        slot_M = number_M % slots
        items_VC = self.groups.below(group_U.repeat_interleave(units_U))
        query_VSD = query_MD.new_zeros(len(items_VC), slots, query_MD.shape[1])
        query_VSD = query_VSD.index_put((unit_M, slot_M), query_MD)
        scores_VSC = (query_VSD @ self.item_vectors(items_VC).transpose(1, 2)).float()
        scores_VSC = scores_VSC.masked_fill((items_VC == NO_ITEM)[:, None], -torch.inf)
        return scores_VSC[unit_M, slot_M]

    def _scores_by_slice(self, query_RD: Tensor, prefixes_R: Tensor) -> Tensor:
        """Return what `_scores` returns for the items below prefixes, without gradients.

        The vectors of one group lie side by side in a table that is kept, so its rows need one
        product and no vector is copied (docs/decoding.md says what that is worth on a CPU).
        """
        slices_DC = self._vectors_by_group()
        order_R = prefixes_R.argsort()
        query_RD = query_RD[order_R].to(slices_DC[0].dtype)
        shape = (len(order_R), self.groups.largest)
        sorted_RC = torch.full(shape, -torch.inf, device=query_RD.device)
        group_U, counts_U = prefixes_R[order_R].unique_consecutive(return_counts=True)
        counts = counts_U.tolist()
        parts = zip(group_U.tolist(), query_RD.split(counts), sorted_RC.split(counts), strict=True)
        for group, query_SD, scores_SC in parts:
            if group != NO_ITEM:
                vectors_DC = slices_DC[group]
                scores_SC[:, : vectors_DC.shape[1]] = query_SD @ vectors_DC
        return torch.empty_like(sorted_RC).index_copy_(0, order_R, sorted_RC)

    def _vectors_by_group(self) -> list[Tensor]:
        """Return the vectors of each group's items, (D, C) each; kept until a weight changes."""
        table_ND = self.item_table()
        if self._slices is None or self._slices[0] is not table_ND:
            sizes = (self.groups.ends_G - self.groups.starts_G).tolist()
            slices_CD = table_ND[self.groups.order_N].split(sizes)
            self._slices = table_ND, [vectors_CD.T for vectors_CD in slices_CD]
        return self._slices[1]

    def _scores(self, query_MD: Tensor, items_MC: Tensor) -> Tensor:
        """Return float32 scores of items, -inf for filling."""
        vectors_MCD = self.item_vectors(items_MC)
        scores_MC = (vectors_MCD @ query_MD.unsqueeze(-1).to(vectors_MCD.dtype)).squeeze(-1)
        return scores_MC.float().masked_fill(items_MC == NO_ITEM, -torch.inf)

    def _biased(
        self, scores_MC: Tensor, group_M: Tensor, seen_MH: Tensor, bias_MH: Tensor
    ) -> Tensor:
        """Return the scores of a group's items plus the biases of those that were seen."""
        mine_MH = self.groups.group_N[seen_MH] == group_M[:, None]
        return scores_MC.scatter_add(1, self.groups.place_N[seen_MH], bias_MH * mine_MH)
