"""Helpers for numba kernels: powers of two and the hyperbolic tangent of vectors."""

from __future__ import annotations

from typing import Any

from paged_kernels.cpu.intrinsics import LANES, call_llvm, const, define, iconst, inline, ivec, vec, vector
from paged_kernels.cpu.vectors import vadd, vdiv, vmax, vmul, vselect_less, vsplat, vsub

# 2**f = 1 + f * p(f) on [-0.5, 0.5], and tanh(x) = x + x * z * p(z) with z = x * x on [-0.65, 0.65]. The coefficients
# minimise the largest relative error, which is 2e-9 and 6e-9.
_EXP2 = (0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262, 0.0013398875016719103,
         0.00015353361959569156)  # fmt: skip
_TANH = (-0.3333326280117035, 0.1333089917898178, -0.05369296669960022, 0.020483311265707016, -0.005528628826141357)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    total = const(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = call_llvm(builder, f"llvm.fma.v{LANES}f32", total, x, const(c))
    return total


@define(vector, vector)
def vexp2(builder: Any, x: Any) -> Any:
    """Return 2**x to about one unit in the last place, for x <= 127; 0 below -126 (so for -inf); NaN for NaN."""
    too_small = builder.fcmp_ordered("olt", x, const(-126.0))
    x = builder.select(too_small, const(-126.0), x)
    shifted = builder.fadd(x, const(_ROUND))
    f = builder.fsub(x, builder.fsub(shifted, const(_ROUND)))
    power = builder.shl(builder.add(builder.bitcast(shifted, ivec), iconst(127)), iconst(23))
    p = _polynomial(builder, f, _EXP2)
    y = call_llvm(builder, f"llvm.fma.v{LANES}f32", p, f, const(1.0))
    return builder.select(too_small, const(0.0), builder.fmul(y, builder.bitcast(power, vec)))


@define(vector, vector)
def vtanh_near(builder: Any, x: Any) -> Any:
    """Return tanh(x) for -0.65 <= x <= 0.65."""
    z = builder.fmul(x, x)
    xz = builder.fmul(x, z)
    return call_llvm(builder, f"llvm.fma.v{LANES}f32", xz, _polynomial(builder, z, _TANH), x)


@inline
def vtanh(x):
    """Return tanh(x) to a few units in the last place; NaN for NaN."""
    one = vsplat(1.0)
    size = vmax(x, vsub(vsplat(0.0), x))
    power = vexp2(vmul(vselect_less(vsplat(20.0), size, vsplat(20.0), size), vsplat(-2.885390081777927)))
    far = vdiv(vsub(one, power), vadd(one, power))
    far = vselect_less(x, vsplat(0.0), vsub(vsplat(0.0), far), far)
    near = vtanh_near(x)
    return vselect_less(size, vsplat(0.625), near, far)
