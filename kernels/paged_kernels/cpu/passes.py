"""Sums of a tile in vector registers: each number of a row of x is copied to all lanes of a vector and multiplies
vectors of weights.

A tile is stored as [K, columns], so that one step of k reads whole neighbouring vectors. While a stretch of a tile is
multiplied with the rows of x, each pass prefetches its share of the next stretch, so that memory and arithmetic work at
the same time. A ``KStep`` defines one step of k; fma.py, dot_bf16.py and dot_int8.py each have theirs. This file knows
LLVM. It knows no dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.product import LINE

_f32, _i32, _i64, _byte = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def add_to_start(b: Any, sums: Any, start: Any, line: Any, beside: Any, column: int) -> Any:
    """Return float32 sums plus what they start from."""
    return b.fadd(start, sums)


@dataclass(frozen=True)
class KStep:
    """One step of k: ``words`` times four bytes of each row of x, and ``columns`` elements of weights."""

    lanes: int  # sums in a vector
    rows: int  # of x, in registers: with rows * vectors sums, as many vectors of weights, and one x
    weight_bytes: int  # of one element
    load: Callable[[Any, Any], Sequence[Any]]  # builder, pointer to bytes -> weights, a vector for each word of x
    spread: Callable[[Any, Any], Any]  # builder, pointer to bytes -> a vector with the x there in all lanes
    add: Callable[[Any, Any, Any, Any], Any]  # builder, x, weights, sums -> sums
    vectors: int = 3  # side by side in registers
    sweeps: int = 1  # over a tile, each of as many vectors
    words: int = 1
    halves_rests: bool = False
    sum_type: Any = _f32
    close: Callable[[Any, Any, Any, Any, Any, int], Any] = add_to_start
    """builder, sums, what they are added to, address of x's row, address of extra data, column -> float32"""

    @property
    def columns(self) -> int:
        return self.vectors * self.sweeps * self.lanes


def make_passes(step: KStep) -> Any:
    """Make ``passes(x, xs, w, count, num_rows, y, ys, start, ss, ahead, beside)``, which multiplies all rows of a block
    with one stretch of a tile, or as much of it as one sweep covers. ``ahead``: the stretch to prefetch. ``beside``:
    extra data for ``close``."""
    most, width = step.rows, step.columns * step.weight_bytes  # bytes of weights in one step of k
    many, few = -(-width // LINE), 1
    full_many, full_few = make_pass(step, most, many), make_pass(step, most, few)
    rest = _make_halving(step, many) if step.halves_rests else _make_exact(step, many)

    @inline
    def passes(x, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead, beside):
        share = -(-width // -(-num_rows // most))  # bytes prefetched at each step of k
        row = 0
        while row < num_rows:
            left = num_rows - row
            xr, yr, sr = x + row * x_stride, y + 4 * row * y_stride, start + 4 * row * start_stride
            if left < most:
                rest(left, xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share, beside)
            elif num_rows <= 2 * most:
                full_many(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share, beside)
            else:
                full_few(xr, x_stride, w, count, yr, y_stride, sr, start_stride, ahead, share, beside)
            row += most
            ahead += share * count

    return passes


def _make_exact(step: KStep, num_prefetches: int) -> Any:
    """Make a function for the remaining rows, all in one pass."""
    rest = [None] + [make_pass(step, rows, num_prefetches) for rows in range(1, step.rows)]
    r1, r2, r3 = rest[1:4]
    r4, r5, r6, r7 = rest[4:] or [r3] * 4  # with four rows in registers, at most three remain

    @inline
    def exact(left, x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside):
        if left == 1:
            r1(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        elif left == 2:
            r2(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        elif left == 3:
            r3(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        elif left == 4:
            r4(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        elif left == 5:
            r5(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        elif left == 6:
            r6(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
        else:
            r7(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)

    return exact


def _make_halving(step: KStep, num_prefetches: int) -> Any:
    """Make a function for the remaining rows, four, two and one at a time. This compiles fewer passes, for small
    weights."""
    r1, r2, r4 = (make_pass(step, rows, num_prefetches) for rows in (1, 2, 4))

    @inline
    def halving(left, x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside):
        if left & 4:
            r4(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
            x, y, start = x + 4 * x_stride, y + 16 * y_stride, start + 16 * start_stride
        if left & 2:
            r2(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)
            x, y, start = x + 2 * x_stride, y + 8 * y_stride, start + 8 * start_stride
        if left & 1:
            r1(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, share, beside)

    return halving


def make_pass(step: KStep, rows: int, num_prefetches: int) -> Any:
    """Make ``one_pass(x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step, beside)``, which
    computes y = start + x @ w for ``rows`` rows and one sweep of a tile, over ``count`` steps of k. Arguments are
    addresses; x's strides and ahead_step are in bytes, the others in elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_pass(step, rows, num_prefetches, builder, args)
        return context.get_dummy_value()

    @intrinsic
    def one_pass(typingctx, x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step, beside):
        return types.void(*[types.int64] * 11), codegen

    return one_pass


def emit_pass(step: KStep, rows: int, num_prefetches: int, b: Any, args: Any) -> None:
    x, x_stride, w, count, y, y_stride, start, start_stride, ahead, ahead_step, beside = args
    sums_type, floats = ir.VectorType(step.sum_type, step.lanes), ir.VectorType(_f32, step.lanes)

    def after(base: Any, num_bytes: Any, kind: Any = _byte) -> Any:
        return b.inttoptr(b.add(base, num_bytes), kind)

    def cell(base: Any, stride: Any, row: int, vector: int) -> Any:
        elements = b.add(b.mul(stride, _i64(row)), _i64(vector * step.lanes))
        return after(base, b.mul(elements, _i64(4)), floats.as_pointer())

    cells = [(m, v) for m in range(rows) for v in range(step.vectors)]
    nothing = ir.Constant(sums_type, [ir.Constant(step.sum_type, 0)] * step.lanes)
    lines = [b.add(x, b.mul(x_stride, _i64(m))) for m in range(rows)]
    before, loop, done = b.block, b.append_basic_block("k"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    k, near = b.phi(_i64), b.phi(_i64)
    sums = {each: b.phi(sums_type) for each in cells}
    at = b.mul(k, _i64(step.columns * step.weight_bytes))
    vector_bytes = step.lanes * step.weight_bytes
    weights = [step.load(b, after(w, b.add(at, _i64(v * vector_bytes)))) for v in range(step.vectors)]
    for n in range(num_prefetches):
        emit_prefetch(b, b.add(near, _i64(n * LINE)))
    new = dict(sums)
    for m in range(rows):
        for word in range(step.words):
            left = step.spread(b, after(lines[m], b.add(b.mul(k, _i64(4 * step.words)), _i64(4 * word))))
            for v in range(step.vectors):
                new[m, v] = step.add(b, left, weights[v][word], new[m, v])
    next_k = b.add(k, _i64(1))
    phis = [(k, _i64(0), next_k), (near, ahead, b.add(near, ahead_step)), *((sums[c], nothing, new[c]) for c in cells)]
    for phi, initial, update in phis:
        phi.add_incoming(initial, before)
        phi.add_incoming(update, loop)
    b.cbranch(b.icmp_signed("<", next_k, count), loop, done)
    b.position_at_end(done)
    for m, v in cells:
        begun = b.load(cell(start, start_stride, m, v), align=4)
        total = step.close(b, new[m, v], begun, lines[m], beside, v * step.lanes)
        b.store(total, cell(y, y_stride, m, v), align=4)


def emit_prefetch(b: Any, address: Any) -> None:
    """Prefetch the cache line at an address, into the second-level cache."""
    kind = ir.FunctionType(ir.VoidType(), [_byte, _i32, _i32, _i32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(fetch, [b.inttoptr(address, _byte), _i32(0), _i32(2), _i32(1)])


def emit_splat(b: Any, scalar: Any, lanes: int) -> Any:
    kind = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    one = b.insert_element(undefined, scalar, _i32(0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_i32, lanes), [0] * lanes))
