"""Packs the contents of blocks into plain bytes, and unpacks them: bit for bit, for any layout and dtype.

A packed block is its part of each of the cache's tensors, one after another. Nothing here knows where the bytes go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from paged_core.execution.kv_cache import KVCache


@torch.inference_mode(False)
@torch.no_grad()
def pack(cache: KVCache, blocks: Sequence[int], packed: Tensor) -> None:
    """Copy the contents of ``blocks`` into ``packed u8 [n, block_bytes]`` on the CPU. Waits for the device."""
    for device, tensors, part in _by_device(cache, packed):
        if device.type == "cpu":
            for rows, own in _columns(tensors, part):
                _items(own)[:] = _items(rows)[list(blocks)]
        else:
            ids = torch.tensor(blocks, device=device)
            part.copy_(torch.cat([rows.index_select(0, ids) for rows in tensors], dim=1))


@torch.inference_mode(False)
@torch.no_grad()
def unpack(cache: KVCache, blocks: Sequence[int], packed: Tensor) -> None:
    """Write packed contents, ``u8 [n, block_bytes]`` on the CPU, into ``blocks``, which need not be the same blocks."""
    for device, tensors, part in _by_device(cache, packed):
        if device.type == "cpu":
            for rows, own in _columns(tensors, part):
                _items(rows)[list(blocks)] = _items(own)
        else:
            ids = torch.tensor(blocks, device=device)
            for rows, own in _columns(tensors, part.to(device)):
                rows.index_copy_(0, ids, own)


def _by_device(cache: KVCache, packed: Tensor) -> Iterator[tuple[torch.device, list[Tensor], Tensor]]:
    """Yield for each run of neighbours on one device: the tensors as bytes ``[num_blocks + 1, n]``, and their columns
    of ``packed``."""
    start = 0
    for device, tensors in groupby(cache.tensors, key=lambda tensor: tensor.device):
        rows = [tensor.view(torch.uint8).flatten(1) for tensor in tensors]
        width = sum(each.shape[1] for each in rows)
        yield device, rows, packed[:, start : start + width]
        start += width


def _columns(tensors: Sequence[Tensor], part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for rows in tensors:
        yield rows, part[:, start : start + rows.shape[1]]
        start += rows.shape[1]


def _items(rows: Tensor) -> Any:
    """Return rows ``u8 [N, n]`` as a numpy array of N items. numpy copies an item at once, several times as fast as
    torch."""
    return rows.numpy().view(f"V{rows.shape[1]}")[:, 0]
