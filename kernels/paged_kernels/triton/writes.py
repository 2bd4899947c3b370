"""Launchers that write K/V: a step's new tokens to their slots, whole blocks to other places. None of them waits for
the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from paged_kernels.layers import LayerCache
from paged_kernels.triton import store, tiles
from paged_kernels.triton.arrays import bits_of, on_device, rows_of

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Store ``k [T,K,D], v [T,K,Dv]`` in the cache at ``slot_mapping i64 [T]``; see ``reference.store_kv``."""
    num_tokens, num_kv_heads, dim = k.shape
    if num_tokens == 0:
        return
    (k, *k_strides), (v, *v_strides) = rows_of(k), rows_of(v)
    key_cache, value_cache = bits_of(cache.keys), bits_of(cache.values)
    key_scales, value_scales = cache.key_scales, cache.value_scales
    tile = tiles.store(num_kv_heads, dim, v.shape[2])
    with on_device(k.device):
        store.store_kernel[num_tokens, -(-num_kv_heads // tile["HEADS"])](
            k, v, key_cache, value_cache, key_scales, value_scales, slot_mapping.contiguous(), num_kv_heads,
            *k_strides, *v_strides, key_cache.stride(0), value_cache.stride(0),
            None if key_scales is None else key_scales.stride(0), BLOCK_SIZE=key_cache.shape[2], **tile,
        )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, target) in every cache ``[blocks, ...]``, one pair after another."""
    for together in _independent(pairs):
        move_blocks(caches, caches, together)


def move_blocks(sources: Sequence[Tensor], targets: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block ``pair[0]`` of each source to block ``pair[1]`` of its target, all pairs at once: from a cache to a
    staging tensor, or back. Either may be in pinned host memory."""
    for device in dict.fromkeys(_kernel_device(pair) for pair in zip(sources, targets, strict=True)):
        mine = [pair for pair in zip(sources, targets, strict=True) if _kernel_device(pair) == device]
        block_bytes = [source[0].numel() * source.element_size() for source, _ in mine]
        word = next(size for size in _WORDS if all(count % size == 0 for count in block_bytes))
        numbers = [number for pair in pairs for number in pair]
        for (source, target), count in zip(mine, block_bytes, strict=True):
            assert source[0].is_contiguous() and target[0].is_contiguous() and source.stride(0) == target.stride(0)
            numbers += [source.data_ptr(), target.data_ptr(), count // word]
        # The host would wait for a copy from memory that isn't pinned.
        given = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        num_words = max(block_bytes) // word
        grid = (len(pairs), len(mine), -(-num_words // tiles.COPY_TILE["NUM_WORDS"]))
        unit = torch.empty(0, dtype=_WORDS[word], device=device)
        with on_device(device):
            store.copy_kernel[grid](given[2 * len(pairs) :], given, unit, **tiles.COPY_TILE)


def _independent(pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of pairs that may be copied in any order, because none touches another's target."""
    together: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if source in written or target in written or target in read:
            yield together
            together, read, written = [], set(), set()
        together.append((source, target))
        read.add(source)
        written.add(target)
    if together:
        yield together


def _kernel_device(pair: tuple[Tensor, Tensor]) -> torch.device:
    """Return the device on which to copy between two tensors: the GPU, if one of them is in host memory."""
    source, target = pair
    return target.device if source.device.type == "cpu" else source.device
