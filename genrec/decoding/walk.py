"""How do many beams of a request go down the tree together, whoever chooses their way?

Shared by sampling and by diverse groups. Distinct prefixes of a request run once, and settled beams
go on without the model. It chooses nothing itself. Unlike `beam.Search` it reads sizes back from
the device at each level.

Shapes: B requests, S beams of a request, U distinct open prefixes of a request, R = B*U rows,
C columns of children, Y chosen beams, L levels, X any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genrec.decoding.beam import step_logprobs
from genrec.decoding.csr import CSRIndex
from genrec.decoding.exact import distinct
from genrec.decoding.filters import NodeFilter
from genrec.decoding.levels import take
from genrec.decoding.protocol import NO_ROW, Filters, Scoring, StepModel, speaker


@dataclass(frozen=True)
class Options:
    """How each beam may go on by one code.

    Args:
        steps_BSC: log-probability of each child, -inf where there is none.
        states_BSC: the children.
        codes_BSC: their codes.
    """

    steps_BSC: Tensor
    states_BSC: Tensor
    codes_BSC: Tensor


class Walk:
    """Takes the beams of B requests down the tree; the model sees each distinct prefix once.

    `nodes_BS` are the beams' nodes; a walk begins with one beam per request at the root. After
    `num_steps` steps each node holds one item. With `top_p` the steps are probabilities to draw
    with: among the codes that the request may take, and of these the fewest most likely ones with
    at least `top_p` together. Without, they are those of the search.
    """

    def __init__(
        self,
        model: StepModel,
        batch: Any,
        constraint: CSRIndex,
        filters: Filters | None,
        *,
        scoring: Scoring = "renormalized",
        temperature: float = 1.0,
        top_p: float | None = None,
    ) -> None:
        self.model, self.constraint, self.scoring = speaker(model, scoring), constraint, scoring
        self.temperature, self.top_p = temperature, top_p
        self.logits_RK, self.state = self.model.begin(batch)
        self.num_requests, self.device = len(self.logits_RK), self.logits_RK.device
        self.rules = None if filters is None else NodeFilter(constraint, filters, self.num_requests)
        self.num_steps = 1 + next(
            n
            for n in range(constraint.depth)
            if n == constraint.depth - 1 or constraint.num_unsettled(n + 1, scoring) == 0
        )
        self.nodes_BS = torch.zeros(self.num_requests, 1, dtype=torch.int64, device=self.device)
        self.slots_BS = self.nodes_BS  # the row of the model's last call that each beam extends
        self.num_slots = 1

    def options(self, logprobs_BS: Tensor, level: int) -> Options:
        """Return what each beam may choose next. Settled beams have one choice, which is free."""
        live_BS = logprobs_BS != -torch.inf
        open_BS = live_BS
        if level:
            open_BS = live_BS & ~self.constraint.is_settled(self.nodes_BS, level, self.scoring)
        slots_BS, nodes_BU = self._run(open_BS, level)
        only_BS = self.constraint.only_child(self.nodes_BS, level)
        codes_BS = take(self.constraint.levels[level].codes, only_BS).long()
        if nodes_BU.shape[1] == 0:
            steps_BS = torch.where(live_BS, 0.0, -torch.inf)
            return Options(steps_BS[..., None], only_BS[..., None], codes_BS[..., None])
        return self._mixed(open_BS, live_BS, slots_BS, nodes_BU, only_BS, codes_BS, level)

    def _run(self, open_BS: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Run the model on the distinct open prefixes; return each beam's slot and the nodes."""
        if level == 0:
            self.slots_BS = torch.zeros_like(self.nodes_BS)
            return self.slots_BS, self.nodes_BS[:, :1]
        first_B1 = torch.arange(self.num_requests, device=self.device)[:, None] * self.num_slots
        parents_BS = first_B1 + self.slots_BS.clamp(max=max(self.num_slots - 1, 0))
        slots_BS, (nodes_BU, parents_BU) = distinct(self.nodes_BS, open_BS, parents_BS)
        self.slots_BS, self.num_slots = slots_BS, nodes_BU.shape[1]
        if self.num_slots:
            codes_BU = take(self.constraint.levels[level - 1].codes, nodes_BU).long()
            self.logits_RK, self.state = self.model.step(
                codes_BU.reshape(-1), self.state, parents_BU.reshape(-1)
            )
        return slots_BS, nodes_BU

    def _mixed(
        self,
        open_BS: Tensor,
        live_BS: Tensor,
        slots_BS: Tensor,
        nodes_BU: Tensor,
        only_BS: Tensor,
        codes_BS: Tensor,
        level: int,
    ) -> Options:
        num_slots = nodes_BU.shape[1]
        expansion = self.constraint.levels[level].expand(nodes_BU.reshape(-1))
        valid_RC = expansion.valid_RC
        if self.rules is not None:
            used_B1 = torch.where(open_BS, slots_BS, -1).amax(1, keepdim=True)
            live_BU = torch.arange(num_slots, device=self.device) <= used_B1
            valid_RC = self.rules.apply(expansion, nodes_BU, live_BU, level)
        logits_RK = self.logits_RK if self.scoring == "raw" else self.logits_RK / self.temperature
        steps_RC = step_logprobs(expansion, logits_RK, self.scoring)
        steps_RC = steps_RC.masked_fill(~valid_RC, -torch.inf)
        if self.top_p is not None:
            steps_RC = _nucleus(_among_themselves(steps_RC), self.top_p)
        codes_RC = self.constraint.children(nodes_BU.reshape(-1), level).codes_RC
        shape = *nodes_BU.shape, steps_RC.shape[1]
        at_BS1 = slots_BS.clamp(max=num_slots - 1)[..., None].expand(-1, -1, shape[2])
        steps_BSC, states_BSC, found_BSC = (
            values.reshape(shape).gather(1, at_BS1)
            for values in (steps_RC, expansion.states(), codes_RC)
        )
        # A settled beam goes on to its only child, in column 0; a dead one stays dead.
        closed_BS1, first_C = ~open_BS[..., None], torch.arange(shape[2], device=self.device) == 0
        free_BSC = torch.where(first_C & live_BS[..., None], 0.0, -torch.inf)
        return Options(
            torch.where(closed_BS1, free_BSC, steps_BSC),
            torch.where(closed_BS1, only_BS[..., None], states_BSC),
            torch.where(closed_BS1, codes_BS[..., None], found_BSC),
        )

    def move(self, options: Options, cells_BY: Tensor) -> None:
        """Go to chosen cells, numbered beam by beam."""
        self.nodes_BS = options.states_BSC.flatten(1).gather(1, cells_BY)
        beams_BY = cells_BY // options.states_BSC.shape[2]
        self.slots_BS = self.slots_BS.gather(1, beams_BY)

    def rows_of(self, nodes_X: Tensor) -> Tensor:
        """Return the catalogue rows below nodes that the last step leads to."""
        return self.constraint.row(self.constraint.first_position(nodes_X, self.num_steps))

    def items(self, logprobs_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and codes where the walk has ended, -1 for dead beams."""
        empty_BS = logprobs_BS == -torch.inf
        positions_BS = self.constraint.first_position(self.nodes_BS, self.num_steps)
        rows_BS = self.constraint.row(positions_BS).masked_fill(empty_BS, NO_ROW)
        codes_BSL = self.constraint.codes(positions_BS)
        return rows_BS, codes_BSL.masked_fill(empty_BS[..., None], NO_ROW)


def _nucleus(steps_RC: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely columns with at least `top_p` together, and renormalise."""
    if top_p >= 1:
        return steps_RC
    sorted_RC, order_RC = steps_RC.sort(dim=1, descending=True, stable=True)
    before_RC = sorted_RC.exp().cumsum(1) - sorted_RC.exp()
    kept_RC = torch.zeros_like(before_RC, dtype=torch.bool).scatter_(1, order_RC, before_RC < top_p)
    kept_RC[torch.arange(len(kept_RC), device=kept_RC.device), order_RC[:, 0]] = True
    return _among_themselves(steps_RC.masked_fill(~kept_RC, -torch.inf))


def _among_themselves(steps_RC: Tensor) -> Tensor:
    """Return log-probabilities that sum to 1 in each row; rows without any child stay at -inf."""
    return steps_RC - steps_RC.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0, nan=torch.nan)
