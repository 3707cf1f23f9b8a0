"""How does one draw items at random instead of the best ones?

Constrained sampling from the model's distribution over the catalogue (temperature, top-p), with
replacement or without (stochastic beam search). Noise is drawn per request on the host, so that a
draw depends on the request's seed only: not on its batch, nor on the device. It knows neither
networks nor item ids.

Shapes: B requests, S samples or beams of a request, C columns of children, X candidates, Y chosen
ones, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from genrec.decoding.beam import best_places
from genrec.decoding.csr import CSRIndex
from genrec.decoding.protocol import NO_ROW, Filters, StepModel, check_numbers
from genrec.decoding.walk import Walk
from genrec.errors import UserError

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Samples:
    """Drawn items.

    Args:
        rows_BS: int64 catalogue rows, -1 where there was nothing (left) to draw.
        logprobs_BS: float32 log-probability of each under the distribution that was drawn from:
            after temperature, top-p and filters; -inf where padded.
        codes_BSL: int64 semantic IDs, -1 where padded.
        keys_BS: without replacement, the log-probabilities plus Gumbel noise that ordered the draw
            (for importance weights, Kool et al. 2019, section 4); else None.
    """

    rows_BS: Tensor
    logprobs_BS: Tensor
    codes_BSL: Tensor
    keys_BS: Tensor | None = None


@torch.no_grad()
def sample(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    num_samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    replacement: bool = True,
    filters: Filters | None = None,
    seed: Seed = 0,
) -> Samples:
    """Draw items of the catalogue, code by code, in the model's proportions.

    Each code is drawn among those that lead to an item which the request may get. Without filters
    and rules these are the probabilities of scoring="renormalized". With them an item is as likely
    as the codes on its way are beside what is left there, which is not its share of all that is
    left; for that, draw without filters and drop what is denied.

    With replacement every sample is an independent draw (in the order of drawing). Without, items
    of a request differ: the Gumbel-top-k trick over the tree draws exactly as if items were taken
    one by one from what is left, best key first (stochastic beam search, Kool, van Hoof and Welling
    2019, algorithm 1). A request with fewer items than samples is padded.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue, or a restricted view of it.
        num_samples: S >= 1.
        temperature: > 0; logits of every step are divided by it.
        top_p: 0 < top_p <= 1; of every step only the smallest set of the most likely codes with at
            least this probability stays (Holtzman et al. 2020).
        replacement: see above.
        filters: as in `beam_search`.
        seed: an integer for the whole call, or one per request. The same seed draws the same.

    Raises:
        UserError: arguments out of range, filters or seeds that do not fit, or NaN logits.
    """
    _check_sampling(num_samples, temperature, top_p)
    walk = Walk(model, batch, constraint, filters, temperature=temperature, top_p=top_p)
    noise = _Noise(seed, walk.num_requests, walk.device)
    draw = _draw_independent if replacement else _draw_distinct
    logprobs_BS = torch.zeros(walk.num_requests, 1, device=walk.device)
    keys_BS = noise.gumbel(1, 1)[:, :, 0]
    for level in range(walk.num_steps):
        options = walk.options(logprobs_BS, level)
        gumbel_BSC = noise.gumbel(
            num_samples if replacement else logprobs_BS.shape[1], options.steps_BSC.shape[2]
        )
        cells_BY, logprobs_BS, keys_BS = draw(
            logprobs_BS, keys_BS, options.steps_BSC, gumbel_BSC, num_samples
        )
        walk.move(options, cells_BY)
    rows_BS, codes_BSL = walk.items(logprobs_BS)
    check_numbers(logprobs_BS)
    missing = num_samples - rows_BS.shape[1]
    return Samples(
        pad(rows_BS, (0, missing), value=NO_ROW),
        pad(logprobs_BS, (0, missing), value=-torch.inf),
        pad(codes_BSL, (0, 0, 0, missing), value=NO_ROW),
        None if replacement else pad(keys_BS, (0, missing), value=-torch.inf),
    )


def _check_sampling(num_samples: int, temperature: float, top_p: float) -> None:
    if num_samples < 1:
        raise UserError(f"num_samples: got {num_samples}, expected an integer >= 1.")
    if not temperature > 0:
        raise UserError(
            f"temperature: got {temperature}, expected a number above 0. For the best items "
            "without chance use beam_search."
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: got {top_p}, expected 0 < top_p <= 1 (1 keeps every code).")


class _Noise:
    """Gumbel noise, one generator per request."""

    def __init__(self, seed: Seed, num_requests: int, device: torch.device) -> None:
        if isinstance(seed, int):
            self._generators = [np.random.default_rng([seed, b]) for b in range(num_requests)]
        else:
            self._generators = [np.random.default_rng(each) for each in seed]
        if len(self._generators) != num_requests:
            raise UserError(
                f"seed: got {len(self._generators)} seeds for {num_requests} requests. Give one "
                "integer, or one per request."
            )
        self.device = device

    def gumbel(self, num_rows: int, num_columns: int) -> Tensor:
        """Return (B, rows, columns) float32 standard Gumbel noise."""
        drawn = [g.gumbel(size=(num_rows, num_columns)) for g in self._generators]
        return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(self.device)


def _draw_independent(
    logprobs_BS: Tensor, keys_BS: Tensor, steps_BSC: Tensor, gumbel_BSC: Tensor, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose a child for every sample (Gumbel-max trick); return cells and log-probabilities."""
    num_columns = steps_BSC.shape[2]
    columns_BS = (steps_BSC + gumbel_BSC).argmax(2)
    beams_S = torch.arange(num_samples, device=columns_BS.device) % steps_BSC.shape[1]
    cells_BS = beams_S * num_columns + columns_BS
    logprobs_BX = (logprobs_BS[..., None] + steps_BSC).flatten(1)
    return cells_BS, logprobs_BX.gather(1, cells_BS), keys_BS


def _draw_distinct(
    logprobs_BS: Tensor, keys_BS: Tensor, steps_BSC: Tensor, gumbel_BSC: Tensor, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the children with the best perturbed keys over all beams of a request."""
    logprobs_BSC = logprobs_BS[..., None] + steps_BSC
    keys_BX = _conditioned(logprobs_BSC + gumbel_BSC, keys_BS[..., None]).flatten(1)
    ties_X = torch.arange(keys_BX.shape[1], device=keys_BX.device).expand_as(keys_BX)
    cells_BY = best_places(keys_BX, ties_X, num_samples, signed=True)
    return cells_BY, logprobs_BSC.flatten(1).gather(1, cells_BY), keys_BX.gather(1, cells_BY)


def _conditioned(keys_BSC: Tensor, parents_BS1: Tensor) -> Tensor:
    """Condition children's keys on their maximum being the parent's (Kool et al., appendix B.3)."""
    largest_BS1 = keys_BSC.amax(2, keepdim=True)
    # log(1 - exp(key - largest)), -inf at the largest itself; dead beams give -inf or NaN here.
    gap_BSC = torch.log(-torch.expm1(keys_BSC - largest_BS1))
    shift_BSC = parents_BS1 - keys_BSC + gap_BSC
    moved_BSC = parents_BS1 - shift_BSC.clamp(min=0) - torch.log1p(torch.exp(-shift_BSC.abs()))
    moved_BSC = torch.where(keys_BSC == largest_BS1, parents_BS1, moved_BSC)
    return torch.where(keys_BSC == -torch.inf, keys_BSC, moved_BSC)
