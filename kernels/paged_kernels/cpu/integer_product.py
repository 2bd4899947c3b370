"""The common part of integer products, for any instruction: rows are quantised to int8, and sums become float32.

Each row of x is divided into groups along k, or rotated first (rotation.py) and then a single group. A group has its
own scale, its largest number over 127, and becomes int8 codes. Weights are unsigned codes of eight bits or four. The
products of a group's codes are summed in int32. That is exact, so the order of summing does not matter. Then, in
float32 and group by group:

    y += (sum of products - 128 * sum of x's codes) * scale of x * scale of the weights             eight bits
    y += sum of products * scale of x * scale of the weights + (sum of x's codes * scale of x) * minimum    four bits

A row's result is therefore the same to the last bit in any batch, with any number of threads, by any instruction.

X, in the kernel's array, is the quantised rows: for each group a float32 scale and an int32 sum of its codes, padded to
whole cache lines, then the codes. A tile of weights has COLUMNS columns: scales of all groups (or one for all of K),
minima in the same form, then codes, four steps of k side by side for each column, in low halves of bytes before high
halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import float32
from numba.core import cgutils

from paged_kernels.cpu.codes import hlargest, store_int8, vlarger, vload_int8, vstore_int8
from paged_kernels.cpu.intrinsics import F32, LANES, inline
from paged_kernels.cpu.memory import (
    fetch_add,
    load_float,
    load_i64,
    load_shared,
    size_of,
    store_f32,
    store_i32,
    store_i64,
    vload_float,
    vstore,
)
from paged_kernels.cpu.parallel import Kernel
from paged_kernels.cpu.passes import emit_splat
from paged_kernels.cpu.product import (
    CODES_AT,
    GROUP,
    HAS_MINIMA,
    LINE,
    NEXT_ROW,
    NUM_ROWS,
    RAW,
    RAW_DTYPE,
    RAW_STRIDE,
    ROTATED,
    ROWS_DONE,
    SCALE_DTYPE,
    SCALE_STEP,
    WIDTH,
    X_STRIDE,
    X,
    scratch_bytes,
)
from paged_kernels.cpu.rotation import rotate_row
from paged_kernels.cpu.vectors import hsum, vadd, vmul, vsplat

COLUMNS = 32  # of a tile
AHEAD = 8192  # prefetched weights are this many bytes ahead of those being multiplied

# What a thread keeps beside a group of weights, as offsets into its scratch memory: the scales and minima as float32,
# and the distance from a row's codes of the group to their scale and sum (twice, because each sweep measures from its
# own beginning).
BESIDE, MINIMA, TO_ENTRY, NEXT_TO_ENTRY = 64, 4 * COLUMNS, 8 * COLUMNS, 8 * COLUMNS + LINE
BESIDE_END = BESIDE + NEXT_TO_ENTRY + LINE

_LEAST = 2.0**-100  # groups of smaller numbers only become zeros: the inverse of their scale could be infinite

_f32, _i32, _i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


@dataclass(frozen=True)
class IntegerProduct:
    """One way to compute integer products. All give the same bits."""

    name: str
    kernels: dict[int, Kernel]  # by bits of the weights
    scratch_bytes: int  # for each thread


def make_tile(bits: int, multiply: Any) -> Any:
    """Make a tile function for make_compute. ``multiply(x, x_stride, w, group, num_rows, y, y_stride, start,
    start_stride, beside, args, scratch)`` computes ``y = start +`` one group's part; ``x`` and ``w`` are addresses of
    its codes."""
    group_bits = COLUMNS * bits

    @inline
    def tile(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch):
        group, x_codes, beside = load_i64(args, GROUP), load_i64(args, CODES_AT), scratch + BESIDE
        dtype, scale_step = load_i64(args, SCALE_DTYPE), load_i64(args, SCALE_STEP)
        has_minima = load_i64(args, HAS_MINIMA)
        parts = depth if scale_step else 1
        scales_bytes = parts * COLUMNS * size_of(dtype)
        scales, codes = w, w + scales_bytes * (2 if has_minima else 1)
        start, start_stride = bias, bias_stride
        for number in range(depth):
            if number == 0 or scale_step:
                _lay_beside(scales, scales_bytes if has_minima else 0, dtype, beside)
            to_entry = 8 * number - x_codes - number * group
            store_i64(beside + TO_ENTRY, 0, to_entry)
            store_i64(beside + NEXT_TO_ENTRY, 0, to_entry)
            at = x + x_codes + number * group
            multiply(at, x_stride, codes, group, num_rows, y, y_stride, start, start_stride, beside, args, scratch)
            start, start_stride = y, y_stride
            scales += scale_step
            codes += group * group_bits // 8

    return tile


@inline
def _lay_beside(scales, to_minima, dtype, beside):
    """Store a group's scales and minima as float32. For 4-bit codes without minima, the middle code means zero."""
    for column in range(0, COLUMNS, LANES):
        scale = vload_float(scales, column, dtype)
        vstore(beside, column, scale)
        if to_minima:
            vstore(beside + MINIMA, column, vload_float(scales + to_minima, column, dtype))
        else:
            vstore(beside + MINIMA, column, vmul(scale, vsplat(float32(-8.0))))


def make_close(bits: int) -> Any:
    """Make the function that turns a vector of int32 sums into float32: see passes.KStep."""

    def close(b: Any, sums: Any, start: Any, line: Any, beside: Any, column: int) -> Any:
        lanes = sums.type.count
        floats = ir.VectorType(_f32, lanes)

        def at(base: Any, num_bytes: int, kind: Any) -> Any:
            return b.load(b.inttoptr(b.add(base, _i64(num_bytes)), kind.as_pointer()), align=4)

        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{lanes}f32")
        entry = b.add(line, at(beside, TO_ENTRY, _i64))
        x_scale, x_sum = at(entry, 0, _f32), at(entry, 4, _i32)
        if bits == 8:
            sums = b.sub(sums, emit_splat(b, b.shl(x_sum, _i32(7)), lanes))
        scaled = b.fmul(b.sitofp(sums, floats), emit_splat(b, x_scale, lanes))
        y = b.call(fma, [scaled, at(beside, 4 * column, floats), start])
        if bits == 8:
            return y
        share = emit_splat(b, b.fmul(b.sitofp(x_sum, _f32), x_scale), lanes)
        return b.call(fma, [share, at(beside, MINIMA + 4 * column, floats), y])

    return close


# ---- quantising rows to int8 -------------------------------------------------------------------------------------


@inline
def take_rows(args, scratch):
    """Quantise rows until none is left, then wait for those that other threads are quantising. A rotated row is one
    group, and becomes float32 in scratch memory first."""
    num_rows, group, codes_at = load_i64(args, NUM_ROWS), load_i64(args, GROUP), load_i64(args, CODES_AT)
    dtype, width = load_i64(args, RAW_DTYPE), load_i64(args, WIDTH)
    while True:
        row = fetch_add(args + 8 * NEXT_ROW, 1)
        if row >= num_rows:
            break
        raw = load_i64(args, RAW) + row * load_i64(args, RAW_STRIDE)
        target = load_i64(args, X) + row * load_i64(args, X_STRIDE)
        if load_i64(args, ROTATED):
            rotate_row(raw, dtype, width, scratch, group)
            _quantize(scratch, F32, target + codes_at, group, group, target)
        for number in range(0 if load_i64(args, ROTATED) else -(-width // group)):
            first = number * group
            codes, count = target + codes_at + first, min(group, width - first)
            _quantize(raw + first * size_of(dtype), dtype, codes, count, group, target + 8 * number)
        fetch_add(args + 8 * ROWS_DONE, 1)
    while load_shared(args + 8 * ROWS_DONE) < num_rows:
        pass


@inline
def _quantize(source, dtype, codes, count, group, entry):
    """Quantise one group of a row. A number that isn't finite makes the group's scale, and all results of the row, not
    finite."""
    whole, top = count // LANES * LANES, vsplat(float32(0.0))
    for i in range(0, whole, LANES):
        top = vlarger(top, vload_float(source, i, dtype))
    for i in range(whole, count):
        top = vlarger(top, vsplat(load_float(source, i, dtype)))
    largest, total = hlargest(top), vsplat(float32(0.0))
    if largest < float32(_LEAST):
        largest, per_step = float32(0.0), float32(0.0)
    else:
        per_step = float32(127.0) / largest
    steps = vsplat(per_step)
    for i in range(0, whole, LANES):
        vstore_int8(codes, i, vmul(vload_float(source, i, dtype), steps))
        total = vadd(total, vload_int8(codes, i))
    for i in range(whole, group):
        store_int8(codes, i, load_float(source, i, dtype) * per_step if i < count else float32(0.0))
    if whole < group:
        total = vsplat(float32(0.0))
        for i in range(0, group, LANES):
            total = vadd(total, vload_int8(codes, i))
    store_f32(entry, 0, largest / float32(127.0))
    store_i32(entry, 1, int(hsum(total)))


SCRATCH_BYTES = scratch_bytes(COLUMNS) + BESIDE_END
