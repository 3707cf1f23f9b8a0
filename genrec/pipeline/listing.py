"""What does a generator recommend to all users of a split, and how fast? The stage "lists".

It searches and writes; what the lists are worth is measured elsewhere.

Shapes: U users with a target, W list length (the beam width).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from genrec.artifacts import Artifact, save_artifact, write_json_atomic
from genrec.bundle import load_model
from genrec.data import Dataset
from genrec.data.interactions import SplitName
from genrec.decoding import CSRIndex
from genrec.decoding.protocol import Scoring
from genrec.errors import DataError
from genrec.evaluation import metrics, search_quality
from genrec.inference import RankedLists, context_of, search
from genrec.item_index import ItemIndex


def make_lists(
    path: Path,
    dataset: Dataset,
    index: ItemIndex,
    model: Artifact,
    *,
    split: SplitName,
    masked: bool,
    width: int,
    scoring: Scoring,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """Search the best `width` items for every user of a split (artifact "lists").

    What the search took lies beside the artifact, not in it: the same lists have one fingerprint,
    however long they took.
    """
    examples = dataset.interactions.examples(split)
    if not len(examples):
        raise DataError(
            f"data set {dataset.name!r} has no {split} targets. Expected users with at least 3 "
            "interactions (leave-one-out); see `genrec doctor`."
        )
    network = load_model(model.path, index).to(accelerator.device)
    spent: list[tuple[int, float]] = []
    constraint = CSRIndex.from_index(index).to(accelerator.device)
    depth = min(width, len(index))
    # Interleaved shares of equal size (the last ones repeat a user), so that gathering is a
    # plain all-gather.
    share = -(-len(examples) // accelerator.num_processes)
    mine = (np.arange(share) * accelerator.num_processes + accelerator.process_index) % len(
        examples
    )
    histories = [examples.history(int(i)) for i in mine]
    found = search(
        network,
        constraint,
        histories,
        width=depth,
        k=depth,
        scoring=scoring,
        exclude=histories if masked else None,
        context=context_of(network, examples.select(mine)),
        batch_size=batch_size,
        description=f"search {split}",
        on_batch=lambda requests, seconds: spent.append((requests, seconds)),
    )
    lists = _gather(found, mine, len(examples), accelerator)
    if accelerator.is_main_process:
        save_artifact(
            path,
            kind="lists",
            arrays={
                "rows": lists.rows.astype(np.int32),
                "logprobs": lists.logprobs.astype(np.float32),
                "certified": lists.certified,
                "num_eligible": lists.num_eligible,
                "target_rows": examples.target_rows,
                "user_rows": examples.user_rows,
            },
            upstream={"model": model.fingerprint, "dataset": dataset.fingerprint},
            extra={"split": split, "masked": masked, "width": depth, "scoring": scoring},
        )
        write_json_atomic(_timing_file(path), _latency(spent, batch_size, accelerator))


def _gather(
    found: RankedLists, mine: np.ndarray, total: int, accelerator: Accelerator
) -> RankedLists:
    """Collect every process's share, in the order of the examples."""
    parts = (mine, found.rows, found.logprobs, found.certified, found.num_eligible)
    gathered = [
        accelerator.gather(torch.from_numpy(np.ascontiguousarray(part)).to(accelerator.device))
        for part in parts
    ]
    places, *arrays = [part.cpu().numpy() for part in gathered]
    _, first = np.unique(places, return_index=True)
    assert len(first) == total
    return RankedLists(*[array[first] for array in arrays])


def _latency(
    spent: Sequence[tuple[int, float]], batch_size: int, accelerator: Accelerator
) -> dict[str, Any]:
    """Return what requests took, each its share of its batch, and what batches took."""
    requests, seconds = (np.array(part) for part in zip(*spent, strict=True))
    batches = search_quality.latency(seconds)
    return {
        **search_quality.latency(np.repeat(seconds / requests, requests)),
        "batch_p50_ms": batches["p50_ms"],
        "batch_p95_ms": batches["p95_ms"],
        "batch_size": batch_size,
        "device": _device_name(accelerator.device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"


def _timing_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.timing.json")


def read_latency(artifact: Artifact) -> dict[str, Any] | None:
    """Return what the search behind a "lists" artifact took; None where that is not known."""
    path = _timing_file(artifact.path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_lists(artifact: Artifact) -> tuple[RankedLists, np.ndarray]:
    """Return the lists and the target rows (U,) of a "lists" artifact."""
    arrays = artifact.arrays
    lists = RankedLists(
        arrays["rows"].astype(np.int64),
        arrays["logprobs"].astype(np.float64),
        arrays["certified"],
        arrays["num_eligible"],
    )
    return lists, arrays["target_rows"]


def list_values(artifact: Artifact, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return per-user recall and NDCG of a "lists" artifact; lists shorter than k are padded."""
    lists, targets = read_lists(artifact)
    rows = lists.rows
    if rows.shape[1] < max(ks):
        rows = np.pad(rows, ((0, 0), (0, max(ks) - rows.shape[1])), constant_values=-1)
    return metrics.list_metrics(rows, targets, ks)
