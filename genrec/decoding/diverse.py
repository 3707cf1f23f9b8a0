"""Which lists do groups of beams find that avoid each other's codes?

Diverse beam search over the tree of the catalogue. It knows neither networks nor item ids.

Shapes: B requests, G groups, W beams of a group, S = G*W, C columns of children, X candidates,
Y chosen ones, L levels, k list length, T codes that earlier groups chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from genrec.decoding.beam import best_places
from genrec.decoding.csr import CSRIndex
from genrec.decoding.protocol import (
    NO_ROW,
    Filters,
    Scoring,
    StepModel,
    check_numbers,
    check_search,
)
from genrec.decoding.walk import Options, Walk
from genrec.errors import UserError


@dataclass(frozen=True)
class Groups:
    """Lists of groups, each best first by (log-probability, row).

    Args:
        rows_BGk: int64 catalogue rows, -1 where padded. Groups may share items.
        logprobs_BGk: float32, without penalties; -inf where padded.
        codes_BGkL: int64 semantic IDs, -1 where padded.
    """

    rows_BGk: Tensor
    logprobs_BGk: Tensor
    codes_BGkL: Tensor


@torch.no_grad()
def diverse_beam_search(
    model: StepModel,
    batch: Any,
    constraint: CSRIndex,
    *,
    num_groups: int,
    width: int,
    k: int,
    penalty: float,
    filters: Filters | None = None,
    scoring: Scoring = "renormalized",
) -> Groups:
    """Return lists of groups that avoid each other's codes (Vijayakumar et al. 2018).

    Groups extend their beams one after the other at each level. For every beam of an earlier group
    that has just chosen the same code, a candidate loses `penalty` (Hamming diversity), for the
    rest of the search. Penalty 0 makes each group the plain beam search.

    Args:
        model: a StepModel, in eval mode.
        batch: B requests.
        constraint: the catalogue, or a restricted view of it.
        num_groups: G >= 1.
        width: beams of each group, >= 1.
        k: items of each group, 1 <= k <= width.
        penalty: >= 0, natural-log units.
        filters: as in `beam_search`.
        scoring: as in `beam_search`.

    Raises:
        UserError: arguments out of range, filters that do not fit, or NaN logits.
    """
    check_search(width, k, constraint.num_items, scoring)
    if num_groups < 1 or not penalty >= 0:
        raise UserError(
            f"diverse_beam_search: got num_groups={num_groups}, penalty={penalty}, expected at "
            "least 1 group and a penalty >= 0. Set e.g. num_groups=4 penalty=0.5."
        )
    walk = Walk(model, batch, constraint, filters, scoring=scoring)
    logprobs_BGW = torch.zeros(walk.num_requests, num_groups, 1, device=walk.device)
    keys_BGW = logprobs_BGW
    walk.nodes_BS = walk.nodes_BS.repeat(1, num_groups)
    walk.slots_BS = walk.slots_BS.repeat(1, num_groups)
    for level in range(walk.num_steps):
        options = walk.options(logprobs_BGW.flatten(1), level)
        final = level == walk.num_steps - 1
        count = k if final else min(width, constraint.num_nodes[level + 1])
        ties_BSC = walk.rows_of(options.states_BSC) if final else None
        cells_BGY, keys_BGW = _choose_in_groups(keys_BGW, options, ties_BSC, count, penalty)
        candidates_BX = (logprobs_BGW.flatten(1)[..., None] + options.steps_BSC).flatten(1)
        logprobs_BGW = candidates_BX.gather(1, cells_BGY.flatten(1)).view(cells_BGY.shape)
        walk.move(options, cells_BGY.flatten(1))
    rows_BS, codes_BSL = walk.items(logprobs_BGW.flatten(1))
    check_numbers(logprobs_BGW.flatten(1))
    return _in_order(rows_BS.view(logprobs_BGW.shape), logprobs_BGW, codes_BSL, k)


def _in_order(rows_BGY: Tensor, logprobs_BGY: Tensor, codes_BSL: Tensor, k: int) -> Groups:
    """Order each group by (log-probability, row) and pad to k."""
    shape = rows_BGY.shape
    ties_GY = rows_BGY.flatten(0, 1) & 0xFFFF_FFFF  # padding (-1) goes last
    order = best_places(logprobs_BGY.flatten(0, 1), ties_GY, shape[2]).view(shape)
    codes = codes_BSL.view(*shape, -1).gather(
        2, order[..., None].expand(*shape, codes_BSL.shape[2])
    )
    missing = k - shape[2]
    return Groups(
        pad(rows_BGY.gather(2, order), (0, missing), value=NO_ROW),
        pad(logprobs_BGY.gather(2, order), (0, missing), value=-torch.inf),
        pad(codes, (0, 0, 0, missing), value=NO_ROW),
    )


def _choose_in_groups(
    keys_BGW: Tensor, options: Options, ties_BSC: Tensor | None, count: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Return chosen cells (numbered over all beams of the request) and their keys, (B, G, Y)."""
    num_requests, num_groups, width = keys_BGW.shape
    shape = num_requests, num_groups, width * options.steps_BSC.shape[2]
    keys_BGX = (keys_BGW.flatten(1)[..., None] + options.steps_BSC).reshape(shape)
    codes_BGX = options.codes_BSC.reshape(shape)
    places_X = torch.arange(shape[2], device=keys_BGX.device)
    ties_BGX = places_X.expand(shape) if ties_BSC is None else ties_BSC.reshape(shape)
    taken_BT = codes_BGX[:, 0, :0]
    cells, keys = [], []
    for group in range(num_groups):
        codes_BX = codes_BGX[:, group]
        again_BX = (codes_BX[..., None] == taken_BT[:, None]).sum(2)
        keys_BX = keys_BGX[:, group] - penalty * again_BX
        chosen_BY = best_places(keys_BX, ties_BGX[:, group], count)
        keys.append(keys_BX.gather(1, chosen_BY))
        cells.append(chosen_BY + group * shape[2])
        # Beams that hold nothing have chosen nothing.
        codes_BY = codes_BX.gather(1, chosen_BY).masked_fill(keys[-1] == -torch.inf, NO_ROW)
        taken_BT = torch.cat([taken_BT, codes_BY], 1)
    return torch.stack(cells, 1), torch.stack(keys, 1)
