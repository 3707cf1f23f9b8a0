"""Which events stay, and in which order: duplicates, k-core, ties. It knows integer codes only.

Order within a user is (time, tie-break, file row). The hash tie-break is MD5 of "user|item" (raw
ids), compared as hex text: it depends neither on item ids nor on popularity nor on file order. Its
first 64 bits decide.

Shapes: M events, U users, N items.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np

from genrec.data.events import Events

_HASH_ROWS = 500_000


def keep_duplicates(
    events: Events, policy: Literal["first", "last", "keep"], *, by_time: bool = True
) -> np.ndarray:
    """Return the mask (M,) of events that stay: one per (user, item) unless policy is "keep".

    Args:
        events: in file order.
        policy: keep the "first" or the "last" one in time (equal times: in the file), or all.
        by_time: False compares places in the file only.
    """
    keep = np.ones(len(events), dtype=bool)
    if policy == "keep":
        return keep
    pairs = events.user_codes.astype(np.int64) * len(events.item_ids) + events.item_codes
    if by_time:
        order = np.lexsort((events.times_ms, pairs))
    else:
        order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    same = pairs[1:] == pairs[:-1]
    keep[order[1:][same] if policy == "first" else order[:-1][same]] = False
    return keep


def keep_users(events: Events, count: int) -> np.ndarray:
    """Return the mask (M,) of the events of `count` users: those whose ids have the smallest MD5.

    The choice depends on the ids alone, not on the order of the file or on what users did; a
    larger sample holds the smaller one.
    """
    present = np.unique(events.user_codes)
    digests = [
        hashlib.md5(events.user_ids[code].encode(), usedforsecurity=False).digest()
        for code in present
    ]
    order = sorted(range(len(present)), key=digests.__getitem__)[:count]
    chosen = np.zeros(len(events.user_ids), dtype=bool)
    chosen[present[order]] = True
    return chosen[events.user_codes]


def keep_core(
    user_codes: np.ndarray, item_codes: np.ndarray, min_user: int, min_item: int
) -> tuple[np.ndarray, int]:
    """Drop users below `min_user` events and items below `min_item`, until none is.

    The result is the largest such set: it does not depend on the order of dropping.

    Returns:
        the mask (M,) of events that stay, and the number of passes that dropped something.
    """
    places = np.arange(len(user_codes), dtype=np.int64)
    users, items, passes = user_codes, item_codes, 0
    while len(places):
        enough = np.bincount(users)[users] >= min_user
        enough &= np.bincount(items)[items] >= min_item
        if enough.all():
            break
        passes += 1
        users, items, places = users[enough], items[enough], places[enough]
    keep = np.zeros(len(user_codes), dtype=bool)
    keep[places] = True
    return keep, passes


def chronological(
    events: Events, ties: Literal["file", "hash"], *, by_time: bool = True
) -> np.ndarray:
    """Return the order (M,) int64 that groups events by user code, oldest first.

    Args:
        events: in file order.
        ties: what decides between equal times of a user; events without a time (0) keep the file's
            order.
        by_time: False keeps the file's order within a user.
    """
    if not by_time:
        return np.argsort(events.user_codes, kind="stable")
    order = np.lexsort((events.times_ms, events.user_codes))
    if ties == "file":
        return order
    users, times = events.user_codes[order], events.times_ms[order]
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1]) & (times[1:] != 0)
    tied = np.zeros(len(order), dtype=bool)
    tied[1:] |= same
    tied[:-1] |= same
    places = np.flatnonzero(tied)
    # A group of ties is contiguous, so sorting the tied places among themselves is enough.
    group = np.cumsum(np.concatenate([[True], ~same]))[places] if len(order) else places
    del users, times, same, tied
    inner = np.lexsort((_hashes(events, order[places]), group))
    order[places] = order[places[inner]]
    return order


def _hashes(events: Events, places: np.ndarray) -> np.ndarray:
    """First 8 bytes of MD5("user|item") as uint64: the order of the hex text."""
    users, items = events.user_ids, events.item_ids
    hashes = np.empty(len(places), dtype=np.uint64)
    for start in range(0, len(places), _HASH_ROWS):  # Python integers are large: some at a time
        part = places[start : start + _HASH_ROWS]
        pairs = zip(events.user_codes[part].tolist(), events.item_codes[part].tolist(), strict=True)
        digests = (
            hashlib.md5(f"{users[u]}|{items[i]}".encode(), usedforsecurity=False).digest()[:8]
            for u, i in pairs
        )
        hashes[start : start + _HASH_ROWS] = np.frombuffer(b"".join(digests), dtype=">u8")
    return hashes


def tie_statistics(offsets: np.ndarray, times: np.ndarray) -> dict[str, Any]:
    """Count neighbours with equal times within a user; events without a time (0) do not count.

    Args:
        offsets: (U + 1,) boundaries of the users.
        times: (M,) chronological within a user.

    Returns:
        `pairs` of neighbours with times, `tied_pairs`, `users_with_ties`, and
        `users_tied_at_the_end`: those whose last two have equal times, so that the tie-break
        decides which is the test item.
    """
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    inside = (users[1:] == users[:-1]) & (times[1:] > 0) & (times[:-1] > 0)
    tied = inside & (times[1:] == times[:-1])
    ends = offsets[1:][np.diff(offsets) >= 2] - 2
    return {
        "pairs": int(inside.sum()),
        "tied_pairs": int(tied.sum()),
        "users_with_ties": len(np.unique(users[1:][tied])),
        "users_tied_at_the_end": int(tied[ends].sum()),
    }
