"""Products with packed weights for the host's cores: y = x @ weight.T + bias, and silu(gate) * up of two at once.

A packed weight is cut into tiles of TILE output columns; a tile lies as [K, TILE], so that one step of k reads whole
vectors that lie side by side. ROWS x TILE sums stay in registers. While a stretch of a tile meets the rows of x, each
pass fetches its share of the next stretch: memory and arithmetic are busy at the same time.

Every sum runs over k in order in float32, stretch by stretch, the bias first. So a row's result does not depend, to
the last bit, on how many other rows there are, on the threads or on the width of the host's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.vectors import (
    LANES,
    fetch_add,
    inline,
    load_f32,
    load_i64,
    store_bf16,
    store_f32,
    vadd,
    vdiv,
    vexp2,
    vload,
    vload_bf16,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vstore_bf16,
)

VECTORS = 3  # vectors side by side in a tile
TILE = VECTORS * LANES  # output columns
ROWS = 8 if LANES == 16 else 4  # rows of x in registers: ROWS * VECTORS sums, VECTORS weights and one x
STRETCH = 192  # steps of k whose weights are met by all rows before the next are read; they stay in the nearest cache
BLOCK = 64  # rows of x for which one thread computes one tile
LINE = 64  # bytes

# The kernels' array of int64. The counters: one a thread, each in a cache line of its own, then the thread's number.
(X, X_STRIDE, WEIGHT, BIAS, BIAS_STRIDE, Y, Y_STRIDE, NUM_ROWS, NUM_COLUMNS, DEPTH, GATED, OUT_BF16, NUM_THREADS,
 SCRATCH, SCRATCH_STRIDE, TICKET, COUNTERS) = range(17)  # fmt: skip


def scratch_bytes() -> int:
    """What one thread needs: the sums of a block, gate beside up, and a stretch of weights as float32."""
    return 4 * (BLOCK * 2 * TILE + STRETCH * TILE)


def make_pass(rows: int, bf16: bool, num_prefetches: int) -> Any:
    """``(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step)``: y = start + x @ w for ``rows``
    rows and one tile; ``count`` steps of k. Addresses; strides count elements, ahead_step bytes."""
    f32, i16, i32, i64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
    byte, vector, ints = ir.IntType(8).as_pointer(), ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)

    def emit(b: Any, args: Any) -> None:
        x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step = args
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32")
        fetch = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]), "llvm.prefetch.p0"
        )

        def at(base: Any, stride: Any, row: int, column: int) -> Any:
            pointer = b.gep(b.inttoptr(base, f32.as_pointer()), [b.add(b.mul(stride, i64(row)), i64(column))])
            return b.bitcast(pointer, vector.as_pointer())

        def weight(k: Any, v: int) -> Any:
            element = i16 if bf16 else f32
            pointer = b.gep(b.inttoptr(w, element.as_pointer()), [b.add(b.mul(k, i64(TILE)), i64(v * LANES))])
            if not bf16:
                return b.load(b.bitcast(pointer, vector.as_pointer()), align=4)
            halves = b.load(b.bitcast(pointer, ir.VectorType(i16, LANES).as_pointer()), align=2)
            return b.bitcast(b.shl(b.zext(halves, ints), ir.Constant(ints, [16] * LANES)), vector)

        undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ints, [0] * LANES)
        lines = [b.gep(b.inttoptr(x, f32.as_pointer()), [b.mul(x_stride, i64(m))]) for m in range(rows)]
        cells = [(m, v) for m in range(rows) for v in range(VECTORS)]
        nothing = ir.Constant(vector, [ir.Constant(f32, 0.0)] * LANES)

        before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        k, near = b.phi(i64), b.phi(i64)
        sums = {cell: b.phi(vector) for cell in cells}
        weights = [weight(k, v) for v in range(VECTORS)]
        for n in range(num_prefetches):
            b.call(fetch, [b.inttoptr(b.add(near, i64(n * LINE)), byte), i32(0), i32(2), i32(1)])
        new = {}
        for m in range(rows):
            scalar = b.insert_element(undefined, b.load(b.gep(lines[m], [k])), i32(0))
            left = b.shuffle_vector(scalar, undefined, zeros)
            for v in range(VECTORS):
                new[m, v] = b.call(fma, [left, weights[v], sums[m, v]])
        next_k = b.add(k, i64(1))
        for phi, initial, update in [
            (k, i64(0), next_k), (near, ahead, b.add(near, ahead_step)), *((sums[c], nothing, new[c]) for c in cells)
        ]:  # fmt: skip
            phi.add_incoming(initial, before)
            phi.add_incoming(update, loop)
        b.cbranch(b.icmp_signed("<", next_k, count), loop, after)
        b.position_at_end(after)
        for m, v in cells:
            total = b.fadd(b.load(at(start, start_stride, m, v * LANES), align=4), new[m, v])
            b.store(total, at(y, y_stride, m, v * LANES), align=4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, args)
        return context.get_dummy_value()

    @intrinsic
    def one_pass(typingctx, x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step):
        return types.void(*[types.int64] * 10), codegen

    return one_pass


def make_passes(bf16: bool) -> Any:
    """``passes(x, xs, w, count, num_rows, y, ys, start, ss, ahead)``: all rows of a block meet one stretch of a tile.
    ``ahead``: the stretch to fetch meanwhile."""
    step = TILE * (2 if bf16 else 4)  # bytes of weights in one step of k
    many, few = -(-step // LINE), 1
    full_many, full_few = make_pass(ROWS, bf16, many), make_pass(ROWS, bf16, few)
    rest = [None] + [make_pass(rows, bf16, many) for rows in range(1, ROWS)]
    r1, r2, r3 = rest[1:4]
    r4, r5, r6, r7 = rest[4:] or [r3] * 4  # with four rows in registers there are never more than three left

    @inline
    def passes(x, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead):
        share = -(-step // -(-num_rows // ROWS))  # bytes fetched at each step of k
        row = 0
        while row < num_rows:
            left = num_rows - row
            xr, yr, sr = x + 4 * row * x_stride, y + 4 * row * y_stride, start + 4 * row * start_stride
            if left >= ROWS:
                if num_rows <= 2 * ROWS:
                    full_many(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
                else:
                    full_few(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 1:
                r1(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 2:
                r2(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 3:
                r3(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 4:
                r4(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 5:
                r5(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            elif left == 6:
                r6(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            else:
                r7(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share)
            row += ROWS
            ahead += share * count

    return passes


passes_f32 = make_passes(False)
passes_bf16 = make_passes(True)


@inline
def tile_f32(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, wide):
    """One tile for a block of rows, into y; ``w`` the tile's address."""
    start, start_stride = bias, bias_stride
    for k in range(0, depth, STRETCH):
        count = min(STRETCH, depth - k)
        ahead = w + 4 * count * TILE
        passes_f32(x + 4 * k, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead)
        start, start_stride, w = y, y_stride, ahead


@inline
def tile_bf16(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, wide):
    """As tile_f32. When many rows will read a stretch, it is widened to float32 once, at ``wide``."""
    start, start_stride = bias, bias_stride
    for k in range(0, depth, STRETCH):
        count = min(STRETCH, depth - k)
        ahead = w + 2 * count * TILE
        if num_rows <= 2 * ROWS:
            passes_bf16(x + 4 * k, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead)
        else:
            for i in range(0, count * TILE, LANES):
                vstore(wide, i, vload_bf16(w, i))
            passes_f32(x + 4 * k, x_stride, wide, count, num_rows, y, y_stride, start, start_stride, ahead)
        start, start_stride, w = y, y_stride, ahead


@inline
def write_out(sums, num_rows, num_columns, y, y_stride, out_bf16):
    """Sums [num_rows, TILE of 2 * TILE] to y, in its dtype, as many columns as there are."""
    for row in range(num_rows):
        column = 0
        while column + LANES <= num_columns:
            value = vload(sums, row * 2 * TILE + column)
            if out_bf16:
                vstore_bf16(y, row * y_stride + column, value)
            else:
                vstore(y, row * y_stride + column, value)
            column += LANES
        while column < num_columns:
            one = load_f32(sums, row * 2 * TILE + column)
            if out_bf16:
                store_bf16(y, row * y_stride + column, one)
            else:
                store_f32(y, row * y_stride + column, one)
            column += 1


@inline
def gate_in_place(sums, num_rows):
    """Each row of sums holds TILE of gate, then TILE of up: silu(gate) * up goes where gate was."""
    one, top = vsplat(1.0), vsplat(126.0)
    for row in range(num_rows):
        for column in range(0, TILE, LANES):
            at = row * 2 * TILE + column
            gate = vload(sums, at)
            power = vmul(gate, vsplat(-1.4426950408889634))
            power = vselect_less(power, top, power, top)
            vstore(sums, at, vmul(vdiv(gate, vadd(one, vexp2(power))), vload(sums, at + TILE)))


def make_compute(tile: Any, weight_bytes: int) -> Any:
    """One thread's part of a launch. Items: tile by tile, each for all blocks of rows; a thread starts with a stretch
    of its own and helps the others when that is done."""

    @inline
    def compute(args):
        num_rows, num_columns, depth = load_i64(args, NUM_ROWS), load_i64(args, NUM_COLUMNS), load_i64(args, DEPTH)
        x_stride, y_stride, out_bf16 = load_i64(args, X_STRIDE), load_i64(args, Y_STRIDE), load_i64(args, OUT_BF16)
        num_blocks = -(-num_rows // BLOCK)
        block_rows = -(-num_rows // num_blocks)
        block_rows = -(-block_rows // ROWS) * ROWS
        num_blocks = -(-num_rows // block_rows)
        num_items = -(-num_columns // TILE) * num_blocks
        num_threads, num_parts = load_i64(args, NUM_THREADS), 2 if load_i64(args, GATED) else 1
        me = fetch_add(args + 8 * TICKET, 1)
        sums = load_i64(args, SCRATCH) + me * load_i64(args, SCRATCH_STRIDE)
        wide = sums + 4 * BLOCK * 2 * TILE
        out_bytes = 2 if out_bf16 else 4
        tile_bytes = depth * TILE * weight_bytes
        for turn in range(num_threads):
            owner = (me + turn) % num_threads
            counter = args + 8 * COUNTERS + LINE * owner
            first, last = num_items * owner // num_threads, num_items * (owner + 1) // num_threads
            while True:
                item = first + fetch_add(counter, 1)
                if item >= last:
                    break
                column, row = item // num_blocks * TILE, item % num_blocks * block_rows
                rows, columns = min(block_rows, num_rows - row), min(TILE, num_columns - column)
                x = load_i64(args, X) + 4 * row * x_stride
                y = load_i64(args, Y) + out_bytes * (row * y_stride + column)
                part = num_parts * (item // num_blocks)
                w, bias_stride = load_i64(args, WEIGHT) + part * tile_bytes, load_i64(args, BIAS_STRIDE)
                bias = load_i64(args, BIAS) + 4 * (part * TILE + row * bias_stride)
                if num_parts == 1 and columns == TILE and not out_bf16:
                    tile(x, x_stride, w, depth, rows, y, y_stride, bias, bias_stride, wide)
                else:
                    tile(x, x_stride, w, depth, rows, sums, 2 * TILE, bias, bias_stride, wide)
                    if num_parts == 2:
                        w, bias, up = w + tile_bytes, bias + 4 * TILE, sums + 4 * TILE
                        tile(x, x_stride, w, depth, rows, up, 2 * TILE, bias, bias_stride, wide)
                        gate_in_place(sums, rows)
                    write_out(sums, rows, columns, y, y_stride, out_bf16)

    return compute


compute_f32, compute_bf16 = make_compute(tile_f32, 4), make_compute(tile_bf16, 2)


@kernel
def product_f32(args):
    compute_f32(args)


@kernel
def product_bf16(args):
    compute_bf16(args)


def warm_up(dtype: torch.dtype, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile, or load from disk, the product for weights of this dtype. ``progress(what, done, total)``."""
    if progress is not None:
        progress("product", 0, 1)
    (product_bf16 if dtype is torch.bfloat16 else product_f32).compile()
    if progress is not None:
        progress("product", 1, 1)
