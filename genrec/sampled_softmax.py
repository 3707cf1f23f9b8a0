"""Among which items is the target told apart, where the whole catalogue would take too long?

The items that a place has read already, each by itself, and random ones that stand for all others.
With all items drawn it is exactly the full softmax. It knows no network.

Seen items count one by one because random draws hold them rarely: a network trained on draws alone
never learns whether users take an item twice.

Shapes: B sequences, T places, P places with a target, N items, D width, M random items.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen_items(items_BT: Tensor, before_TT: Tensor) -> Tensor:
    """Return the items that each place has read, (B, T, T), each once, -1 for none.

    Args:
        items_BT: int64 item rows.
        before_TT: bool, which places (columns) a place (row) has read.
    """
    places = items_BT.shape[1]
    earlier_TT = torch.ones(places, places, dtype=torch.bool, device=items_BT.device).tril(-1)
    same_BTT = items_BT[:, :, None] == items_BT[:, None]
    again_BT = (same_BTT & earlier_TT).any(-1)
    seen_BTT = items_BT[:, None].expand(-1, places, -1)
    return seen_BTT.masked_fill(~before_TT | again_BT[:, None], -1)


def sampled_logits(
    target_scores_P: Tensor,
    drawn_scores_PM: Tensor,
    seen_scores_PT: Tensor,
    *,
    targets_P: Tensor,
    drawn_M: Tensor,
    seen_PT: Tensor,
    num_items: int,
    num_possible: int | None = None,
) -> Tensor:
    """Return logits (P, 1 + M + T) whose first column is the target.

    Drawn items stand for all that are neither target nor seen, so their logits rise by the
    logarithm of how many each stands for (Bengio and Senecal 2008, for uniform draws).

    Args:
        target_scores_P: scores of the targets.
        drawn_scores_PM: scores of the drawn items.
        seen_scores_PT: scores of the seen items; anything where there is none.
        targets_P: int64 target rows.
        drawn_M: int64 rows, all different; what a place counts already is left out there.
        seen_PT: int64 rows of items that each place has read, each once; -1 for none.
        num_items: N.
        num_possible: how many of them can be meant, those of all arguments among them; None: N.
    """
    seen_PT = seen_PT.masked_fill(seen_PT == targets_P[:, None], -1)
    num_drawn = len(drawn_M)
    column_N = drawn_M.new_full((num_items,), num_drawn)
    column_N[drawn_M] = torch.arange(num_drawn, device=drawn_M.device)
    counted = torch.cat([targets_P[:, None], seen_PT], dim=1)
    columns = torch.where(counted >= 0, column_N[counted.clamp(min=0)], num_drawn)
    known_PM = torch.zeros(
        len(targets_P), num_drawn + 1, dtype=torch.bool, device=targets_P.device
    ).scatter_(1, columns, True)[:, :num_drawn]
    possible = num_items if num_possible is None else num_possible
    others_P1 = (possible - (counted >= 0).sum(1, keepdim=True)).clamp(min=1)
    drawn_P1 = (~known_PM).sum(1, keepdim=True).clamp(min=1)
    drawn_scores_PM = drawn_scores_PM + torch.log(others_P1 / drawn_P1)
    return torch.cat(
        [
            target_scores_P[:, None],
            drawn_scores_PM.masked_fill(known_PM, -torch.inf),
            seen_scores_PT.masked_fill(seen_PT < 0, -torch.inf),
        ],
        dim=1,
    )
