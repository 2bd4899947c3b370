"""The K/V tensors, and how many blocks a budget holds. docs/kv_layout.md draws the layout."""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paged_core.execution.model import ModelSpec


@dataclass(frozen=True)
class KVCache:
    """Per layer one K and one V tensor; the tokens of one head in one block are contiguous.

    Block 0 is the null block: it pads block tables and stands for blocks that have left a sliding window. Nothing
    reads it and requests never own it, so ``num_blocks`` usable blocks need ``num_blocks + 1`` in the tensors.
    """

    keys: tuple[Tensor, ...]  # L of [num_blocks + 1, K, block_size, D]
    values: tuple[Tensor, ...]  # L of [num_blocks + 1, K, block_size, Dv]
    block_size: int

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers together."""
    floats = sum(layer.num_kv_heads * (layer.head_dim + layer.value_head_dim) for layer in spec.layers)
    return floats * block_size * dtype.itemsize


def allocate(spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    """Tensors for ``num_blocks`` usable blocks, each on its layer's device.

    Uninitialised: no slot is read before it was written, and on a CPU pages that are never used cost nothing.
    """
    keys, values = [], []
    for layer in spec.layers:
        shape = (num_blocks + 1, layer.num_kv_heads, block_size)
        keys.append(_empty((*shape, layer.head_dim), dtype, layer.device))
        values.append(_empty((*shape, layer.value_head_dim), dtype, layer.device))
    return KVCache(tuple(keys), tuple(values), block_size)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device right now, before anything is given back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 8 << 30
    with contextlib.suppress(OSError, ValueError):  # a container may be allowed less ("max": as much as there is)
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, allowed - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < 2 << 20:
        return torch.empty(shape, dtype=dtype, device=device)
    # Touching a fresh 4 KiB page costs microseconds, which a growing cache pays all the time; huge pages cost a fifth.
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
