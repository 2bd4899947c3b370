"""Store and attention over paged K/V for the host's cores, as one kernel.

The kernel gets one address, of an array laid out in arguments.py. Its threads first store this step's K and V
between them, then share out the items of attention. An item is one tile of query rows (query x head of one kv
head's group) against one stretch of keys; ``plan_items`` writes the list.

Two ways to compute an item. A decode row holds the group's few heads: vectors run along the head dim, so each key is
read once, where it lies. A chunk holds many rows: vectors run along the rows, and both products are register tiles.
Long contexts are cut at fixed positions, whoever else is in the batch; the thread that finishes the last stretch of
a tile adds the stretches up in their order. Scores are kept in base 2. All arithmetic is float32.
"""

from __future__ import annotations

from numba import float32, int64

from paged_kernels.cpu.arguments import (
    AT_KEYS,
    AT_OUT,
    AT_Q,
    AT_ROWS,
    AT_SCORES,
    AT_VALUES,
    BIAS_STRIDE,
    COUNTER,
    COUNTERS,
    DTYPE,
    FIRST_ROW,
    GROUP,
    HEAD_DIM,
    ITEM_SIZE,
    ITEMS,
    KEY_BIAS,
    KEY_SCALES,
    KEY_START,
    KEY_STOP,
    KEYS,
    NEXT_ITEM,
    NUM_COUNTERS,
    NUM_ITEMS,
    NUM_KV_HEADS,
    NUM_PARTIALS,
    NUM_REQUESTS,
    NUM_ROWS,
    NUM_SPLITS,
    OUT,
    PARTIAL,
    PARTIALS,
    Q_HEAD,
    Q_TOKEN,
    QUERY_STARTS,
    REQUEST,
    SCALE,
    SCRATCH,
    SCRATCH_STRIDE,
    SEQ_LENS,
    SINKS,
    SOFTCAP,
    SPLIT,
    TICKET,
    VALUE_DIM,
    VALUE_SCALES,
    VALUES,
    WINDOW,
    Q,
)
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.rows import (
    CODES,
    call_for,
    copy,
    find_rows,
    padded,
    store_all,
    widen,
)
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
    load_f32,
    load_float,
    load_i32,
    load_i64,
    make_mix,
    make_outer,
    size_of,
    store_f32,
    store_i64,
    vadd,
    vexp2,
    vfirst,
    vfma,
    vload,
    vmax,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vsub,
    vtanh,
)

TILE = 64  # keys at a time
ROWS = 4 * LANES  # query rows of a chunk's tile
DECODE_SPLIT = 256  # keys of a stretch for one query
CHUNK_SPLIT = 2048  # keys of a stretch for a chunk of queries

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
def plan_items(args):
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


def _make_store_and_attend(codes):
    @kernel
    def store_and_attend(args):
        """Store this step's K and V, then compute every item."""
        store_all(args, codes)
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
                _chunk(args, item, head, scratch, codes)
            else:
                next_item, next_head = item, head
                if then < num_items * num_kv_heads:
                    next_item, next_head = items + 8 * ITEM_SIZE * (then // num_kv_heads), then % num_kv_heads
                _decode(args, item, head, scratch, next_item, next_head, codes)
            _finish(args, item, head, scratch)
            n = then

    return store_and_attend


def _make_store(codes):
    @kernel
    def store(args):
        """Store this step's K and V."""
        store_all(args, codes)

    return store


# For caches of floats, and for caches of codes (see rows.CODES): each is compiled when it is first used.
store, store_codes = _make_store(None), _make_store(CODES)
store_and_attend, store_and_attend_codes = _make_store_and_attend(None), _make_store_and_attend(CODES)


@inline
def _query(args, item, head, row):
    """The address of a row's query."""
    group = load_i64(args, GROUP)
    row += load_i64(item, FIRST_ROW)
    token = load_i32(load_i64(args, QUERY_STARTS), load_i64(item, REQUEST)) + row // group
    index = token * load_i64(args, Q_TOKEN) + (head * group + row % group) * load_i64(args, Q_HEAD)
    return load_i64(args, Q) + index * size_of(load_i64(args, DTYPE))


@inline
def _cap(scores, softcap):
    """softcap * tanh(scores / softcap), of scores in base 2."""
    inner = vmul(scores, vsplat(float32(1.0) / (softcap * float32(LOG2E))))
    return vmul(vtanh(inner), vsplat(softcap * float32(LOG2E)))


@inline
def _bias_of(args, head):
    """The address of the bias of a group's first head, or 0."""
    bias = load_i64(args, KEY_BIAS)
    return bias + 4 * head * load_i64(args, GROUP) * load_i64(args, BIAS_STRIDE) if bias != 0 else bias


# ---- one query: vectors along the head dim --------------------------------------------------------------------


@inline
def _decode(args, item, head, scratch, next_item, next_head, codes):
    num_rows = load_i64(item, NUM_ROWS)
    dim, value_dim = load_i64(args, HEAD_DIM), load_i64(args, VALUE_DIM)
    width, value_width = padded(dim), padded(value_dim)
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
        query = queries + 4 * row * width
        widen(_query(args, item, head, row), dtype, query, dim, width)
        for i in range(0, width, LANES):
            vstore(query, i, vmul(vload(query, i), scale))
        store_f32(state, _M * ROWS + row, LOWEST)
        store_f32(state, _L * ROWS + row, float32(0.0))
        for i in range(0, value_width, LANES):
            vstore(out + 4 * row * value_width, i, vsplat(float32(0.0)))
    stop = load_i64(item, KEY_STOP)
    for start in range(load_i64(item, KEY_START), stop, TILE):
        count = min(TILE, stop - start)
        keys, values = scratch + load_i64(args, AT_KEYS), scratch + load_i64(args, AT_VALUES)
        find_rows(
            args, item, head, load_i64(args, KEYS), load_i64(args, KEY_SCALES), dim, start, count, key_rows, keys, codes
        )
        find_rows(
            args, item, head, load_i64(args, VALUES), load_i64(args, VALUE_SCALES), value_dim, start, count,
            value_rows, values, codes,
        )  # fmt: skip
        ahead, ahead_head, ahead_start, ahead_stop = item, head, start + TILE, stop
        if start + TILE >= stop:
            ahead, ahead_head = next_item, next_head
            ahead_start, ahead_stop = load_i64(next_item, KEY_START), load_i64(next_item, KEY_STOP)
        for row in range(num_rows):
            query, line = queries + 4 * row * width, scores + 4 * row * TILE
            top = vsplat(LOWEST)
            for i in range(0, count, LANES):
                if row == 0:
                    call_for(args, ahead, ahead_head, ahead_start + i, min(ahead_stop, ahead_start + i + LANES), codes)
                s = dots(key_rows + 8 * i, query, width // LANES)
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
                height, scores + 4 * row * TILE, TILE, 1, value_rows, out + 4 * row * value_width, value_width,
                state + 4 * (_ALPHA * ROWS + row), count,
            )  # fmt: skip
            row += height


@inline
def _mix(height, p, p_row, p_key, rows, out, width, alphas, count):
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
def _chunk(args, item, head, scratch, codes):
    num_rows = load_i64(item, NUM_ROWS)
    dim, value_dim = load_i64(args, HEAD_DIM), load_i64(args, VALUE_DIM)
    value_width = padded(value_dim)
    softcap = load_f32(args, 2 * SOFTCAP)
    queries, scores = scratch + load_i64(args, AT_Q), scratch + load_i64(args, AT_SCORES)
    out, state = scratch + load_i64(args, AT_OUT), scratch + load_i64(args, AT_ROWS)
    key_rows = state + 4 * 5 * ROWS
    value_rows = key_rows + 8 * TILE
    columns = (num_rows + LANES - 1) // LANES
    _take_queries(args, item, head, queries, state, columns)
    for i in range(0, (num_rows + 3) // 4 * 4 * value_width, LANES):
        vstore(out, i, vsplat(float32(0.0)))
    bias = _bias_of(args, head)
    first_high, last_low = load_f32(state, _HIGH * ROWS), load_f32(state, _LOW * ROWS + num_rows - 1)
    stop = load_i64(item, KEY_STOP)
    for start in range(load_i64(item, KEY_START), stop, TILE):
        count = min(TILE, stop - start)
        keys, values = scratch + load_i64(args, AT_KEYS), scratch + load_i64(args, AT_VALUES)
        find_rows(
            args, item, head, load_i64(args, KEYS), load_i64(args, KEY_SCALES), dim, start, count, key_rows, keys, codes
        )
        find_rows(
            args, item, head, load_i64(args, VALUES), load_i64(args, VALUE_SCALES), value_dim, start, count,
            value_rows, values, codes,
        )  # fmt: skip
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
                4, scores + 4 * row, 1, ROWS, value_rows, out + 4 * row * value_width, value_width,
                state + 4 * (_ALPHA * ROWS + row), count,
            )  # fmt: skip


@inline
def _take_queries(args, item, head, queries, state, columns):
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
            for d in range(dim):
                store_f32(queries, d * ROWS + row, load_float(source, d, dtype) * scale)
        else:
            for d in range(dim):
                store_f32(queries, d * ROWS + row, float32(0.0))
        store_f32(state, _HIGH * ROWS + row, float32(high))
        store_f32(state, _LOW * ROWS + row, float32(low))
        store_f32(state, _M * ROWS + row, LOWEST)
        store_f32(state, _L * ROWS + row, float32(0.0))


@inline
def _scores(key_rows, queries, scores, columns, dim, count):
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
def _add_bias(args, scores, first_row, bias, start, count):
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
def _softmax(scores, state, start, count, masked):
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
def _finish(args, item, head, scratch):
    """Write the tile's rows; or keep them as partial, and write the tile if this was its last stretch to end."""
    num_rows, num_splits = load_i64(item, NUM_ROWS), load_i64(item, NUM_SPLITS)
    width = padded(load_i64(args, VALUE_DIM))
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
def _write(args, item, head, row, m, total, values):
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
    copy(values, F32, load_i64(args, OUT) + index * size_of(dtype), dtype, dim)
