"""From sums in float32 to a product's result: rounded, gated, added to a residual. Words that the processor has for
bfloat16 are taken where the product is by such an instruction, too."""

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
    """x / (1 + exp(-x)) to a few units in the last place."""
    power, top = vmul(gate, vsplat(-1.4426950408889634)), vsplat(126.0)
    return vdiv(gate, vadd(vsplat(1.0), vexp2(vselect_less(power, top, power, top))))


class Words(NamedTuple):
    """What a vector of sums is finished with."""

    store: Any  # (address, index, vector): as bfloat16
    round: Any  # vector -> vector: the numbers that bfloat16 keeps
    silu: Any  # vector -> vector


ANY_HOST = Words(vstore_bf16, vround_bf16, _silu)


def make_write_out(columns: int, words: Words) -> Any:
    vstore_bf16 = words.store

    @inline
    def write_out(sums, num_rows, num_columns, y, y_stride, out_bf16):
        """Sums [num_rows, columns of 2 * columns] to y, in its dtype, as many columns as there are."""
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
        """Sums, rounded to bfloat16, and the residual, which lies as y does; to y. As two modules would round."""
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
        """Each row of sums holds ``columns`` of gate, then of up: silu(gate) * up goes where gate was."""
        for row in range(num_rows):
            for column in range(0, columns, LANES):
                at = row * 2 * columns + column
                vstore(sums, at, vmul(silu(vload(sums, at)), vload(sums, at + columns)))

    return gate_in_place
