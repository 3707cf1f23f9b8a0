"""Raw data in, a dataset folder out: filters, order, split, catalogue, and a record of each choice.

Raw user ids stay in memory: users become rows numbered by first appearance in the file. The same
input and choices give the same fingerprint on every machine with the same libraries.

Shapes: M events, U users, N items.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from genrec import assets
from genrec.artifacts import fingerprint, write_text_atomic
from genrec.config import StrictConfig, parse_component
from genrec.data import splits
from genrec.data.catalog import ITEM_ID, Catalog
from genrec.data.dataset import Dataset
from genrec.data.events import Events, read_events
from genrec.data.filters import (
    chronological,
    keep_core,
    keep_duplicates,
    keep_users,
    tie_statistics,
)
from genrec.data.interactions import SPLITS, Interactions
from genrec.data.source import Source, SourceConfig
from genrec.errors import ConfigError, DataError, UserError
from genrec.runtime import get_logger, load_object, progress

logger = get_logger("data.prepare")
ASSET = "asset:"


class PrepareConfig(StrictConfig):
    """The choices between raw events and a dataset; all of them are recorded in it."""

    name: str | None = None
    """Name of the data set in results; null: from the path."""
    min_user_interactions: int = Field(default=5, ge=1)
    """k-core: users with fewer are dropped (5 in the field's protocol)."""
    min_item_interactions: int = Field(default=5, ge=1)
    """k-core: items with fewer are dropped (5 in the field's protocol)."""
    sample_users: int | None = Field(default=None, ge=1)
    """Keep this many users, those whose ids have the smallest MD5 (before the k-core); for quick
    comparisons on large data. null: all users."""
    rating_threshold: float | None = None
    """Events rated lower are left out; null: keep all."""
    keep_ratings: bool = False
    """Keep the ratings in the dataset, for instructions that ask for them."""
    duplicates: Literal["first", "last", "keep"] = "first"
    """Several events of one user with one item: keep the first or the last in time, or all."""
    ties: Literal["file", "hash"] | None = None
    """Equal timestamps of a user: order of the file, or MD5 of "user|item"; null: the source's
    default (hash; file for sequences and for data without timestamps). hash on sequences with
    timestamps orders by time instead of by the file."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be parsed: stop with its number, or leave it out and count it."""
    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    """Last two interactions of each user, or everything after two points in time."""
    valid_fraction: float = Field(default=0.1, gt=0, lt=1)
    """global_time: share of the interactions before the test period that validate."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """global_time: share of the latest interactions that test."""
    hidden_items: float | None = Field(default=None, gt=0, lt=1)
    """Cold start: share of the items that nobody consumes in training, those whose ids have the
    smallest MD5. Their training interactions are dropped after the split; as targets and in the
    histories of validation and test they stay. null: hide none."""


def make_source(config: Source | SourceConfig | Mapping[str, Any]) -> Source:
    """Return the source for a config object, or for a mapping such as {"name": ..., "path": ...}.

    A path such as "asset:ml-100k" names an asset (`genrec assets`), wherever it lies.

    Raises:
        AssetError: the asset is not on this machine; the message says how to get it.
        ConfigError: unknown source or key, with the nearest name.
    """
    from genrec.data import SOURCES

    if isinstance(config, Source):
        return config
    parsed: StrictConfig
    if isinstance(config, SourceConfig):
        cls, parsed = load_object(SOURCES[config.to_dict()["name"]]), config
    else:
        cls, parsed = parse_component(SOURCES, config, path="source")
    assert isinstance(parsed, SourceConfig)
    asset = str(parsed.path).removeprefix(ASSET)
    if asset != str(parsed.path):
        parsed = parsed.model_copy(update={"path": assets.resolve(asset)})
    return cls(parsed)


def prepare(
    source: Source | SourceConfig | Mapping[str, Any],
    config: PrepareConfig | None = None,
    out: str | Path | None = None,
    *,
    user_map: str | Path | None = None,
) -> Dataset:
    """Prepare a dataset.

    Args:
        source: a source, its config, or a mapping with `name` and `path`.
        config: the choices; default 5-core, leave-one-out.
        out: folder to write (replaced if it exists); None keeps the dataset in memory.
        user_map: csv file to write with `user_id,user_row`; it holds personal data and must lie
            outside `out`. Without it nobody can tell which row is which user.

    Raises:
        DataError: raw data that cannot be used; nothing is written then.
        ConfigError: choices that contradict each other or the source.
    """
    source, config = make_source(source), config or PrepareConfig()
    _check(config, source, out, user_map)
    ties = config.ties or source.default_ties
    by_time = not source.ordered or ties == "hash"
    for file in source.files():
        file.check()

    # 1. Read, filter and order, as integer codes.
    with progress("reading", None) as advance:
        events = read_events(
            source,
            rating_threshold=config.rating_threshold,
            keep_ratings=config.keep_ratings,
            bad_rows=config.bad_rows,
            advance=advance,
        )
    facts = events.facts
    events, counts = _filter(events, config, by_time=by_time)
    events = events.select(chronological(events, ties, by_time=by_time))

    # 2. Number users by first appearance and items by id; split.
    users, user_codes = _dense(events.user_codes)
    item_ids, item_rows = _sorted_items(events)
    counts_U = np.bincount(users)
    offsets = np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64)
    seconds = events.times_ms // 1000
    ties_found = tie_statistics(offsets, events.times_ms)
    user_ids = [events.user_ids[code] for code in user_codes] if user_map is not None else []
    ratings = None if events.ratings is None else events.ratings.astype(np.float32)
    del users, events
    split, parts = _split(config, offsets, seconds)
    interactions = Interactions(item_rows, offsets, seconds, parts, len(item_ids), ratings)
    if config.hidden_items is not None:
        hidden = splits.hidden_items(item_ids, config.hidden_items)
        interactions, dropped = splits.without_training(interactions, hidden)
        split["hidden_items"] = {"share": config.hidden_items, "items": len(hidden)}
        counts |= {"dropped_hidden": dropped}

    # 3. Join the items table, describe, write.
    table, items_facts = _catalog(source, item_ids)
    untimed = {}
    if source.ordered and by_time:
        untimed = {"users_in_file_order": _untimed_users(offsets, seconds)}
    info = {
        **_description(source, config, facts, ties, source.default_name),
        "split": split,
        "counts": counts | _sizes(interactions) | untimed,
        "tie_statistics": ties_found,
        "items_table": items_facts,
        **({} if ratings is None else {"ratings": "kept"}),
    }
    dataset = Dataset(
        Catalog(table),
        interactions,
        {**info, "num_users": interactions.num_users, "num_items": len(item_ids)},
    )
    if out is None:
        digest = fingerprint(info, dataset.catalog.fingerprint, interactions.fingerprint)
        dataset = Dataset(dataset.catalog, interactions, dataset.info, digest)
    else:
        dataset = dataset.save(out)
    if user_map is not None:
        _write_user_map(Path(user_map), user_ids)
    return dataset


def _check(
    config: PrepareConfig,
    source: Source,
    out: str | Path | None,
    user_map: str | Path | None,
) -> None:
    if config.valid_fraction + config.test_fraction >= 1:
        raise ConfigError(
            f"valid_fraction, test_fraction: got {config.valid_fraction} and "
            f"{config.test_fraction}, expected a sum below 1: nothing is left for training."
        )
    if config.ties == "hash" and not source.timed:
        raise ConfigError(
            "ties: got 'hash', but this source has no order except the file's, which a hash would "
            "destroy. Use ties=file, or leave it out; or give timestamps."
        )
    if user_map is not None and out is not None:
        place, folder = Path(user_map).resolve(), Path(out).resolve()
        if folder == place or folder in place.parents:
            raise UserError(
                f"user map: {str(user_map)!r} lies inside the dataset folder. It holds raw user "
                "ids; choose a place outside."
            )


def _filter(
    events: Events, config: PrepareConfig, *, by_time: bool
) -> tuple[Events, dict[str, int]]:
    """Drop duplicates, then what is outside the k-core; count both."""
    facts = events.facts
    num_read = len(events)
    num_users = len(events.user_ids)
    num_items = len(events.item_ids)
    keep = keep_duplicates(events, config.duplicates, by_time=by_time)
    if not keep.all():
        events = events.select(keep)
    num_unique = len(events)
    if config.sample_users is not None:
        events = events.select(keep_users(events, config.sample_users))
    num_sampled = len(events)
    least = (config.min_user_interactions, config.min_item_interactions)
    keep, passes = keep_core(events.user_codes, events.item_codes, *least)
    if not keep.any():
        raise DataError(
            f"nothing is left: of {num_sampled} interactions ({num_users} users, {num_items} "
            f"items) none is in the core of users with at least {least[0]} and items with at least "
            f"{least[1]} interactions. Lower min_user_interactions and min_item_interactions "
            "(--k-core 1 keeps all), or check that the user and item columns are the right ones."
        )
    if not keep.all():
        events = events.select(keep)
    counts = {
        "read": facts["read"],
        "dropped_bad_rows": sum(facts["bad_rows"].values()),
        "dropped_below_rating": facts["below_rating"],
        "dropped_duplicates": num_read - num_unique,
        "dropped_sampling": num_unique - num_sampled,
        "dropped_k_core": num_sampled - len(events),
        "k_core_passes": passes,
        "users_before_k_core": num_users,
        "items_before_k_core": num_items,
        "kept": len(events),
    }
    return events, counts


def _dense(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber sorted codes 0, 1, ... without gaps; also return the old code of each new one."""
    new = np.cumsum(np.concatenate([[0], codes[1:] != codes[:-1]]))
    return new, codes[np.concatenate([[True], codes[1:] != codes[:-1]])]


def _sorted_items(events: Events) -> tuple[list[str], np.ndarray]:
    """Return the surviving item ids, sorted (as numbers if all are), and each event's item row."""
    codes = np.unique(events.item_codes)
    ids = [events.item_ids[code] for code in codes]
    order = sorted(range(len(ids)), key=_natural(ids))
    rows = np.full(len(events.item_ids), -1, dtype=np.int32)
    rows[codes[order]] = np.arange(len(ids), dtype=np.int32)
    return [ids[place] for place in order], rows[events.item_codes]


def _natural(ids: list[str]) -> Any:
    if all(i.isascii() and i.isdigit() for i in ids):
        return lambda place: (int(ids[place]), ids[place])
    return lambda place: ids[place]


def _split(
    config: PrepareConfig, offsets: np.ndarray, seconds: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    if config.split == "leave_one_out":
        short = int((np.diff(offsets) < splits.MIN_HELD_OUT_LENGTH).sum())
        facts = {"name": "leave_one_out", "users_without_held_out": short}
        return facts, splits.leave_one_out(offsets)
    untimed = int((seconds == 0).sum())
    if untimed:
        raise DataError(
            f"split global_time: {untimed} of {len(seconds)} interactions have no timestamp. Use "
            "split=leave_one_out, or data with times."
        )
    inside = np.ones(len(seconds), dtype=bool)
    inside[offsets[:-1]] = False
    backwards = int((np.diff(seconds, prepend=seconds[:1])[inside] < 0).sum())
    if backwards:
        raise DataError(
            f"split global_time: the file's order contradicts its timestamps {backwards} times. "
            "Use split=leave_one_out, or correct the data."
        )
    cuts = splits.time_cuts(seconds, config.valid_fraction, config.test_fraction)
    facts = {
        "name": "global_time",
        "valid_fraction": config.valid_fraction,
        "test_fraction": config.test_fraction,
        "valid_from": cuts[0],
        "test_from": cuts[1],
    }
    return facts, splits.global_time(seconds, *cuts)


def _catalog(source: Source, item_ids: list[str]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Join the items table to the ids; items without a row get only an id."""
    base = pl.DataFrame({ITEM_ID: item_ids}, schema={ITEM_ID: pl.String})
    table = source.items(item_ids)
    if table is None:
        return base, {"given": False}
    unique = table.unique(ITEM_ID, keep="first", maintain_order=True)
    joined = base.join(unique, on=ITEM_ID, how="left", maintain_order="left")
    facts = {
        "given": True,
        "items_without_row": len(base) - len(unique),
        "repeated_rows": len(table) - len(unique),
    }
    return joined, facts


def _description(
    source: Source, config: PrepareConfig, facts: dict[str, Any], ties: str, name: str
) -> dict[str, Any]:
    return {
        "name": config.name or name,
        "source": source.config.to_dict()["name"],
        "source_options": source.options(),
        "source_facts": {**source.facts(), "time_format": facts["time_format"]},
        "filters": {
            "min_user_interactions": config.min_user_interactions,
            "min_item_interactions": config.min_item_interactions,
            "sample_users": config.sample_users,
            "rating_threshold": config.rating_threshold,
            "bad_rows": config.bad_rows,
        },
        "bad_rows": {"kinds": facts["bad_rows"], "examples": facts["bad_row_examples"]},
        "duplicates": config.duplicates,
        "ties": ties,
        "order": "file" if source.ordered and ties == "file" else "time",
    }


def _untimed_users(offsets: np.ndarray, seconds: np.ndarray) -> int:
    """Return how many users have no times at all, so that the file's order is theirs."""
    timed = np.add.reduceat((seconds != 0).astype(np.int64), offsets[:-1])
    return int((timed == 0).sum())


def _sizes(interactions: Interactions) -> dict[str, int]:
    sizes = {name: int((interactions.splits == part).sum()) for name, part in SPLITS.items()}
    return {"users": interactions.num_users, "items": interactions.num_items, **sizes}


def _write_user_map(path: Path, user_ids: list[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["user_id", "user_row"])
    writer.writerows((user, row) for row, user in enumerate(user_ids))
    write_text_atomic(path, text.getvalue())
    logger.info("wrote %d raw user ids to %s: personal data, keep it private", len(user_ids), path)
