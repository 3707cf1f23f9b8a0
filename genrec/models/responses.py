"""What is a batch of instructions to a language model, and how likely are their responses?

Prompts and responses are model tokens, text and codes mixed. Only tokens of responses carry loss;
where they stand is written down when the batch is made, so that no device is asked. It refuses to
know tasks, templates and how text becomes tokens.

Shapes: B examples, T tokens read, Q response tokens, M tokens with loss, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.models.batch import LossOutput
from genrec.models.language_models import Kind

Tokens = Sequence[int]


@dataclass(frozen=True)
class Responses:
    """Prompts with responses.

    Args:
        tokens_BT: int64, right-padded with 0: prompts; of causal models with the responses behind.
        lengths_B: int64, tokens of each row.
        response_BQ: int64, right-padded with 0: responses, for encoder-decoders; (B, 0) else.
        rows_M: int64, which example each token with loss belongs to.
        places_M: int64, its place in `tokens_BT` (causal) or in `response_BQ`.
        labels_M: int64, the token.
        tasks_B: int64, which task each example is of; for figures only.
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    response_BQ: Tensor
    rows_M: Tensor
    places_M: Tensor
    labels_M: Tensor
    tasks_B: Tensor

    def __len__(self) -> int:
        return len(self.lengths_B)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Responses:
        """Return the batch on `device`."""
        moved = (getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self))
        return Responses(*moved)


@dataclass(frozen=True, kw_only=True)
class ResponseLoss(LossOutput):
    """Loss of a batch of responses; see `LossOutput`.

    Args:
        nll_B: float32, -log p(response | prompt) of each example in nats.
        counts_B: float32, its tokens with loss.
    """

    nll_B: Tensor
    counts_B: Tensor

    def per_task(
        self, tasks_B: Tensor, num_tasks: int, *, per: Literal["token", "response"]
    ) -> LossOutput:
        """Return the loss with sums per task as figures.

        Args:
            tasks_B: int64 task of each example.
            num_tasks: S.
            per: what counts alike.

        Returns:
            figures are three sums of each task: losses, tokens, responses, (3 * S,).
        """
        zeros_S = self.nll_B.new_zeros(num_tasks)
        sums = [self.nll_B.detach(), self.counts_B, torch.ones_like(self.counts_B)]
        figures = torch.cat([zeros_S.index_add(0, tasks_B, values_B) for values_B in sums])
        count = self.num_targets if per == "token" else (tasks_B >= 0).sum()
        return LossOutput.of(self.loss_sum, count, figures=figures)


def collate_responses(
    prompts: Sequence[Tokens], responses: Sequence[Tokens], tasks: Sequence[int], kind: Kind
) -> Responses:
    """Put examples into a batch for a model of a kind, on the CPU.

    >>> batch = collate_responses([[5, 6], [7]], [[8], [9, 3]], [0, 0], "causal")
    >>> batch.tokens_BT.tolist(), batch.places_M.tolist(), batch.labels_M.tolist()
    ([[5, 6, 8], [7, 9, 3]], [2, 1, 2], [8, 9, 3])
    """
    causal = kind == "causal"
    pairs = list(zip(prompts, responses, strict=True))
    read = [[*prompt, *response] if causal else prompt for prompt, response in pairs]
    counts = [len(response) for response in responses]
    firsts = [len(prompt) if causal else 0 for prompt in prompts]
    places = [np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]
    labels = [token for response in responses for token in response]
    return Responses(
        pad_tokens(read),
        torch.tensor([len(tokens) for tokens in read]),
        torch.zeros((len(pairs), 0), dtype=torch.int64) if causal else pad_tokens(responses),
        torch.from_numpy(np.repeat(np.arange(len(pairs)), counts)),
        torch.from_numpy(np.concatenate(places).astype(np.int64)),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(list(tasks), dtype=torch.int64),
    )


def pad_tokens(rows: Sequence[Tokens]) -> Tensor:
    """Return rows of tokens, right-padded with 0, int64."""
    padded = torch.zeros((len(rows), max(map(len, rows), default=0)), dtype=torch.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.as_tensor(list(tokens), dtype=torch.int64)
    return padded


def response_loss(logits_MV: Tensor, batch: Responses, *, smoothing: float = 0.0) -> ResponseLoss:
    """Return the loss from the logits that predict the tokens of `batch.labels_M`.

    Args:
        logits_MV: float32.
        batch: what they are of.
        smoothing: share of a target that is spread evenly over all tokens.
    """
    nll_M = F.cross_entropy(logits_MV, batch.labels_M, reduction="none", label_smoothing=smoothing)
    zeros_B = nll_M.new_zeros(len(batch))
    nll_B = zeros_B.index_add(0, batch.rows_M, nll_M)
    counts_B = zeros_B.index_add(0, batch.rows_M, torch.ones_like(nll_M))
    loss = LossOutput.of(nll_M.sum(), counts_B.sum().long())
    return ResponseLoss(
        loss=loss.loss,
        loss_sum=loss.loss_sum,
        num_targets=loss.num_targets,
        nll_B=nll_B,
        counts_B=counts_B,
    )
