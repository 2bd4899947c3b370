"""Integer products with vectors: by ``vpdpbusd`` where the host has it, else by 16-bit products, which every host has.

``vpdpbusd`` (AVX-512 VNNI, AVX-VNNI) adds four products of bytes, unsigned weights and signed x, to each lane of an
int32 sum. The other way first widens bytes to 16 bits, then makes two products and an addition per lane (``vpmaddwd``
on x86-64).
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from paged_kernels.cpu.integer_product import (
    AHEAD,
    COLUMNS,
    SCRATCH_BYTES,
    IntegerProduct,
    make_close,
    make_tile,
    take_rows,
)
from paged_kernels.cpu.intrinsics import LANES, inline
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.passes import KStep, emit_splat, make_passes
from paged_kernels.cpu.product import make_compute

VECTORS = 2

_i8, _i16, _i32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = llvm.llvm_version_info >= (22,)  # LLVM's type of vpdpbusd's operands; before, it was int32


def _load_words(bits: int, lanes: int) -> Any:
    """Make a function that loads, for each word of x, four codes into each lane."""
    ints = ir.VectorType(_i32, lanes)

    def load(b: Any, pointer: Any) -> list[Any]:
        whole = b.load(b.bitcast(pointer, ints.as_pointer()), align=4)
        if bits == 8:
            return [whole]
        mask, four = ir.Constant(ints, [0x0F0F0F0F] * lanes), ir.Constant(ints, [4] * lanes)
        return [b.and_(whole, mask), b.and_(b.lshr(whole, four), mask)]

    return load


def _spread(lanes: int) -> Any:
    def spread(b: Any, pointer: Any) -> Any:
        return emit_splat(b, b.load(b.bitcast(pointer, _i32.as_pointer()), align=4), lanes)

    return spread


def _dot(lanes: int) -> Any:
    ints = ir.VectorType(_i32, lanes)
    taken = ir.VectorType(_i8, 4 * lanes) if _BYTES else ints
    kind = ir.FunctionType(ints, [ints, taken, taken])

    def add(b: Any, x: Any, weights: Any, sums: Any) -> Any:
        dot = cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}")
        return b.call(dot, [sums, b.bitcast(weights, taken), b.bitcast(x, taken)])

    return add


def _halves(b: Any, words: Any, signed: bool) -> tuple[Any, Any]:
    """Return the even bytes and the odd bytes, as 16-bit numbers."""
    kind = ir.VectorType(_i16, 2 * words.type.count)
    shorts, eight = b.bitcast(words, kind), ir.Constant(kind, [8] * kind.count)
    if signed:
        return b.ashr(b.shl(shorts, eight), eight), b.ashr(shorts, eight)
    return b.and_(shorts, ir.Constant(kind, [255] * kind.count)), b.lshr(shorts, eight)


def _pairs(b: Any, x: Any, y: Any) -> Any:
    """Return 16-bit products, of which two neighbours are added in 32 bits."""
    count = x.type.count
    wide, none = ir.VectorType(_i32, count), ir.Constant(ir.VectorType(_i32, count), ir.Undefined)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    order = [ir.Constant(ir.VectorType(_i32, count // 2), list(range(first, count, 2))) for first in (0, 1)]
    return b.add(*(b.shuffle_vector(products, none, each) for each in order))


def _add_widened(b: Any, x: Any, weights: Any, sums: Any) -> Any:
    for part, weight in zip(_halves(b, x, True), _halves(b, weights, False), strict=True):
        sums = b.add(sums, _pairs(b, part, weight))
    return sums


def make_step(bits: int, by_dot: bool, lanes: int = LANES) -> KStep:
    """Sixteen lanes mean 32 registers, for 8 rows at once. Eight lanes mean 16 registers, for 4 rows, or for 2 with
    widened bytes."""
    rows = 8 if lanes == 16 else 4
    add = _dot(lanes) if by_dot else _add_widened
    return KStep(
        lanes, rows, 4, _load_words(bits, lanes), _spread(lanes), add, VECTORS, COLUMNS // (VECTORS * lanes),
        8 // bits, True, _i32, make_close(bits),
    )  # fmt: skip


def _make_multiply(step: KStep) -> Any:
    passes, sweeps, width = make_passes(step), step.sweeps, 4 * step.vectors * step.lanes
    depth = 4 * step.words  # steps of k in one KStep

    @inline
    def multiply(x, x_stride, w, group, num_rows, y, y_stride, start, start_stride, beside, args, scratch):
        for sweep in range(sweeps):
            at, count = sweep * width, group // depth
            passes(
                x, x_stride, w + at, count, num_rows, y + at, y_stride, start + at, start_stride, w + AHEAD, beside + at
            )

    return multiply


def _make_compute(bits: int, by_dot: bool) -> Any:
    step = make_step(bits, by_dot)
    return make_compute(make_tile(bits, _make_multiply(step)), COLUMNS, step.rows, False, take_rows)


_dot_8, _dot_4 = _make_compute(8, True), _make_compute(4, True)
_widened_8, _widened_4 = _make_compute(8, False), _make_compute(4, False)


@kernel
def product_dot_int8(args):
    _dot_8(args)


@kernel
def product_dot_int4(args):
    _dot_4(args)


@kernel
def product_widened_int8(args):
    _widened_8(args)


@kernel
def product_widened_int4(args):
    _widened_4(args)


DOT = IntegerProduct("vnni", {8: product_dot_int8, 4: product_dot_int4}, SCRATCH_BYTES)
WIDENED = IntegerProduct("widened", {8: product_widened_int8, 4: product_widened_int4}, SCRATCH_BYTES)
