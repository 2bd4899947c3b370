"""EngineView and MemoryUse: a snapshot of an engine, for people who watch it. Plain copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paged_core.execution.kv_cache import KVCache
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.scheduler import Scheduler
from paged_core.tiers.stats import OffloadingStats


class BlockCells(NamedTuple):
    """Blocks in the order of their ids, ``blocks_per_cell`` neighbours per cell; the last cell may have fewer. For each
    cell, the number of its blocks in each state; blocks in none of the three are free."""

    num_blocks: int
    blocks_per_cell: int
    cached: list[int]  # kept for prefix hits only
    used: list[int]  # one reference
    shared: list[int]  # two or more


class EngineView(NamedTuple):
    """An engine between two steps."""

    num_running: int
    num_waiting: int
    block_size: int
    references: Sequence[int]  # reference counts of blocks 1, 2, ...
    cached: Sequence[int]  # ids of blocks that are kept for prefix hits only
    offloading: OffloadingStats = OffloadingStats()  # what tiers hold and have done

    @classmethod
    def of(cls, scheduler: Scheduler, offloading: OffloadingStats) -> EngineView:
        """Return the scheduler's present state."""
        references, cached = scheduler.pool.snapshot()
        num_running, num_waiting = len(scheduler.running), len(scheduler.waiting) + len(scheduler.loading)
        return cls(num_running, num_waiting, scheduler.pool.block_size, references, cached, offloading)

    @property
    def num_saved(self) -> int:
        """The number of blocks that sharing saves: references beyond each block's first."""
        return sum(self.references) - sum(1 for count in self.references if count)

    def cells(self, max_cells: int) -> BlockCells:
        """Return the block map in at most ``max_cells`` cells."""
        references = np.asarray(self.references, dtype=np.int64)  # [num_blocks]
        is_cached = np.zeros(len(references), dtype=bool)
        is_cached[np.asarray(self.cached, dtype=np.int64) - 1] = True
        per_cell = max(1, -(-len(references) // max_cells))
        starts = np.arange(0, len(references), per_cell)
        states = (is_cached, references == 1, references > 1)
        cached, used, shared = (np.add.reduceat(state.astype(np.int64), starts).tolist() for state in states)
        return BlockCells(len(references), per_cell, cached, used, shared)


class MemoryUse(NamedTuple):
    """The memory of the K/V cache between two steps."""

    num_blocks: int  # the most that the cache may have
    num_blocks_backed: int  # those that have memory
    num_blocks_used: int  # referenced by requests
    num_blocks_cached: int  # kept for prefix hits only
    num_bytes: int  # allocated, the null block included

    @classmethod
    def of(cls, pool: BlockPool, cache: KVCache) -> MemoryUse:
        """Return the memory use of a pool whose blocks are in ``cache``."""
        return cls(pool.num_blocks, cache.num_blocks, pool.num_used, pool.num_cached, cache.num_bytes)
