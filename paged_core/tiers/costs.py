"""TierCosts: whether to load blocks, to compute them, or both, by the measured speed of each; and whether to write
evicted blocks, which may never be needed again.

This file knows which blocks tiers hold, and seconds, bytes and tokens. It starts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from paged_core.tiers.tier import OffloadTier

_NEWEST = 0.3  # weight of the newest measurement in an average
_FULL_STEP = 128  # tokens; the time of a smaller step weighs less, because it says less
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0  # until a too slow tier is tried again; doubles at each failure
_PATIENCE_S = 0.05  # that any load may take
_UNMEASURED_S = 10.0  # that a load may take while the speed of computing is unknown
_TOO_SLOW_BESIDE = 9.0  # loading this many times slower than computing saves less than a tenth of the time
_SHARE = 0.01  # of the time of steps: what writing may take before it has saved any time
_AT_FIRST_S = 0.02  # what writing may take before the first steps
# Both are done only if they take less than this share of loading all. Computing uses processors, and a step may end
# late.
_WORTH_BESIDE = 0.8


class TierCosts:
    """The answers to the scheduler's questions about ``tiers`` (see ``prefixes.Stored``), from measured times.

    Args:
        block_bytes: bytes of one block.
        block_size: tokens of one block.
    """

    def __init__(self, tiers: Sequence[OffloadTier], block_bytes: int, block_size: int) -> None:
        self.tokens_per_s: float | None = None  # prompt tokens computed per second; None: not measured yet
        self.bytes_per_s: float | None = None  # bytes loaded per second; None: not measured yet
        self.latency_s = 0.0  # of a load, beside the transfer: for example, until the current step is over
        self._tiers = tiers
        self._block_bytes, self._block_size = block_bytes, block_size
        self._to_spend_s = _AT_FIRST_S  # seconds that may still be spent on writing evicted blocks
        self._paid_s = 0.0  # of the seconds spent, those of the tiers' own threads
        self._copy_s = 0.0  # of the step, for copying one block out
        self._retry_at = 0.0
        self._retry_s = _FIRST_RETRY_S

    # ---- what the scheduler asks ---------------------------------------------------------------------------------

    @property
    def wants_more(self) -> bool:
        """False while loading takes longer than computing, because then writing never pays. Otherwise True as long as
        writing has cost little more time than loads have saved."""
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
        """The average seconds to write one block."""
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
        self._retry_at = now + self._retry_s  # try one load
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
        """Return the seconds that loading so many blocks should take."""
        return self.latency_s + num_blocks * self._block_bytes / (self.bytes_per_s or float("inf"))

    def patience_s(self, num_tokens: int) -> float:
        """Return the seconds to wait for a load that saves so many tokens: as long as computing them takes."""
        return _UNMEASURED_S if self.tokens_per_s is None else _PATIENCE_S + num_tokens / self.tokens_per_s

    # ---- what is measured ----------------------------------------------------------------------------------------

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Take in the time of a step that was mostly of prompts."""
        weight = _NEWEST * min(1.0, num_tokens / _FULL_STEP)
        self.tokens_per_s = _averaged(self.tokens_per_s, num_tokens / max(seconds, 1e-9), weight)

    def stepped(self, seconds: float) -> None:
        """Take in the time of any step."""
        self._to_spend_s += _SHARE * seconds

    def copied(self, num_blocks: int, seconds: float) -> None:
        """Take in the seconds by which copying blocks out for tiers delayed a step."""
        self._to_spend_s -= seconds
        self._copy_s = _averaged(self._copy_s or None, seconds / num_blocks)

    def saved(self, num_tokens: int, busy_s: float) -> None:
        """Take in that tiers saved the computation of so many tokens in so much of their time."""
        if self.tokens_per_s is not None:
            self._to_spend_s += max(0.0, num_tokens / self.tokens_per_s - busy_s)

    def brought(self, num_blocks: int, busy_s: float) -> None:
        """Take in that a tier took so long to load so many blocks."""
        self.bytes_per_s = _averaged(self.bytes_per_s, num_blocks * self._block_bytes / max(busy_s, 1e-9))

    def waited(self, seconds: float, idle_s: float, num_tokens: int) -> None:
        """Take in that the rows of a load, which saved ``num_tokens`` tokens, waited ``seconds`` for it. For ``idle_s``
        of these the tier was not working on it."""
        self.latency_s = _averaged(self.latency_s, idle_s)
        if self.tokens_per_s is None or seconds < num_tokens / self.tokens_per_s:
            self._retry_s = _FIRST_RETRY_S
        else:
            self.failed()

    def failed(self) -> None:
        """Note that a load saved no time: the next load that does not promise to is tried after a while."""
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


def _both_s(compute_s: float, load_s: float) -> float:
    """Return the seconds for doing both at once from either end, if each alone would take so long."""
    return compute_s * load_s / (compute_s + load_s) if load_s > 0 else 0.0


def _averaged(average: float | None, newest: float, weight: float = _NEWEST) -> float:
    return newest if average is None else average + weight * (newest - average)
