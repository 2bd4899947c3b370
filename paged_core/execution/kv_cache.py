"""The K/V tensors, and how many blocks a budget holds. docs/kv_layout.md draws the layout."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paged_core.execution.spec import ModelSpec

QUANTIZED = (torch.int8, torch.float8_e4m3fn)  # cache dtypes that come with a scale for each token and kv head


@dataclass(frozen=True)
class KVCache:
    """Per layer one K and one V tensor; the tokens of one head in one block are contiguous.

    Block 0 is the null block: it pads block tables and stands for blocks that have left a sliding window. It is never
    read, and no request holds it, so ``num_blocks`` usable blocks need ``num_blocks + 1`` in the tensors.

    The tensor objects stay the same for the cache's life. If ``max_blocks`` is set, their first axis and their
    addresses change between steps, as memory is allocated and freed.

    A quantised cache also has scales: the keys of one token and kv head are ``keys * key_scales``.
    """

    keys: tuple[Tensor, ...]  # L of [num_blocks + 1, K, block_size, D]
    values: tuple[Tensor, ...]  # L of [num_blocks + 1, K, block_size, Dv]
    block_size: int
    max_blocks: int | None = None  # usable blocks that it may grow to; None: it keeps its first size
    key_scales: tuple[Tensor, ...] = ()  # L of f32 [num_blocks + 1, K, block_size] if quantised, else none
    value_scales: tuple[Tensor, ...] = ()  # the same

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that hold a part of each block, ``[num_blocks + 1, ...]`` each."""
        return (*self.keys, *self.values, *self.key_scales, *self.value_scales)

    @property
    def num_blocks(self) -> int:
        """Usable blocks that have memory."""
        return self.tensors[-1].shape[0] - 1  # the last tensor to grow: the others have at least as many

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def block_bytes(self) -> int:
        """The bytes of one block in all tensors together."""
        return sum(math.prod(t.shape[1:]) * t.element_size() for t in self.tensors)

    def grow(self, num_blocks: int) -> None:
        """Make room for at least ``num_blocks`` usable blocks. The blocks keep their contents.

        On a CPU this costs nothing. Elsewhere each tensor is copied, one after another.
        """
        if self.max_blocks is None or num_blocks <= self.num_blocks:
            return
        assert num_blocks <= self.max_blocks, "the pool never hands out more"
        for tensor in self.tensors:
            tensor.resize_(num_blocks + 1, *tensor.shape[1:])

    def release(self) -> None:
        """Free all memory, if the cache can grow again. The contents of all blocks are lost."""
        if self.max_blocks is not None:
            for tensor in self.tensors:
                fresh = _room(self.max_blocks, 0, tensor.shape[1:], tensor.dtype, tensor.device)
                tensor.set_(fresh.untyped_storage(), 0, fresh.shape, fresh.stride())

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, block_table: Sequence[int], num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of each layer's ``(k [K, num_tokens, D], v [K, num_tokens, Dv])``: float32 if the cache is
        quantised, and zeros where the table holds the null block."""
        blocks = torch.tensor(block_table[: -(-num_tokens // self.block_size)], dtype=torch.int64)
        found = []
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            key_scales, value_scales = (s[layer] if s else None for s in (self.key_scales, self.value_scales))
            found.append((_gather(k, key_scales, blocks, num_tokens), _gather(v, value_scales, blocks, num_tokens)))
        return found


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block in all layers together."""
    scale_bytes = torch.float32.itemsize if dtype in QUANTIZED else 0
    token_bytes = sum(
        layer.num_kv_heads * ((layer.head_dim + layer.value_head_dim) * dtype.itemsize + 2 * scale_bytes)
        for layer in spec.layers
    )
    return token_bytes * block_size


def allocate(
    spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, max_blocks: int | None = None
) -> KVCache:
    """Return a cache that begins with ``num_blocks`` usable blocks, each on its layer's device, and may grow to
    ``max_blocks`` (None: it can't grow).

    The memory is uninitialised, because no slot is read before it was written. On a CPU, pages that are never used cost
    nothing.
    """
    most = max(num_blocks, max_blocks or 0)
    keys, values, scales = [], [], []
    for layer in spec.layers:
        shape = (layer.num_kv_heads, block_size)
        keys.append(_room(most, num_blocks, (*shape, layer.head_dim), dtype, layer.device))
        values.append(_room(most, num_blocks, (*shape, layer.value_head_dim), dtype, layer.device))
        if dtype in QUANTIZED:
            scales.append([_room(most, num_blocks, shape, torch.float32, layer.device) for _ in range(2)])
    key_scales, value_scales = tuple(zip(*scales, strict=True)) or ((), ())
    return KVCache(tuple(keys), tuple(values), block_size, most, key_scales, value_scales)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 8 << 30
    with contextlib.suppress(OSError, ValueError):  # a container's limit may be lower ("max": it has none)
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, allowed - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _gather(cache: Tensor, scales: Tensor | None, blocks: Tensor, num_tokens: int) -> Tensor:
    """Read ``cache [num_blocks + 1, K, block_size, D]`` at ``blocks i64 [B] -> [K, num_tokens, D]``."""
    blocks = blocks.to(cache.device)
    found = cache.index_select(0, blocks)  # [B, K, block_size, D]; torch 2.9 can't index float8
    if scales is not None:
        found = found.float() * scales[blocks][..., None]
    found[blocks == 0] = 0
    return found.transpose(0, 1).flatten(1, 2)[:, :num_tokens].contiguous()


@torch.inference_mode(False)  # tensors made in inference mode could not be written outside it
def _room(max_blocks: int, num_blocks: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[num_blocks + 1, *shape]``. On a CPU the addresses of ``max_blocks`` are reserved, so that resize_ up to
    that size copies nothing."""
    rows = 1 + (max_blocks if device.type == "cpu" else num_blocks)
    return _empty((rows, *shape), dtype, device).resize_(num_blocks + 1, *shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # The memory has its own pages. They cost nothing before they are touched, go back to the system together, and are
    # copied when a forked process writes to them.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # resize_, not a view: a view would keep the memory alive in release().
    return torch.frombuffer(memory, dtype=dtype).resize_(shape)
