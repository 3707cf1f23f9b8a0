"""Which rows of the catalogue does a request mean, and is it one that can be answered?

Histories, filters, times and users come in as callers write them and leave as arrays of rows, or as
an error that says what was expected. It refuses to know bundles, the search and probabilities.

Shapes: B requests, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from genrec import runtime
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, RequestContext

log = runtime.get_logger(__name__)

Histories = Sequence[Sequence[str]]


def check_histories(histories: Any) -> None:
    """Raise `UserError` where histories are text instead of lists of item ids."""
    if isinstance(histories, str) or any(isinstance(h, str) for h in histories):
        raise UserError(
            'histories: got text, expected a list of lists of item ids, e.g. [["50", "181"]].'
        )


def history_rows(
    index: ItemIndex, histories: Histories, missing: Literal["skip", "error"]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the rows of the known items, and which places of the histories they come from.

    Args:
        index: the catalogue.
        histories: B lists of item ids.
        missing: unknown items: "skip" them with one warning, or raise.

    Returns:
        B arrays of int64 rows, and B arrays of their places.

    Raises:
        UserError: an unknown item with missing="error", or another word for it.
    """
    if missing not in ("skip", "error"):
        raise UserError(f"missing: got {missing!r}, expected 'skip' or 'error'.")
    if missing == "error":
        found = [index.rows_of(h) for h in histories]
        return found, [np.arange(len(rows)) for rows in found]
    marked = [index.rows_of(h, missing="mark") for h in histories]
    unknown = {
        str(item)
        for history, rows in zip(histories, marked, strict=True)
        for item, row in zip(history, rows, strict=True)
        if row < 0
    }
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        log.warning(
            "%d item(s) in the histories are not in the catalogue and were skipped: %s%s. "
            "Pass missing='error' to stop instead.",
            len(unknown),
            shown,
            " ..." if len(unknown) > 5 else "",
        )
    kept = [np.flatnonzero(rows >= 0) for rows in marked]
    return [rows[places] for rows, places in zip(marked, kept, strict=True)], kept


def request_context(
    model: Backbone,
    histories: Histories,
    kept: Sequence[np.ndarray],
    times: Sequence[Sequence[float] | np.ndarray] | None,
    now: Sequence[float] | None,
    users: Sequence[str | None] | None,
) -> RequestContext | None:
    """Return what the model reads beside the items that were kept; None: nothing.

    Args:
        model: says what it reads.
        histories: B lists of item ids.
        kept: which places of each history have a row (`history_rows`).
        times: seconds since 1970 of each item of each history, 0 where not known.
        now: seconds at which each request is made.
        users: who asks, None for nobody known.

    Raises:
        UserError: times that are missing, or anything that does not fit the histories.
    """
    for name, given in (("times", times), ("now", now), ("users", users)):
        if given is not None and (isinstance(given, str) or len(given) != len(histories)):
            raise UserError(
                f"{name}: got {len(given)} for {len(histories)} histories, expected one for each."
            )
    found = None if users is None else model.user_rows(users)
    if not model.reads_times:
        return None if found is None else RequestContext(users_B=found)
    if times is None:
        raise UserError(
            "times: got none, but this model reads when items were taken. Expected seconds "
            "since 1970 for each item of each history (0 where not known): "
            "times=[[881250949, 881250991]]."
        )
    seconds = [np.asarray(row, dtype=np.float64) for row in times]
    for number, (row, history) in enumerate(zip(seconds, histories, strict=True)):
        if row.shape != (len(history),):
            raise UserError(
                f"times[{number}]: got {row.size} times for {len(history)} items, expected one "
                "for each item of the history, 0 where not known."
            )
        _check_seconds(f"times[{number}]", row)
    now_B = None if now is None else np.asarray(now, dtype=np.float64)
    if now_B is not None:
        _check_seconds("now", now_B)
    return RequestContext(
        [row[places].astype(np.int64) for row, places in zip(seconds, kept, strict=True)],
        None if now_B is None else now_B.astype(np.int64),
        found,
    )


def filter_rows(
    index: ItemIndex, items: Histories | Sequence[str] | None, count: int, what: str
) -> list[np.ndarray]:
    """Return the rows of a filter for each of `count` requests; no rows where it is None.

    Args:
        index: the catalogue.
        items: one list of item ids for all requests, or one per request.
        count: B.
        what: name of the argument, for messages.

    Raises:
        UserError: text, another number of lists, or an unknown item.
    """
    if items is None:
        return [np.empty(0, np.int64)] * count
    if isinstance(items, str):
        raise UserError(f"{what}: got text, expected a list of item ids.")
    if all(isinstance(item, str) for item in items):
        return [index.rows_of(items)] * count  # type: ignore[arg-type]
    if len(items) != count:
        raise UserError(
            f"{what}: got {len(items)} lists for {count} histories, expected one list for "
            "all, or one per history."
        )
    return [index.rows_of(each) for each in items]


def candidate_rows(index: ItemIndex, candidates: Histories) -> np.ndarray:
    """Return the rows of B lists of items, (B, C) int64, C the longest; -1 where one is shorter."""
    wanted = [index.rows_of(items) for items in candidates]
    rows_BC = np.full((len(wanted), max(map(len, wanted), default=0)), -1, dtype=np.int64)
    for i, found in enumerate(wanted):
        rows_BC[i, : len(found)] = found
    return rows_BC


def check_width(k: int, width: int | None, default: int) -> int:
    """Return the beam width of a request; without one the default, or k where that is larger.

    Raises:
        UserError: k or width below 1, or width below k.
    """
    for name, value in (("k", k), ("width", width)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{name}: got {value!r}, expected an integer >= 1.")
    if width is None:
        return max(default, k)
    if width < k:
        raise UserError(f"width: got {width}, expected at least k={k}. Raise width or lower k.")
    return width


def _check_seconds(name: str, seconds: np.ndarray) -> None:
    if seconds.size and not (np.isfinite(seconds).all() and seconds.min() >= 0):
        raise UserError(
            f"{name}: got {seconds.min()}, expected seconds since 1970, or 0 where not known."
        )
