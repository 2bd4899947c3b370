"""StepStats: the numbers of one step. Observers get it from the on_step_finished hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Schedule
from paged_core.scheduling.scheduler import Scheduler
from paged_core.tiers.stats import OffloadingStats


class StepStats(NamedTuple):
    """One engine step. Counters that begin with ``total_`` run since the engine was built."""

    duration_s: float
    num_running: int  # after the step
    num_waiting: int  # waiting for their turn, or for blocks that a tier loads
    num_tokens: int  # computed in this step
    num_sampled: int  # rows that got a new token
    num_preempted: int
    num_blocks: int  # usable blocks of the cache
    num_blocks_used: int  # referenced by running requests
    num_blocks_cached: int  # kept for prefix hits only
    num_blocks_shared: int  # blocks that forks and prefix hits saved: references beyond the first
    num_slots_wasted: int  # slots of used blocks that hold no token
    block_size: int
    total_preemptions: int
    total_prefix_queries: int  # prompt tokens looked up in the prefix cache
    total_prefix_hits: int  # and found there
    total_late_compiles: int = 0  # graphs captured and kernels compiled during steps, which waited for them
    total_steps_divided: int = 0  # steps computed in parts, because memory had no room for the whole
    offloading: OffloadingStats = OffloadingStats()  # what tiers have done

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        schedule: Schedule,
        *,
        num_sampled: int,
        duration_s: float,
        total_late_compiles: int,
        total_steps_divided: int,
        offloading: OffloadingStats,
    ) -> StepStats:
        """Return the stats of the step that the scheduler has just updated from."""
        pool = scheduler.pool
        return cls(
            duration_s=duration_s,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.loading),
            num_tokens=sum(chunk.num_tokens for chunk in schedule.chunks),
            num_sampled=num_sampled,
            num_preempted=len(schedule.preempted),
            num_blocks=pool.num_blocks,
            num_blocks_used=pool.num_used,
            num_blocks_cached=pool.num_cached,
            num_blocks_shared=pool.num_shared,
            num_slots_wasted=_slots_wasted(scheduler.running, pool),
            block_size=pool.block_size,
            total_preemptions=scheduler.num_preemptions,
            total_prefix_queries=scheduler.num_prefix_queries,
            total_prefix_hits=scheduler.num_prefix_hits,
            total_late_compiles=total_late_compiles,
            total_steps_divided=total_steps_divided,
            offloading=offloading,
        )

    @property
    def kv_cache_usage(self) -> float:
        """The share of blocks in use, 0 to 1."""
        return self.num_blocks_used / self.num_blocks

    @property
    def kv_waste(self) -> float:
        """The share of reserved slots that hold no token, 0 to 1 (Kwon et al., 2023, figure 2)."""
        reserved = self.num_blocks_used * self.block_size
        return self.num_slots_wasted / reserved if reserved else 0.0


def _slots_wasted(running: Sequence[Request], pool: BlockPool) -> int:
    """Return the slots of used blocks that hold no token. A partly filled block that rows share counts once."""
    block_size = pool.block_size
    wasted, seen = 0, set()
    for request in running:
        empty = len(request.block_table) * block_size - request.num_computed
        if empty and pool.is_shared(request.block_table[-1]):
            if request.block_table[-1] in seen:
                continue
            seen.add(request.block_table[-1])
        wasted += empty
    return wasted
