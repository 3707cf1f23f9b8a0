"""How do new items enter an index that a model was trained on, and do they look like the old ones?

With the frozen tokenizer and the policy of the index; no existing code changes and nothing is
trained. Everything is placed and written, or nothing is. What finds no place is listed; where
places are free is decided in `genrec.tokenizers.collisions.insertion`.

Shapes: M new items, L levels of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genrec.data import Catalog
from genrec.errors import MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.pipeline.drift import drift_figures
from genrec.pipeline.index_folder import Target, align, open_target
from genrec.pipeline.indexing import OWN_CODES, BuiltIndex
from genrec.pipeline.new_vectors import NO_TEXT, embed_new_items
from genrec.runtime import get_logger
from genrec.tokenizers.base import IntArray, ItemTokenizer
from genrec.tokenizers.collisions.insertion import Placed, place
from genrec.tokenizers.diagnostics.agreement import reconstruction_distances

log = get_logger(__name__)

MAX_LISTED = 20
PRESENT = "its id is in the index already"


@dataclass
class _Newcomers:
    """New items on their way: what is left of them, and why the others were refused."""

    catalog: Catalog
    reasons: dict[str, str]

    def refuse(self, bad: Sequence[bool] | np.ndarray, reason: str) -> None:
        """Take out the items where `bad` holds."""
        ids = self.catalog.item_ids
        rows = np.flatnonzero(bad)
        self.refuse_each({ids[row]: reason for row in rows})

    def refuse_each(self, reasons: dict[str, str]) -> None:
        """Take out items by id, each for a reason of its own."""
        self.reasons |= reasons
        ids = self.catalog.item_ids
        self.catalog = self.catalog.select([r for r, i in enumerate(ids) if i not in reasons])


def add_items(
    path: Path,
    items: Catalog,
    *,
    vectors: Path | None = None,
    out: Path | None = None,
    skip: bool = False,
) -> dict[str, Any]:
    """Add items to the index of a folder, atomically.

    Args:
        path: a bundle, a folder that `genrec tokenize` wrote, or an index with the tokenizer beside
            it.
        items: new items with their texts.
        vectors: their vectors (a file with ids, an npy file or a vectors artifact in the order of
            `items`); default: computed by the extractor that the index records.
        out: where to write the extended folder; default: `path` itself.
        skip: leave out what cannot be placed instead of refusing everything.

    Returns:
        `path`, `num_added`, `num_items`, `index_fingerprint` and `previous_fingerprint`, `policy`,
        `items` (`item_id`, `codes`, and where codes stand for vectors `distance` and
        `percentile`), `refused` (`item_id`, `reason`), and `drift` (see `drift_figures`; None where
        codes do not stand for vectors).

    Raises:
        UserError: items that cannot be placed (all are listed), or a folder that cannot grow.
        MismatchError: the parts of the folder, or the extractor, are not those of the index.
    """
    target = open_target(path)
    tokenizer, built = ItemTokenizer.load(target.tokenizer), target.built()
    policy = _policy(tokenizer, built, target)
    items = align(items, target.catalog(), built.notes.get("columns"))
    new = _Newcomers(items, {})
    new.refuse(built.index.rows_of(items.item_ids, missing="mark") >= 0, PRESENT)
    _add_vectors(new, tokenizer, built, target, vectors)
    codes = _encode(new, tokenizer)
    placed = _place(new, tokenizer, built.index, policy, codes)
    refused = [{"item_id": i, "reason": new.reasons[i]} for i in items.item_ids if i in new.reasons]
    if refused and (not skip or not len(placed.rows)):
        raise UserError(_refusal(refused, len(items), skip))
    kept = new.catalog.select(placed.rows)
    grown = _grow(built, kept, codes[placed.rows], placed.codes[placed.rows])
    distances = (
        reconstruction_distances(tokenizer, kept, codes[placed.rows]) if tokenizer.decodes else None
    )
    target.write(out or path, grown, kept)
    drift, percentile = drift_figures(distances, built.arrays)
    return {
        "path": str(out or path),
        "num_added": len(kept),
        "num_items": len(grown.index),
        "policy": policy,
        "index_fingerprint": grown.index.fingerprint,
        "previous_fingerprint": built.index.fingerprint,
        "refused": refused,
        "drift": drift,
        "items": _items(kept, grown.index, distances, percentile),
    }


def _policy(tokenizer: ItemTokenizer, built: BuiltIndex, target: Target) -> str:
    if not tokenizer.codes_new_items:
        raise UserError(
            f"tokenizer {tokenizer.name!r} cannot code new items: it numbers the items that it was "
            "fitted on. Fit it again on the whole catalogue (`genrec tokenize`), or choose a "
            "tokenizer that codes new items (docs/tokenizers.md)."
        )
    policy = built.notes.get("collisions")
    if policy is None:
        raise UserError(
            f"the index at {str(target.index)!r} does not say by which collision policy it was "
            "built, so new items cannot be placed. Build it again: `genrec tokenize`."
        )
    return str(policy)


def _add_vectors(
    new: _Newcomers,
    tokenizer: ItemTokenizer,
    built: BuiltIndex,
    target: Target,
    vectors: Path | None,
) -> None:
    """Check texts and put vectors into the new items, where the tokenizer needs them."""
    if "texts" in tokenizer.needs and len(new.catalog):
        new.refuse([not text.strip() for text in new.catalog.texts()], NO_TEXT)
    needed = "vectors" in tokenizer.needs or target.reads_content()
    if not needed or not len(new.catalog):
        return
    found, reasons = embed_new_items(
        new.catalog, vectors=vectors, tokenizer=tokenizer, built=built, known=target.catalog()
    )
    rows = [row for row, item in enumerate(new.catalog.item_ids) if item not in reasons]
    new.refuse_each(reasons)
    new.catalog = new.catalog.with_vectors(found[rows], built.notes.get("content_columns"))


def _encode(new: _Newcomers, tokenizer: ItemTokenizer) -> IntArray:
    """Return codes (M, L) of the items that the tokenizer can code; the others are refused."""
    codes, reasons = isolate(new.catalog, tokenizer.encode)
    new.refuse_each(reasons)
    empty = np.empty((0, len(tokenizer.codebook_sizes)), np.int32)
    return np.concatenate([empty, *codes]).astype(np.int32)


def isolate(
    catalog: Catalog, call: Callable[[Catalog], np.ndarray]
) -> tuple[list[np.ndarray], dict[str, str]]:
    """Return results for the items that `call` can handle, and the errors of those that it cannot.

    `call` looks at each item alone. If it raises, halves are tried, so that one bad item among M
    costs about 2 log M calls.

    Args:
        catalog: M items.
        call: returns one line per item or raises `UserError`.

    Returns:
        parts of the results in row order, and by item id the first line of the error.
    """
    if not len(catalog):
        return [], {}
    try:
        return [call(catalog)], {}
    except MismatchError:
        raise
    except UserError as error:
        if len(catalog) == 1:
            return [], {catalog.item_ids[0]: str(error).splitlines()[0]}
    middle = len(catalog) // 2
    halves = (np.arange(middle), np.arange(middle, len(catalog)))
    (first, one), (second, other) = (isolate(catalog.select(rows), call) for rows in halves)
    return first + second, one | other


def _place(
    new: _Newcomers, tokenizer: ItemTokenizer, index: ItemIndex, policy: str, codes: IntArray
) -> Placed:
    catalog = new.catalog
    placed = place(
        index,
        policy,
        catalog.item_ids,
        codes,
        tokenizer.codebook_sizes,
        distances=lambda rows: tokenizer.last_level_distances(catalog.select(rows)),
    )
    reasons = zip(catalog.item_ids, placed.reasons, strict=True)
    new.reasons |= {item: reason for item, reason in reasons if reason is not None}
    return placed


def _refusal(refused: Sequence[dict[str, str]], num_items: int, skip: bool) -> str:
    """Say which items were refused and why, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for entry in refused:
        groups.setdefault(entry["reason"], []).append(entry["item_id"])
    lines, listed = [], 0
    for reason, ids in groups.items():
        shown = ids[: max(0, MAX_LISTED - listed)]
        listed += len(shown)
        more = f" and {len(ids) - len(shown)} more" if len(shown) < len(ids) else ""
        named = ", ".join(map(repr, shown)) or "items"
        lines.append(f"  {named}{more}: {reason}")
        if listed >= MAX_LISTED and len(lines) < len(groups):
            lines.append(f"  ... ({len(groups)} reasons in all)")
            break
    remedy = "nothing was changed. Correct or remove these items, or leave them out with --skip."
    if skip:
        remedy = "none is left to add. Correct the items."
    if any("taken" in reason or "no last code" in reason for reason in groups):
        remedy += (
            " Where all places are taken, the index has to be built again with more room "
            "(index.reserve for an extra level, or a larger tokenizer.codebook_size) and the model "
            "trained on it."
        )
    return f"{len(refused)} of {num_items} item(s) cannot be added; {remedy}\n" + "\n".join(lines)


def _grow(built: BuiltIndex, kept: Catalog, own_codes: IntArray, codes: IntArray) -> BuiltIndex:
    arrays = dict(built.arrays)
    if OWN_CODES in arrays:
        arrays[OWN_CODES] = np.concatenate([arrays[OWN_CODES], own_codes])
    return replace(built, index=built.index.add(kept.item_ids, codes), arrays=arrays)


def _items(
    kept: Catalog, index: ItemIndex, distances: np.ndarray | None, percentile: np.ndarray | None
) -> list[dict[str, Any]]:
    codes = index.codes_of(kept.item_ids).tolist()
    entries: list[dict[str, Any]] = []
    for row, item in enumerate(kept.item_ids):
        entry = {"item_id": item, "title": kept.titles[row], "codes": codes[row]}
        if distances is not None:
            entry["distance"] = float(distances[row])
        if percentile is not None:
            entry["percentile"] = float(percentile[row])
        entries.append(entry)
    return entries
