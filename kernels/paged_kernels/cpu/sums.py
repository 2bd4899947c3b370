"""The running softmax of query rows: tile by tile of keys, always in the order of the keys.

A row's state is its largest score so far, the sum of 2 ** (score - largest) over all scores, and the sum of the values
with these weights. Each tile of keys is summed by itself and then taken into the state. So the result does not depend
on which item sums it: the row's own, one for several requests, or several that compute some of the tiles each.
"""

from __future__ import annotations

from numba import float32

from paged_kernels.cpu.exponents import vexp2
from paged_kernels.cpu.intrinsics import F32, LANES, inline
from paged_kernels.cpu.memory import (
    fetch_add,
    load_f32,
    load_i32,
    load_shared,
    size_of,
    store_f32,
    store_i64,
    store_shared,
    vload,
    vstore,
)
from paged_kernels.cpu.rows import copy, padded
from paged_kernels.cpu.sharing import TILE
from paged_kernels.cpu.vectors import vadd, vfirst, vfma, vmax, vmul, vsplat, vsub

ROWS = 4 * LANES  # most query rows of an item

# Vectors with one float for each row: maximum and sum of the state; maximum and sum of the tile that is to be taken in;
# the factors for both; and the keys that a row sees: LOW <= key < HIGH.
MAXIMUM, SUM, TILE_MAXIMUM, TILE_SUM, KEPT, TAKEN, LOW, HIGH, NUM_VECTORS = range(9)

LOG2E = 1.4426950408889634
LOWEST = float32(-1e30)  # below every score, and finite: LOWEST - LOWEST is 0
NOTHING = float32(float("-inf"))


@inline
def at(vector, row):
    return vector * ROWS + row


@inline
def token_of(args, item, row):
    """Return the index of a row's token in q and out."""
    return load_i32(args.tokens, item.first_token + (item.first_row + row) // args.group)


@inline
def head_of(args, item, head, row):
    return head * args.group + (item.first_row + row) % args.group


@inline
def query_of(args, item, head, row):
    """Return the address of a row's query."""
    index = token_of(args, item, row) * args.q_token + head_of(args, item, head, row) * args.q_head
    return args.q + index * size_of(args.dtype)


@inline
def sees_until(args, item, row):
    """Return the first key that a row does not see because it comes later."""
    if item.many_requests == 1:
        return item.key_stop
    return item.first_position + (item.first_row + row) // args.group + 1


@inline
def note_sight(args, item, state):
    """Store which keys each row sees, LOW <= key < HIGH. Padding rows see none."""
    for row in range(padded(item.num_rows)):
        high = sees_until(args, item, row) if row < item.num_rows else item.key_start
        store_f32(state, at(HIGH, row), float32(high))
        store_f32(state, at(LOW, row), float32(max(0, high - args.window)))


@inline
def clear(args, item, state, out):
    """Reset the state: no key has been seen."""
    for i in range(0, padded(item.num_rows), LANES):
        vstore(state, at(MAXIMUM, i), vsplat(LOWEST))
        vstore(state, at(SUM, i), vsplat(float32(0.0)))
    for i in range(0, item.num_rows * padded(args.value_dim), LANES):
        vstore(out, i, vsplat(float32(0.0)))


@inline
def take_in(state, num_rows):
    """Take a tile's maxima and sums into the state. KEPT and TAKEN become the factors for the values' sums: for those
    so far, and for the tile's."""
    for i in range(0, padded(num_rows), LANES):
        before, of_tile = vload(state, at(MAXIMUM, i)), vload(state, at(TILE_MAXIMUM, i))
        now = vmax(before, of_tile)
        kept, taken = vexp2(vsub(before, now)), vexp2(vsub(of_tile, now))
        total = vmul(vload(state, at(SUM, i)), kept)
        vstore(state, at(SUM, i), vadd(total, vmul(vload(state, at(TILE_SUM, i)), taken)))
        vstore(state, at(MAXIMUM, i), now)
        vstore(state, at(KEPT, i), kept)
        vstore(state, at(TAKEN, i), taken)


# ---- states in memory -----------------------------------------------------------------------------------------


@inline
def _row_bytes(args):
    return 4 * (LANES + padded(args.value_dim))


@inline
def _keep(args, state, out, row, target):
    width = padded(args.value_dim)
    store_f32(target, 0, load_f32(state, at(MAXIMUM, row)))
    store_f32(target, 1, load_f32(state, at(SUM, row)))
    for i in range(0, width, LANES):
        vstore(target, LANES + i, vload(out, row * width + i))


@inline
def begin(args, item, head, state, out):
    """Load the rows' states before the item: those that another item has left, as soon as they are there, or empty
    ones."""
    if item.goes_on == 0:
        clear(args, item, state, out)
        return
    width = padded(args.value_dim)
    for row in range(item.num_rows):
        index = head * args.num_shared_rows + item.state + row
        # The item that computes the state was taken before this one, and waits at most for items before it.
        while load_shared(args.marks + 8 * index) != item.key_start:
            pass
        source = args.states + _row_bytes(args) * index
        store_f32(state, at(MAXIMUM, row), load_f32(source, 0))
        store_f32(state, at(SUM, row), load_f32(source, 1))
        for i in range(0, width, LANES):
            vstore(out, row * width + i, vload(source, LANES + i))


@inline
def end(args, item, head, state, out):
    """Store the rows' states after the item: as results, or for another item."""
    width = padded(args.value_dim)
    for row in range(item.num_rows):
        index = head * args.num_shared_rows + item.state + row
        if item.ends == 0:
            _keep(args, state, out, row, args.states + _row_bytes(args) * index)
            store_shared(args.marks + 8 * index, item.key_stop)
            continue
        if item.goes_on == 1:
            store_i64(args.marks, index, 0)  # for the next layer
        m, total = load_f32(state, at(MAXIMUM, row)), load_f32(state, at(SUM, row))
        _write(args, item, head, row, m, total, out + 4 * row * width)


@inline
def keep_tile(args, item, head, tile, state, out):
    """Keep a tile's own sums, because other threads compute other tiles of these rows."""
    first = _partial_of(args, item, head, tile)
    for row in range(item.num_rows):
        _keep(args, state, out, row, first + _row_bytes(args) * row)


@inline
def is_last_piece(args, item, head):
    """Return whether all other pieces of the rows' work are finished."""
    counter = args.counters + 8 * (item.counter + head)
    if fetch_add(counter, 1) < item.num_pieces - 1:
        return False
    store_i64(counter, 0, 0)
    return True


@inline
def take_in_tiles(args, item, head, state, out):
    """Take in all tiles of the rows that were kept, as if they were computed now."""
    width = padded(args.value_dim)
    for tile in range(item.key_start // TILE * TILE, item.key_stop, TILE):
        first = _partial_of(args, item, head, tile)
        for row in range(item.num_rows):
            store_f32(state, at(TILE_MAXIMUM, row), load_f32(first + _row_bytes(args) * row, 0))
            store_f32(state, at(TILE_SUM, row), load_f32(first + _row_bytes(args) * row, 1))
        take_in(state, item.num_rows)
        for row in range(item.num_rows):
            take_in_values(state, row, first + _row_bytes(args) * row + 4 * LANES, out + 4 * row * width, width)


@inline
def take_in_values(state, row, of_tile, out, width):
    """Compute ``out`` of one row times KEPT, plus the tile's times TAKEN."""
    kept, taken = vsplat(load_f32(state, at(KEPT, row))), vsplat(load_f32(state, at(TAKEN, row)))
    for i in range(0, width, LANES):
        vstore(out, i, vfma(vload(of_tile, i), taken, vmul(vload(out, i), kept)))


@inline
def _partial_of(args, item, head, tile):
    num_tiles = (item.key_stop - 1) // TILE - item.key_start // TILE + 1
    number = head * num_tiles + tile // TILE - item.key_start // TILE
    return args.partials + _row_bytes(args) * (item.partial + number * item.num_rows)


# ---- sums to results ------------------------------------------------------------------------------------------


@inline
def _write(args, item, head, row, m, total, values):
    """Write one row of the result: values / total, with the sink's share taken into account."""
    query_head = head_of(args, item, head, row)
    weight = float32(1.0)
    if args.sinks != 0:
        sink = load_f32(args.sinks, query_head) * float32(LOG2E)
        top = max(m, sink)
        weight = vfirst(vexp2(vsplat(m - top)))
        total = total * weight + vfirst(vexp2(vsplat(sink - top)))
    factor = vsplat(weight / total)
    for i in range(0, args.value_dim, LANES):
        vstore(values, i, vmul(vload(values, i), factor))
    index = (token_of(args, item, row) * args.num_kv_heads * args.group + query_head) * args.value_dim
    copy(values, F32, args.out + index * size_of(args.dtype), args.dtype, args.value_dim)
