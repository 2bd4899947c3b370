"""Store and attention over paged K/V for the host's cores, as one kernel.

The kernel gets one address, of an array of int64 laid out by the names below. Its threads first store this step's K
and V between them, then share out the items of attention. An item is one tile of query rows (query x head of one kv
head's group) against one stretch of keys; ``plan_items`` writes the list.

Two ways to compute an item. A decode row holds the group's few heads: vectors run along the head dim, so each key is
read once, where it lies. A chunk holds many rows: vectors run along the rows, and both products are register tiles.
Long contexts are cut at fixed positions, whoever else is in the batch; the thread that finishes the last stretch of
a tile adds the stretches up in their order. Scores are kept in base 2. All arithmetic is float32.
"""

from __future__ import annotations

import struct

from numba import float32, int64

from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.vectors import (
    F32,
    LANES,
    REGISTERS,
    dots,
    fetch_add,
    hmax,
    hsum,
    inline,
    lane_numbers,
    load_bf16,
    load_f32,
    load_i32,
    load_i64,
    load_shared,
    make_mix,
    make_outer,
    prefetch,
    store_bf16,
    store_f32,
    store_i64,
    vadd,
    vexp2,
    vfirst,
    vfma,
    vload,
    vload_bf16,
    vmax,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vstore_bf16,
    vsub,
    vtanh,
)

TILE = 64  # keys at a time
ROWS = 4 * LANES  # query rows of a chunk's tile
DECODE_SPLIT = 256  # keys of a stretch for one query
CHUNK_SPLIT = 2048  # keys of a stretch for a chunk of queries
STORE_TOKENS = 16  # tokens stored by one grab of work

# The kernel's array. Counters first, each in a cache line of its own; what changes from layer to layer next.
NEXT_STORE, NUM_STORED, NEXT_ITEM, TICKET = 0, 8, 16, 24
(
    Q, Q_TOKEN, Q_HEAD,  # address; strides in elements
    K, K_TOKEN, K_HEAD,
    V, V_TOKEN, V_HEAD,
    OUT,  # [T, H, Dv]
    KEYS, VALUES,  # the caches
    SINKS,  # f32 [H], or 0
    KEY_BIAS, BIAS_STRIDE,  # f32 [H, positions], or 0
    DTYPE, CACHE_DTYPE,  # of q, k, v, out; of the caches
    BLOCK_SIZE,
    NUM_TOKENS,  # to store
    SCALE, SOFTCAP,  # float32 in the lower half; softcap 0 if none
    NUM_REQUESTS, SLOTS, QUERY_STARTS, SEQ_LENS, TABLES, TABLE_STRIDE,
    NUM_KV_HEADS, GROUP, HEAD_DIM, VALUE_DIM,
    WINDOW,  # keys a query sees, itself among them; larger than any context if all
    ITEMS, NUM_ITEMS,
    PARTIALS, NUM_PARTIALS,  # f32 rows of (maximum, sum, Dv values) of unfinished tiles
    COUNTERS, NUM_COUNTERS,  # int64: stretches finished of a tile
    SCRATCH, SCRATCH_STRIDE,  # bytes of each thread, parted as follows
    AT_Q, AT_SCORES, AT_OUT, AT_KEYS, AT_VALUES, AT_ROWS,
    NUM_ARGS,
) = range(32, 32 + 47)  # fmt: skip
EACH_LAYER = struct.Struct("256x19qf4xf4x")  # the counters at zero, then Q to SOFTCAP

# An item: eight int64.
REQUEST, FIRST_ROW, NUM_ROWS, KEY_START, KEY_STOP, SPLIT, NUM_SPLITS, PARTIAL, COUNTER, ITEM_SIZE = range(10)

# AT_ROWS: vectors of one float for each row, then two tables of addresses.
_M, _L, _ALPHA, _LOW, _HIGH = range(5)

LOG2E = 1.4426950408889634
LOWEST = float32(-1e30)  # below every score, and finite: LOWEST - LOWEST is 0
NOTHING = float32(float("-inf"))

WIDEST = 4 if REGISTERS == 32 else 2  # vectors side by side in a register tile
outer_4x4, outer_4x3, outer_8x2, outer_8x1 = make_outer(4, 4), make_outer(4, 3), make_outer(8, 2), make_outer(8, 1)
mix_1x4, mix_2x4, mix_3x4, mix_4x4 = make_mix(1, 4), make_mix(2, 4), make_mix(3, 4), make_mix(4, 4)
mix_1x2, mix_2x2, mix_3x2, mix_4x2 = make_mix(1, 2), make_mix(2, 2), make_mix(3, 2), make_mix(4, 2)
mix_1x1, mix_2x1, mix_3x1, mix_4x1 = make_mix(1, 1), make_mix(2, 1), make_mix(3, 1), make_mix(4, 1)


@kernel
def plan_items(args):  # type: ignore[no-untyped-def]
    """Write the items of this step to ITEMS, or, while that is 0, only count items, partial rows and counters."""
    items = load_i64(args, ITEMS)
    group = load_i64(args, GROUP)
    num_kv_heads = load_i64(args, NUM_KV_HEADS)
    window = load_i64(args, WINDOW)
    starts, lens = load_i64(args, QUERY_STARTS), load_i64(args, SEQ_LENS)
    num_items = num_partials = num_counters = 0
    for wanted in range(2):  # chunks first: their items are the largest
        for request in range(load_i64(args, NUM_REQUESTS)):
            num_queries = load_i32(starts, request + 1) - load_i32(starts, request)
            is_chunk = num_queries > 1 or group > LANES // 2
            if num_queries == 0 or is_chunk != (wanted == 0):
                continue
            first_query = load_i32(lens, request) - num_queries
            num_rows = num_queries * group
            tile = ROWS if is_chunk else num_rows
            split_keys = DECODE_SPLIT if num_queries == 1 else CHUNK_SPLIT
            row = (num_rows - 1) // tile * tile
            while row >= 0:  # the last tile sees the most keys
                count = min(tile, num_rows - row)
                key_stop = first_query + (row + count - 1) // group + 1
                key_start = max(0, first_query + row // group - window + 1)
                first_split = key_start // split_keys
                num_splits = (key_stop - 1) // split_keys - first_split + 1
                for split in range(num_splits):
                    if items != 0:
                        item = items + 8 * ITEM_SIZE * num_items
                        store_i64(item, REQUEST, request)
                        store_i64(item, FIRST_ROW, row)
                        store_i64(item, NUM_ROWS, count)
                        store_i64(item, KEY_START, max(key_start, (first_split + split) * split_keys))
                        store_i64(item, KEY_STOP, min(key_stop, (first_split + split + 1) * split_keys))
                        store_i64(item, SPLIT, split)
                        store_i64(item, NUM_SPLITS, num_splits)
                        store_i64(item, PARTIAL, num_partials)
                        store_i64(item, COUNTER, num_counters)
                    num_items += 1
                if num_splits > 1:
                    num_partials += num_kv_heads * num_splits * count
                    num_counters += num_kv_heads
                row -= tile
    store_i64(args, NUM_ITEMS, num_items)
    store_i64(args, NUM_PARTIALS, num_partials)
    store_i64(args, NUM_COUNTERS, num_counters)


@kernel
def store_and_attend(args):  # type: ignore[no-untyped-def]
    """Store this step's K and V, then compute every item."""
    _store_all(args)
    items = load_i64(args, ITEMS)
    num_items = load_i64(args, NUM_ITEMS)
    if num_items == 0:
        return
    num_kv_heads = load_i64(args, NUM_KV_HEADS)
    group = load_i64(args, GROUP)
    scratch = load_i64(args, SCRATCH) + fetch_add(args + 8 * TICKET, 1) * load_i64(args, SCRATCH_STRIDE)
    n, then = fetch_add(args + 8 * NEXT_ITEM, 1), int64(0)
    while n < num_items * num_kv_heads:
        then = fetch_add(args + 8 * NEXT_ITEM, 1)  # taken early, so that its first keys can be called for
        item = items + 8 * ITEM_SIZE * (n // num_kv_heads)
        head = n % num_kv_heads
        starts = load_i64(args, QUERY_STARTS)
        request = load_i64(item, REQUEST)
        num_queries = load_i32(starts, request + 1) - load_i32(starts, request)
        if num_queries > 1 or group > LANES // 2:
            _chunk(args, item, head, scratch)
        else:
            next_item, next_head = item, head
            if then < num_items * num_kv_heads:
                next_item, next_head = items + 8 * ITEM_SIZE * (then // num_kv_heads), then % num_kv_heads
            _decode(args, item, head, scratch, next_item, next_head)
        _finish(args, item, head, scratch)
        n = then


@kernel
def store(args):  # type: ignore[no-untyped-def]
    """Store this step's K and V."""
    _store_all(args)


# ---- storing ---------------------------------------------------------------------------------------------------


@inline
def _store_all(args):  # type: ignore[no-untyped-def]
    """Take batches of tokens until none are left, then wait for those that other threads have taken."""
    num_tokens = load_i64(args, NUM_TOKENS)
    num_batches = (num_tokens + STORE_TOKENS - 1) // STORE_TOKENS
    while True:
        batch = fetch_add(args + 8 * NEXT_STORE, 1)
        if batch >= num_batches:
            break
        for token in range(batch * STORE_TOKENS, min(num_tokens, (batch + 1) * STORE_TOKENS)):
            _store_token(args, token)
        fetch_add(args + 8 * NUM_STORED, 1)
    while load_shared(args + 8 * NUM_STORED) < num_batches:
        pass


@inline
def _store_token(args, token):  # type: ignore[no-untyped-def]
    slot = load_i64(load_i64(args, SLOTS), token)
    block_size, num_kv_heads = load_i64(args, BLOCK_SIZE), load_i64(args, NUM_KV_HEADS)
    block = slot // block_size
    offset = slot - block * block_size
    dtype, cache_dtype = load_i64(args, DTYPE), load_i64(args, CACHE_DTYPE)
    size, cache_size = (4 if dtype == F32 else 2), (4 if cache_dtype == F32 else 2)
    for head in range(num_kv_heads):
        row = (block * num_kv_heads + head) * block_size + offset
        source = load_i64(args, K) + (token * load_i64(args, K_TOKEN) + head * load_i64(args, K_HEAD)) * size
        dim = load_i64(args, HEAD_DIM)
        _copy(source, dtype, load_i64(args, KEYS) + row * dim * cache_size, cache_dtype, dim)
        source = load_i64(args, V) + (token * load_i64(args, V_TOKEN) + head * load_i64(args, V_HEAD)) * size
        dim = load_i64(args, VALUE_DIM)
        _copy(source, dtype, load_i64(args, VALUES) + row * dim * cache_size, cache_dtype, dim)


@inline
def _copy(source, dtype, target, target_dtype, count):  # type: ignore[no-untyped-def]
    """``count`` numbers from one place to another, converted."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        x = vload(source, i) if dtype == F32 else vload_bf16(source, i)
        if target_dtype == F32:
            vstore(target, i, x)
        else:
            vstore_bf16(target, i, x)
    for i in range(whole, count):
        y = load_f32(source, i) if dtype == F32 else load_bf16(source, i)
        if target_dtype == F32:
            store_f32(target, i, y)
        else:
            store_bf16(target, i, y)


# ---- finding keys and values ----------------------------------------------------------------------------------


@inline
def _find_rows(args, item, head, cache, dim, start, count, rows, staging):  # type: ignore[no-untyped-def]
    """Put the addresses of keys (or values) start..start+count into the table ``rows``, and fill it up to a multiple
    of LANES with the last one. Rows the products can't read as they lie are first copied to ``staging``, as
    float32 and padded with zeros."""
    num_kv_heads, block_size = load_i64(args, NUM_KV_HEADS), load_i64(args, BLOCK_SIZE)
    dtype = load_i64(args, CACHE_DTYPE)
    row_bytes = dim * (4 if dtype == F32 else 2)
    table = load_i64(args, TABLES) + 4 * load_i64(item, REQUEST) * load_i64(args, TABLE_STRIDE)
    block = start // block_size
    offset = start - block * block_size
    i = 0
    while i < count:
        address = cache + ((load_i32(table, block) * num_kv_heads + head) * block_size + offset) * row_bytes
        stop = min(count, i + block_size - offset)
        while i < stop:
            store_i64(rows, i, address)
            address += row_bytes
            i += 1
        block += 1
        offset = 0
    if dtype != F32 or dim % LANES != 0:
        padded = _padded(dim)
        for i in range(count):
            source, target = load_i64(rows, i), staging + 4 * i * padded
            if dim == padded:
                for d in range(0, dim, LANES):
                    vstore(target, d, vload_bf16(source, d))
            else:
                _widen(source, dtype, target, dim, padded)
            store_i64(rows, i, target)
    last = load_i64(rows, count - 1)
    for i in range(count, _padded(count)):
        store_i64(rows, i, last)


@inline
def _call_for(args, item, head, start, stop):  # type: ignore[no-untyped-def]
    """Ask memory for keys and values start..stop, which are needed soon: blocks lie apart, so the hardware's own
    prefetching starts anew with each."""
    num_kv_heads, block_size = load_i64(args, NUM_KV_HEADS), load_i64(args, BLOCK_SIZE)
    size = 4 if load_i64(args, CACHE_DTYPE) == F32 else 2
    key_bytes, value_bytes = load_i64(args, HEAD_DIM) * size, load_i64(args, VALUE_DIM) * size
    table = load_i64(args, TABLES) + 4 * load_i64(item, REQUEST) * load_i64(args, TABLE_STRIDE)
    while start < stop:
        block = start // block_size
        count = min(stop, (block + 1) * block_size) - start
        row = (load_i32(table, block) * num_kv_heads + head) * block_size + start - block * block_size
        _call_run(load_i64(args, KEYS) + row * key_bytes, count * key_bytes)
        _call_run(load_i64(args, VALUES) + row * value_bytes, count * value_bytes)
        start += count


@inline
def _call_run(address, num_bytes):  # type: ignore[no-untyped-def]
    for i in range(0, num_bytes, 64):
        prefetch(address, i)


@inline
def _widen(source, dtype, target, count, padded):  # type: ignore[no-untyped-def]
    whole = count // LANES * LANES
    if dtype == F32:
        for i in range(0, whole, LANES):
            vstore(target, i, vload(source, i))
    else:
        for i in range(0, whole, LANES):
            vstore(target, i, vload_bf16(source, i))
    for i in range(whole, count):
        store_f32(target, i, load_f32(source, i) if dtype == F32 else load_bf16(source, i))
    for i in range(count, padded):
        store_f32(target, i, float32(0.0))


@inline
def _padded(count):  # type: ignore[no-untyped-def]
    return (count + LANES - 1) // LANES * LANES


@inline
def _query(args, item, head, row):  # type: ignore[no-untyped-def]
    """The address of a row's query."""
    group = load_i64(args, GROUP)
    row += load_i64(item, FIRST_ROW)
    token = load_i32(load_i64(args, QUERY_STARTS), load_i64(item, REQUEST)) + row // group
    index = token * load_i64(args, Q_TOKEN) + (head * group + row % group) * load_i64(args, Q_HEAD)
    return load_i64(args, Q) + index * (4 if load_i64(args, DTYPE) == F32 else 2)


@inline
def _cap(scores, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(scores / softcap), of scores in base 2."""
    inner = vmul(scores, vsplat(float32(1.0) / (softcap * float32(LOG2E))))
    return vmul(vtanh(inner), vsplat(softcap * float32(LOG2E)))


@inline
def _bias_of(args, head):  # type: ignore[no-untyped-def]
    """The address of the bias of a group's first head, or 0."""
    bias = load_i64(args, KEY_BIAS)
    return bias + 4 * head * load_i64(args, GROUP) * load_i64(args, BIAS_STRIDE) if bias != 0 else bias


# ---- one query: vectors along the head dim --------------------------------------------------------------------


@inline
def _decode(args, item, head, scratch, next_item, next_head):  # type: ignore[no-untyped-def]
    num_rows = load_i64(item, NUM_ROWS)
    dim, value_dim = load_i64(args, HEAD_DIM), load_i64(args, VALUE_DIM)
    padded, value_padded = _padded(dim), _padded(value_dim)
    dtype = load_i64(args, DTYPE)
    softcap = load_f32(args, 2 * SOFTCAP)
    queries, scores = scratch + load_i64(args, AT_Q), scratch + load_i64(args, AT_SCORES)
    out, state = scratch + load_i64(args, AT_OUT), scratch + load_i64(args, AT_ROWS)
    key_rows = state + 4 * 5 * ROWS
    value_rows = key_rows + 8 * TILE
    scale = vsplat(load_f32(args, 2 * SCALE) * float32(LOG2E))
    bias, bias_stride = _bias_of(args, head), load_i64(args, BIAS_STRIDE)
    changes = softcap != 0.0 or bias != 0
    for row in range(num_rows):
        query = queries + 4 * row * padded
        _widen(_query(args, item, head, row), dtype, query, dim, padded)
        for i in range(0, padded, LANES):
            vstore(query, i, vmul(vload(query, i), scale))
        store_f32(state, _M * ROWS + row, LOWEST)
        store_f32(state, _L * ROWS + row, float32(0.0))
        for i in range(0, value_padded, LANES):
            vstore(out + 4 * row * value_padded, i, vsplat(float32(0.0)))
    stop = load_i64(item, KEY_STOP)
    for start in range(load_i64(item, KEY_START), stop, TILE):
        count = min(TILE, stop - start)
        keys, values = scratch + load_i64(args, AT_KEYS), scratch + load_i64(args, AT_VALUES)
        _find_rows(args, item, head, load_i64(args, KEYS), dim, start, count, key_rows, keys)
        _find_rows(args, item, head, load_i64(args, VALUES), value_dim, start, count, value_rows, values)
        ahead, ahead_head, ahead_start, ahead_stop = item, head, start + TILE, stop
        if start + TILE >= stop:
            ahead, ahead_head = next_item, next_head
            ahead_start, ahead_stop = load_i64(next_item, KEY_START), load_i64(next_item, KEY_STOP)
        for row in range(num_rows):
            query, line = queries + 4 * row * padded, scores + 4 * row * TILE
            top = vsplat(LOWEST)
            for i in range(0, count, LANES):
                if row == 0:
                    _call_for(args, ahead, ahead_head, ahead_start + i, min(ahead_stop, ahead_start + i + LANES))
                s = dots(key_rows + 8 * i, query, padded // LANES)
                if changes:
                    if softcap != 0.0:
                        s = _cap(s, softcap)
                    if bias != 0:
                        s = vfma(vload(bias + 4 * row * bias_stride, start + i), vsplat(float32(LOG2E)), s)
                if i + LANES > count:
                    s = vselect_less(lane_numbers(), vsplat(float32(count - i)), s, vsplat(NOTHING))
                vstore(line, i, s)
                top = vmax(top, s)
            before = load_f32(state, _M * ROWS + row)
            m = max(before, hmax(top))
            total = vsplat(float32(0.0))
            for i in range(0, count, LANES):
                p = vexp2(vsub(vload(line, i), vsplat(m)))
                vstore(line, i, p)
                total = vadd(total, p)
            alpha = vfirst(vexp2(vsplat(before - m)))
            store_f32(state, _M * ROWS + row, m)
            store_f32(state, _L * ROWS + row, load_f32(state, _L * ROWS + row) * alpha + hsum(total))
            store_f32(state, _ALPHA * ROWS + row, alpha)
        row = 0
        while row < num_rows:
            height = min(4, num_rows - row)
            _mix(
                height, scores + 4 * row * TILE, TILE, 1, value_rows, out + 4 * row * value_padded, value_padded,
                state + 4 * (_ALPHA * ROWS + row), count,
            )  # fmt: skip
            row += height


@inline
def _mix(height, p, p_row, p_key, rows, out, width, alphas, count):  # type: ignore[no-untyped-def]
    """out[height, width] = out * alphas + p @ rows, in register tiles."""
    at = 0
    while at < width:
        left = (width - at) // LANES
        if left >= 4 and WIDEST == 4:
            if height == 4:
                mix_4x4(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 3:
                mix_3x4(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 2:
                mix_2x4(p, p_row, p_key, rows, at, out, width, alphas, count)
            else:
                mix_1x4(p, p_row, p_key, rows, at, out, width, alphas, count)
            at += 4 * LANES
        elif left >= 2:
            if height == 4:
                mix_4x2(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 3:
                mix_3x2(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 2:
                mix_2x2(p, p_row, p_key, rows, at, out, width, alphas, count)
            else:
                mix_1x2(p, p_row, p_key, rows, at, out, width, alphas, count)
            at += 2 * LANES
        else:
            if height == 4:
                mix_4x1(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 3:
                mix_3x1(p, p_row, p_key, rows, at, out, width, alphas, count)
            elif height == 2:
                mix_2x1(p, p_row, p_key, rows, at, out, width, alphas, count)
            else:
                mix_1x1(p, p_row, p_key, rows, at, out, width, alphas, count)
            at += LANES


# ---- a chunk of queries: vectors along the rows ---------------------------------------------------------------


@inline
def _chunk(args, item, head, scratch):  # type: ignore[no-untyped-def]
    num_rows = load_i64(item, NUM_ROWS)
    dim, value_dim = load_i64(args, HEAD_DIM), load_i64(args, VALUE_DIM)
    value_padded = _padded(value_dim)
    softcap = load_f32(args, 2 * SOFTCAP)
    queries, scores = scratch + load_i64(args, AT_Q), scratch + load_i64(args, AT_SCORES)
    out, state = scratch + load_i64(args, AT_OUT), scratch + load_i64(args, AT_ROWS)
    key_rows = state + 4 * 5 * ROWS
    value_rows = key_rows + 8 * TILE
    columns = (num_rows + LANES - 1) // LANES
    _take_queries(args, item, head, queries, state, columns)
    for i in range(0, (num_rows + 3) // 4 * 4 * value_padded, LANES):
        vstore(out, i, vsplat(float32(0.0)))
    bias = _bias_of(args, head)
    first_high, last_low = load_f32(state, _HIGH * ROWS), load_f32(state, _LOW * ROWS + num_rows - 1)
    stop = load_i64(item, KEY_STOP)
    for start in range(load_i64(item, KEY_START), stop, TILE):
        count = min(TILE, stop - start)
        keys, values = scratch + load_i64(args, AT_KEYS), scratch + load_i64(args, AT_VALUES)
        _find_rows(args, item, head, load_i64(args, KEYS), dim, start, count, key_rows, keys)
        _find_rows(args, item, head, load_i64(args, VALUES), value_dim, start, count, value_rows, values)
        _scores(key_rows, queries, scores, columns, dim, count)
        masked = float32(start + count) > first_high or float32(start) < last_low
        for column in range(columns):
            line = scores + 4 * column * LANES
            if softcap != 0.0:
                for key in range(count):
                    vstore(line, key * ROWS, _cap(vload(line, key * ROWS), softcap))
            if bias != 0:
                _add_bias(args, line, load_i64(item, FIRST_ROW) + column * LANES, bias, start, count)
            _softmax(line, state + 4 * column * LANES, start, count, masked)
        for row in range(0, num_rows, 4):
            _mix(
                4, scores + 4 * row, 1, ROWS, value_rows, out + 4 * row * value_padded, value_padded,
                state + 4 * (_ALPHA * ROWS + row), count,
            )  # fmt: skip


@inline
def _take_queries(args, item, head, queries, state, columns):  # type: ignore[no-untyped-def]
    """The tile's queries, scaled and transposed to [D, ROWS]; which keys each row sees; an empty softmax."""
    num_rows, group = load_i64(item, NUM_ROWS), load_i64(args, GROUP)
    dim, dtype = load_i64(args, HEAD_DIM), load_i64(args, DTYPE)
    scale = load_f32(args, 2 * SCALE) * float32(LOG2E)
    starts, request = load_i64(args, QUERY_STARTS), load_i64(item, REQUEST)
    num_queries = load_i32(starts, request + 1) - load_i32(starts, request)
    first_query = load_i32(load_i64(args, SEQ_LENS), request) - num_queries
    for row in range(columns * LANES):
        high, low = int64(0), int64(0)
        if row < num_rows:
            high = first_query + (load_i64(item, FIRST_ROW) + row) // group + 1
            low = max(0, high - load_i64(args, WINDOW))
            source = _query(args, item, head, row)
            if dtype == F32:
                for d in range(dim):
                    store_f32(queries, d * ROWS + row, load_f32(source, d) * scale)
            else:
                for d in range(dim):
                    store_f32(queries, d * ROWS + row, load_bf16(source, d) * scale)
        else:
            for d in range(dim):
                store_f32(queries, d * ROWS + row, float32(0.0))
        store_f32(state, _HIGH * ROWS + row, float32(high))
        store_f32(state, _LOW * ROWS + row, float32(low))
        store_f32(state, _M * ROWS + row, LOWEST)
        store_f32(state, _L * ROWS + row, float32(0.0))


@inline
def _scores(key_rows, queries, scores, columns, dim, count):  # type: ignore[no-untyped-def]
    """scores[keys, rows] = keys @ queries, in register tiles; keys rounded up to a multiple of 8."""
    at = 0
    while at < columns:
        left = columns - at
        q, target = queries + 4 * at * LANES, scores + 4 * at * LANES
        if left >= 4 and WIDEST == 4:
            for key in range(0, count, 4):
                outer_4x4(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)
            at += 4
        elif left == 3 and WIDEST == 4:
            for key in range(0, count, 4):
                outer_4x3(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)
            at += 3
        elif left >= 2:
            for key in range(0, count, 8):
                outer_8x2(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)
            at += 2
        else:
            for key in range(0, count, 8):
                outer_8x1(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)
            at += 1


@inline
def _add_bias(args, scores, first_row, bias, start, count):  # type: ignore[no-untyped-def]
    """Add the keys' bias to a vector of rows, in base 2; the rows of a group have different heads."""
    group, stride = load_i64(args, GROUP), load_i64(args, BIAS_STRIDE)
    if group == 1:
        for key in range(count):
            b = vsplat(load_f32(bias, start + key) * float32(LOG2E))
            vstore(scores, key * ROWS, vadd(vload(scores, key * ROWS), b))
        return
    for lane in range(LANES):
        line = bias + 4 * ((first_row + lane) % group) * stride
        for key in range(count):
            at = key * ROWS + lane
            store_f32(scores, at, load_f32(scores, at) + load_f32(line, start + key) * float32(LOG2E))


@inline
def _softmax(scores, state, start, count, masked):  # type: ignore[no-untyped-def]
    """One more tile of keys for a vector of rows: scores to weights in place, and the running state."""
    before = vload(state, _M * ROWS)
    if masked:
        low, high = vload(state, _LOW * ROWS), vload(state, _HIGH * ROWS)
        for key in range(count):
            position = vsplat(float32(start + key))
            s = vselect_less(position, high, vload(scores, key * ROWS), vsplat(NOTHING))
            vstore(scores, key * ROWS, vselect_less(position, low, vsplat(NOTHING), s))
    m = before
    for key in range(count):
        m = vmax(m, vload(scores, key * ROWS))
    alpha = vexp2(vsub(before, m))
    total = vmul(vload(state, _L * ROWS), alpha)
    for key in range(count):
        p = vexp2(vsub(vload(scores, key * ROWS), m))
        vstore(scores, key * ROWS, p)
        total = vadd(total, p)
    vstore(state, _M * ROWS, m)
    vstore(state, _L * ROWS, total)
    vstore(state, _ALPHA * ROWS, alpha)


# ---- from sums to results -------------------------------------------------------------------------------------


@inline
def _finish(args, item, head, scratch):  # type: ignore[no-untyped-def]
    """Write the tile's rows; or keep them as partial, and write the tile if this was its last stretch to end."""
    num_rows, num_splits = load_i64(item, NUM_ROWS), load_i64(item, NUM_SPLITS)
    width = _padded(load_i64(args, VALUE_DIM))
    out, state = scratch + load_i64(args, AT_OUT), scratch + load_i64(args, AT_ROWS)
    if num_splits == 1:
        for row in range(num_rows):
            m, total = load_f32(state, _M * ROWS + row), load_f32(state, _L * ROWS + row)
            _write(args, item, head, row, m, total, out + 4 * row * width)
        return
    row_bytes = 4 * (LANES + width)
    first = load_i64(args, PARTIALS) + row_bytes * (load_i64(item, PARTIAL) + head * num_splits * num_rows)
    mine = first + row_bytes * load_i64(item, SPLIT) * num_rows
    for row in range(num_rows):
        target = mine + row_bytes * row
        store_f32(target, 0, load_f32(state, _M * ROWS + row))
        store_f32(target, 1, load_f32(state, _L * ROWS + row))
        for i in range(0, width, LANES):
            vstore(target, LANES + i, vload(out, row * width + i))
    counter = load_i64(args, COUNTERS) + 8 * (load_i64(item, COUNTER) + head)
    if fetch_add(counter, 1) < num_splits - 1:
        return
    store_i64(counter, 0, 0)
    for row in range(num_rows):
        m = LOWEST
        for split in range(num_splits):
            m = max(m, load_f32(first + row_bytes * (split * num_rows + row), 0))
        total = float32(0.0)
        for split in range(num_splits):
            part = first + row_bytes * (split * num_rows + row)
            weight = vexp2(vsplat(load_f32(part, 0) - m))
            total += load_f32(part, 1) * vfirst(weight)
            for i in range(0, width, LANES):
                so_far = vload(out, i) if split > 0 else vsplat(float32(0.0))
                vstore(out, i, vfma(vload(part, LANES + i), weight, so_far))
        _write(args, item, head, row, m, total, out)


@inline
def _write(args, item, head, row, m, total, values):  # type: ignore[no-untyped-def]
    """One row of the result: values / total, the sink's share taken into account."""
    group, dim = load_i64(args, GROUP), load_i64(args, VALUE_DIM)
    query = load_i64(item, FIRST_ROW) + row
    query_head = head * group + query % group
    weight = float32(1.0)
    if load_i64(args, SINKS) != 0:
        sink = load_f32(load_i64(args, SINKS), query_head) * float32(LOG2E)
        top = max(m, sink)
        weight = vfirst(vexp2(vsplat(m - top)))
        total = total * weight + vfirst(vexp2(vsplat(sink - top)))
    factor = vsplat(weight / total)
    for i in range(0, dim, LANES):
        vstore(values, i, vmul(vload(values, i), factor))
    token = load_i32(load_i64(args, QUERY_STARTS), load_i64(item, REQUEST)) + query // group
    index = (token * load_i64(args, NUM_KV_HEADS) * group + query_head) * dim
    dtype = load_i64(args, DTYPE)
    _copy(values, F32, load_i64(args, OUT) + index * (4 if dtype == F32 else 2), dtype, dim)
