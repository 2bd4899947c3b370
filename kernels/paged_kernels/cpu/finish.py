"""Turns float32 sums into a product's result: rounded, gated, or added to a residual. Products that use the processor's
bfloat16 instructions also use its instructions for this."""

from __future__ import annotations

from typing import Any, NamedTuple

from paged_kernels.cpu.exponents import vexp2
from paged_kernels.cpu.intrinsics import LANES, inline
from paged_kernels.cpu.memory import (
    load_bf16,
    load_f32,
    store_bf16,
    store_f32,
    vload,
    vload_bf16,
    vround_bf16,
    vstore,
    vstore_bf16,
)
from paged_kernels.cpu.vectors import vadd, vdiv, vmul, vselect_less, vsplat


@inline
def _silu(gate):
    """Return x / (1 + exp(-x)) to a few units in the last place."""
    power, top = vmul(gate, vsplat(-1.4426950408889634)), vsplat(126.0)
    return vdiv(gate, vadd(vsplat(1.0), vexp2(vselect_less(power, top, power, top))))


class Words(NamedTuple):
    """The functions that finish a vector of sums."""

    store: Any  # (address, index, vector): stores the vector as bfloat16
    round: Any  # vector -> vector of the numbers that bfloat16 would keep
    silu: Any  # vector -> vector


ANY_HOST = Words(vstore_bf16, vround_bf16, _silu)


def make_write_out(columns: int, words: Words) -> Any:
    vstore_bf16 = words.store

    @inline
    def write_out(sums, num_rows, num_columns, y, y_stride, out_bf16):
        """Write sums [num_rows, num_columns], whose rows have 2 * columns floats, to y in its dtype."""
        for row in range(num_rows):
            column = 0
            while column + LANES <= num_columns:
                value = vload(sums, row * 2 * columns + column)
                if out_bf16:
                    vstore_bf16(y, row * y_stride + column, value)
                else:
                    vstore(y, row * y_stride + column, value)
                column += LANES
            while column < num_columns:
                one = load_f32(sums, row * 2 * columns + column)
                if out_bf16:
                    store_bf16(y, row * y_stride + column, one)
                else:
                    store_f32(y, row * y_stride + column, one)
                column += 1

    return write_out


def make_add_rounded(columns: int, words: Words) -> Any:
    vstore_bf16, vround_bf16 = words.store, words.round

    @inline
    def add_rounded(sums, num_rows, num_columns, residual, y, y_stride):
        """Write sums, rounded to bfloat16, plus the residual, which has y's strides, to y. Two modules would round in
        the same places."""
        for row in range(num_rows):
            at, column = row * y_stride, 0
            while column + LANES <= num_columns:
                value = vround_bf16(vload(sums, row * 2 * columns + column))
                vstore_bf16(y, at + column, vadd(vload_bf16(residual, at + column), value))
                column += LANES
            while column < num_columns:
                store_bf16(y, at + column, load_f32(sums, row * 2 * columns + column))
                store_bf16(y, at + column, load_bf16(residual, at + column) + load_bf16(y, at + column))
                column += 1

    return add_rounded


def make_gate(columns: int, words: Words) -> Any:
    silu = words.silu

    @inline
    def gate_in_place(sums, num_rows):
        """Each row of sums holds ``columns`` of gate, then of up. Write silu(gate) * up over gate."""
        for row in range(num_rows):
            for column in range(0, columns, LANES):
                at = row * 2 * columns + column
                vstore(sums, at, vmul(silu(vload(sums, at)), vload(sums, at + columns)))

    return gate_in_place
