"""A worker's lines in TorchServe's log, and the reason of a failure from a server's log. A worker logs when numba
compiles, because at a first start that takes longer than loading, and the time limit of loading excludes it.
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
    """Log compilations in this process from now on, if numba is installed."""
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
    """The time limit of a start: ``limit_s``, without times in which a worker compiles."""

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
    """The lines of a server's log that explain its failure: exceptions of workers, else TorchServe's errors, except
    that about a missing nvidia-smi, which every machine without a GPU logs."""
    lines = [line for line in log.splitlines() if "nvidia-smi" not in line]
    errors = [line for line in lines if "error" in line.lower()]
    return causes(log)[-3:] or errors[-5:] or lines[-5:]


def causes(log: str) -> list[str]:
    """The exceptions of workers, each once."""
    workers = [told for line in log.splitlines() if (told := line.partition(" MODEL_LOG - ")[2])]
    return list(dict.fromkeys(line for line in workers if _CAUSE.match(line)))
