"""Histogram: percentiles of any number of values in bounded memory, to one per cent."""

from __future__ import annotations

import math
from collections.abc import Mapping

_GROWTH = math.log(1.01)


class Histogram:
    """Positive values, counted in bins that are 1 % wide."""

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}
        self.count = 0
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        number = math.floor(math.log(max(value, 1e-9)) / _GROWTH)
        self._bins[number] = self._bins.get(number, 0) + times
        self.count += times
        self.total += value * times

    def counts(self) -> Mapping[int, int]:
        """How many values there are in each bin."""
        return dict(self._bins)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def percentile(self, share: float) -> float:
        """The value that ``share`` of all (0 to 1) don't pass; 0 if there is none."""
        wanted, seen = share * self.count, 0
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen >= wanted:
                return math.exp((number + 0.5) * _GROWTH)
        return 0.0
