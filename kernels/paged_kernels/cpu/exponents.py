"""Words for numba kernels: powers of two and the hyperbolic tangent, of vectors."""

from __future__ import annotations

from typing import Any

from paged_kernels.cpu.vectors import (
    LANES,
    _call,
    _const,
    _define,
    _iconst,
    _ivec,
    _vec,
    inline,
    vadd,
    vdiv,
    vector,
    vmax,
    vmul,
    vselect_less,
    vsplat,
    vsub,
)

# 2**f = 1 + f * p(f) on [-0.5, 0.5] and tanh(x) = x + x * z * p(z), z = x * x, on [-0.65, 0.65]: fitted for the least
# greatest relative error, 2e-9 and 6e-9.
_EXP2 = (0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262, 0.0013398875016719103,
         0.00015353361959569156)  # fmt: skip
_TANH = (-0.3333326280117035, 0.1333089917898178, -0.05369296669960022, 0.020483311265707016, -0.005528628826141357)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    total = _const(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = _call(builder, f"llvm.fma.v{LANES}f32", total, x, _const(c))
    return total


@_define(vector, vector)
def vexp2(builder: Any, x: Any) -> Any:
    """2**x to about one unit in the last place, for x <= 127; 0 below -126 (so for -inf); NaN for NaN."""
    too_small = builder.fcmp_ordered("olt", x, _const(-126.0))
    x = builder.select(too_small, _const(-126.0), x)
    shifted = builder.fadd(x, _const(_ROUND))
    f = builder.fsub(x, builder.fsub(shifted, _const(_ROUND)))
    power = builder.shl(builder.add(builder.bitcast(shifted, _ivec), _iconst(127)), _iconst(23))
    p = _polynomial(builder, f, _EXP2)
    y = _call(builder, f"llvm.fma.v{LANES}f32", p, f, _const(1.0))
    return builder.select(too_small, _const(0.0), builder.fmul(y, builder.bitcast(power, _vec)))


@_define(vector, vector)
def vtanh_near(builder: Any, x: Any) -> Any:
    """tanh(x) for -0.65 <= x <= 0.65."""
    z = builder.fmul(x, x)
    xz = builder.fmul(x, z)
    return _call(builder, f"llvm.fma.v{LANES}f32", xz, _polynomial(builder, z, _TANH), x)


@inline
def vtanh(x):
    """tanh(x) to a few units in the last place; NaN for NaN."""
    one = vsplat(1.0)
    size = vmax(x, vsub(vsplat(0.0), x))
    power = vexp2(vmul(vselect_less(vsplat(20.0), size, vsplat(20.0), size), vsplat(-2.885390081777927)))
    far = vdiv(vsub(one, power), vadd(one, power))
    far = vselect_less(x, vsplat(0.0), vsub(vsplat(0.0), far), far)
    near = vtanh_near(x)
    return vselect_less(size, vsplat(0.625), near, far)
