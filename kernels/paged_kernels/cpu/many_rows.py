"""A tile of keys for many query rows, in float32. Vectors run along the rows, and both products are computed in
registers."""

from __future__ import annotations

from numba import float32

from paged_kernels.cpu.exponents import vexp2
from paged_kernels.cpu.few_rows import mix
from paged_kernels.cpu.intrinsics import LANES, REGISTERS, inline
from paged_kernels.cpu.memory import load_f32, load_float, store_f32, vload, vstore
from paged_kernels.cpu.register_tiles import make_outer, sum_down
from paged_kernels.cpu.rows import padded
from paged_kernels.cpu.scores import bias_of, biased, cap
from paged_kernels.cpu.sums import (
    HIGH,
    KEPT,
    LOG2E,
    LOW,
    LOWEST,
    NOTHING,
    ROWS,
    TAKEN,
    TILE_MAXIMUM,
    TILE_SUM,
    at,
    head_of,
    query_of,
    take_in,
)
from paged_kernels.cpu.vectors import vfirst, vmax, vselect_less, vsplat, vsub

outer_2x2, outer_4x1 = (make_outer(*size, 4 if REGISTERS == 32 else 2) for size in ((2, 2), (4, 1)))


@inline
def take_many(args, item, head, queries):
    """Copy the rows' queries, scaled and transposed to [D, ROWS]."""
    scale = args.scale * float32(LOG2E)
    for row in range(padded(item.num_rows)):
        if row < item.num_rows:
            source = query_of(args, item, head, row)
            for d in range(args.head_dim):
                store_f32(queries, d * ROWS + row, load_float(source, d, args.dtype) * scale)
        else:
            for d in range(args.head_dim):
                store_f32(queries, d * ROWS + row, float32(0.0))


@inline
def tile_of_many(args, item, head, tile, lead, count, key_rows, value_rows, queries, scores, state, out):
    """Take keys lead..count of a tile into the rows' states."""
    value_width, columns = padded(args.value_dim), padded(item.num_rows) // LANES
    _scores(key_rows, queries, scores, columns, args.head_dim, lead // 4 * 4, count)
    first_high, last_low = load_f32(state, at(HIGH, 0)), load_f32(state, at(LOW, item.num_rows - 1))
    masked = float32(tile + count) > first_high or float32(tile + lead) < last_low
    for column in range(columns):
        line = scores + 4 * column * LANES
        if args.softcap != 0.0:
            for key in range(lead, count):
                vstore(line, key * ROWS, cap(vload(line, key * ROWS), args.softcap))
        if args.key_bias != 0:
            _add_bias(args, item, head, line, column * LANES, tile, lead, count)
        _softmax(line, state + 4 * column * LANES, tile, lead, count, masked)
    take_in(state, item.num_rows)
    for row in range(0, item.num_rows, 4):
        mix(
            4, scores + 4 * (lead * ROWS + row), 1, ROWS, value_rows + 8 * lead, out + 4 * row * value_width,
            value_width, state + 4 * at(KEPT, row), state + 4 * at(TAKEN, row), count - lead,
        )  # fmt: skip


@inline
def _scores(key_rows, queries, scores, columns, dim, start, stop):
    """Compute scores[keys, rows] = keys @ queries, in registers."""
    for column in range(0, columns - 1, 2):
        q, target = queries + 4 * column * LANES, scores + 4 * column * LANES
        for key in range(start, stop, 2):
            outer_2x2(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)
    if columns % 2 == 1:
        q, target = queries + 4 * (columns - 1) * LANES, scores + 4 * (columns - 1) * LANES
        for key in range(start, stop, 4):
            outer_4x1(key_rows + 8 * key, q, ROWS, target + 4 * key * ROWS, ROWS, dim)


@inline
def _add_bias(args, item, head, scores, first_row, tile, lead, count):
    """Add the keys' bias to a vector of rows. The rows of a group have different heads."""
    if args.group == 1:
        bias = bias_of(args, head)
        for key in range(lead, count):
            b = vsplat(load_f32(bias, tile + key))
            vstore(scores, key * ROWS, biased(vload(scores, key * ROWS), b))
        return
    for lane in range(LANES):
        bias = bias_of(args, head_of(args, item, head, first_row + lane))
        for key in range(lead, count):
            place = key * ROWS + lane
            b = vsplat(load_f32(bias, tile + key))
            store_f32(scores, place, vfirst(biased(vsplat(load_f32(scores, place)), b)))


@inline
def _softmax(scores, state, tile, lead, count, masked):
    """Turn a tile's scores for a vector of rows into weights in place, and compute their maximum and sum."""
    begun = lead // LANES * LANES
    for key in range(begun, lead):
        vstore(scores, key * ROWS, vsplat(NOTHING))
    for key in range(count, padded(count)):
        vstore(scores, key * ROWS, vsplat(NOTHING))
    if masked:
        low, high = vload(state, at(LOW, 0)), vload(state, at(HIGH, 0))
        for key in range(lead, count):
            position = vsplat(float32(tile + key))
            s = vselect_less(position, high, vload(scores, key * ROWS), vsplat(NOTHING))
            vstore(scores, key * ROWS, vselect_less(position, low, vsplat(NOTHING), s))
    m = vsplat(LOWEST)
    for key in range(lead, count):
        m = vmax(m, vload(scores, key * ROWS))
    for key in range(begun, padded(count)):
        vstore(scores, key * ROWS, vexp2(vsub(vload(scores, key * ROWS), m)))
    vstore(state, at(TILE_MAXIMUM, 0), m)
    vstore(state, at(TILE_SUM, 0), sum_down(scores + 4 * begun * ROWS, ROWS, (padded(count) - begun) // LANES))
