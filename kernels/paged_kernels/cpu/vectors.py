"""Helpers for numba kernels: arithmetic on vectors of the host's width.

A kernel written with these decides itself what is in a register, so that its speed does not depend on what the compiler
manages to vectorise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from paged_kernels.cpu.intrinsics import LANES, call_llvm, define, f32, i32, ivec, splat, vec, vector


@define(vector, types.float32)
def vsplat(builder: Any, scalar: Any) -> Any:
    return splat(builder, scalar)


@define(vector, vector, vector)
def vadd(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@define(vector, vector, vector)
def vsub(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@define(vector, vector, vector)
def vmul(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@define(vector, vector, vector)
def vdiv(builder: Any, a: Any, b: Any) -> Any:
    return builder.fdiv(a, b)


@define(vector, vector, vector, vector)
def vfma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.v{LANES}f32", a, b, c)


@define(vector, vector, vector)
def vmax(builder: Any, a: Any, b: Any) -> Any:
    """Return the larger number in each lane. A NaN in ``a`` is kept, one in ``b`` is ignored."""
    return builder.select(builder.fcmp_ordered("olt", a, b), b, a)


@define(vector, vector, vector, vector, vector)
def vselect_less(builder: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return in each lane ``yes`` if a < b, else ``no``."""
    return builder.select(builder.fcmp_ordered("olt", a, b), yes, no)


@define(vector, vector, vector)
def vkeep_nan(builder: Any, a: Any, b: Any) -> Any:
    """Return in each lane ``b`` if it is NaN, else ``a``."""
    return builder.select(builder.fcmp_unordered("uno", b, b), b, a)


@define(vector)
def lane_numbers(builder: Any) -> Any:
    return ir.Constant(vec, [ir.Constant(f32, float(i)) for i in range(LANES)])


@define(types.float32, vector)
def vfirst(builder: Any, a: Any) -> Any:
    return builder.extract_element(a, i32(0))


@define(types.float32, vector)
def hsum(builder: Any, a: Any) -> Any:
    return _fold(builder, a, builder.fadd)


@define(types.float32, vector)
def hmax(builder: Any, a: Any) -> Any:
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered("olt", x, y), y, x))


def _fold(builder: Any, a: Any, combine: Callable[[Any, Any], Any]) -> Any:
    step = LANES // 2
    while step:
        order = [(i + step) % LANES for i in range(LANES)]
        a = combine(a, builder.shuffle_vector(a, a, ir.Constant(ivec, order)))
        step //= 2
    return builder.extract_element(a, i32(0))
