"""Did the search do its work: full lists, proven lists, in what time? Arrays in, numbers out.

It knows nothing about whether a list pleases anyone.

Shapes: U users or requests, k list length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from genrec.errors import UserError


def invalid_rate(rows_Uk: np.ndarray) -> float:
    """Return the share of places that hold no item (-1): 0 where every list is full.

    A search that is held to the catalogue leaves places empty only where it runs out of items. For
    a generator that is not, pass -1 for every output that is no item.
    """
    rows_Uk = np.asarray(rows_Uk)
    return float(np.mean(rows_Uk < 0)) if rows_Uk.size else float("nan")


def certified_share(certified_U: np.ndarray) -> float:
    """Return the share of lists that provably are the top k of the whole catalogue."""
    certified_U = np.asarray(certified_U)
    return float(np.mean(certified_U)) if certified_U.size else float("nan")


def latency(seconds: np.ndarray) -> dict[str, Any]:
    """Return what requests took: mean, median, 95th and 99th percentile, in milliseconds.

    Args:
        seconds: (U,) of one request each. The 99th percentile of fewer than 100 is their maximum,
            near enough; `num_requests` stands beside it.

    Raises:
        UserError: no timings, or negative ones.
    """
    seconds = np.asarray(seconds, np.float64).reshape(-1)
    if not len(seconds) or not (seconds >= 0).all():
        raise UserError(
            f"latency: got {len(seconds)} timings, expected at least one, in seconds, none "
            "negative or NaN."
        )
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return {
        "num_requests": len(seconds),
        "mean_ms": float(seconds.mean() * 1e3),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
    }
