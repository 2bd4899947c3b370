"""How much memory this process takes while something runs."""

from __future__ import annotations

import threading
from types import TracebackType


class PeakMemory:
    """``with PeakMemory() as peak: ...`` then ``peak.num_bytes``: the highest resident size seen, every 20 ms.

    None where psutil isn't installed.
    """

    def __init__(self) -> None:
        self.num_bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = resident_bytes()
            if now is None:
                return
            self.num_bytes = max(now, self.num_bytes or 0)
            if self._done.wait(0.02):
                return


def resident_bytes() -> int | None:
    """Physical memory of this process; None where psutil isn't installed."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)
