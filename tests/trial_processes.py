"""The processes that try grammars: who has one can take its first grammar without holding anybody up."""

from __future__ import annotations

from contextlib import suppress

import psutil


def trial_processes(ancestor: int) -> list[int]:
    """Process ids of those that come from ``ancestor``."""
    found = []
    for child in psutil.Process(ancestor).children(recursive=True):
        with suppress(psutil.Error):  # it has ended in between
            if "trial_process" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found
