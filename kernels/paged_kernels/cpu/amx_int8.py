"""Integer products by AMX's ``tdpbsud``: one instruction multiplies 16 rows of x and 16 columns of weights over 64
steps of k.

Rows are divided as in amx.py. The tiles' int32 sums are stored to scratch memory group by group, and added from there
to the float32 result. 4-bit weights are unpacked into scratch memory, a group at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paged_kernels.cpu.amx import GROUP, SUMS, W, X, call, half_of, load_config, move, release
from paged_kernels.cpu.integer_product import (
    AHEAD,
    BESIDE_END,
    COLUMNS,
    SCRATCH_BYTES,
    IntegerProduct,
    make_close,
    make_tile,
    take_rows,
)
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.memory import load_i64, store_i64
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.passes import emit_prefetch
from paged_kernels.cpu.product import GROUP as GROUP_ARGUMENT
from paged_kernels.cpu.product import LINE, NUM_ROWS, make_compute

LANES = 16  # of a tile's row
LONGEST = 128  # longest group of 4-bit weights
SUMS_AT, CODES_AT = BESIDE_END, BESIDE_END + 4 * GROUP * COLUMNS  # where a group's sums and codes are in scratch memory
ROW_BYTES = 4 * COLUMNS  # of sums; or of codes, for four steps of k

_f32, _i8, _i32, _i64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def emit_group(halves: int, fetches: bool, b: Any, args: Any) -> None:
    """Emit the sums of one or two halves of a group of rows: ``count`` times ``step`` steps of k, stored to ``out``.
    ``down``: the distance in rows from the first half to the second."""
    x, x_stride, w, count, step, out, down, ahead = args
    cells = [(h, c) for h in range(halves) for c in range(2)]

    def below(base: Any, stride: Any, h: int) -> Any:
        return b.add(base, b.mul(b.mul(stride, down), _i64(h)))

    for h, c in cells:
        call(b, "tilezero", _i8(SUMS[h][c]))
    with cgutils.for_range(b, count) as loop:
        rows = b.add(x, b.mul(loop.index, step))
        done = b.mul(loop.index, b.mul(step, _i64(COLUMNS)))
        for c in range(2):
            move(b, "tileloadd64", W[c], b.add(b.add(w, done), _i64(c * LINE)), _i64(ROW_BYTES))
        for h in range(halves):
            move(b, "tileloadd64", X[h], below(rows, x_stride, h), x_stride)
        for h, c in cells:
            call(b, "tdpbsud", _i8(SUMS[h][c]), _i8(X[h]), _i8(W[c]))
        if fetches:
            for n in range(64 * COLUMNS // LINE):
                emit_prefetch(b, b.add(b.add(ahead, done), _i64(n * LINE)))
    for h, c in cells:
        place = b.add(below(out, _i64(ROW_BYTES), h), _i64(c * LINE))
        move(b, "tilestored64", SUMS[h][c], place, _i64(ROW_BYTES))


def _make_group(halves: int, fetches: bool) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_group(halves, fetches, builder, args)
        return context.get_dummy_value()

    @intrinsic
    def group(typingctx, x, x_stride, w, count, step, out, down, ahead):
        return types.void(*[types.int64] * 8), codegen

    return group


def emit_unpack(b: Any, args: Any) -> None:
    """Emit the unpacking of ``count`` times eight steps of k: 4-bit codes become bytes."""
    w, count, out, ahead = args
    ints = ir.VectorType(_i32, LANES)
    mask, four = ir.Constant(ints, [0x0F0F0F0F] * LANES), ir.Constant(ints, [4] * LANES)
    with cgutils.for_range(b, count) as loop:
        done = b.mul(loop.index, _i64(ROW_BYTES))
        for c in range(2):
            place = b.add(done, _i64(c * LINE))
            whole = b.load(b.inttoptr(b.add(w, place), ints.as_pointer()), align=4)
            emit_prefetch(b, b.add(ahead, place))
            halves = b.and_(whole, mask), b.and_(b.lshr(whole, four), mask)
            for number, half in enumerate(halves):
                target = b.add(b.add(out, b.add(done, place)), _i64(number * ROW_BYTES))
                b.store(half, b.inttoptr(target, ints.as_pointer()), align=4)


@intrinsic
def _unpack(typingctx, w, count, out, ahead):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_unpack(builder, args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _make_close_row(bits: int) -> Any:
    """Make ``close_row(sums, line, y, start, beside)``, which adds one row's int32 sums to its float32 result."""
    close, floats, ints = make_close(bits), ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        sums, line, y, start, beside = args
        for column in range(0, COLUMNS, LANES):
            total, begun, target = (
                b.inttoptr(b.add(base, _i64(4 * column)), kind.as_pointer())
                for base, kind in ((sums, ints), (start, floats), (y, floats))
            )
            b.store(close(b, b.load(total, align=4), b.load(begun, align=4), line, beside, column), target, align=4)
        return context.get_dummy_value()

    @intrinsic
    def close_row(typingctx, sums, line, y, start, beside):
        return types.void(*[types.int64] * 5), codegen

    return close_row


_one, _two, _two_more = _make_group(1, True), _make_group(2, True), _make_group(2, False)
_one_unpacked, _two_unpacked = _make_group(1, False), _make_group(2, False)


@inline
def _step_of(group):
    """Return how many steps of k one instruction takes."""
    return 64 if group % 64 == 0 else 32


@inline
def _begin(args, config):
    """Quantise the rows to int8, then configure the tiles as in amx.py, for rows of as many bytes as a step has."""
    take_rows(args, config)
    step = _step_of(load_i64(args, GROUP_ARGUMENT))
    for word in range(8):
        store_i64(config, word, 0)
    store_i64(config, 0, 1)
    store_i64(config, 2, 0x0040004000400040)
    store_i64(config, 3, 0x0040004000000000 + step * 0x00010001)
    store_i64(config, 6, step // 4 * 0x0101000000000000 + half_of(load_i64(args, NUM_ROWS)) * 0x010101010101)
    load_config(config)


@inline
def _end():
    release()


def _make_multiply(bits: int) -> Any:
    close_row = _make_close_row(bits)

    @inline
    def multiply(x, x_stride, w, group, num_rows, y, y_stride, start, start_stride, beside, args, scratch):
        step, half, sums = _step_of(group), half_of(load_i64(args, NUM_ROWS)), scratch + SUMS_AT
        count, num_groups = group // step, -(-num_rows // GROUP)
        codes, ahead = w, w + AHEAD
        if bits == 4:
            codes = scratch + CODES_AT
            _unpack(w, group // 8, codes, ahead)
        for number in range(num_groups):
            row = num_rows * number // num_groups
            rows = num_rows * (number + 1) // num_groups - row
            xr = x + row * x_stride
            if bits == 4:
                if rows == half:
                    _one_unpacked(xr, x_stride, codes, count, step, sums, 0, ahead)
                else:
                    _two_unpacked(xr, x_stride, codes, count, step, sums, rows - half, ahead)
            elif rows == half:
                _one(xr, x_stride, codes, count, step, sums, 0, ahead)
            elif number == 0:
                _two(xr, x_stride, codes, count, step, sums, rows - half, ahead)
            else:
                _two_more(xr, x_stride, codes, count, step, sums, rows - half, ahead)
            for r in range(rows):
                at = row + r
                close_row(
                    sums + r * ROW_BYTES,
                    xr + r * x_stride,
                    y + 4 * at * y_stride,
                    start + 4 * at * start_stride,
                    beside,
                )

    return multiply


_compute_8 = make_compute(make_tile(8, _make_multiply(8)), COLUMNS, GROUP, True, _begin, _end)
_compute_4 = make_compute(make_tile(4, _make_multiply(4)), COLUMNS, GROUP, True, _begin, _end)


@kernel
def product_amx_int8(args):
    _compute_8(args)


@kernel
def product_amx_int4(args):
    _compute_4(args)


AMX = IntegerProduct(
    "amx_int8", {8: product_amx_int8, 4: product_amx_int4},
    SCRATCH_BYTES + 4 * GROUP * COLUMNS + LONGEST * COLUMNS,
)  # fmt: skip
