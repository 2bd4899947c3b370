"""How many processors this process may use, and how its threads wait for one another: said before torch is imported.

OpenMP asks the machine for processors and knows nothing of a container's share of them: with more threads than that,
each waits for one that has been stopped. And its threads wait by spinning, for up to tens of milliseconds, which takes
the processor from the very thread that is waited for where other processes want it too.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")
_SPINS = "300"  # a few microseconds: most waits between two launches of a step, and next to nothing of another's turn


def settle_threads() -> None:
    """Give OpenMP defaults that suit a shared machine. What the user has set stays; after torch it is too late."""
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    share = cpu_share()
    if share is not None and share < _num_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(share + 0.25))))


def cpu_share(groups: Path = _GROUPS, of_this_process: Path = _OF_THIS_PROCESS) -> float | None:
    """Processors that control groups (version 1 or 2) let this process have; None if they don't say."""
    shares = [share for share in _shares(groups, of_this_process) if share is not None]
    return min(shares, default=None)


def _shares(groups: Path, of_this_process: Path) -> Iterator[float | None]:
    try:
        lines = of_this_process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in _up_to_root(groups, path):
                yield _quotient(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for mount in (groups / controllers, groups / "cpu"):
                for folder in _up_to_root(mount, path):
                    yield _quotient(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _up_to_root(mount: Path, path: str) -> Iterator[Path]:
    """Each group limits those within it. In a container, the path may be one that only the host sees."""
    inner = mount / path.lstrip("/")
    yield from (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount)))


def _quotient(*files: Path) -> float | None:
    """Of "quota period", in one file or two; None without a limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", say
        return None


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
