"""Rotates rows and weights by one orthogonal matrix R before they are quantised (QuaRot, arXiv:2404.00456).

Products don't change, since ``x @ w.T == (x @ R) @ (w @ R).T``. A number that is much larger than the others of its
row, as activations have them, is spread over the whole row. So one scale per row is enough.

R's size is K, padded to a multiple of STEP. It combines a Hadamard matrix over the power of two in that size with a
reflection ``1 - 2/p`` for each odd prime factor p. It is symmetric, and its own inverse up to a factor. Rows are
multiplied without the factor, weights with all of it; it is a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import float32
from torch import Tensor

from paged_kernels.cpu.intrinsics import LANES, call_llvm, const, define, f32, inline, ivec, vector
from paged_kernels.cpu.memory import load_float, store_f32, vload, vload_float, vstore
from paged_kernels.cpu.vectors import vadd, vfma, vsplat, vsub

STEP = 64


def filled(depth: int) -> int:
    """Return K after padding."""
    return -(-depth // STEP) * STEP


def rotate(rows: Tensor) -> Tensor:
    """Return ``float32 [N, K]`` times R without its factor, ``[N, filled(K)]``."""
    rows = torch.nn.functional.pad(rows, (0, filled(rows.shape[1]) - rows.shape[1])).contiguous()
    power = _power_of_two(rows.shape[1])
    step = 1
    while step < power:
        a, b = rows.view(len(rows), -1, 2, step).unbind(2)
        total = a + b
        torch.sub(a, b, out=b)
        a.copy_(total)
        step *= 2
    for prime in _primes(rows.shape[1] // power):
        parts = rows.view(len(rows), -1, prime, step)
        parts -= parts.sum(2, keepdim=True) * (2 / prime)
        step *= prime
    return rows


def factor(depth: int) -> float:
    """Return the number by which a rotation of a rotation must be divided."""
    return float(_power_of_two(filled(depth)))


def _power_of_two(count: int) -> int:
    return count & -count


def _primes(odd: int) -> list[int]:
    found, prime = [], 3
    while odd > 1:
        if odd % prime:
            prime += 2
        else:
            found.append(prime)
            odd //= prime
    return found


# ---- rotating rows in kernels --------------------------------------------------------------------------------------


def _make_meet(step: int) -> Any:
    """Make the product with the Hadamard matrix of size two, over lanes that are ``step`` apart."""
    order = ir.Constant(ivec, [lane ^ step for lane in range(LANES)])
    signs = ir.Constant(const(0.0).type, [ir.Constant(f32, -1.0 if lane & step else 1.0) for lane in range(LANES)])

    @define(vector, vector)
    def meet(builder: Any, a: Any) -> Any:
        return call_llvm(builder, f"llvm.fma.v{LANES}f32", a, signs, builder.shuffle_vector(a, a, order))

    return meet


_meet_1, _meet_2, _meet_4, _meet_half = (_make_meet(step) for step in (1, 2, 4, LANES // 2))  # half of 8 lanes is 4


@inline
def rotate_row(source, dtype, width, target, count):
    """Write ``width`` numbers, padded with zeros to ``count``, times R without its factor, as float32."""
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        vstore(target, i, _meet_lanes(vload_float(source, i, dtype)))
    if whole < count:
        for i in range(whole, count):
            store_f32(target, i, load_float(source, i, dtype) if i < width else float32(0.0))
        for i in range(whole, count, LANES):
            vstore(target, i, _meet_lanes(vload(target, i)))
    power = count & -count
    step = _meet_vectors(target, count, power)
    odd, prime = count // power, 3
    while odd > 1:
        if odd % prime == 0:
            _reflect(target, count, step, prime)
            step, odd = step * prime, odd // prime
        else:
            prime += 2


@inline
def _meet_lanes(a):
    a = _meet_half(_meet_2(_meet_1(a)))
    return _meet_4(a) if LANES == 16 else a


@inline
def _meet_vectors(target, count, power):
    """Do all steps from one vector on, two at once. Returns the size that was reached."""
    step = LANES
    while 4 * step <= power:
        for first in range(0, count, 4 * step):
            for i in range(first, first + step, LANES):
                a, b, c, d = (vload(target, i), vload(target, i + step), vload(target, i + 2 * step),
                              vload(target, i + 3 * step))  # fmt: skip
                ab, cd, a, c = vadd(a, b), vadd(c, d), vsub(a, b), vsub(c, d)
                vstore(target, i, vadd(ab, cd))
                vstore(target, i + step, vadd(a, c))
                vstore(target, i + 2 * step, vsub(ab, cd))
                vstore(target, i + 3 * step, vsub(a, c))
        step *= 4
    if step < power:
        for first in range(0, count, 2 * step):
            for i in range(first, first + step, LANES):
                a, b = vload(target, i), vload(target, i + step)
                vstore(target, i, vadd(a, b))
                vstore(target, i + step, vsub(a, b))
    return power


@inline
def _reflect(target, count, step, prime):
    share = vsplat(float32(-2.0) / float32(prime))
    for first in range(0, count, prime * step):
        for i in range(first, first + step, LANES):
            total = vload(target, i)
            for j in range(1, prime):
                total = vadd(total, vload(target, i + j * step))
            for j in range(prime):
                vstore(target, i + j * step, vfma(total, share, vload(target, i + j * step)))
