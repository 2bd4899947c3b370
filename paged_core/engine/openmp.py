"""The helper threads that share out a CPU operation: torch's OpenMP. This file knows no engine.

Every thread that computes is given helpers of its own. As soon as all of them together are more than the cores, GNU
OpenMP's no longer wait for the next operation awake, and each of the hundreds in a step begins by waking them: on two
cores, steps of a small model take up to 1.7 times as long. So a thread that leaves the computing to another one gives
its helpers back first.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SOFT = 1  # omp_pause_soft
_PROCESS = os.getpid()  # a forked child has no helpers, and would wait for them for ever


def release_helper_threads() -> None:
    """End the calling thread's helpers. Its next parallel operation starts them anew."""
    pause = _pause()
    if pause is not None and os.getpid() == _PROCESS:
        pause(_SOFT)


@cache
def _pause() -> Any | None:
    """omp_pause_resource_all of the libgomp that torch has loaded. Other OpenMPs wait awake however many there are."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            return ctypes.CDLL(str(library)).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
    return None
