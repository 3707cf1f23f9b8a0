"""What do a few users get, and why? Sample lists with the shared prefix that explains each item.

It searches the lists of three test users. An explanation is a fact about semantic IDs: which item
of the history begins with the same codes; it says nothing about the network.

Shapes: N items, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from genrec.bundle import mode_name
from genrec.data import Catalog, Dataset
from genrec.evaluation.report_parts import ListedItem, Sample, SharedPrefix
from genrec.item_index import ItemIndex
from genrec.recommender import Recommender

SAMPLE_USERS, SAMPLE_HISTORY, SAMPLE_ITEMS = 3, 5, 5


def samples(bundle: Path, dataset: Dataset) -> list[Sample]:
    """Return example users: titles of their last items, what is recommended, and why.

    Users are the first, the middle and the last one with a test target; they are named by nothing.
    """
    recommender = Recommender.from_pretrained(bundle)
    examples = dataset.interactions.examples("test")
    chosen = np.unique(np.linspace(0, len(examples) - 1, SAMPLE_USERS).astype(int))
    ids, titles = dataset.catalog.item_ids, dataset.catalog.titles
    times = examples.history_times()
    found = recommender.recommend(
        [[ids[row] for row in examples.history(int(i))] for i in chosen],
        SAMPLE_ITEMS,
        exclude_seen=mode_name(True) in recommender.calibrators,
        times=None if times is None else [times[int(i)] for i in chosen],
        users=[str(examples.user_rows[int(i)]) for i in chosen],
    )
    read = recommender.model.config.max_history

    def listed(row: int) -> ListedItem:
        return ListedItem(ids[row], titles[row])

    result = []
    for place, example in enumerate(chosen):
        history = examples.history(int(example))
        target = int(examples.target_rows[example])
        items = [item for item in found.item_ids[place] if item is not None]
        rows = recommender.index.rows_of(items)
        recommended = [
            ListedItem(
                ids[row],
                titles[row],
                float(found.probabilities[place, j]),
                bool(row == target),
                shared_prefix(recommender.index, int(row), history[-read:], dataset.catalog),
            )
            for j, row in enumerate(rows)
        ]
        shown = [listed(int(row)) for row in history[-SAMPLE_HISTORY:]]
        result.append(Sample(f"User {place + 1}", shown, recommended, listed(target)))
    return result


def shared_prefix(
    index: ItemIndex, row: int, history_rows: np.ndarray, catalog: Catalog | None = None
) -> SharedPrefix | None:
    """Return the item of a history whose semantic ID begins most like that of an item.

    Args:
        index: gives the codes.
        row: the item.
        history_rows: rows of the history, oldest first; of equally like ones the latest is taken.
        catalog: gives titles.

    Returns:
        None for an empty history.
    """
    history = np.asarray(history_rows, dtype=np.int64)
    if not len(history):
        return None
    codes_NL = index.codes
    lengths = (codes_NL[history] == codes_NL[row]).cumprod(axis=1).sum(axis=1)
    last = len(history) - 1 - int(np.argmax(lengths[::-1]))
    other, length = int(history[last]), int(lengths[last])
    title = None if catalog is None else catalog.titles[other]
    codes = [int(code) for code in codes_NL[row, :length]]
    return SharedPrefix(index.item_ids[other], title, codes, index.num_levels)


def stored(results: Mapping[str, Any]) -> list[Sample]:
    """Return the samples that results.json holds."""
    return [
        Sample(
            sample["label"],
            [_item(item) for item in sample["history"]],
            [_item(item) for item in sample["recommended"]],
            _item(sample["target"]) if sample.get("target") else None,
        )
        for sample in results.get("samples") or []
    ]


def _item(values: Mapping[str, Any]) -> ListedItem:
    shared = values.get("shared")
    known = {key: value for key, value in values.items() if key != "shared"}
    return ListedItem(**known, shared=SharedPrefix(**shared) if shared else None)


def explained(
    found: list[Sample], index: ItemIndex, read: int | None, dataset: Dataset | None
) -> list[Sample]:
    """Explain samples that were recorded without what explains them.

    The whole history that the model read (its last `read` items, None: unknown) is looked at where
    the data set is at hand, else the part that is shown.
    """
    if any(item.shared for sample in found for item in sample.recommended):
        return found
    explained = []
    for place, sample in enumerate(found):
        rows = index.rows_of([item.item_id for item in sample.history], missing="mark")
        whole = None if dataset is None else _whole_history(dataset, place, len(found))
        if whole is not None and np.array_equal(whole[-len(rows) :], rows):
            rows = whole[-read:] if read else whole
        titles = {item.item_id: item.title for item in sample.history}
        if dataset is not None:
            titles.update(zip(dataset.catalog.item_ids, dataset.catalog.titles, strict=True))
        items = [_with_reason(item, index, rows[rows >= 0], titles) for item in sample.recommended]
        explained.append(replace(sample, recommended=items))
    return explained


def _whole_history(dataset: Dataset, place: int, count: int) -> np.ndarray:
    """Return the history of the place-th of `count` sample users, as `samples` chooses them."""
    examples = dataset.interactions.examples("test")
    chosen = np.unique(np.linspace(0, len(examples) - 1, count).astype(int))
    return examples.history(int(chosen[place % len(chosen)]))


def _with_reason(
    item: ListedItem, index: ItemIndex, rows: np.ndarray, titles: Mapping[str, str | None]
) -> ListedItem:
    row = int(index.rows_of([item.item_id], missing="mark")[0])
    shared = None if row < 0 else shared_prefix(index, row, rows)
    if shared is None:
        return item
    return replace(item, shared=replace(shared, title=titles.get(shared.item_id)))
