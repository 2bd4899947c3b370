"""Helpers for numba kernels: products of small matrices in registers.

Each sum has one order, in all helpers. In a dot product, lane i sums the numbers i, i + LANES, i + 2 LANES and so on;
then lanes are added pair by pair, neighbours first. A mix of rows is summed row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from paged_kernels.cpu.intrinsics import LANES, call_llvm, const, define, element_at, f32, i64, ivec, splat, vec, vector


def _accumulators(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    return [[cgutils.alloca_once(builder, vec) for _ in range(columns)] for _ in range(rows)]


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.v{LANES}f32", a, b, c)


def make_outer(rows: int, columns: int, together: int) -> Any:
    """Make ``outer(a_rows, b, b_stride, c, c_stride, count)``: C[m, lanes] = sum over k of A[m, k] * B[k, lanes], in
    the order of ``dots``.

    A has ``rows`` rows, whose addresses are in the table ``a_rows``; B and C have ``columns`` vectors. Strides are in
    floats. The sums that ``dots`` has in its lanes are computed in several passes, ``together`` of them in each; a
    result waits in registers for its neighbour's.
    """
    i = types.int64

    @define(types.void, i, i, i, i, i, i)
    def outer(builder: Any, a_rows: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, count: Any) -> None:
        a = [builder.load(element_at(builder, a_rows, i64(m), i64)) for m in range(rows)]
        product = _Outer(builder, a, b, b_stride, columns, count)
        sums = product.sum_lanes(0, LANES, together)
        for m, n in product.cells:
            index = builder.add(builder.mul(i64(m), c_stride), i64(n * LANES))
            builder.store(sums[m, n], element_at(builder, c, index, f32, vec), align=4)

    return outer


_Sums = dict[tuple[int, int], Any]
"""One vector for each row of A and column of B."""


@dataclass(frozen=True)
class _Outer:
    """The products of A and B, while their code is emitted."""

    builder: Any
    a: Sequence[Any]  # addresses of A's rows
    b: Any
    b_stride: Any
    columns: int
    count: Any

    @property
    def cells(self) -> list[tuple[int, int]]:
        return [(m, n) for m in range(len(self.a)) for n in range(self.columns)]

    def sum_lanes(self, first: int, num: int, together: int) -> _Sums:
        """Return the sum of so many of the lanes in which ``dots`` sums."""
        if num == together:
            return self._fold(self._one_pass(first, together))
        half = num // 2
        return self._fold([self.sum_lanes(first, half, together), self.sum_lanes(first + half, half, together)])

    def _one_pass(self, first: int, together: int) -> list[_Sums]:
        builder = self.builder
        lanes = [{cell: cgutils.alloca_once(builder, vec) for cell in self.cells} for _ in range(together)]
        for acc in lanes:
            for cell in self.cells:
                builder.store(const(0.0), acc[cell])
        whole = builder.sdiv(builder.add(self.count, i64(LANES - first - together)), i64(LANES))
        with cgutils.for_range(builder, whole) as loop:
            k = builder.add(builder.mul(loop.index, i64(LANES)), i64(first))
            for n, acc in enumerate(lanes):
                self._add_products(acc, builder.add(k, i64(n)))
        rest = builder.add(builder.mul(whole, i64(LANES)), i64(first))
        for n, acc in enumerate(lanes[:-1]):
            k = builder.add(rest, i64(n))
            with builder.if_then(builder.icmp_signed("<", k, self.count)):
                self._add_products(acc, k)
        return [{cell: builder.load(acc[cell]) for cell in self.cells} for acc in lanes]

    def _add_products(self, acc: _Sums, k: Any) -> None:
        """Add the products at k to the sums ``acc``."""
        builder = self.builder
        at = builder.mul(k, self.b_stride)
        right = [
            builder.load(element_at(builder, self.b, builder.add(at, i64(n * LANES)), f32, vec), align=4)
            for n in range(self.columns)
        ]
        for m, row in enumerate(self.a):
            left = splat(builder, builder.load(element_at(builder, row, k, f32)))
            for n in range(self.columns):
                builder.store(_fma(builder, left, right[n], builder.load(acc[m, n])), acc[m, n])

    def _fold(self, sums: Sequence[_Sums]) -> _Sums:
        """Add the sums pair by pair, neighbours first."""
        while len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [{cell: self.builder.fadd(one[cell], other[cell]) for cell in self.cells} for one, other in pairs]
        return sums[0]


def make_mix(rows: int, columns: int) -> Any:
    """Make ``mix(p, p_row, p_key, b_rows, offset, c, c_stride, kept, taken, count)``: C[m, lanes] = C * kept[m] +
    taken[m] * (sum over k of P[m, k] * B[k, offset + lanes]).

    An element of P is at ``m * p_row + k * p_key``. The table ``b_rows`` holds the addresses of B's rows.
    """
    i = types.int64

    @define(types.void, i, i, i, i, i, i, i, i, i, i)
    def mix(
        builder: Any, p: Any, p_row: Any, p_key: Any, b_rows: Any, offset: Any, c: Any, c_stride: Any, kept: Any,
        taken: Any, count: Any,
    ) -> None:  # fmt: skip
        acc = _accumulators(builder, rows, columns)
        for m in range(rows):
            for n in range(columns):
                builder.store(const(0.0), acc[m][n])
        with cgutils.for_range(builder, count) as loop:
            k = loop.index
            row = builder.load(element_at(builder, b_rows, k, i64))
            right = [
                builder.load(element_at(builder, row, builder.add(offset, i64(n * LANES)), f32, vec), align=4)
                for n in range(columns)
            ]
            at = builder.mul(k, p_key)
            for m in range(rows):
                index = builder.add(at, builder.mul(i64(m), p_row))
                left = splat(builder, builder.load(element_at(builder, p, index, f32)))
                for n in range(columns):
                    builder.store(_fma(builder, left, right[n], builder.load(acc[m][n])), acc[m][n])
        for m in range(rows):
            keep, take = (splat(builder, builder.load(element_at(builder, x, i64(m), f32))) for x in (kept, taken))
            for n in range(columns):
                index = builder.add(builder.add(builder.mul(i64(m), c_stride), offset), i64(n * LANES))
                target = element_at(builder, c, index, f32, vec)
                before = builder.fmul(builder.load(target, align=4), keep)
                builder.store(_fma(builder, builder.load(acc[m][n]), take, before), target, align=4)

    return mix


@define(vector, types.int64, types.int64, types.int64)
def dots(builder: Any, rows: Any, x: Any, chunks: Any) -> Any:
    """Return one dot product per lane: of x and each of LANES rows, whose addresses are in the table ``rows``. They are
    ``chunks`` vectors long."""
    acc = _accumulators(builder, LANES, 1)
    for m in range(LANES):
        builder.store(const(0.0), acc[m][0])

    def add(first: Any, width: int) -> None:
        at = [builder.mul(builder.add(first, i64(n)), i64(LANES)) for n in range(width)]
        right = [builder.load(element_at(builder, x, index, f32, vec), align=4) for index in at]
        for m in range(LANES):
            row = builder.load(element_at(builder, rows, i64(m), i64))
            total = builder.load(acc[m][0])
            for n in range(width):
                left = builder.load(element_at(builder, row, at[n], f32, vec), align=4)
                total = _fma(builder, left, right[n], total)
            builder.store(total, acc[m][0])

    fours = builder.lshr(chunks, i64(2))
    with cgutils.for_range(builder, fours) as loop:
        add(builder.shl(loop.index, i64(2)), 4)
    done = builder.shl(fours, i64(2))
    with cgutils.for_range(builder, builder.sub(chunks, done)) as loop:
        add(builder.add(done, loop.index), 1)
    return _sum_each(builder, [builder.load(acc[m][0]) for m in range(LANES)])


def _sum_each(builder: Any, vectors: list[Any]) -> Any:
    """Return the sum of each of LANES vectors, in the lane of its number. On each level, two vectors whose numbers
    differ in one bit are merged: lanes with that bit clear keep the first vector's, the others the second's."""
    bit = 1
    while len(vectors) > 1:
        keep = [lane + LANES if lane & bit else lane for lane in range(LANES)]
        cross = [(lane ^ bit) + LANES if lane & bit else lane ^ bit for lane in range(LANES)]
        vectors = [
            builder.fadd(
                builder.shuffle_vector(one, other, ir.Constant(ivec, keep)),
                builder.shuffle_vector(one, other, ir.Constant(ivec, cross)),
            )
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        bit *= 2
    return vectors[0]


@define(vector, types.int64, types.int64, types.int64)
def sum_down(builder: Any, lines: Any, stride: Any, blocks: Any) -> Any:
    """Return the sums of ``blocks`` times LANES vectors that are ``stride`` floats apart. Each lane is summed in the
    order of ``hsum`` over as many vectors, as if its numbers were neighbours."""
    acc = _accumulators(builder, LANES, 1)
    for m in range(LANES):
        builder.store(const(0.0), acc[m][0])
    with cgutils.for_range(builder, blocks) as loop:
        first = builder.mul(loop.index, i64(LANES))
        for m in range(LANES):
            index = builder.mul(builder.add(first, i64(m)), stride)
            line = builder.load(element_at(builder, lines, index, f32, vec), align=4)
            builder.store(builder.fadd(builder.load(acc[m][0]), line), acc[m][0])
    sums = [builder.load(acc[m][0]) for m in range(LANES)]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [builder.fadd(one, other) for one, other in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]
