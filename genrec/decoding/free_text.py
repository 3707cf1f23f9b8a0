"""How does a language model write text, freely, or nothing but one of given texts?

`generate` is a beam or a draw over the model's own tokens; `TextTree` lays given texts (titles) out
as the tree of a constrained search, so that `beam_search` finds the most probable of them. It knows
neither prompts nor items.

Shapes: B prompts, W texts of a prompt, R = B*W rows, V tokens of the model, K tokens that occur in
the texts, N texts, L longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.csr import CSRIndex
from genrec.errors import UserError
from genrec.item_index import END


class TextModel(Protocol):
    """A model that reads and writes tokens (`genrec.models.pretrained`)."""

    def read_tokens(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Any]:
        """Read prompts once; return what the head reads, (B, D), and a state."""

    def extend_tokens(self, tokens_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Append a token per row; return what the head reads, (R, D), and a state."""

    def vocabulary_scores(self, hidden: Tensor) -> Tensor:
        """Return logits over all tokens, (..., V)."""


@dataclass(frozen=True)
class Prompts:
    """Prompts in tokens, right-padded, int64 (B, T), and how many tokens each has (B,)."""

    tokens_BT: Tensor
    lengths_B: Tensor

    def __len__(self) -> int:
        return len(self.lengths_B)


@dataclass(frozen=True)
class Written:
    """One text that a model wrote: its tokens without the end, and their log-probability.

    Args:
        tokens: of the model.
        logprob: natural, of the tokens and, where it was reached, the end.
        ended: whether the end was reached.
    """

    tokens: tuple[int, ...]
    logprob: float
    ended: bool


@torch.no_grad()
def generate(
    model: TextModel,
    prompts: Prompts,
    *,
    ends: Sequence[int],
    num_tokens: int,
    num_texts: int = 1,
    max_tokens: int = 32,
    temperature: float | None = None,
    seed: int = 0,
) -> list[list[Written]]:
    """Return texts for each prompt, the most probable first.

    Args:
        model: in evaluation mode.
        prompts: on its device.
        ends: tokens that end a text.
        num_tokens: only tokens below this are written (text; codes stand above).
        num_texts: W: beams, or draws.
        max_tokens: of a text.
        temperature: None: beam search; else draws from the distribution at this temperature
            (log-probabilities stay those of the model). Draws depend on the batch.
        seed: of the draws.

    Raises:
        UserError: a number below 1, or a temperature that is not positive.
    """
    _check(num_texts, max_tokens, temperature)
    rng = torch.Generator().manual_seed(seed)
    hidden_RD, state = model.read_tokens(prompts.tokens_BT, prompts.lengths_B)
    count, width = len(prompts), 1
    scores_BW = hidden_RD.new_zeros((count, 1), dtype=torch.float32)
    alive_BW = torch.ones_like(scores_BW, dtype=torch.bool)
    texts: list[list[list[int]]] = [[[]] for _ in range(count)]
    end = torch.tensor(list(ends), device=scores_BW.device)
    for _ in range(max_tokens):
        logprobs = model.vocabulary_scores(hidden_RD).log_softmax(-1)[:, :num_tokens]
        logprobs_BWV = logprobs.view(count, width, -1)
        frozen = torch.full_like(logprobs_BWV, -torch.inf)
        frozen[..., int(end[0])] = 0.0  # a text that has ended stays as it is
        logprobs_BWV = torch.where(alive_BW[..., None], logprobs_BWV, frozen)
        totals_BWV = scores_BW[..., None] + logprobs_BWV
        if temperature is None:
            scores_BW, cells_BW = totals_BWV.flatten(1).topk(min(num_texts, totals_BWV[0].numel()))
        else:
            cells_BW = _draw(logprobs_BWV, num_texts if width == 1 else 1, temperature, rng)
            scores_BW = totals_BWV.flatten(1).gather(1, cells_BW)
        beams_BW, tokens_BW = cells_BW // num_tokens, cells_BW % num_tokens
        alive_BW = alive_BW.gather(1, beams_BW)
        written = zip(beams_BW.tolist(), tokens_BW.tolist(), alive_BW.tolist(), strict=True)
        texts = [
            [texts[b][w] + ([token] if on else []) for w, token, on in zip(*row, strict=True)]
            for b, row in enumerate(written)
        ]
        alive_BW = alive_BW & ~torch.isin(tokens_BW, end)
        if not bool(alive_BW.any()):
            break
        parents_BW = beams_BW + torch.arange(count, device=end.device)[:, None] * width
        width = cells_BW.shape[1]
        hidden_RD, state = model.extend_tokens(tokens_BW.flatten(), state, parents_BW.flatten())
    return [_best_first(texts[b], scores_BW[b].tolist(), set(ends)) for b in range(count)]


def _check(num_texts: int, max_tokens: int, temperature: float | None) -> None:
    if num_texts < 1 or max_tokens < 1:
        raise UserError(
            f"generate: got num_texts={num_texts}, max_tokens={max_tokens}, expected at least 1."
        )
    if temperature is not None and not temperature > 0:
        raise UserError(
            f"generate: got temperature={temperature}, expected a number above 0, or None for a "
            "beam search."
        )


def _draw(logprobs_BWV: Tensor, each: int, temperature: float, rng: torch.Generator) -> Tensor:
    """Return drawn cells of the flattened (W, V), `each` for every row, (B, W * each)."""
    count, width, size = logprobs_BWV.shape
    chances = (logprobs_BWV / temperature).softmax(-1).flatten(0, 1).cpu()
    tokens = torch.multinomial(chances, each, replacement=True, generator=rng)
    rows = torch.arange(width).repeat(count)[:, None] * size
    return (tokens + rows).view(count, -1).to(logprobs_BWV.device)


def _best_first(texts: list[list[int]], scores: list[float], ends: set[int]) -> list[Written]:
    made = []
    for tokens, score in zip(texts, scores, strict=True):
        ended = bool(tokens) and tokens[-1] in ends
        if score > -np.inf:
            made.append(Written(tuple(tokens[: len(tokens) - ended]), score, ended))
    return sorted(made, key=lambda text: (-text.logprob, text.tokens))


class TextTree:
    """Given texts as a tree, and a model as what walks down it.

    Args:
        texts: tokens of N different texts, none of them empty.
        end: token that follows a whole text.

    Raises:
        UserError: no texts, an empty one, or one that holds the end.
    """

    def __init__(self, texts: Sequence[Sequence[int]], end: int) -> None:
        wrong = next((n for n, t in enumerate(texts) if not len(t) or end in t), None)
        if not len(texts) or wrong is not None:
            got = "no texts" if wrong is None else f"text {wrong} as {list(texts[wrong])}"
            raise UserError(
                f"TextTree: got {got}, expected texts of at least one token, without the end "
                f"token {end}."
            )
        used = sorted({token for text in texts for token in text})
        codes = {token: code for code, token in enumerate(used, END + 1)}
        longest = max(len(text) for text in texts) + 1  # so that every text has an end to choose
        codes_NL = np.full((len(texts), longest), END, dtype=np.int32)
        for row, text in zip(codes_NL, texts, strict=True):
            row[: len(text)] = [codes[token] for token in text]
        self.tokens_K = torch.tensor([end, *used])
        sizes = (len(self.tokens_K),) * longest
        self.constraint = CSRIndex.from_codes(codes_NL, sizes, shared_vocabulary=True)

    def to(self, device: torch.device | str) -> TextTree:
        """Move to a device, in place."""
        self.tokens_K = self.tokens_K.to(device)
        self.constraint = self.constraint.to(device)
        return self

    def walker(self, model: TextModel) -> TextSteps:
        """Return the model as a `StepModel` over the tree's codes; its batches are `Prompts`."""
        return TextSteps(model, self.tokens_K)


class TextSteps:
    """A `StepModel` over chosen tokens of a language model; code 0 is the end.

    Args:
        model: in evaluation mode.
        tokens_K: token of each code, int64.
    """

    def __init__(self, model: TextModel, tokens_K: Tensor) -> None:
        self.model, self.tokens_K = model, tokens_K

    def begin(self, batch: Prompts) -> tuple[Tensor, Any]:
        """Read prompts; see `StepModel.begin`."""
        hidden_BD, state = self.model.read_tokens(batch.tokens_BT, batch.lengths_B)
        return self.model.vocabulary_scores(hidden_BD)[:, self.tokens_K], state

    def step(self, codes_R: Tensor, state: Any, parents_R: Tensor) -> tuple[Tensor, Any]:
        """Append a token; see `StepModel.step`."""
        hidden_RD, state = self.model.extend_tokens(self.tokens_K[codes_R], state, parents_R)
        return self.model.vocabulary_scores(hidden_RD)[:, self.tokens_K], state
