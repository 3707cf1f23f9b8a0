"""Is the sampled softmax its formula, and the full softmax when everything is drawn?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from genrec.sampled_softmax import sampled_logits, seen_items

TARGETS = torch.tensor([0, 3, 3, 8, 1])
SEEN = torch.tensor([[1, 2], [3, -1], [5, 3], [-1, -1], [7, 0]])


def logits_of(scores: torch.Tensor, drawn: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return sampled_logits(
        scores[torch.arange(5), TARGETS],
        scores[:, drawn],
        scores.gather(1, seen.clamp(min=0)),
        targets_P=TARGETS,
        drawn_M=drawn,
        seen_PT=seen,
        num_items=9,
    )


@pytest.mark.parametrize("seen", [SEEN, torch.full_like(SEEN, -1)])
def test_with_all_items_drawn_it_is_the_full_softmax(seen):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 9, generator=generator)
    logits = logits_of(scores, torch.randperm(9, generator=generator), seen)
    found = cross_entropy(logits, torch.zeros_like(TARGETS), reduction="none")
    expected = cross_entropy(scores, TARGETS, reduction="none")
    torch.testing.assert_close(found, expected)


def test_drawn_items_stand_for_all_that_are_neither_target_nor_seen():
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    drawn = torch.tensor([3, 5, 7])
    found = cross_entropy(
        logits_of(scores, drawn, SEEN), torch.zeros_like(TARGETS), reduction="none"
    )
    for row, target, known, value in zip(
        scores, TARGETS.tolist(), SEEN.tolist(), found, strict=True
    ):
        counted = {target, *known} - {-1}
        others = [row[i].exp() for i in drawn.tolist() if i not in counted]
        rest = sum(others) * (9 - len(counted)) / len(others)
        total = rest + sum(row[i].exp() for i in counted)
        torch.testing.assert_close(value, total.log() - row[target])


def test_each_seen_item_counts_once():
    items = torch.tensor([[4, 2, 4, 7], [1, 1, 3, 0]])
    read = torch.ones(4, 4, dtype=torch.bool).tril()
    kept = [
        [sorted(i for i in row if i >= 0) for row in s] for s in seen_items(items, read).tolist()
    ]
    assert kept[0] == [[4], [2, 4], [2, 4], [2, 4, 7]]
    assert kept[1] == [[1], [1], [1, 3], [0, 1, 3]]
    kept = [[i for i in row if i >= 0] for row in seen_items(items, read.tril(-1))[0].tolist()]
    assert kept == [[], [4], [4, 2], [4, 2]]
