"""How does a loop learn that it shall stop? SIGTERM is noted; the loop looks when it suits it.

It writes no checkpoint and ends no process itself.
"""

from __future__ import annotations

import signal
from typing import Any


class Stop:
    """While active, SIGTERM sets `asked`; the handler of before comes back at the end."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Stop:
        def ask(signum: int, frame: Any) -> None:
            self.asked = True

        try:
            self._previous = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # not the main thread: the caller handles signals
            self._previous = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
