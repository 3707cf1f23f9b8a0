"""NDCG@10 and Recall@10 by real constrained search on a fixed sample of users.

The figure that early stopping and the choice of the best weights go by. Seen items stay in, as in
the protocol's unmasked rows; it never touches test targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from genrec.data.interactions import Examples
from genrec.decoding import CSRIndex
from genrec.evaluation import metrics
from genrec.inference import context_of, evaluating, read_batch, search
from genrec.models.base import Backbone, Batch

K = 10
BATCH_SIZE = 64


class Validator:
    """Scores a model on validation targets.

    Args:
        examples: validation examples.
        constraint: item index on the model's device.
        num_users: size of the sample (all if there are fewer).
        width: beam width.
        seed: draws the sample; the same in every validation of a run.
    """

    def __init__(
        self, examples: Examples, constraint: CSRIndex, *, num_users: int, width: int, seed: int
    ) -> None:
        chosen = np.arange(len(examples))
        if len(examples) > num_users:
            rng = np.random.default_rng([seed, 3])
            chosen = np.sort(rng.choice(len(examples), num_users, replace=False))
        self.examples = examples.select(chosen)
        self.constraint = constraint
        self.width = width

    def show_targets(self, model: Backbone) -> None:
        """Let a model that learns from these targets do so; every process shows it all of them."""
        with evaluating(model):
            model.meet_targets(self._batches(model))

    def _batches(self, model: Backbone) -> Iterator[Batch]:
        histories, context = self.examples.histories(), context_of(model, self.examples)
        order = np.argsort([len(history) for history in histories], kind="stable")
        targets = torch.from_numpy(np.asarray(self.examples.target_rows, dtype=np.int64))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = read_batch(model, histories, chosen, context)
            yield replace(batch, target_B=targets[chosen]).to(model.device)

    def __call__(self, model: Backbone, accelerator: Accelerator) -> dict[str, float]:
        """Return {"ndcg@10", "recall@10", "certified"}; every process searches its share."""
        self.show_targets(model)
        share = np.arange(accelerator.process_index, len(self.examples), accelerator.num_processes)
        mine = self.examples.select(share)
        k = min(K, self.constraint.num_items)
        lists = search(
            model,
            self.constraint,
            mine.histories(),
            width=self.width,
            k=k,
            context=context_of(model, mine),
        )
        ranks = metrics.ranks_in_lists(lists.rows, mine.target_rows)
        sums = torch.tensor(
            [
                metrics.ndcg_at(ranks, k).sum(),
                metrics.recall_at(ranks, k).sum(),
                lists.certified.sum(),
                len(share),
            ],
            dtype=torch.float64,
            device=accelerator.device,
        )
        ndcg, recall, certified, count = accelerator.reduce(sums, "sum").tolist()
        return {
            "ndcg@10": ndcg / count,
            "recall@10": recall / count,
            "certified": certified / count,
        }
