"""Stores rows and finds them again. A row is one token's keys, or values, of one kv head.

Both exist for caches of floats (float32, bfloat16, float16), and for caches of int8 and float8 codes with a scale for
each row, ``f32 [blocks, K, bs]``. A kernel is compiled for one of them: it passes None, or CODES.
"""

from __future__ import annotations

from numba import float32

from paged_kernels.cpu.arguments import NEXT_STORE, NUM_STORED, as_arguments
from paged_kernels.cpu.codes import (
    INT8,
    hlargest,
    load_fp8,
    load_int8,
    store_fp8,
    store_int8,
    vlarger,
    vload_fp8,
    vload_int8,
    vstore_fp8,
    vstore_int8,
)
from paged_kernels.cpu.intrinsics import F32, LANES, inline
from paged_kernels.cpu.memory import (
    fetch_add,
    load_f32,
    load_float,
    load_i32,
    load_i64,
    load_shared,
    prefetch,
    size_of,
    store_f32,
    store_float,
    store_i64,
    vload_float,
    vstore,
    vstore_float,
)
from paged_kernels.cpu.vectors import vdiv, vmul, vsplat

CODES = 1  # instead of None; by its type numba compiles one of the two branches only
STORE_TOKENS = 16  # tokens that a thread takes at once


@inline
def padded(count):
    return (count + LANES - 1) // LANES * LANES


# ---- storing ---------------------------------------------------------------------------------------------------


@inline
def store_all(address, codes):
    """Store batches of tokens until none are left, then wait for those that other threads are storing."""
    args = as_arguments(address)
    num_tokens = args.num_tokens
    num_batches = (num_tokens + STORE_TOKENS - 1) // STORE_TOKENS
    while True:
        batch = fetch_add(address + NEXT_STORE, 1)
        if batch >= num_batches:
            break
        for token in range(batch * STORE_TOKENS, min(num_tokens, (batch + 1) * STORE_TOKENS)):
            _store_token(args, token, codes)
        fetch_add(address + NUM_STORED, 1)
    while load_shared(address + NUM_STORED) < num_batches:
        pass


@inline
def _store_token(args, token, codes):
    slot = load_i64(args.slots, token)
    block_size, num_kv_heads = args.block_size, args.num_kv_heads
    block = slot // block_size
    offset = slot - block * block_size
    size = size_of(args.dtype)
    keys, key_scales, dim = args.keys, args.key_scales, args.head_dim
    values, value_scales, value_dim = args.values, args.value_scales, args.value_dim
    for head in range(num_kv_heads):
        row = (block * num_kv_heads + head) * block_size + offset
        source = args.k + (token * args.k_token + head * args.k_head) * size
        _write(args, source, keys, key_scales, row, dim, codes)
        source = args.v + (token * args.v_token + head * args.v_head) * size
        _write(args, source, values, value_scales, row, value_dim, codes)


@inline
def _write(args, source, cache, scales, row, dim, codes):
    dtype, cache_dtype = args.dtype, args.cache_dtype
    if codes is None:
        copy(source, dtype, cache + row * dim * size_of(cache_dtype), cache_dtype, dim)
    else:
        scale = _to_codes(source, dtype, cache + row * dim, cache_dtype, dim)
        store_f32(scales, row, scale)


@inline
def copy(source, dtype, target, target_dtype, count):
    """Copy and convert ``count`` floats."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        vstore_float(target, i, target_dtype, vload_float(source, i, dtype))
    for i in range(whole, count):
        store_float(target, i, target_dtype, load_float(source, i, dtype))


@inline
def _to_codes(source, dtype, target, target_dtype, count):
    """Store ``count`` floats as codes, and their scale, bit for bit as ``reference.quantize`` does."""
    whole = count // LANES * LANES
    top = vsplat(float32(0.0))
    for i in range(0, whole, LANES):
        top = vlarger(top, vload_float(source, i, dtype))
    for i in range(whole, count):
        top = vlarger(top, vsplat(load_float(source, i, dtype)))
    scale = hlargest(top) / float32(127.0 if target_dtype == INT8 else 448.0)
    if scale == 0.0:
        scale = float32(1.0)
    for i in range(0, whole, LANES):
        x = vdiv(vload_float(source, i, dtype), vsplat(scale))
        if target_dtype == INT8:
            vstore_int8(target, i, x)
        else:
            vstore_fp8(target, i, x)
    for i in range(whole, count):
        y = load_float(source, i, dtype) / scale
        if target_dtype == INT8:
            store_int8(target, i, y)
        else:
            store_fp8(target, i, y)
    return scale


# ---- finding ---------------------------------------------------------------------------------------------------


@inline
def find_rows(args, item, head, cache, scales, dim, tile, lead, count, rows, staging, codes):
    """Put the addresses of keys (or values) lead..count of the tile that begins with key ``tile`` into the table
    ``rows``, and pad it on both sides to multiples of LANES with the first and the last. Rows that the products can't
    read as they are are first copied to ``staging``, as float32 padded with zeros."""
    num_kv_heads, block_size = args.num_kv_heads, args.block_size
    dtype, width = args.cache_dtype, padded(dim)
    row_bytes = dim * size_of(dtype)
    table = args.tables + 4 * item.request * args.table_stride
    block = (tile + lead) // block_size
    offset = tile + lead - block * block_size
    i = lead
    while i < count:
        row = (load_i32(table, block) * num_kv_heads + head) * block_size + offset
        address = cache + row * row_bytes
        stop = min(count, i + block_size - offset)
        while i < stop:
            if codes is None:
                store_i64(rows, i, address)
            else:
                target = staging + 4 * i * width
                _from_codes(address, dtype, load_f32(scales, row), target, dim, width)
                store_i64(rows, i, target)
                row += 1
            address += row_bytes
            i += 1
        block += 1
        offset = 0
    if codes is None and (dtype != F32 or dim != width):
        _stage_widened(rows, lead, count, staging, dtype, dim, width)
    first, last = load_i64(rows, lead), load_i64(rows, count - 1)
    for i in range(lead // LANES * LANES, lead):
        store_i64(rows, i, first)
    for i in range(count, padded(count)):
        store_i64(rows, i, last)


@inline
def _stage_widened(rows, lead, count, staging, dtype, dim, width):
    """Copy rows lead..count as float32 with padding, and put the copies' addresses in the table."""
    for i in range(lead, count):
        source, target = load_i64(rows, i), staging + 4 * i * width
        if dim == width:
            for d in range(0, dim, LANES):
                vstore(target, d, vload_float(source, d, dtype))
        else:
            widen(source, dtype, target, dim, width)
        store_i64(rows, i, target)


@inline
def widen(source, dtype, target, count, width):
    """Copy ``count`` floats as float32, then write zeros up to ``width``."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        vstore(target, i, vload_float(source, i, dtype))
    for i in range(whole, count):
        store_f32(target, i, load_float(source, i, dtype))
    for i in range(count, width):
        store_f32(target, i, float32(0.0))


@inline
def _from_codes(source, dtype, scale, target, count, width):
    """Copy ``count`` codes times their scale as float32, then write zeros up to ``width``."""
    whole, scales = count // LANES * LANES, vsplat(scale)
    if dtype == INT8:
        for i in range(0, whole, LANES):
            vstore(target, i, vmul(vload_int8(source, i), scales))
    else:
        for i in range(0, whole, LANES):
            vstore(target, i, vmul(vload_fp8(source, i), scales))
    for i in range(whole, count):
        store_f32(target, i, (load_int8(source, i) if dtype == INT8 else load_fp8(source, i)) * scale)
    for i in range(count, width):
        store_f32(target, i, float32(0.0))


@inline
def prefetch_rows(args, item, head, start, stop, codes):
    """Prefetch keys and values start..stop, which are needed soon. Blocks are not neighbours in memory, so the
    hardware's own prefetching starts again with each."""
    num_kv_heads, block_size = args.num_kv_heads, args.block_size
    size = size_of(args.cache_dtype)
    key_bytes, value_bytes = args.head_dim * size, args.value_dim * size
    table = args.tables + 4 * item.request * args.table_stride
    while start < stop:
        block = start // block_size
        count = min(stop, (block + 1) * block_size) - start
        row = (load_i32(table, block) * num_kv_heads + head) * block_size + start - block * block_size
        _prefetch_run(args.keys + row * key_bytes, count * key_bytes)
        _prefetch_run(args.values + row * value_bytes, count * value_bytes)
        if codes is not None:
            _prefetch_run(args.key_scales + row * 4, count * 4)
            _prefetch_run(args.value_scales + row * 4, count * 4)
        start += count


@inline
def _prefetch_run(address, num_bytes):
    for i in range(0, num_bytes, 64):
        prefetch(address, i)
