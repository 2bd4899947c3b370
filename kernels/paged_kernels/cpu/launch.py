"""Launchers of the CPU's attention kernels: torch tensors in, torch tensors out.

``AttentionPlan`` is made once for layers of one shape, given each step's metadata once, and run once a layer; between
two layers only addresses change. The functions below have the signatures of ``paged_kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paged_kernels.cpu import arguments, codes
from paged_kernels.cpu import attention as kernels
from paged_kernels.cpu.attention import ROWS, TILE
from paged_kernels.cpu.vectors import BF16, F16, F32, HAS_F16, LANES
from paged_kernels.layers import Extras, LayerCache

_FLOATS = {torch.float32: F32, torch.bfloat16: BF16} | ({torch.float16: F16} if HAS_F16 else {})
_CODES = {torch.int8: codes.INT8, torch.float8_e4m3fn: codes.FP8}
_EVERYTHING = 1 << 40  # a window wider than any context


def supports(dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether queries and caches of these dtypes can be run."""
    return dtype in _FLOATS and (cache_dtype in _FLOATS or cache_dtype in _CODES)


class AttentionPlan:
    """Attention for layers of one shape: arguments of the kernel, its list of work, its buffers.

    One step at a time: an instance must not be used by two threads at once.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        sliding_window: int | None = None,
    ) -> None:
        self._args = torch.zeros(arguments.NUM_ARGS, dtype=torch.int64)
        self._address = self._args.data_ptr()
        self._set = self._args.numpy().data
        self._bytes = self._set.cast("B")
        self._group = num_heads // num_kv_heads
        self._out_shape = (num_heads, value_head_dim)
        self._buffers: dict[int, Tensor] = {}
        self._metadata: tuple[Tensor, ...] = ()
        self._num_stores = 0
        self._num_threads = 1
        given = self._set
        given[arguments.NUM_KV_HEADS] = num_kv_heads
        given[arguments.GROUP] = self._group
        given[arguments.HEAD_DIM] = head_dim
        given[arguments.VALUE_DIM] = value_head_dim
        given[arguments.WINDOW] = _EVERYTHING if sliding_window is None else sliding_window
        self._scratch_bytes = self._part_scratch(head_dim, value_head_dim)

    def _part_scratch(self, head_dim: int, value_head_dim: int) -> int:
        dim, value_dim = _padded(head_dim), _padded(value_head_dim)
        at = 0
        for name, num_bytes in (
            (arguments.AT_Q, 4 * ROWS * dim),
            (arguments.AT_SCORES, 4 * ROWS * TILE),
            (arguments.AT_OUT, 4 * ROWS * value_dim),
            (arguments.AT_KEYS, 4 * TILE * dim),
            (arguments.AT_VALUES, 4 * TILE * value_dim),
            (arguments.AT_ROWS, 4 * 5 * ROWS + 2 * 8 * TILE),
        ):
            self._set[name] = at
            at += -(-num_bytes // 64) * 64
        return at + 64  # threads' parts never share a cache line

    def plan(self, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, slot_mapping: Tensor) -> None:
        """Take in a step: ``i32 [R+1], i32 [R], i32 [R,B], i64 [T]``, all on the CPU."""
        block_tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
        self._metadata = (query_starts.contiguous(), seq_lens.contiguous(), block_tables, slot_mapping.contiguous())
        query_starts, seq_lens, block_tables, slot_mapping = self._metadata
        assert query_starts.dtype == seq_lens.dtype == block_tables.dtype == torch.int32
        assert slot_mapping.dtype == torch.int64
        self._num_stores = slot_mapping.shape[0]
        self._num_threads = torch.get_num_threads()
        given = self._set
        given[arguments.NUM_REQUESTS] = seq_lens.shape[0]
        given[arguments.SLOTS] = slot_mapping.data_ptr()
        given[arguments.QUERY_STARTS] = query_starts.data_ptr()
        given[arguments.SEQ_LENS] = seq_lens.data_ptr()
        given[arguments.TABLES] = block_tables.data_ptr()
        given[arguments.TABLE_STRIDE] = block_tables.stride(0)
        given[arguments.ITEMS] = 0
        kernels.plan_items(self._address, 1)
        row_bytes = 4 * (LANES + _padded(given[arguments.VALUE_DIM]))
        self._reserve(arguments.COUNTERS, 8 * given[arguments.NUM_COUNTERS])
        self._reserve(arguments.PARTIALS, row_bytes * given[arguments.NUM_PARTIALS])
        self._reserve(arguments.ITEMS, 8 * arguments.ITEM_SIZE * given[arguments.NUM_ITEMS])
        self._reserve(arguments.SCRATCH, self._scratch_bytes * self._num_threads)
        given[arguments.SCRATCH_STRIDE] = self._scratch_bytes
        kernels.plan_items(self._address, 1)

    def _reserve(self, name: int, num_bytes: int) -> None:
        """Point argument ``name`` at a buffer of at least this size; a new one is zeroed."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.zeros(max(num_bytes + num_bytes // 2, 64), dtype=torch.uint8)
            self._buffers[name] = buffer
        self._set[name] = buffer.data_ptr()

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: LayerCache, extras: Extras) -> Tensor:
        """Store ``k [T,K,D], v [T,K,Dv]`` (if given) at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]``.

        The window is the plan's own. ``key_bias f32 [H,P]`` is used as it lies if P is ``LANES`` more than the longest
        sequence, else copied.
        """
        dtype, (key_cache, value_cache, key_scales, value_scales) = q.dtype, cache
        scale, _, softcap, sinks, key_bias = extras
        cache_code = _cache_code(key_cache, key_scales)
        out = torch.empty((q.shape[0], *self._out_shape), dtype=dtype)
        num_stores = self._num_stores
        if k is None or v is None:
            k = v = q
            num_stores = 0
        elif k.dtype is not dtype or v.dtype is not dtype:
            k, v = k.to(dtype), v.to(dtype)
        (q, *q_strides), (k, *k_strides), (v, *v_strides) = _side_by_side(q), _side_by_side(k), _side_by_side(v)
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
        kernel = kernels.store_and_attend if key_scales is None else kernels.store_and_attend_codes
        kernel(self._address, self._num_threads)
        return out

    def _with_room(self, key_bias: Tensor) -> Tensor:
        """The bias with its rows' numbers side by side, readable for a vector beyond the last key."""
        seq_lens = self._metadata[1]
        longest = int(seq_lens.max()) if seq_lens.numel() else 0
        num_positions = key_bias.shape[1]
        if num_positions < longest:
            raise ValueError(f"key_bias knows {num_positions} positions, and a sequence has {longest} tokens")
        key_bias = key_bias.detach().to(torch.float32)
        if num_positions < longest + LANES:
            return torch.nn.functional.pad(key_bias, (0, LANES))
        return key_bias if key_bias.stride(1) == 1 else key_bias.contiguous()


def warm_up(progress: Callable[[str, int, int], None] | None = None, cache_dtype: torch.dtype = torch.float32) -> None:
    """Compile, or load from disk, every attention kernel that caches of this dtype need. ``progress(what, done,
    total)``, before each and after all.

    They are the same for every model: shapes are arguments, and so are dtypes, but for those of codes.
    """
    if cache_dtype in _CODES:
        todo = (kernels.plan_items, kernels.store_codes, kernels.store_and_attend_codes)
    else:
        todo = (kernels.plan_items, kernels.store, kernels.store_and_attend)
    for done, each in enumerate(todo):
        if progress is not None:
            progress(each.name, done, len(todo))
        each.compile()
    if progress is not None:
        progress("attention kernels", len(todo), len(todo))


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """``k [T,K,D], v [T,K,Dv]`` into the cache at ``slot_mapping i64 [T]``; see ``reference.store_kv``."""
    key_cache, value_cache, key_scales, value_scales = cache
    cache_code = _cache_code(key_cache, key_scales)
    args = torch.zeros(arguments.NUM_ARGS, dtype=torch.int64)
    given = args.numpy().data
    slot_mapping = slot_mapping.contiguous()
    (k, *k_strides), (v, *v_strides) = _side_by_side(k), _side_by_side(v.to(k.dtype))
    arguments.EACH_LAYER.pack_into(
        given.cast("B"), 0, 0, 0, 0, k.data_ptr(), *k_strides, v.data_ptr(), *v_strides, 0,
        key_cache.data_ptr(), value_cache.data_ptr(), _address(key_scales), _address(value_scales), 0, 0, 0,
        _FLOATS[k.dtype], cache_code, key_cache.shape[2], slot_mapping.shape[0], 0.0, 0.0,
    )  # fmt: skip
    given[arguments.SLOTS] = slot_mapping.data_ptr()
    given[arguments.NUM_KV_HEADS], given[arguments.HEAD_DIM] = key_cache.shape[1], key_cache.shape[3]
    given[arguments.VALUE_DIM] = value_cache.shape[3]
    kernel = kernels.store if key_scales is None else kernels.store_codes
    kernel(args.data_ptr(), torch.get_num_threads())


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, target) in every cache ``[blocks, ...]``, one pair after another."""
    for source, target in pairs:
        for cache in caches:
            cache[target].copy_(cache[source])


def paged_attention(
    q: Tensor, cache: LayerCache, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, extras: Extras
) -> Tensor:
    """Causal attention of packed queries over the blocks of their own request; see ``reference.paged_attention``."""
    shape = (q.shape[1], cache.keys.shape[1], q.shape[2], cache.values.shape[3])
    plan = AttentionPlan(*shape, extras.sliding_window)
    plan.plan(query_starts, seq_lens, block_tables, torch.empty(0, dtype=torch.int64))
    return plan.run(q, None, None, cache, extras)


def _cache_code(cache: Tensor, scales: Tensor | None) -> int:
    """The kernels' number for a cache's dtype."""
    if scales is not None:
        return _CODES[cache.dtype]
    if cache.dtype in _CODES:
        raise ValueError(f"a cache of {cache.dtype} needs key_scales and value_scales")
    return _FLOATS[cache.dtype]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _side_by_side(x: Tensor) -> tuple[Tensor, int, int]:
    """x with each row's numbers side by side, and its strides from token to token and from head to head."""
    token, head, number = x.stride()
    if number == 1:
        return x, token, head
    x = x.contiguous()
    token, head, _ = x.stride()
    return x, token, head


def _padded(dim: int) -> int:
    return -(-dim // LANES) * LANES
