"""The network of SASRec and its three losses. Which sequences it sees is not its business.

Sequences are padded on the right: attention is causal, so padding is never seen by what comes
before it, and no mask is needed.

Shapes: B sequences, T places, P places with a target, N items, D width, M random negatives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.repeats import RepeatBias
from genrec.sampled_softmax import sampled_logits, seen_items

if TYPE_CHECKING:
    from genrec.features.sasrec import SASRecConfig

INIT_STD = 0.02


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each normalised, dropped out and added.

    Args:
        config: settings of SASRec.
    """

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.d_ff or config.d_model
        self.num_heads, self.dropout, self.pre = config.num_heads, config.dropout, config.pre_norm
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the hidden states after this block, (B, T, D)."""
        for norm, layer in zip(self.norms, (self._attend, self._feed), strict=True):
            change = layer(norm(x_BTD) if self.pre else x_BTD)
            x_BTD = x_BTD + dropout(change, self.dropout, self.training)
            x_BTD = x_BTD if self.pre else norm(x_BTD)
        return x_BTD

    def _attend(self, x_BTD: Tensor) -> Tensor:
        batch, places, width = x_BTD.shape
        heads = self.qkv(x_BTD).view(batch, places, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        mixed_BTD = mixed.transpose(1, 2).reshape(batch, places, width)
        return self.out(mixed_BTD)

    def _feed(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))


class Network(nn.Module):
    """Item and place embeddings, blocks, and scores against the same item embeddings.

    Args:
        num_items: N.
        config: settings of SASRec.
    """

    def __init__(self, num_items: int, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(num_items, config.d_model)
        self.places = nn.Embedding(config.max_history, config.d_model)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm_in = nn.Identity() if config.pre_norm else nn.LayerNorm(config.d_model)
        self.norm_out = nn.LayerNorm(config.d_model) if config.pre_norm else nn.Identity()
        if config.repeat_bias:
            self.repeats = RepeatBias(config.max_history + 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items_BT: Tensor) -> Tensor:
        """Return hidden states (B, T, D); the one at place t has read the items up to t."""
        places = torch.arange(items_BT.shape[1], device=items_BT.device)
        scale = math.sqrt(self.config.d_model)
        x_BTD = self.norm_in(self.items(items_BT) * scale + self.places(places))
        x_BTD = dropout(x_BTD, self.config.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm_out(x_BTD)

    def item_outputs(self) -> Tensor:
        """Return what hidden states are multiplied with: (N, D)."""
        weight_ND = self.items.weight
        return weight_ND if self.config.temperature is None else F.normalize(weight_ND, dim=-1)

    def queries(self, hidden: Tensor) -> Tensor:
        """Return hidden states (..., D) such that products with `item_outputs` are scores."""
        temperature = self.config.temperature
        return hidden if temperature is None else F.normalize(hidden, dim=-1) / temperature

    def loss(self, items_BT: Tensor, targets_BT: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss over the places whose target is not negative.

        Args:
            items_BT: item rows, padded on the right with any row.
            targets_BT: the next item row, -1 where there is none.
            generator: draws negatives.
        """
        real_BT = targets_BT >= 0
        query_BTD = self.queries(self(items_BT))
        if self.config.loss == "softmax":
            logits = self._all_logits(query_BTD, items_BT, real_BT)
            return F.cross_entropy(logits, targets_BT[real_BT])
        if self.config.loss == "sampled_softmax":
            negatives_M = self._negatives(generator).to(targets_BT.device)
            logits = self._sampled_logits(query_BTD, items_BT, targets_BT, negatives_M)
            return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
        query_PD, targets_P = query_BTD[real_BT], targets_BT[real_BT]
        shape = (len(targets_P), self.config.negatives)
        draws = torch.randint(max(1, self.items.num_embeddings - 1), shape, generator=generator)
        negatives_PM = draws.to(targets_P.device)
        negatives_PM = negatives_PM + (negatives_PM >= targets_P[:, None])  # never the target
        negatives_PM = negatives_PM.clamp(max=self.items.num_embeddings - 1)
        return binary_cross_entropy(query_PD, self.item_outputs(), targets_P, negatives_PM)

    def _all_logits(self, query_BTD: Tensor, items_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Return logits (P, N) of all items at the real places."""
        logits_PN = query_BTD[real_BT] @ self.item_outputs().T
        if not self.config.repeat_bias:
            return logits_PN
        bias_PT = self.repeats.between(_longer(items_BT))[:, 1:, :-1][real_BT]
        rows_PT = items_BT[:, None].expand(-1, items_BT.shape[1], -1)[real_BT]
        return logits_PN.scatter_add(1, rows_PT, bias_PT)

    def _sampled_logits(
        self, query_BTD: Tensor, items_BT: Tensor, targets_BT: Tensor, negatives_M: Tensor
    ) -> Tensor:
        """Return logits (P, 1 + M + T) of the target, drawn and seen items at the real places."""
        items_ND, real_BT = self.item_outputs(), targets_BT >= 0
        target_scores_BT = (query_BTD * F.embedding(targets_BT.clamp(min=0), items_ND)).sum(-1)
        seen_scores_BTT = query_BTD @ F.embedding(items_BT, items_ND).transpose(1, 2)
        if self.config.repeat_bias:
            longer = _longer(items_BT)
            same_BTT = items_BT[:, None] == targets_BT[..., None]
            bias_BTT = self.repeats.between(longer)[:, 1:, :-1]
            target_scores_BT = target_scores_BT + (bias_BTT * same_BTT).sum(-1)
            seen_scores_BTT = seen_scores_BTT + self.repeats.of_items(longer)[:, 1:, :-1]
        read_TT = torch.ones_like(items_BT[0, :, None] == items_BT[0]).tril()
        return sampled_logits(
            target_scores_BT[real_BT],
            query_BTD[real_BT] @ items_ND[negatives_M].T,
            seen_scores_BTT[real_BT],
            targets_P=targets_BT[real_BT],
            drawn_M=negatives_M,
            seen_PT=seen_items(items_BT, read_TT)[real_BT],
            num_items=len(items_ND),
        )

    def _negatives(self, generator: torch.Generator) -> Tensor:
        """Return M different items, every set equally likely."""
        num_items = self.items.num_embeddings
        return torch.randperm(num_items, generator=generator)[: self.config.negatives]


def _longer(items_BT: Tensor) -> Tensor:
    """Return sequences with a place more: a place reads itself, the next has it before it."""
    return F.pad(items_BT, (0, 1))


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Return x with entries dropped at `rate` and the rest scaled up.

    On the CPU four entries share one 64-bit draw (rates are exact to 1/65536): several times faster
    than torch's own, which draws a double for each entry and would take a fifth of an epoch.
    """
    if not training or not rate:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return x * ((bits >= round(rate * 65536) - 32768) * (1 / (1 - rate)))


def binary_cross_entropy(
    hidden_PD: Tensor, items_ND: Tensor, targets_P: Tensor, negatives_PM: Tensor
) -> Tensor:
    """Return -log s(target) - mean of log(1 - s(negative)), s the sigmoid (SASRec, equation 6).

    Args:
        hidden_PD: hidden states.
        items_ND: item embeddings.
        targets_P: target rows.
        negatives_PM: item rows, each place its own.
    """
    positive_P = (hidden_PD * items_ND[targets_P]).sum(-1)
    negative_PM = torch.einsum("pd,pmd->pm", hidden_PD, items_ND[negatives_PM])
    return (F.softplus(-positive_P) + F.softplus(negative_PM).mean(-1)).mean()
