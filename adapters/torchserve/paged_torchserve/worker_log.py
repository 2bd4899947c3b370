"""What a worker says in TorchServe's log, and what a server's log says of why it failed.

A worker tells when numba compiles. At a first start that takes longer than loading, and whoever waits for the model can
tell one from the other.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

BEGINS, ENDS = "kernels are being compiled", "kernels have been compiled"
_CAUSE = re.compile(r"[\w.]*(?:Error|Exception|Unsupported\w+|Exit)\b.*: ")


def announce_compiling(log: logging.Logger) -> None:
    """From now on, in this process. Nothing is told where there is no numba."""
    try:
        from numba.core import event
    except ImportError:
        return
    lock, depth = threading.Lock(), 0

    class Announcer(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            tell(1, BEGINS)

        def on_end(self, event: Any) -> None:
            tell(-1, ENDS)

    def tell(step: int, told: str) -> None:
        nonlocal depth
        with lock:
            depth += step
            if depth == (1 if step > 0 else 0):  # one compilation asks for others
                log.info(told)

    event.register("numba:compile", Announcer())


class Patience:
    """With a start: ``limit_s`` of time in which no worker compiles."""

    def __init__(self, limit_s: float) -> None:
        self._left_s = limit_s
        self._looked = time.monotonic()

    def is_at_its_end(self, log: str) -> bool:
        """``log``: the server's, as it is now."""
        now = time.monotonic()
        self._left_s -= 0.0 if _is_compiling(log) else now - self._looked
        self._looked = now
        return self._left_s < 0


def _is_compiling(log: str) -> bool:
    return log.count(BEGINS) > log.count(ENDS)


def last_words(log: str) -> list[str]:
    """What in a server's log tells why it failed: what workers raised; else what TorchServe calls an error. That a
    machine has no nvidia-smi is told of every machine without a GPU."""
    lines = [line for line in log.splitlines() if "nvidia-smi" not in line]
    workers = [told for line in lines if (told := line.partition(" MODEL_LOG - ")[2])]
    causes = [line for line in workers if _CAUSE.match(line)]
    errors = [line for line in lines if "error" in line.lower()]
    return list(dict.fromkeys(causes))[-3:] or errors[-5:] or lines[-5:]
