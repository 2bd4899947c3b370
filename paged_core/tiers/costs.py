"""TierCosts: whether to load blocks or to compute them, or both, by what either has taken lately; and whether to write
what may never be asked for again.

This file knows tiers by what they hold, and seconds, bytes and tokens. It starts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from paged_core.tiers.tier import OffloadTier

_NEWEST = 0.3  # weight of the newest measurement in an average
_FULL_STEP = 128  # tokens: what a smaller step took tells less, and weighs less
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0  # a tier that was too slow is tried again after a while, and a longer one
_PATIENCE_S = 0.05  # that any load may take
_UNMEASURED_S = 10.0  # that a load may take while nobody knows what computing takes
_TOO_SLOW_BESIDE = 9.0  # times as slow as computing: then it saves less than a tenth of that
_SHARE = 0.01  # of the time of steps that writing may take before it has saved any
_AT_FIRST_S = 0.02  # that it may take before there were any steps to speak of
_WORTH_BESIDE = 0.8  # of the time of loading all of it: computing takes processors, and a step may end too late


class TierCosts:
    """What the scheduler asks of ``tiers``.

    Args:
        block_bytes: of one block.
        block_size: its tokens.
    """

    def __init__(self, tiers: Sequence[OffloadTier], block_bytes: int, block_size: int) -> None:
        self.tokens_per_s: float | None = None  # computed, of prompts; None: not measured yet
        self.bytes_per_s: float | None = None  # loaded
        self.latency_s = 0.0  # of a load, beside that: until the step under way is over, say
        self._tiers = tiers
        self._block_bytes, self._block_size = block_bytes, block_size
        self._to_spend_s = _AT_FIRST_S  # on writing what the cache evicts
        self._paid_s = 0.0  # of that, to tiers' own threads
        self._copy_s = 0.0  # of a block, within a step
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S

    # ---- what the scheduler asks ---------------------------------------------------------------------------------

    @property
    def wants_more(self) -> bool:
        """Not while loading takes longer than computing: then what is written costs, and never pays. Else as far as
        loads have saved what writing costs, and a little beyond that."""
        self._pay_tiers()
        return self._to_spend_s > 0 and not self._too_slow and self._can_write

    @property
    def wants_back(self) -> bool:
        if self.tokens_per_s is None:
            return self._can_write
        load_s = self._block_bytes / self.bytes_per_s if self.bytes_per_s is not None else 0.0
        return self._write_s + load_s < self._block_size / self.tokens_per_s and self._can_write

    @property
    def _can_write(self) -> bool:
        return any(tier.wants_more for tier in self._tiers)

    @property
    def _write_s(self) -> float:
        """Of a block, on an average."""
        stats = [tier.stats for tier in self._tiers]
        num_out = max(1, sum(each.blocks_out for each in stats))
        return self._copy_s + sum(each.seconds_out for each in stats) / num_out

    def _pay_tiers(self) -> None:
        written_s = sum(tier.stats.seconds_out for tier in self._tiers)
        self._to_spend_s -= written_s - self._paid_s
        self._paid_s = written_s

    @property
    def _too_slow(self) -> bool:
        if self.bytes_per_s is None or self.tokens_per_s is None:
            return False
        return self._block_bytes / self.bytes_per_s > self._block_size / self.tokens_per_s

    def holds(self, digest: bytes) -> bool:
        return any(tier.holds(digest) for tier in self._tiers)

    def pays(self, num_blocks: int, num_tokens: int, beside: bool) -> bool:
        if self.bytes_per_s is None or self.tokens_per_s is None:
            return True
        slowest_s = num_tokens / self.tokens_per_s * (_TOO_SLOW_BESIDE if beside else 1.0)
        if self.load_s(num_blocks) < slowest_s:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._retry_s  # one tries
        return True

    def pays_beside(self, num_blocks: int, num_tokens: int) -> bool:
        if self.bytes_per_s is None or self.tokens_per_s is None:
            return False
        compute_s, load_s = num_tokens / self.tokens_per_s, self.load_s(num_blocks)
        return self.latency_s + _both_s(compute_s, load_s - self.latency_s) < _WORTH_BESIDE * load_s

    def num_to_compute(self, num_blocks: int, num_tokens: int) -> int:
        if self.bytes_per_s is None or self.tokens_per_s is None:
            return num_tokens
        compute_s, load_s = num_tokens / self.tokens_per_s, self.load_s(num_blocks) - self.latency_s
        return int(_both_s(compute_s, load_s) * self.tokens_per_s)

    def load_s(self, num_blocks: int) -> float:
        """Seconds that loading so many blocks should take."""
        return self.latency_s + num_blocks * self._block_bytes / (self.bytes_per_s or float("inf"))

    def patience_s(self, num_tokens: int) -> float:
        """How long to wait for a load that saves so many tokens: as long as computing them takes."""
        return _UNMEASURED_S if self.tokens_per_s is None else _PATIENCE_S + num_tokens / self.tokens_per_s

    # ---- what is measured ----------------------------------------------------------------------------------------

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly of prompts."""
        weight = _NEWEST * min(1.0, num_tokens / _FULL_STEP)
        self.tokens_per_s = _averaged(self.tokens_per_s, num_tokens / max(seconds, 1e-9), weight)

    def stepped(self, seconds: float) -> None:
        """A step took so long, whatever it computed."""
        self._to_spend_s += _SHARE * seconds

    def copied(self, num_blocks: int, seconds: float) -> None:
        """A step was held up for so long by what was copied out for tiers."""
        self._to_spend_s -= seconds
        self._copy_s = _averaged(self._copy_s or None, seconds / num_blocks)

    def saved(self, num_tokens: int, busy_s: float) -> None:
        """So many tokens need not be computed, as tiers were at them for so long."""
        if self.tokens_per_s is not None:
            self._to_spend_s += max(0.0, num_tokens / self.tokens_per_s - busy_s)

    def brought(self, num_blocks: int, busy_s: float) -> None:
        """A tier was at so many blocks for so long."""
        self.bytes_per_s = _averaged(self.bytes_per_s, num_blocks * self._block_bytes / max(busy_s, 1e-9))

    def waited(self, seconds: float, idle_s: float, num_tokens: int) -> None:
        """Until a load's rows could run, which saved them ``num_tokens``, it took ``seconds``. For ``idle_s`` of these
        the tier was not at it."""
        self.latency_s = _averaged(self.latency_s, idle_s)
        if self.tokens_per_s is None or seconds < num_tokens / self.tokens_per_s:
            self._retry_s = _FIRST_RETRY_S
        else:
            self.failed()

    def failed(self) -> None:
        """A load was of no use: the next one that doesn't promise to be is tried later."""
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


def _both_s(compute_s: float, load_s: float) -> float:
    """What both take together, from either end of what each does in so long by itself."""
    return compute_s * load_s / (compute_s + load_s) if load_s > 0 else 0.0


def _averaged(average: float | None, newest: float, weight: float = _NEWEST) -> float:
    return newest if average is None else average + weight * (newest - average)
