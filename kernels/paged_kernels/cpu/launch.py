"""Launchers of the CPU's attention kernels: torch tensors in, torch tensors out.

An ``AttentionPlan`` is made once for layers of one shape, gets each step's metadata once, and runs once a layer;
between two layers only addresses change. The functions below have the signatures of ``paged_kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_not

import numpy as np
import torch
from torch import Tensor

from paged_kernels.cpu import arguments, codes, host, items, sharing
from paged_kernels.cpu import attention as kernels
from paged_kernels.cpu.intrinsics import BF16, F16, F32, HAS_F16, LANES
from paged_kernels.cpu.pair_tiles import STEP
from paged_kernels.cpu.parallel import Kernel
from paged_kernels.cpu.recording import ArgumentLayout, keep_for_recording, room, spoil_recording
from paged_kernels.cpu.sharing import TILE
from paged_kernels.cpu.sums import NUM_VECTORS, ROWS
from paged_kernels.layers import Extras, LayerCache

_FLOATS = {torch.float32: F32, torch.bfloat16: BF16} | ({torch.float16: F16} if HAS_F16 else {})
_CODES = {torch.int8: codes.INT8, torch.float8_e4m3fn: codes.FP8}
_EVERYTHING = 1 << 40  # a window wider than any context
_KERNELS: dict[str, tuple[Kernel, Kernel]] = {  # for caches of floats, and for caches of codes
    "float": (kernels.store_and_attend, kernels.store_and_attend_codes),
    "dot": (kernels.store_and_attend_dot, kernels.store_and_attend_dot_codes),
    "amx": (kernels.store_and_attend_amx, kernels.store_and_attend_amx_codes),
}
_COUNTED = ("num_shared_rows", "num_items", "num_partials", "num_counters")
# The part that changes with each layer; the step's part follows it in memory.
_ARGUMENTS = ArgumentLayout(arguments.EACH_LAYER.size, arguments.OFFSET["num_tokens"] // 8, in_place=True)
_FEW_ROWS = 32  # a request with at most this many rows may have its keys divided into pieces, if threads would be idle


def supports(dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Return whether the kernels can run queries and caches of these dtypes."""
    return dtype in _FLOATS and (cache_dtype in _FLOATS or cache_dtype in _CODES)


class AttentionPlan:
    """Attention for layers of one shape: the kernel's arguments, its list of work, its buffers.

    One thread at a time may use an instance. ``block_size``: the block size of the caches. If it is given, blocks that
    several requests of a step begin with are read once for all of them. That changes no result.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        sliding_window: int | None = None,
        block_size: int | None = None,
    ) -> None:
        self._args = np.zeros(1, arguments.ARGUMENTS)
        self._given = self._args[0]
        self._address = self._args.ctypes.data
        self._bytes = self._args.view(np.uint8).data
        self._out_shape = (num_heads, value_head_dim)
        self._buffers: dict[str, Tensor] = {}
        self._metadata: tuple[Tensor, ...] = ()
        self._num_stores = 0
        self._num_threads = 1
        self._row_bytes = 4 * (LANES + _padded(value_head_dim, LANES))
        self._num_kv_heads = num_kv_heads
        for name, value in {
            "num_kv_heads": num_kv_heads,
            "group": num_heads // num_kv_heads,
            "head_dim": head_dim,
            "value_dim": value_head_dim,
            "window": _EVERYTHING if sliding_window is None else sliding_window,
            "planned_block_size": block_size or 0,
            "row_tile": ROWS,
            "few_rows": _FEW_ROWS,
        }.items():
            self._given[name] = value
        self._scratch_bytes = self._part_scratch(head_dim, value_head_dim)

    def _part_scratch(self, head_dim: int, value_head_dim: int) -> int:
        """Divide a thread's scratch memory. In float32 a head dim is padded to whole vectors; in pairs of bfloat16 to
        whole steps, which may be more."""
        dim, value_dim = _padded(head_dim, LANES), _padded(value_head_dim, LANES)
        wide, value_wide = _padded(head_dim, STEP), _padded(value_head_dim, STEP)
        at = 0
        for name, num_bytes in {
            "at_q": ROWS * max(4 * dim, 2 * wide),
            "at_scores": 4 * ROWS * TILE,
            "at_weights": 2 * ROWS * TILE,
            "at_out": 4 * ROWS * value_dim,
            "at_sums": 4 * ROWS * value_wide,
            "at_keys": TILE * max(4 * dim, 2 * wide),
            "at_values": TILE * max(4 * value_dim, 2 * value_wide),
            "at_staging": 2 * (TILE + 1) * max(wide, value_wide),
            "at_tables": 2 * 8 * TILE,
            "at_rows": 4 * NUM_VECTORS * ROWS,
        }.items():
            self._given[name] = at
            at += -(-num_bytes // 64) * 64
        self._given["scratch_stride"] = at + 64  # so that threads' parts never share a cache line
        return at + 64

    def plan(self, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, slot_mapping: Tensor) -> None:
        """Take in a step: ``query_starts i32 [R+1], seq_lens i32 [R], block_tables i32 [R,B], slot_mapping i64 [T]``,
        all on the CPU."""
        block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
        self._metadata = (query_starts.contiguous(), seq_lens.contiguous(), block_tables, slot_mapping.contiguous())
        query_starts, seq_lens, block_tables, slot_mapping = self._metadata
        assert query_starts.dtype == seq_lens.dtype == block_tables.dtype == torch.int32
        assert slot_mapping.dtype == torch.int64
        self._num_stores = slot_mapping.shape[0]
        self._num_threads = torch.get_num_threads()
        num_requests, num_tokens = seq_lens.shape[0], int(query_starts[-1])
        of_nodes = sharing.NODE_BYTES * 2 * (num_requests + 1)
        arguments.EACH_STEP.pack_into(
            self._bytes, arguments.OFFSET["num_requests"], num_requests, slot_mapping.data_ptr(),
            query_starts.data_ptr(), seq_lens.data_ptr(), block_tables.data_ptr(), block_tables.stride(0),
            self._num_threads, self._room("order", 8 * num_requests), self._room("reach", 8 * num_requests),
            self._room("nodes", of_nodes), self._room("stack", of_nodes), self._room("tokens", 8 * num_tokens),
        )  # fmt: skip
        items.plan_groups(self._address, 1)
        shared, num_items, num_partials, num_counters = (int(self._given[name]) for name in _COUNTED)
        shared *= self._num_kv_heads
        arguments.ROOM.pack_into(
            self._bytes, arguments.OFFSET["states"], self._room("states", self._row_bytes * shared),
            self._room("marks", 8 * shared), self._room("items", items.ITEM_BYTES * num_items),
            self._room("partials", self._row_bytes * num_partials), self._room("counters", 8 * num_counters),
            self._room("scratch", self._scratch_bytes * self._num_threads),
        )  # fmt: skip
        items.plan_items(self._address, 1)

    def _room(self, name: str, num_bytes: int) -> int:
        """Return the address of a buffer of at least this size. A new buffer is zeroed."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.zeros(max(num_bytes + num_bytes // 2, 64), dtype=torch.uint8)
            self._buffers[name] = buffer
        return buffer.data_ptr()

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: LayerCache, extras: Extras) -> Tensor:
        """Store ``k [T,K,D], v [T,K,Dv]`` (if given) at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]``.

        The window is the plan's own. ``key_bias f32 [H,P]`` is used without a copy if P is at least the longest
        sequence plus ``LANES``.
        """
        dtype, (key_cache, value_cache, key_scales, value_scales) = q.dtype, cache
        scale, _, softcap, sinks, key_bias = extras
        cache_code = _cache_code(key_cache, key_scales)
        out = room("attended", (q.shape[0], *self._out_shape), dtype)
        num_stores, given = self._num_stores, (q, k, v)
        if k is None or v is None:
            k = v = q
            num_stores = 0
        elif k.dtype is not dtype or v.dtype is not dtype:
            k, v = k.to(dtype), v.to(dtype)
        (q, *q_strides), (k, *k_strides), (v, *v_strides) = _side_by_side(q), _side_by_side(k), _side_by_side(v)
        if sinks is not None or key_bias is not None or any(map(is_not, given, (q, k, v))):
            spoil_recording()
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
        if key_bias is not None:
            key_bias = self._with_room(key_bias)
        arguments.EACH_LAYER.pack_into(
            self._bytes, 0, q.data_ptr(), *q_strides, k.data_ptr(), *k_strides, v.data_ptr(), *v_strides,
            out.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), _address(key_scales), _address(value_scales),
            _address(sinks), _address(key_bias), 0 if key_bias is None else key_bias.stride(0),
            _FLOATS[dtype], cache_code, key_cache.shape[2], num_stores, scale, softcap or 0.0,
        )  # fmt: skip
        keep_for_recording(self._args)
        _kernel_for(dtype, key_cache.dtype)(self._address, self._num_threads, _ARGUMENTS)
        return out

    def _with_room(self, key_bias: Tensor) -> Tensor:
        """Return the bias with contiguous rows, padded so that a vector may be read beyond the last key."""
        seq_lens = self._metadata[1]
        longest = int(seq_lens.max()) if seq_lens.numel() else 0
        num_positions = key_bias.shape[1]
        if num_positions < longest:
            raise ValueError(f"key_bias knows {num_positions} positions, and a sequence has {longest} tokens")
        key_bias = key_bias.detach().to(torch.float32)
        if num_positions < longest + LANES:
            return torch.nn.functional.pad(key_bias, (0, LANES))
        return key_bias if key_bias.stride(1) == 1 else key_bias.contiguous()


def _kernel_for(dtype: torch.dtype, cache_dtype: torch.dtype) -> Kernel:
    """Return the kernel for queries and caches of these dtypes that suits the host."""
    in_pairs = dtype is torch.bfloat16 and (cache_dtype is torch.bfloat16 or cache_dtype in _CODES)
    of_floats, of_codes = _KERNELS[host.choose_attention() if in_pairs else "float"]
    return of_codes if cache_dtype in _CODES else of_floats


def warm_up(
    progress: Callable[[str, int, int], None] | None = None,
    cache_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
) -> None:
    """Compile, or load from disk, every attention kernel for caches of this dtype and queries of ``dtype`` (by default
    the cache's dtype, or float32). Calls ``progress(what, done, total)`` before each kernel and after all.

    The kernels are the same for every model, because shapes are arguments.
    """
    dtype = dtype or (torch.float32 if cache_dtype in _CODES else cache_dtype)
    store = kernels.store_codes if cache_dtype in _CODES else kernels.store
    todo = (items.plan_groups, items.plan_items, store, _kernel_for(dtype, cache_dtype))
    for done, each in enumerate(todo):
        if progress is not None:
            progress(each.name, done, len(todo))
        each.compile()
    if progress is not None:
        progress("attention kernels", len(todo), len(todo))


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Store ``k [T,K,D], v [T,K,Dv]`` in the cache at ``slot_mapping i64 [T]``; see ``reference.store_kv``."""
    key_cache, value_cache, key_scales, value_scales = cache
    cache_code = _cache_code(key_cache, key_scales)
    args = np.zeros(1, arguments.ARGUMENTS)
    slot_mapping = slot_mapping.contiguous()
    (k, *k_strides), (v, *v_strides) = _side_by_side(k), _side_by_side(v.to(k.dtype))
    arguments.EACH_LAYER.pack_into(
        args.view(np.uint8).data, 0, 0, 0, 0, k.data_ptr(), *k_strides, v.data_ptr(), *v_strides, 0,
        key_cache.data_ptr(), value_cache.data_ptr(), _address(key_scales), _address(value_scales), 0, 0, 0,
        _FLOATS[k.dtype], cache_code, key_cache.shape[2], slot_mapping.shape[0], 0.0, 0.0,
    )  # fmt: skip
    given = args[0]
    given["slots"] = slot_mapping.data_ptr()
    given["num_kv_heads"], given["head_dim"] = key_cache.shape[1], key_cache.shape[3]
    given["value_dim"] = value_cache.shape[3]
    kernel = kernels.store if key_scales is None else kernels.store_codes
    kernel(args.ctypes.data, torch.get_num_threads())


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, target) in every cache ``[blocks, ...]``, one pair after another."""
    for source, target in pairs:
        for cache in caches:
            cache[target].copy_(cache[source])


def paged_attention(
    q: Tensor, cache: LayerCache, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, extras: Extras
) -> Tensor:
    """Compute causal attention of packed queries over the blocks of their own request; see
    ``reference.paged_attention``."""
    shape = (q.shape[1], cache.keys.shape[1], q.shape[2], cache.values.shape[3])
    plan = AttentionPlan(*shape, extras.sliding_window, cache.keys.shape[2])
    plan.plan(query_starts, seq_lens, block_tables, torch.empty(0, dtype=torch.int64))
    return plan.run(q, None, None, cache, extras)


def _cache_code(cache: Tensor, scales: Tensor | None) -> int:
    """Return the kernels' code of a cache's dtype."""
    if scales is not None:
        return _CODES[cache.dtype]
    if cache.dtype in _CODES:
        raise ValueError(f"a cache of {cache.dtype} needs key_scales and value_scales")
    return _FLOATS[cache.dtype]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _side_by_side(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x with contiguous rows, and its strides from token to token and from head to head."""
    token, head, number = x.stride()
    if number == 1:
        return x, token, head
    x = x.contiguous()
    token, head, _ = x.stride()
    return x, token, head


def _padded(dim: int, unit: int) -> int:
    return -(-dim // unit) * unit
