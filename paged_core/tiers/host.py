"""HostTier: blocks in host memory, for a device that has less memory.

Everything happens in the engine's thread, because memory is fast.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.errors import ConfigError
from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.stats import TierStats, empty_counts
from paged_core.tiers.tier import Fetch, Piece


class _KeptBlock(NamedTuple):
    slot: int
    content: BlockContent


class HostTier:
    """Keeps blocks of ``block_bytes`` each in ``max_bytes`` of memory, which is allocated at once.

    Args:
        pinned: whether the memory is pinned, so that the device copies from it fast.

    Raises:
        ConfigError: the memory has no room for a block, or can't be allocated.
    """

    key = None  # of digests; None, because no other process finds these blocks
    wants_more = True

    def __init__(self, max_bytes: int, block_bytes: int, *, pinned: bool) -> None:
        num_slots = max_bytes // block_bytes
        if num_slots < 1:
            raise ConfigError(f"kv_host_bytes ({max_bytes}) holds no block, which takes {block_bytes} bytes; raise it")
        try:
            self._memory = torch.empty(num_slots, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise ConfigError(f"kv_host_bytes ({max_bytes}) can't be had, lower it: {error}") from error
        self._free = list(range(num_slots))
        self._kept: OrderedDict[bytes, _KeptBlock] = OrderedDict()  # least recently used first
        self._counts = empty_counts()

    @property
    def stats(self) -> TierStats:
        return TierStats("host", len(self._kept), **self._counts)  # all counted in the engine's thread

    def holds(self, digest: bytes) -> bool:
        return digest in self._kept

    def store(self, contents: Sequence[BlockContent], data: Tensor) -> None:
        for content, row in zip(contents, data, strict=True):
            if content.digest in self._kept:
                continue
            slot = self._free.pop() if self._free else self._kept.popitem(last=False)[1].slot
            self._memory[slot].copy_(row)
            self._kept[content.digest] = _KeptBlock(slot, content)
            self._counts["blocks_out"] += 1
            self._counts["bytes_out"] += row.numel()

    def fetch(self, contents: Sequence[BlockContent], arrived: threading.Event) -> Fetch:
        """Return copies of the blocks at once, because the next blocks stored may take their room."""
        began = time.perf_counter()
        fetch = Fetch(contents, arrived)
        slots, good = [], []
        for content in contents:
            kept = self._kept.get(content.digest)
            good.append(kept is not None and kept.content[1:] == content[1:])
            slots.append(kept.slot if kept is not None else 0)
            if kept is not None:
                self._kept.move_to_end(content.digest)
        data = self._memory[slots]
        fetch.put(Piece(range(len(contents)), data, good, time.perf_counter() - began))
        self._counts["blocks_in"] += sum(good)
        self._counts["bytes_in"] += sum(good) * self._memory.shape[1]
        self._counts["blocks_lost"] += len(good) - sum(good)
        fetch.finish()
        return fetch

    def give_back(self, piece: Piece) -> None:
        """Do nothing: the piece was a copy."""

    def forget(self) -> None:
        self._free += [kept.slot for kept in self._kept.values()]
        self._kept.clear()

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        self.forget()
        self._memory = self._memory[:0].clone()
        self._free.clear()
