"""What tiers have done, in numbers. Part of StepStats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TierStats(NamedTuple):
    """One tier. All but ``num_blocks`` run since the engine was built."""

    name: str
    num_blocks: int = 0  # that it holds now and this engine could load
    seconds_out: float = 0.0  # of a processor, beside the engine's thread: what writing has taken
    blocks_out: int = 0  # written to it
    bytes_out: int = 0
    blocks_in: int = 0  # read from it, and sound
    bytes_in: int = 0
    blocks_dropped: int = 0  # given up by the cache, and not written: the tier was behind, or could not
    blocks_lost: int = 0  # it should have held, and did not: damaged, or evicted meanwhile


class OffloadingStats(NamedTuple):
    """All tiers of an engine."""

    tiers: Sequence[TierStats] = ()
    num_loading: int = 0  # rows that wait for their blocks now
    total_loads: int = 0  # begun
    total_loads_abandoned: int = 0  # too slow; or what was wanted was gone, or needed for others
    total_tokens_loaded: int = 0  # that need not be computed
    total_tokens_asked: int = 0  # looked for in tiers, since the prefix cache had not got them

    @property
    def total_bytes_out(self) -> int:
        return sum(tier.bytes_out for tier in self.tiers)

    @property
    def total_bytes_in(self) -> int:
        return sum(tier.bytes_in for tier in self.tiers)


def empty_counts() -> dict[str, int]:
    """Of a tier that has done nothing."""
    return dict.fromkeys(TierStats._fields[3:], 0)
