"""A tile of keys for bfloat16 queries, few or many. Both products use the processor's bfloat16 instructions.

Keys are transposed into pairs along the head dim, and values stored as pairs of keys, once for all rows of the item.
Scores, their softmax and all sums are float32. Weights are rounded to bfloat16 before they multiply the values. Codes
become bfloat16 without their scales, which is exact for int8 and float8; the scales multiply the scores, and the
weights.
"""

from __future__ import annotations

from numba import float32, int64

from paged_kernels.cpu.bf16_words import vexp2_for_bf16, vstore_as_bf16
from paged_kernels.cpu.codes import INT8
from paged_kernels.cpu.intrinsics import LANES, inline
from paged_kernels.cpu.memory import (
    load_f32,
    load_i32,
    load_i64,
    size_of,
    store_f32,
    store_i64,
    vload,
    vstore,
    vstore_bf16,
)
from paged_kernels.cpu.pair_tiles import (
    STEP,
    copy_padded,
    interleave_fp8,
    interleave_int8,
    interleave_pairs,
    product,
    transpose_fp8,
    transpose_int8,
    transpose_pairs,
)
from paged_kernels.cpu.rows import padded, prefetch_rows
from paged_kernels.cpu.scores import as_seen, bias_of, capped_and_biased
from paged_kernels.cpu.sharing import TILE
from paged_kernels.cpu.sums import (
    HIGH,
    LOG2E,
    LOW,
    LOWEST,
    TILE_MAXIMUM,
    TILE_SUM,
    at,
    head_of,
    query_of,
    take_in,
    take_in_values,
)
from paged_kernels.cpu.vectors import hmax, hsum, vadd, vfma, vmax, vmul, vsplat

AT_ONCE = 32  # rows that are computed together


@inline
def in_steps(count):
    return (count + STEP - 1) // STEP * STEP


@inline
def take_pairs(args, item, head, scratch):
    """Copy the rows' queries, padded with zeros, and make a row of zeros for missing keys."""
    width, queries = in_steps(args.head_dim), scratch + args.at_q
    for row in range(item.num_rows):
        copy_padded(query_of(args, item, head, row), queries + 2 * row * width, 2 * args.head_dim, 2 * width)
    for i in range(0, max(width, in_steps(args.value_dim)), LANES):
        vstore_bf16(_zeros(args, scratch), i, vsplat(float32(0.0)))


@inline
def _zeros(args, scratch):
    return scratch + args.at_staging + 2 * TILE * max(in_steps(args.head_dim), in_steps(args.value_dim))


@inline
def tile_of_pairs(args, item, head, tile, lead, count, scratch, ahead, ahead_head, ahead_start, ahead_stop, codes, amx):
    """Take keys lead..count of a tile into the rows' states. Meanwhile the keys that are needed next are prefetched."""
    first, stop = lead // STEP * STEP, in_steps(count)
    _lay_out(
        args, item, head, tile, lead, count, first, stop, scratch, ahead, ahead_head, ahead_start, ahead_stop, codes
    )
    for row in range(0, item.num_rows, AT_ONCE):
        num_rows = min(AT_ONCE, item.num_rows - row)
        _some_rows(args, item, head, row, num_rows, tile, lead, count, first, stop, scratch, codes, amx)
        if row == 0 and item.num_rows <= AT_ONCE:
            _call_part(args, ahead, ahead_head, ahead_start + 48, ahead_stop, codes)


@inline
def _some_rows(args, item, head, row, num_rows, tile, lead, count, first, stop, scratch, codes, amx):
    """Compute as many rows as fit into the nearest cache."""
    width, value_width = in_steps(args.head_dim), in_steps(args.value_dim)
    state, scores, weights = scratch + args.at_rows, scratch + args.at_scores, scratch + args.at_weights
    keys, values = scratch + args.at_keys + 4 * first, scratch + args.at_values + 2 * first * value_width
    product(
        scratch + args.at_q + 2 * row * width, 2 * width, keys, 4 * TILE, num_rows, stop - first, width,
        scores + 4 * first, 4 * TILE, amx,
    )  # fmt: skip
    for r in range(num_rows):
        _softmax(args, item, head, row + r, r, tile, lead, count, first, stop, scratch, codes)
    take_in(state + 4 * row, num_rows)
    sums, out_width = scratch + args.at_sums, padded(args.value_dim)
    product(
        weights + 2 * first, 2 * TILE, values, 4 * value_width, num_rows, value_width, stop - first, sums,
        4 * value_width, amx,
    )  # fmt: skip
    for r in range(num_rows):
        out = scratch + args.at_out + 4 * (row + r) * out_width
        take_in_values(state, row + r, sums + 4 * r * value_width, out, out_width)


# ---- keys and values as pairs ---------------------------------------------------------------------------------


@inline
def _lay_out(args, item, head, tile, lead, count, first, stop, scratch, ahead, ahead_head, ahead_start, ahead_stop,
             codes):  # fmt: skip
    width, value_width, rows = in_steps(args.head_dim), in_steps(args.value_dim), scratch + args.at_tables
    few = item.num_rows <= AT_ONCE  # with many rows, computing takes longer than loading
    if few:
        _call_part(args, ahead, ahead_head, ahead_start, ahead_stop, codes)
    _find(args, item, head, args.keys, args.key_scales, args.head_dim, tile, lead, count, first, stop, scratch, 0,
          codes)  # fmt: skip
    for key in range(first, stop, 16):
        _lay_out_keys(args, key, width, rows, scratch + args.at_keys, codes)
    if few:
        _call_part(args, ahead, ahead_head, ahead_start + 16, ahead_stop, codes)
    _find(args, item, head, args.values, args.value_scales, args.value_dim, tile, lead, count, first, stop, scratch,
          TILE, codes)  # fmt: skip
    for key in range(first, stop, 16):
        _lay_out_values(args, key, value_width, rows, scratch + args.at_values, codes)
    if few:
        _call_part(args, ahead, ahead_head, ahead_start + 32, ahead_stop, codes)


@inline
def _call_part(args, item, head, start, stop, codes):
    """Prefetch 16 more of the keys that come next. Memory handles that many requests at once; more would delay what is
    computed meanwhile."""
    prefetch_rows(args, item, head, start, min(stop, start + 16), codes)


@inline
def _lay_out_keys(args, key, width, rows, target, codes):
    """Store 16 keys as [pairs of the head dim, keys]."""
    for d in range(0, width, STEP):
        place = target + 4 * (d // 2 * TILE + key)
        if codes is None:
            transpose_pairs(rows + 8 * key, 2 * d, place, 4 * TILE)
        elif args.cache_dtype == INT8:
            transpose_int8(rows + 8 * key, d, place, 4 * TILE)
        else:
            transpose_fp8(rows + 8 * key, d, place, 4 * TILE)


@inline
def _lay_out_values(args, key, width, rows, target, codes):
    """Store 16 values as [pairs of keys, head dim]."""
    for k in range(key, key + 16, 2):
        one, other, place = load_i64(rows, k), load_i64(rows, k + 1), target + 2 * k * width
        for d in range(0, width, 16):
            if codes is None:
                interleave_pairs(one + 2 * d, other + 2 * d, place + 4 * d)
            elif args.cache_dtype == INT8:
                interleave_int8(one + d, other + d, place + 4 * d)
            else:
                interleave_fp8(one + d, other + d, place + 4 * d)


@inline
def _find(args, item, head, cache, cache_scales, dim, tile, lead, count, first, stop, scratch, at_scale, codes):
    """Put the addresses of keys (or values) first..stop of a tile into the table, and the scales of codes next to it,
    from index ``at_scale`` on. Rows that are not whole steps long are copied; those that the item doesn't see are
    zeros."""
    rows, staging, width = scratch + args.at_tables, scratch + args.at_staging, in_steps(dim)
    scales, size = rows + 8 * TILE + 4 * at_scale, size_of(args.cache_dtype)
    table = args.tables + 4 * item.request * args.table_stride
    block = (tile + lead) // args.block_size
    offset = tile + lead - block * args.block_size
    for i in range(first, lead):
        _leave_out(args, scratch, rows, scales, i)
    for i in range(count, stop):
        _leave_out(args, scratch, rows, scales, i)
    i = lead
    while i < count:
        row = (load_i32(table, block) * args.num_kv_heads + head) * args.block_size + offset
        end = min(count, i + args.block_size - offset)
        while i < end:
            address = cache + row * dim * size
            if dim != width:
                copy_padded(address, staging + 2 * i * width, dim * size, width * size)
                address = staging + 2 * i * width
            store_i64(rows, i, address)
            if codes is not None:
                store_f32(scales, i, load_f32(cache_scales, row))
            row += 1
            i += 1
        block += 1
        offset = 0


@inline
def _leave_out(args, scratch, rows, scales, i):
    store_i64(rows, i, _zeros(args, scratch))
    store_f32(scales, i, float32(0.0))


# ---- scores to weights ----------------------------------------------------------------------------------------


@inline
def _softmax(args, item, head, row, r, tile, lead, count, first, stop, scratch, codes):
    """Turn a row's scores into bfloat16 weights, and compute the tile's maximum and sum. ``r``: the row's index in the
    scores."""
    line, weights = scratch + args.at_scores + 4 * r * TILE, scratch + args.at_weights + 2 * r * TILE
    state, key_scales = scratch + args.at_rows, scratch + args.at_tables + 8 * TILE
    high = min(count, int64(load_f32(state, at(HIGH, row))) - tile)
    low = max(lead, int64(load_f32(state, at(LOW, row))) - tile)
    if codes is not None:
        for i in range(first, stop, LANES):
            vstore(line, i, vmul(vload(line, i), vload(key_scales, i)))
    scale = args.scale * float32(LOG2E)
    if args.softcap != 0.0 or args.key_bias != 0 or args.scale < float32(0.0):
        bias = bias_of(args, head_of(args, item, head, row)) if args.key_bias != 0 else 0
        for i in range(first, stop, LANES):
            vstore(line, i, capped_and_biased(args, vmul(vload(line, i), vsplat(scale)), bias, tile, i))
        scale = float32(1.0)
    top = vsplat(LOWEST)
    if low <= first and stop <= high:
        for i in range(first, stop, LANES):
            top = vmax(top, vload(line, i))
    else:
        for i in range(first, stop, LANES):
            s = as_seen(vload(line, i), i, low, high)
            vstore(line, i, s)
            top = vmax(top, s)
    m = hmax(top) * scale
    total = vsplat(float32(0.0))
    for i in range(first, stop, LANES):
        p = vexp2_for_bf16(vfma(vload(line, i), vsplat(scale), vsplat(-m)))
        total = vadd(total, p)
        if codes is not None:
            p = vmul(p, vload(key_scales, TILE + i))
        vstore_as_bf16(weights, i, p)
    store_f32(state, at(TILE_MAXIMUM, row), m)
    store_f32(state, at(TILE_SUM, row), hsum(total))
