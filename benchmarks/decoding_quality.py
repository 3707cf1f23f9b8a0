"""How much of the true list does a beam find, how often is it proven, and which scoring ranks best?

Runs on a trained bundle and the validation users of its data set. The truth is a beam that holds
every prefix. It fits nothing and times nothing.

    python -m benchmarks.decoding_quality BUNDLE DATASET [--users N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks import common
from genrec import runtime
from genrec.bundle import load_bundle
from genrec.data.dataset import Dataset
from genrec.decoding import CSRIndex, Scoring, invalid_mass
from genrec.evaluation.metrics import ndcg_at, recall_at
from genrec.evaluation.significance import paired_bootstrap
from genrec.inference import RankedLists, search
from genrec.models.base import Backbone, pad_histories

WIDTHS = (5, 10, 20, 50, 100, 200)
KS = (5, 10, 20)


class Case:
    """A model, the validation users and the way of searching."""

    def __init__(self, model: Backbone, constraint: CSRIndex, data: Any, masked: bool) -> None:
        self.model, self.constraint, self.masked = model, constraint, masked
        self.histories, self.targets = data
        self.exhaustive = max(constraint.num_nodes[:-1])

    def lists(self, width: int, scoring: Scoring = "renormalized") -> RankedLists:
        """Return the best 20 (or as many as the beam is wide) of every user."""
        return search(
            self.model,
            self.constraint,
            self.histories,
            width=width,
            k=min(width, KS[-1]),
            exclude=self.histories if self.masked else None,
            scoring=scoring,
            batch_size=32,
        )

    def metrics(self, lists: RankedLists, k: int = 10) -> dict[str, np.ndarray]:
        """Return recall and NDCG of the target, per user."""
        hit = lists.rows == self.targets[:, None]
        rank = np.where(hit.any(1), hit.argmax(1), -1)
        return {f"recall@{k}": recall_at(rank, k), f"ndcg@{k}": ndcg_at(rank, k)}


def beam_rows(case: Case) -> list[dict[str, Any]]:
    """Compare widths with the truth."""
    truth = case.lists(case.exhaustive)
    found = []
    for width in WIDTHS:
        lists = case.lists(width)
        for k in (k for k in KS if k <= width):
            top, best = lists.top(k), truth.rows[:, :k]
            shared = [len(np.intersect1d(a, b)) / k for a, b in zip(top.rows, best, strict=True)]
            found.append(
                {
                    "masked": case.masked,
                    "width": width,
                    "k": k,
                    "certified": float(top.certified.mean()),
                    "true_top_k_recall": float(np.mean(shared)),
                    "equal_lists": float((top.rows == best).all(1).mean()),
                    **{n: float(v.mean()) for n, v in case.metrics(lists).items() if k == 10},
                }
            )
    return found


def scoring_rows(case: Case) -> list[dict[str, Any]]:
    """Compare scorings on the same users, at the widest beam."""
    found, reference = [], None
    for scoring in get_args(Scoring):
        values = case.metrics(case.lists(WIDTHS[-1], scoring))
        reference = values if reference is None else reference
        row: dict[str, Any] = {"masked": case.masked, "scoring": scoring}
        for name, per_user in values.items():
            row[name] = float(per_user.mean())
            row[f"{name}_difference"] = paired_bootstrap(per_user, reference[name])
        found.append(row)
    return found


def invalid_rows(case: Case) -> list[dict[str, Any]]:
    """Return the quartiles over users of what the model spends on nothing, by scoring."""
    found = []
    for scoring in get_args(Scoring):
        mass = [
            invalid_mass(
                case.model,
                pad_histories(case.histories[i : i + 32], case.model.config.max_history),
                case.constraint,
                scoring=scoring,
            )
            for i in range(0, len(case.histories), 32)
        ]
        quartiles = torch.cat(mass).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        found.append({"scoring": scoring, "quartiles": [round(float(q), 4) for q in quartiles]})
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run both comparisons; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("dataset", type=Path, help="the prepared data set of the bundle")
    parser.add_argument("--users", type=int, default=None, help="first users only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    common.one_thread()
    bundle, dataset = load_bundle(arguments.bundle), Dataset.load(arguments.dataset)
    examples = dataset.interactions.examples("valid")
    users = range(len(examples))[: arguments.users]
    data = [examples.history(u) for u in users], examples.target_rows[list(users)]
    constraint = CSRIndex.from_index(bundle.index)
    cases = [Case(bundle.model, constraint, data, masked) for masked in (False, True)]
    result = {
        "dataset": dataset.name,
        "users": len(users),
        "items": len(bundle.index),
        "model": bundle.model.config.to_dict(),
        "machine": common.machine(),
        "commit": runtime.git_state().get("commit", "unknown"),
        "beams": [row for case in cases for row in beam_rows(case)],
        "scorings": [row for case in cases for row in scoring_rows(case)],
        "invalid_mass": invalid_rows(cases[0]),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
