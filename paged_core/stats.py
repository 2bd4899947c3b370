"""StepStats: what one step did, in numbers. Observers get it from the on_step_finished hook."""

from __future__ import annotations

from typing import NamedTuple


class StepStats(NamedTuple):
    """One engine step. Counters that begin with ``total_`` run since the engine was built."""

    duration_s: float
    num_running: int  # after the step
    num_waiting: int
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
    total_late_compiles: int = 0  # graphs captured and kernels compiled since the engine was built: a step waited
    total_steps_divided: int = 0  # computed in parts, since memory had no room for them

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.num_blocks_used / self.num_blocks

    @property
    def kv_waste(self) -> float:
        """Share of the reserved slots that hold no token, 0 to 1 (Kwon et al., 2023, figure 2)."""
        reserved = self.num_blocks_used * self.block_size
        return self.num_slots_wasted / reserved if reserved else 0.0
