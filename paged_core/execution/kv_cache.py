"""The K/V tensors, and how many blocks a budget holds. docs/kv_layout.md draws the layout."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Zeroed tensors for ``num_blocks`` usable blocks, each on its layer's device."""
    keys, values = [], []
    for layer in spec.layers:
        shape = (num_blocks + 1, layer.num_kv_heads, block_size)
        keys.append(torch.zeros(*shape, layer.head_dim, dtype=dtype, device=layer.device))
        values.append(torch.zeros(*shape, layer.value_head_dim, dtype=dtype, device=layer.device))
    return KVCache(tuple(keys), tuple(values), block_size)
