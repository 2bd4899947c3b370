"""Costs: whether to load a block or to compute it, by what either has taken lately.

This file knows tiers by what they hold, and seconds, bytes and tokens. It starts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from paged_core.tiers.tier import OffloadTier

_NEWEST = 0.3  # weight of the newest measurement in an average
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0  # a tier that was too slow is tried again after a while, and a longer one
_PATIENCE_S = 0.05  # that any load may take
_UNMEASURED_S = 10.0  # that a load may take while nobody knows what computing takes


class Costs:
    """What the scheduler asks of ``tiers``.

    Args:
        block_bytes: of one block.
    """

    def __init__(self, tiers: Sequence[OffloadTier], block_bytes: int) -> None:
        self.tokens_per_s: float | None = None  # computed, of prompts; None: not measured yet
        self.bytes_per_s: float | None = None  # loaded
        self.latency_s = 0.0  # of a load, beside that: until the step under way is over, say
        self._tiers = tiers
        self._block_bytes = block_bytes
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S

    # ---- what the scheduler asks ---------------------------------------------------------------------------------

    @property
    def wants_more(self) -> bool:
        return any(tier.wants_more for tier in self._tiers)

    def holds(self, digest: bytes) -> bool:
        return any(tier.holds(digest) for tier in self._tiers)

    def pays(self, num_blocks: int, num_tokens: int) -> bool:
        if self.bytes_per_s is None or self.tokens_per_s is None:
            return True
        if self.load_s(num_blocks) < num_tokens / self.tokens_per_s:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._retry_s  # one tries
        return True

    def load_s(self, num_blocks: int) -> float:
        """Seconds that loading so many blocks should take."""
        return self.latency_s + num_blocks * self._block_bytes / (self.bytes_per_s or float("inf"))

    def patience_s(self, num_tokens: int) -> float:
        """How long to wait for a load that saves so many tokens: as long as computing them takes."""
        return _UNMEASURED_S if self.tokens_per_s is None else _PATIENCE_S + num_tokens / self.tokens_per_s

    # ---- what is measured ----------------------------------------------------------------------------------------

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly of prompts."""
        self.tokens_per_s = _averaged(self.tokens_per_s, num_tokens / max(seconds, 1e-9))

    def loaded(self, num_blocks: int, num_tokens: int, busy_s: float, seconds: float) -> None:
        """A load: the tier was at it for ``busy_s``; until its rows could run it took ``seconds``."""
        self.bytes_per_s = _averaged(self.bytes_per_s, num_blocks * self._block_bytes / max(busy_s, 1e-9))
        self.latency_s = _averaged(self.latency_s, max(seconds - busy_s, 0.0))
        if self.tokens_per_s is None or seconds < num_tokens / self.tokens_per_s:
            self._retry_s = _FIRST_RETRY_S
        else:
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


def _averaged(average: float | None, newest: float) -> float:
    return newest if average is None else average + _NEWEST * (newest - average)
