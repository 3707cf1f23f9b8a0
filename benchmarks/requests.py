"""How long does one user wait for a bundle's answer, and what would a batch have cost?

`Recommender.recommend` as a product calls it: item ids in, ten items with calibrated probabilities
out, seen items left out, the bundle's own beam, one thread. The same users are asked one by one and
in batches; the lists must be equal. The histories are those of the data set's test users, drawn at
random. Beside the medians stand the 99th percentiles: a service is as good as its slow answers.

    genrec run configs/genrec.yaml data=DATASET --out RUN
    python -m benchmarks.requests RUN/bundle DATASET [--requests N] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from genrec.data import Dataset
from genrec.recommender import Recommendations, Recommender

BATCH = 64
K = 10
WARM_UP = 30


def histories_of(dataset: Dataset, num_requests: int, seed: int = 0) -> list[list[str]]:
    """Return what different test users took, as item ids; all users where there are fewer."""
    test = dataset.interactions.examples("test")
    ids = dataset.catalog.item_ids
    chosen = np.random.default_rng(seed).permutation(len(test))[:num_requests]
    return [[ids[row] for row in test.history(user)] for user in chosen]


def ask(
    recommender: Recommender, groups: Sequence[Sequence[Sequence[str]]]
) -> tuple[np.ndarray, np.ndarray, list[Recommendations]]:
    """Answer groups of histories; return CPU and wall milliseconds of each group, and answers."""
    times, answers = [], []
    for group in groups:
        # An item that the bundle does not know is an error: the data set is another one.
        timing = common.timed(
            lambda group=group: answers.append(recommender.recommend(group, K, missing="error"))
        )
        times.append(timing)
    cpu, wall = 1000 * np.array(times).T
    return cpu, wall, answers


def latency(recommender: Recommender, histories: list[list[str]], runs: int) -> common.Row:
    """Time requests one by one and in batches, in turn; lists of both are compared."""
    alone = [[history] for history in histories]
    together = [histories[i : i + BATCH] for i in range(0, len(histories), BATCH)]
    ask(recommender, alone[:WARM_UP])
    ones, shares = [], []
    for _ in range(runs):
        cpu, wall, answers = ask(recommender, alone)
        ones.append((cpu, wall))
        cpu, _, batches = ask(recommender, together)
        shares.append(cpu.sum() / len(histories))
    lists = [np.concatenate([part.item_ids for part in side]) for side in (answers, batches)]
    cpu, wall = (np.concatenate(side) for side in zip(*ones, strict=True))
    p50, p99 = np.quantile(cpu, [0.5, 0.99])
    share = float(np.median(shares))
    details: dict[str, Any] = {
        "requests": len(histories),
        "runs": runs,
        "p50_cpu_ms": float(p50),
        "p99_cpu_ms": float(p99),
        "p50_wall_ms": float(np.quantile(wall, 0.5)),
        "p99_wall_ms": float(np.quantile(wall, 0.99)),
        "share_of_a_batch_cpu_ms": share,
        "batch": BATCH,
        "k": K,
        "width": recommender.width,
        "items": len(recommender.index),
        "model": recommender.model.config.to_dict(),
    }
    equal = np.array_equal(*lists)
    case, baseline = "one request, p50", f"share of a batch of {BATCH}"
    return common.Row(case, baseline, p50, share, share / p50, "cpu_ms", equal, details)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Time a bundle; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("dataset", type=Path, help="the prepared data set of the bundle")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3, help="how often each is asked")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if min(arguments.requests, arguments.runs) < 1:
        parser.error("--requests and --runs: expected 1 or more")
    common.one_thread()
    recommender = Recommender.from_pretrained(arguments.bundle, device="cpu")
    histories = histories_of(Dataset.load(arguments.dataset), arguments.requests)
    if not histories:
        parser.error(f"{arguments.dataset} has no test users, expected a data set with some")
    return common.report([latency(recommender, histories, arguments.runs)], arguments.json)


if __name__ == "__main__":
    main()
