"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 120.0


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Return when ``condition()`` is true.

    Raises:
        AssertionError: it wasn't for ``limit_s`` seconds.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
