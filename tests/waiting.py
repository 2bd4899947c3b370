"""Waits for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 120.0


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Return when ``condition()`` is true.

    Raises:
        AssertionError: it wasn't within ``limit_s`` seconds.
    """
    deadline = time.monotonic() + limit_s
    pause_s = 0.002
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(pause_s)
        pause_s = min(1.1 * pause_s, 0.1)  # asking more often would take the processor from a server that starts
