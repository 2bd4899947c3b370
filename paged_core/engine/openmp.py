"""The helper threads of torch's OpenMP, which share a CPU operation. This file knows nothing of engines.

Every thread that computes gets its own helpers. As soon as all of them together are more than the cores, GNU OpenMP's
helpers no longer spin until the next operation, and each of the hundreds of operations in a step begins by waking them:
on two cores, steps of a small model take up to 1.7 times as long. So a thread that leaves the computing to another one
releases its helpers first.
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
    """End the calling thread's helpers. Its next parallel operation starts new ones."""
    pause = _pause()
    if pause is not None and os.getpid() == _PROCESS:
        pause(_SOFT)


@cache
def _pause() -> Any | None:
    """Return omp_pause_resource_all of the libgomp that torch has loaded, or None. Other OpenMP libraries spin however
    many threads there are."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            return ctypes.CDLL(str(library)).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
    return None
