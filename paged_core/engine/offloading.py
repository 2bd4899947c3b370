"""Offloading: moves blocks between the cache and tiers, as schedules say.

Evicted blocks are copied out before a step overwrites them. Loaded blocks are copied in between two steps, piece by
piece, and the scheduler is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from paged_core.execution.model_runner import ModelRunner
from paged_core.scheduling.block_pool import BlockContent
from paged_core.scheduling.schedule import Load, Schedule
from paged_core.scheduling.scheduler import Scheduler
from paged_core.tiers.costs import TierCosts
from paged_core.tiers.stats import OffloadingStats
from paged_core.tiers.tier import Fetch, OffloadTier, Piece

_log = logging.getLogger("paged_core")
_PACKED_BYTES = 4 << 20  # of blocks that are copied together, when all are saved
_MOMENT_S = 0.01  # the most that a request may be delayed by saving when idle


class _Part(NamedTuple):
    """The blocks of a load that one tier loads."""

    tier: OffloadTier
    places: Sequence[int]
    fetch: Fetch


class _UnderWay:
    """The state of one load."""

    def __init__(self, load: Load, parts: Sequence[_Part], until: float) -> None:
        self.load = load
        self.parts = parts
        self.began = time.perf_counter()
        self.until = until
        self.good: set[int] = set()  # loaded blocks that are in the cache
        # num_blocks: blocks that have come, valid or not. num_timed: those of them whose time shows a tier's speed.
        self.num_blocks = self.num_timed = 0
        self.busy_s = 0.0  # that tiers worked on these
        self.ended = False  # the scheduler knows; pieces that still come are dropped

    @property
    def all_there(self) -> bool:
        return all(part.fetch.done for part in self.parts)


class Offloading:
    """The tiers of one engine, and its loads in progress.

    Args:
        tiers: asked for blocks in this order; evicted blocks go to all of them.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, tiers: Sequence[OffloadTier], costs: TierCosts
    ) -> None:
        self._scheduler, self._runner = scheduler, runner
        self._tiers = tiers
        self._costs = costs
        self._block_bytes = runner.cache.block_bytes
        self._arrived = threading.Event()
        self._under_way: list[_UnderWay] = []
        self._too_slow = False  # whether the last save ran out of time
        self._num_packed = max(1, _PACKED_BYTES // self._block_bytes)  # blocks
        self._offered: set[bytes] = set()  # digests saved when idle: each only once, even if a tier has no room for all
        self._loads = self._abandoned = 0

    @property
    def stats(self) -> OffloadingStats:
        return OffloadingStats(
            [tier.stats for tier in self._tiers],
            len(self._scheduler.loading),
            self._loads,
            self._abandoned,
            self._scheduler.num_tokens_loaded,
            self._scheduler.num_tokens_asked,
        )

    # ---- a step --------------------------------------------------------------------------------------------------

    def take_up(self) -> None:
        """Copy what tiers have loaded into the cache. Called at the beginning of a step."""
        if not self._under_way and not self._scheduler.loads:
            return
        self._arrived.clear()
        self._forgo_unasked()
        for each in list(self._under_way):
            all_there = each.all_there  # asked before its pieces are taken, as more may come after
            if each.load.abandoned and not each.ended:
                self._leave(each)
            self._take_pieces(each)
            if not each.ended and (all_there or each.load.met or time.perf_counter() > each.until):
                self._land(each)
            if all_there:
                self._under_way.remove(each)

    def carry_out(self, schedule: Schedule) -> None:
        """Copy blocks that a schedule evicts to tiers, and begin its loads. Called before the step writes to its
        blocks."""
        if schedule.offloads:
            began = time.perf_counter()
            self._store(schedule.offloads)
            self._costs.copied(len(schedule.offloads), time.perf_counter() - began)
        for load in schedule.loads:
            self._begin(load)

    def wait(self, timeout_s: float) -> None:
        """Wait until something is loaded, when there is nothing to compute."""
        if self._scheduler.loading:
            self._arrived.wait(timeout_s)

    def measure(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """Take in the time of a step that computed ``num_tokens`` tokens of ``num_rows`` requests."""
        self._costs.stepped(seconds)
        if num_tokens >= 16 and num_tokens > 4 * num_rows:
            self._costs.computed(num_tokens, seconds)

    # ---- beside steps --------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forget all loads and stored blocks, because the model has changed. The scheduler has abandoned the loads."""
        self._offered.clear()
        for tier in self._tiers:
            tier.forget()

    def save(self, timeout_s: float) -> int:
        """Store all blocks of the prefix cache, those most worth keeping first, as far as time allows. Returns how many
        blocks were given to tiers."""
        until = time.monotonic() + timeout_s
        contents = [content for content in self._scheduler.pool.findable() if not self._costs.holds(content.digest)]
        num_saved = 0
        for start in range(0, len(contents), self._num_packed):
            if time.monotonic() >= until or not self._can_write or not self._flush(until):
                break
            part = contents[start : start + self._num_packed]
            self._store(part)
            num_saved += len(part)
        self._too_slow = not self._flush(until)
        return num_saved

    def save_some(self) -> bool:
        """Store a few blocks of the prefix cache while the engine is idle. Returns False if none is left."""
        if not self._can_write:
            return False
        if not self._flush(time.monotonic() + _MOMENT_S):
            return True
        findable = self._scheduler.pool.findable()
        self._offered.intersection_update(content.digest for content in findable)
        lacking = [content for content in findable if content.digest not in self._offered]
        part = lacking[: self._num_packed]
        self._offered.update(content.digest for content in part)
        self._store(part)
        return len(lacking) > len(part)

    def close(self, timeout_s: float) -> None:
        """Save, unless the last save ran out of time, and close the tiers."""
        until = time.monotonic() + timeout_s
        if not self._too_slow:
            self.save(timeout_s)
        for tier in self._tiers:
            tier.close(max(0.0, until - time.monotonic()))

    @property
    def _can_write(self) -> bool:
        return any(tier.wants_more for tier in self._tiers)

    def _flush(self, until: float) -> bool:
        flushed = [tier.flush(max(0.0, until - time.monotonic())) for tier in self._tiers]
        return all(flushed)

    # ---- out -----------------------------------------------------------------------------------------------------

    def _store(self, contents: Sequence[BlockContent]) -> None:
        new = [content for content in contents if not self._costs.holds(content.digest)]
        if new:
            data = torch.empty(len(new), self._block_bytes, dtype=torch.uint8)
            self._runner.pack_blocks([content.block for content in new], data)
            for tier in self._tiers:
                tier.store(new, data)

    # ---- in ------------------------------------------------------------------------------------------------------

    def _begin(self, load: Load) -> None:
        wanted, parts = list(range(len(load.contents))), []
        for tier in self._tiers:
            places = [i for i in wanted if tier.holds(load.contents[i].digest)]
            wanted = [i for i in wanted if i not in set(places)]
            if places:
                parts.append(_Part(tier, places, tier.fetch([load.contents[i] for i in places], self._arrived)))
        until = time.perf_counter() + self._costs.patience_s(load.num_saved)
        self._under_way.append(_UnderWay(load, parts, until))
        self._loads += 1

    def _forgo_unasked(self) -> None:
        """Let requests compute what loads would have brought that were never begun, because their step was
        interrupted."""
        asked = {each.load for each in self._under_way}
        for load in self._scheduler.loads:
            if load not in asked:
                self._scheduler.landed(load, {content.block for content in load.contents})

    def _take_pieces(self, each: _UnderWay) -> None:
        for part in each.parts:
            for piece in part.fetch.take():
                each.num_blocks += len(piece.places)
                each.num_timed += len(piece.places) if piece.busy_s else 0
                each.busy_s += piece.busy_s
                if not each.ended:
                    self._copy_in(each, part, piece)
                part.tier.give_back(piece)

    def _copy_in(self, each: _UnderWay, part: _Part, piece: Piece) -> None:
        lacking = self._scheduler.lacking(each.load)
        blocks = [each.load.contents[part.places[place]].block for place in piece.places]
        rows = [row for row, good in enumerate(piece.good) if good and blocks[row] in lacking]
        if not rows:
            return
        data = piece.data[: len(blocks)] if len(rows) == len(blocks) else piece.data[rows]
        come = [blocks[row] for row in rows]
        self._runner.unpack_blocks(come, data)
        each.good.update(come)
        self._scheduler.arrived(each.load, come)

    def _land(self, each: _UnderWay) -> None:
        """End a load with the blocks that have come."""
        load = each.load
        self._measure_load(each, time.perf_counter() - each.began)
        lost = set() if load.met else {content.block for content in load.contents} - each.good
        self._scheduler.landed(load, lost)
        self._costs.saved(len(each.good) * self._scheduler.pool.block_size, each.busy_s)
        self._abandoned += bool(lost)
        self._end(each)

    def _measure_load(self, each: _UnderWay, seconds: float) -> None:
        if not each.num_blocks:  # it would have taken longer than this
            self._costs.brought(1, seconds)
        elif each.num_timed:
            self._costs.brought(each.num_timed, each.busy_s)
        if not each.load.beside:
            self._costs.waited(seconds, max(seconds - each.busy_s, 0.0), each.load.num_saved)
        elif not each.good:
            self._costs.failed()

    def _leave(self, each: _UnderWay) -> None:
        self._abandoned += 1
        self._end(each)

    def _end(self, each: _UnderWay) -> None:
        each.ended = True
        for part in each.parts:
            part.fetch.cancelled = True
