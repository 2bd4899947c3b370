"""A tile of keys for few query rows, in float32. Vectors run along the head dim, so that keys are read where they
are."""

from __future__ import annotations

from numba import float32, int64

from paged_kernels.cpu.exponents import vexp2
from paged_kernels.cpu.intrinsics import LANES, REGISTERS, inline
from paged_kernels.cpu.memory import load_f32, store_f32, vload, vstore
from paged_kernels.cpu.register_tiles import dots, make_mix
from paged_kernels.cpu.rows import padded, prefetch_rows, widen
from paged_kernels.cpu.scores import as_seen, bias_of, capped_and_biased
from paged_kernels.cpu.sharing import TILE
from paged_kernels.cpu.sums import (
    HIGH,
    KEPT,
    LOG2E,
    LOW,
    LOWEST,
    TAKEN,
    TILE_MAXIMUM,
    TILE_SUM,
    at,
    head_of,
    query_of,
    take_in,
)
from paged_kernels.cpu.vectors import hmax, hsum, vadd, vmax, vmul, vsplat, vsub

FEW = LANES // 2  # rows; with more, vectors along the rows are faster
WIDEST = 4 if REGISTERS == 32 else 2  # vectors side by side in registers


def _make_mix_of(columns):
    """Make ``mix`` for one to four rows, chosen by ``height``."""
    one, two, three, four = (make_mix(rows, columns) for rows in (1, 2, 3, 4))

    @inline
    def mix_of(height, p, p_row, p_key, rows, at, out, width, kept, taken, count):
        if height == 4:
            four(p, p_row, p_key, rows, at, out, width, kept, taken, count)
        elif height == 3:
            three(p, p_row, p_key, rows, at, out, width, kept, taken, count)
        elif height == 2:
            two(p, p_row, p_key, rows, at, out, width, kept, taken, count)
        else:
            one(p, p_row, p_key, rows, at, out, width, kept, taken, count)

    return mix_of


_mix_of_4, _mix_of_2, _mix_of_1 = _make_mix_of(4), _make_mix_of(2), _make_mix_of(1)


@inline
def take_few(args, item, head, queries):
    """Copy the rows' queries, scaled and padded with zeros."""
    dim, width = args.head_dim, padded(args.head_dim)
    scale = vsplat(args.scale * float32(LOG2E))
    for row in range(item.num_rows):
        query = queries + 4 * row * width
        widen(query_of(args, item, head, row), args.dtype, query, dim, width)
        for i in range(0, width, LANES):
            vstore(query, i, vmul(vload(query, i), scale))


@inline
def tile_of_few(args, item, head, tile, lead, count, key_rows, value_rows, queries, scores, state, out, ahead,
                ahead_head, ahead_start, ahead_stop, codes):  # fmt: skip
    """Take keys lead..count of a tile into the rows' states. Meanwhile the keys that are needed next are prefetched."""
    width, value_width = padded(args.head_dim), padded(args.value_dim)
    begun = lead // LANES * LANES
    for row in range(item.num_rows):
        query, line = queries + 4 * row * width, scores + 4 * row * TILE
        bias = bias_of(args, head_of(args, item, head, row)) if args.key_bias != 0 else 0
        high = min(count, int64(load_f32(state, at(HIGH, row))) - tile)
        low = max(lead, int64(load_f32(state, at(LOW, row))) - tile)
        top = vsplat(LOWEST)
        for i in range(begun, count, LANES):
            if row == 0:
                prefetch_rows(args, ahead, ahead_head, ahead_start + i, min(ahead_stop, ahead_start + i + LANES), codes)
            s = dots(key_rows + 8 * i, query, width // LANES)
            s = as_seen(capped_and_biased(args, s, bias, tile, i), i, low, high)
            vstore(line, i, s)
            top = vmax(top, s)
        m = hmax(top)
        total = vsplat(float32(0.0))
        for i in range(begun, count, LANES):
            p = vexp2(vsub(vload(line, i), vsplat(m)))
            vstore(line, i, p)
            total = vadd(total, p)
        store_f32(state, at(TILE_MAXIMUM, row), m)
        store_f32(state, at(TILE_SUM, row), hsum(total))
    take_in(state, item.num_rows)
    row = 0
    while row < item.num_rows:
        height = min(4, item.num_rows - row)
        mix(
            height, scores + 4 * (row * TILE + lead), TILE, 1, value_rows + 8 * lead, out + 4 * row * value_width,
            value_width, state + 4 * at(KEPT, row), state + 4 * at(TAKEN, row), count - lead,
        )  # fmt: skip
        row += height


@inline
def mix(height, p, p_row, p_key, rows, out, width, kept, taken, count):
    """Compute out[height, width] = out * kept + taken * (p @ rows), a few registers' columns at a time."""
    at = 0
    while at < width:
        left = (width - at) // LANES
        if left >= 4 and WIDEST == 4:
            _mix_of_4(height, p, p_row, p_key, rows, at, out, width, kept, taken, count)
            at += 4 * LANES
        elif left >= 2:
            _mix_of_2(height, p, p_row, p_key, rows, at, out, width, kept, taken, count)
            at += 2 * LANES
        else:
            _mix_of_1(height, p, p_row, p_key, rows, at, out, width, kept, taken, count)
            at += LANES
