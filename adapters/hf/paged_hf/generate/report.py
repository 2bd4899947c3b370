"""Report: which tier ran a generate() call, and why not a better one."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

_log = logging.getLogger("paged_hf")
_latest = threading.local()
_warned: set[str] = set()

Tier = Literal["native", "cache", "stock"]


@dataclass(frozen=True)
class Report:
    """How one call was answered.

    ``native``: rows ran in the engine's batch, on its paged K/V. ``cache``: stock's loop ran the user's model over a
    Cache that keeps K/V in blocks. ``stock``: nothing of ours was involved.
    """

    tier: Tier
    loop: str  # "free": rows on their own; else the name of stock's loop
    num_rows: int
    reason: str | None = None  # what kept the call from the native tier
    num_blocks: int = 0  # K/V blocks in use at the end of a lockstep call
    num_blocks_shared: int = 0  # blocks that beams or samples would have needed beyond those, had they not shared

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.tier} ({self.loop}, {self.num_rows} rows){why}"


def note(report: Report) -> None:
    """Remember the report of the calling thread's latest call; warn once of each reason that led to stock."""
    _latest.report = report
    if getattr(_latest, "trying", False):
        return
    _log.debug("generate: %s", report)
    if report.tier == "stock" and report.reason is not None:
        warn_once(f"generate() runs as stock does, not on paged memory: {report.reason}")


def warn_once(message: str) -> None:
    """Log a warning, unless the same was logged before, even with other numbers."""
    kind = re.sub(r"\d+", "N", message)
    if kind not in _warned and not getattr(_latest, "trying", False):
        _warned.add(kind)
        _log.warning(message)


def forget() -> None:
    """The calling thread begins a call: the report of the one before is no longer the latest."""
    _latest.report = None


@contextmanager
def trying() -> Iterator[None]:
    """Calls inside are our own trials: they warn about nothing and leave no report."""
    before = last_report()
    _latest.trying = True
    try:
        yield
    finally:
        _latest.trying, _latest.report = False, before


def last_report() -> Report | None:
    """The report of the calling thread's latest call of a patched ``generate``; None if there was none."""
    return getattr(_latest, "report", None)
