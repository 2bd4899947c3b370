"""How many processors this process may use, and how its threads wait. Both must be set before torch is imported.

OpenMP counts the machine's processors and ignores a container's share of them. With more threads than the share allows,
threads wait for others that the kernel has stopped. OpenMP's threads also wait by spinning, for up to tens of
milliseconds. Beside other processes, that takes processor time from the very thread that they wait for.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")
_SPINS = "300"  # a few microseconds: longer than most waits in a step, far shorter than a time slice


def settle_threads() -> None:
    """Set OpenMP's defaults to values that suit a shared machine, except those that the user has set. Call this before
    torch is imported; later it has no effect."""
    if "torch" in sys.modules:
        return
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    share = cpu_share()
    if share is not None and share < _num_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(share + 0.25))))


def cpu_share(groups: Path = _GROUPS, of_this_process: Path = _OF_THIS_PROCESS) -> float | None:
    """Return how many processors control groups (version 1 or 2) allow this process, or None if they set no limit."""
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
    """Yield the folder of each group from ``path`` up to ``mount``, since each group limits those within it. In a
    container, ``path`` may be one that exists on the host only."""
    inner = mount / path.lstrip("/")
    yield from (inner, *(parent for parent in inner.parents if parent.is_relative_to(mount)))


def _quotient(*files: Path) -> float | None:
    """Read "quota period" from one file or two, and return quota / period, or None without a limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # such as "max" as the quota
        return None


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
