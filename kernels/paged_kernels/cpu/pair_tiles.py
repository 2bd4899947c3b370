"""Helpers for numba kernels: small bfloat16 products, whose right side is stored in pairs.

``y [rows, columns] f32 = x [rows, depth] @ w``. x is stored row by row. w is stored as ``[depth / 2, columns]`` of
pairs of neighbours along the depth. There are two ways, chosen by host.py: AMX's tiles, and ``vdpbf16ps``. Each sums a
row in the same order, whatever other rows there are. Rows of x and y must be readable up to a multiple of 16; columns
and depth must be multiples of 32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from paged_kernels.cpu.amx import call, load_config, move
from paged_kernels.cpu.codes import _MANY, _from_fp8, _from_int8
from paged_kernels.cpu.dot_bf16 import _add, _load, _spread
from paged_kernels.cpu.intrinsics import define, element_at, inline
from paged_kernels.cpu.memory import store_i64

STEP = 32  # of the depth, and of columns
ROWS = 16  # of x in one AMX tile

_i8, _i16, _i32, _i64, _f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_words, _floats, _halves = ir.VectorType(_i32, 16), ir.VectorType(_f32, 16), ir.VectorType(_i16, 16)

_shorts, _indices = ir.VectorType(_i16, 32), ir.VectorType(_i32, 32)

# AMX's tile registers: sums of two halves of rows with two halves of columns; rows of x; columns of w.
_SUMS, _X, _W = ((0, 1), (2, 3)), (4, 5), (6, 7)


def _emit_amx(
    halves: int, b: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, steps: Any, y: Any, y_stride: Any
) -> None:
    cells = [(h, c) for h in range(halves) for c in range(2)]

    def half(base: Any, stride: Any, h: int) -> Any:
        return b.add(base, b.mul(stride, _i64(ROWS * h)))

    for h, c in cells:
        call(b, "tilezero", _i8(_SUMS[h][c]))
    with cgutils.for_range(b, steps) as loop:
        rows = b.add(w, b.mul(b.mul(loop.index, _i64(STEP // 2)), w_stride))
        left = b.add(x, b.mul(loop.index, _i64(2 * STEP)))
        for c in range(2):
            move(b, "tileloadd64", _W[c], b.add(rows, _i64(64 * c)), w_stride)
        for h in range(halves):
            move(b, "tileloadd64", _X[h], half(left, x_stride, h), x_stride)
        for h, c in cells:
            call(b, "tdpbf16ps", _i8(_SUMS[h][c]), _i8(_X[h]), _i8(_W[c]))
    for h, c in cells:
        move(b, "tilestored64", _SUMS[h][c], b.add(half(y, y_stride, h), _i64(64 * c)), y_stride)


def _emit_dot(
    rows: int, b: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, steps: Any, y: Any, y_stride: Any
) -> None:
    sums = [[cgutils.alloca_once(b, _floats) for _ in range(2)] for _ in range(rows)]
    for row in sums:
        for cell in row:
            b.store(ir.Constant(_floats, [ir.Constant(_f32, 0.0)] * 16), cell)
    with cgutils.for_range(b, b.mul(steps, _i64(STEP // 2))) as loop:
        pairs = b.add(w, b.mul(loop.index, w_stride))
        right = [_load(b, element_at(b, b.add(pairs, _i64(64 * c)), _i64(0), _i8))[0] for c in range(2)]
        for m in range(rows):
            address = b.add(b.add(x, b.mul(x_stride, _i64(m))), b.mul(loop.index, _i64(4)))
            left = _spread(b, element_at(b, address, _i64(0), _i8))
            for c in range(2):
                b.store(_add(b, left, right[c], b.load(sums[m][c])), sums[m][c])
    for m in range(rows):
        for c in range(2):
            address = b.add(b.add(y, b.mul(y_stride, _i64(m))), _i64(64 * c))
            b.store(b.load(sums[m][c]), element_at(b, address, _i64(0), _f32, _floats), align=4)


def _make(emit: Any, size: int) -> Any:
    i = types.int64

    @define(types.void, i, i, i, i, i, i, i)
    def product(b: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, steps: Any, y: Any, y_stride: Any) -> None:
        emit(size, b, x, x_stride, w, w_stride, steps, y, y_stride)

    return product


_amx_16, _amx_32, _dot_8 = _make(_emit_amx, 1), _make(_emit_amx, 2), _make(_emit_dot, 8)


@inline
def product(x, x_stride, w, w_stride, num_rows, columns, depth, y, y_stride, amx):
    """Compute y = x @ w. Strides are in bytes. ``amx``: None for vdpbf16ps."""
    steps = depth // STEP
    for column in range(0, columns, STEP):
        wc, yc = w + 4 * column, y + 4 * column
        if amx is None:
            for row in range(0, num_rows, 8):
                _dot_8(x + row * x_stride, x_stride, wc, w_stride, steps, yc + row * y_stride, y_stride)
        else:
            for row in range(0, num_rows - ROWS, 2 * ROWS):
                _amx_32(x + row * x_stride, x_stride, wc, w_stride, steps, yc + row * y_stride, y_stride)
            if (num_rows - 1) // ROWS % 2 == 0:
                row = (num_rows - 1) // ROWS * ROWS
                _amx_16(x + row * x_stride, x_stride, wc, w_stride, steps, yc + row * y_stride, y_stride)


@inline
def set_up_tiles(config):
    """Configure all AMX tiles with 16 rows of 64 bytes. ``config``: 64 bytes of scratch memory."""
    for word in range(8):
        store_i64(config, word, 0)
    store_i64(config, 0, 1)
    for word in (2, 3):
        store_i64(config, word, 0x0040004000400040)
    store_i64(config, 6, 0x1010101010101010)
    load_config(config)


def _codes_of(from_codes: Any) -> Any:
    """Make a function that loads 32 codes as 16 pairs of bfloat16, which represent them exactly."""

    def load(b: Any, address: Any) -> Any:
        floats = [b.bitcast(from_codes(b, _codes_at(b, address, i), _MANY), _shorts) for i in (0, 16)]
        return b.bitcast(b.shuffle_vector(*floats, ir.Constant(_indices, [2 * i + 1 for i in range(32)])), _words)

    return load


def _codes_at(b: Any, address: Any, index: int) -> Any:
    return b.load(element_at(b, address, _i64(index), _i8, _MANY.bytes), align=1)


def _pairs_at(b: Any, address: Any) -> Any:
    return b.load(element_at(b, address, _i64(0), _i32, _words), align=2)


def _make_transpose(load: Any) -> Any:
    """Make ``transpose(rows, start, target, stride)``, for 16 pairs of each of 16 rows, from byte ``start`` on: pair p
    of row r becomes pair r of the line at ``target + p * stride``. The table ``rows`` holds the rows' addresses."""
    i = types.int64

    @define(types.void, i, i, i, i)
    def transpose(b: Any, rows: Any, start: Any, target: Any, stride: Any) -> None:
        lines = [load(b, b.add(b.load(element_at(b, rows, _i64(r), _i64)), start)) for r in range(16)]

        def pick(one: Any, other: Any, order: list[int]) -> Any:
            return b.shuffle_vector(one, other, ir.Constant(_words, order))

        for bit in (1, 2, 4, 8):  # swap what has this bit set in the row's number with what has it set in the lane's
            for r in range(16):
                if not r & bit:
                    one, other = lines[r], lines[r | bit]
                    lines[r] = pick(one, other, [i if not i & bit else (i ^ bit) + 16 for i in range(16)])
                    lines[r | bit] = pick(one, other, [i | bit if not i & bit else i + 16 for i in range(16)])
        for p in range(16):
            address = b.add(target, b.mul(stride, _i64(p)))
            b.store(lines[p], element_at(b, address, _i64(0), _i32, _words), align=4)

    return transpose


def _make_interleave(load: Any) -> Any:
    """Make ``interleave(one, other, target)``, which stores 16 numbers of two rows as 16 pairs."""
    i = types.int64

    @define(types.void, i, i, i)
    def interleave(b: Any, one: Any, other: Any, target: Any) -> None:
        low, high = load(b, one), load(b, other)
        b.store(
            b.or_(b.lshr(low, ir.Constant(_words, [16] * 16)), high),
            element_at(b, target, _i64(0), _i32, _words),
            align=4,
        )

    return interleave


def _upper_halves(b: Any, address: Any) -> Any:
    """Load 16 bfloat16 numbers into the upper halves of 16 words."""
    numbers = b.zext(b.load(element_at(b, address, _i64(0), _i16, _halves), align=2), _words)
    return b.shl(numbers, ir.Constant(_words, [16] * 16))


def _upper_halves_of(from_codes: Any) -> Any:
    return lambda b, address: b.bitcast(from_codes(b, _codes_at(b, address, 0), _MANY), _words)


transpose_pairs, transpose_int8, transpose_fp8 = (
    _make_transpose(load) for load in (_pairs_at, _codes_of(_from_int8), _codes_of(_from_fp8))
)
interleave_pairs, interleave_int8, interleave_fp8 = (
    _make_interleave(load) for load in (_upper_halves, _upper_halves_of(_from_int8), _upper_halves_of(_from_fp8))
)


@define(types.void, types.int64, types.int64, types.int64, types.int64)
def copy_padded(b: Any, source: Any, target: Any, num_bytes: Any, whole_bytes: Any) -> None:
    """Copy ``num_bytes``, then write zeros up to ``whole_bytes``, a multiple of 32."""
    with cgutils.for_range(b, b.lshr(whole_bytes, _i64(5))) as loop:
        b.store(
            ir.Constant(_halves, [0] * 16), element_at(b, target, b.shl(loop.index, _i64(4)), _i16, _halves), align=1
        )
    cgutils.raw_memcpy(b, element_at(b, target, _i64(0), _i8), element_at(b, source, _i64(0), _i8), num_bytes, 1)
