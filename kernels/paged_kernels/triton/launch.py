"""Launchers of the GPU's attention kernels: torch tensors in, torch tensors out.

An ``AttentionPlan`` is made once for layers of one shape, gets each step's metadata once, and runs once a layer. The
functions below have the signatures of ``paged_kernels.reference``. No launcher waits for the device, and what it
allocates depends on shapes alone, so all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_kernels.layers import Extras, LayerCache
from paged_kernels.triton import decode, elementwise, prefill, sampling, store, tiles, work
from paged_kernels.triton.arrays import bits_of, on_device, rows_of
from paged_kernels.triton.writes import copy_blocks, move_blocks, store_kv

__all__ = [
    "AttentionPlan", "copy_blocks", "fits", "move_blocks", "num_compiles", "paged_attention", "store_kv", "supports",
]  # fmt: skip

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CODES = (torch.int8, torch.float8_e4m3fn)  # of quantised caches


def num_compiles() -> int:
    """Return the number of kernels compiled so far, those of modules and of the sampler included, for all devices of
    this process. Interpreted kernels don't count."""
    modules = (work, decode, prefill, store, elementwise, sampling)
    kernels = {id(thing): thing for module in modules for thing in vars(module).values()}.values()
    caches = (found for kernel in kernels for found in getattr(kernel, "device_caches", {}).values())
    return sum(len(cache[0]) for cache in caches)


def supports(dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Return whether the kernels can run queries of ``dtype`` with caches of ``cache_dtype``."""
    return dtype in _FLOATS and cache_dtype in (*_FLOATS, *_CODES)


def fits(head_dim: int, value_head_dim: int) -> bool:
    """Return whether heads of this size fit into a GPU's registers and shared memory."""
    return max(head_dim, value_head_dim) <= 256


class AttentionPlan:
    """Attention for layers of one shape, whose queries have one dtype, and whose caches have another (None: the same).
    One step at a time. ``block_size``: the block size of the caches. If it is given, blocks that several requests of a
    step begin with are read for many of them together. That changes no result."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        sliding_window: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        cache_dtype: torch.dtype | None = None,
        block_size: int | None = None,
    ) -> None:
        if not fits(head_dim, value_head_dim):
            raise ValueError(f"head dims of {head_dim} and {value_head_dim} are too large for a GPU's tiles: up to 256")
        self._group = num_heads // num_kv_heads
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        self._dims = (head_dim, value_head_dim)
        self._window, self._block_size = sliding_window, block_size
        self._shape = (self._group, *self._dims, dtype, cache_dtype or dtype)

    def plan(
        self,
        query_starts: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        max_query_len: int,
        max_seq_len: int,
    ) -> None:
        """Take in a step: ``query_starts i32 [R+1], seq_lens i32 [R], block_tables i32 [R,B], slot_mapping i64 [T]`` on
        the layers' device. No request exceeds the two lengths. The work is listed on the device too, so the tensors may
        be rewritten and the launches replayed."""
        assert query_starts.dtype == seq_lens.dtype == block_tables.dtype == torch.int32
        assert slot_mapping.dtype == torch.int64
        card = tiles.card_of(seq_lens.device)
        self.decode_tile = tiles.decode(*self._shape, card)
        self._prefill_tile = tiles.prefill(*self._shape, card)
        self._combine_tile = tiles.combine(*self._dims)
        self._query_starts, self._seq_lens, self._slots = query_starts.contiguous(), seq_lens.contiguous(), slot_mapping
        self._tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
        num_keys = min(max_seq_len, self._window or max_seq_len)
        self._make_room(max_query_len, num_keys)
        with on_device(seq_lens.device):
            self._list_work(num_keys)

    def _make_room(self, max_query_len: int, num_keys: int) -> None:
        """Allocate lists for the most items that decode and prefill may have."""
        num_requests, device = self._seq_lens.shape[0], self._seq_lens.device
        splits = min(-(-num_keys // tiles.SPLITS["SPLIT"]), tiles.SPLITS["MAX_SPLITS"])
        self._max_splits = num_requests * splits
        self.decode_items = _items(self._max_splits, num_requests, device, 1 + self.decode_tile["ROOM"])
        self._max_tiles = 0
        self._prefill_items: tuple[Tensor | None, Tensor | None] = (None, None)
        if max_query_len > 1:
            block_m = self._prefill_tile["BLOCK_M"]
            tiles_of_longest = -(-max_query_len * self._group // block_m)
            num_tokens = self._slots.shape[0] or num_requests * max_query_len
            of_all = num_tokens * self._group // block_m + num_requests
            self._max_tiles = min(num_requests * tiles_of_longest, of_all)
            self._prefill_items = _items(self._max_tiles, num_requests, device)

    def _list_work(self, num_keys: int) -> None:
        num_requests, room = self._seq_lens.shape[0], self.decode_tile["ROOM"]
        work.list_items_kernel[1,](
            self._query_starts, self._seq_lens, *self.decode_items, *self._prefill_items, num_requests, self._window,
            GROUP=self._group, BLOCK_M=self._prefill_tile["BLOCK_M"], ROOM=room, **tiles.SPLITS, **tiles.LIST_TILE,
        )  # fmt: skip
        if self._can_share(num_requests, num_keys, room):
            work.share_kernel[self._max_splits,](
                self._query_starts, self._seq_lens, self._tables, *self.decode_items, num_requests,
                self._tables.stride(0), self._window, BLOCK_SIZE=self._block_size, ROOM=room, **tiles.SPLITS,
                **tiles.SHARE_TILE,
            )  # fmt: skip

    def _can_share(self, num_requests: int, num_keys: int, room: int) -> bool:
        """Return whether requests could share blocks, without looking at block tables: there must be two, with keys for
        a whole stretch each.

        Looking costs a launch per step, a few microseconds. A stretch that two requests read together saves 256 KiB per
        kv head and layer (head dim 128, 16 bits): at the 4 TB/s that decode reads on an H200, that is 15 microseconds
        for 8 kv heads and 30 layers. So a single shared stretch pays for it. Neither time has been measured."""
        return self._block_size is not None and room > 1 and num_requests > 1 and num_keys > tiles.SPLITS["SPLIT"]

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: LayerCache, extras: Extras) -> Tensor:
        """Store ``k [T,K,D], v [T,K,Dv]`` (if given) at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]``. The
        window is the plan's own."""
        if k is not None and v is not None:
            store_kv(k, v, cache, self._slots)
        for part in cache:
            if part is not None and not part.is_contiguous():
                raise ValueError(
                    f"a cache is read as one piece of memory, and one has strides {part.stride()}: make it contiguous"
                )
        key_cache, value_cache = bits_of(cache.keys), bits_of(cache.values)
        scale, _, softcap, sinks, key_bias = extras
        if key_bias is not None:
            key_bias = key_bias.detach().to(torch.float32)
            key_bias = key_bias if key_bias.stride(1) == 1 else key_bias.contiguous()
        if sinks is not None:
            sinks = sinks.detach().contiguous()
        q, *q_strides = rows_of(q)
        out = torch.empty((q.shape[0], self._num_heads, self._dims[1]), dtype=q.dtype, device=q.device)
        cache_arguments = (key_cache, value_cache, cache.key_scales, cache.value_scales, key_bias)
        step = (self._query_starts, self._seq_lens, self._tables, self._seq_lens.shape[0], self._num_heads, *q_strides)
        strides = (self._tables.stride(0), None if key_bias is None else key_bias.stride(0))
        facts = (self._window, float(scale), None if softcap is None else float(softcap))
        block_size = key_cache.shape[2]
        with on_device(q.device):
            if self._max_tiles:
                prefill.prefill_kernel[self._max_tiles, self._num_kv_heads](
                    q, *cache_arguments, sinks, out, *self._prefill_items, *step, *strides, *facts,
                    BLOCK_SIZE=block_size, **self._prefill_tile,
                )  # fmt: skip
            if self._max_splits and not self._only_prefills(q.shape[0]):
                self._decode(q, cache_arguments, (*step, *strides, *facts), sinks, out, block_size)
        return out

    def _only_prefills(self, num_tokens: int) -> bool:
        """Return whether shapes alone show that all work is prefill: a single request with several queries."""
        return self._seq_lens.shape[0] == 1 and num_tokens > 1

    def _decode(
        self, q: Tensor, cache_arguments: tuple[Tensor | None, ...], rest: tuple[object, ...], sinks: Tensor | None,
        out: Tensor, block_size: int,
    ) -> None:  # fmt: skip
        heads, (_, value_dim) = self._num_heads, self._dims
        partials = torch.empty((self._max_splits, heads, value_dim), dtype=torch.float32, device=q.device)
        logs = torch.empty((self._max_splits, heads), dtype=torch.float32, device=q.device)
        columns = self._num_kv_heads * -(-self._group // self.decode_tile["BLOCK_H"])
        grid = (min(self._max_splits, max(tiles.MAX_PROGRAMS // columns, 1)), columns)
        decode.split_kernel[grid](
            q, *cache_arguments, partials, logs, *self.decode_items, *rest, BLOCK_SIZE=block_size, **self.decode_tile
        )
        decode.combine_kernel[self._seq_lens.shape[0], heads](
            partials, logs, sinks, out, self.decode_items[1], self._query_starts, heads, **self._combine_tile
        )


def paged_attention(
    q: Tensor, cache: LayerCache, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, extras: Extras
) -> Tensor:
    """Compute causal attention of packed queries over the blocks of their own request; see
    ``reference.paged_attention``."""
    dims = (q.shape[1], cache.keys.shape[1], q.shape[2], cache.values.shape[3])
    plan = AttentionPlan(*dims, extras.sliding_window, q.dtype, cache.keys.dtype, cache.keys.shape[2])
    longest = block_tables.shape[1] * cache.keys.shape[2]
    no_slots = torch.empty(0, dtype=torch.int64, device=q.device)
    plan.plan(query_starts, seq_lens, block_tables, no_slots, q.shape[0], longest)
    return plan.run(q, None, None, cache, extras)


def _items(count: int, num_requests: int, device: torch.device, width: int = 1) -> tuple[Tensor, Tensor]:
    """Return an empty list of work: for each item its request (or ``width`` numbers), and for each request its first
    item."""
    both = torch.empty(count * width + num_requests + 1, dtype=torch.int32, device=device)
    return both[: count * width], both[count * width :]
