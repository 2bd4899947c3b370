"""The processes that try grammars: who has one can take its first grammar without holding anybody up."""

from __future__ import annotations

import psutil


def trial_processes(ancestor: int) -> list[int]:
    """Process ids of those that come from ``ancestor``."""
    children = psutil.Process(ancestor).children(recursive=True)
    return [child.pid for child in children if "trial_process" in " ".join(child.cmdline())]
