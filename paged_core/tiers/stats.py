"""Counters of tiers, which are a part of StepStats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TierStats(NamedTuple):
    """The counters of one tier. All but ``num_blocks`` are totals since the engine was built."""

    name: str
    num_blocks: int = 0  # blocks that it holds now and this engine could load
    seconds_out: float = 0.0  # processor time of writing, beside the engine's thread
    blocks_out: int = 0  # written to it
    bytes_out: int = 0
    blocks_in: int = 0  # read from it, and valid
    bytes_in: int = 0
    blocks_dropped: int = 0  # evicted by the cache and not written, because the tier was behind or could not write
    blocks_lost: int = 0  # the tier should have held them, and did not: they were damaged, or evicted meanwhile


class OffloadingStats(NamedTuple):
    """The counters of all tiers of an engine."""

    tiers: Sequence[TierStats] = ()
    num_loading: int = 0  # rows that wait for their blocks now
    total_loads: int = 0  # begun
    total_loads_abandoned: int = 0  # because they were too slow, or their blocks were gone or needed for other requests
    total_tokens_loaded: int = 0  # tokens that need not be computed
    total_tokens_asked: int = 0  # tokens looked up in tiers, because the prefix cache lacked them

    @property
    def total_bytes_out(self) -> int:
        return sum(tier.bytes_out for tier in self.tiers)

    @property
    def total_bytes_in(self) -> int:
        return sum(tier.bytes_in for tier in self.tiers)


def empty_counts() -> dict[str, int]:
    """Return the counts of a tier that has done nothing."""
    return dict.fromkeys(TierStats._fields[3:], 0)
