"""Progress on the terminal (standard error). Knows nothing of what is in progress."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """One bar at a time, as in ``progress(what, done, total)``. Without tqdm, or unwatched, one line each."""

    def __init__(self, unit: str = "it") -> None:
        self._unit = unit
        self._what: str | None = None
        self._bar: Any = None
        self._said: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self._bar = _bar(what, total, self._unit)
            if self._bar is None and what not in self._said:
                self._said.add(what)
                print(f"{what} ...", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the line as it is; the next call begins another."""
        if self._bar is not None:
            self._bar.close()
        self._what = self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bar(what: str, total: int, unit: str) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=what, total=total, unit=unit, dynamic_ncols=True)
