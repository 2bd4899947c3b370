"""Words for numba kernels: raw memory, vectors as wide as the host's registers, and atomics.

A kernel written with these decides itself what sits in a register, so its speed does not hang on what the compiler
manages to vectorise. Addresses are int64; indices count elements of the type in the word's name. This file knows
LLVM and nothing of attention.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8  # floats in a vector
REGISTERS = 32 if LANES == 16 or not _FEATURES.get("avx") else 16

F32, BF16, F16 = 0, 1, 4  # dtype codes, as kernels are given them; 2 and 3: see codes.py
HAS_F16 = bool(_FEATURES.get("f16c")) or platform.machine().lower() not in ("x86_64", "amd64")
"""Whether the host converts float16 by itself. Where it does not, the words for it are there and must not be used."""

_i32, _i64, _f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_vec, _ivec = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)
_svec = ir.VectorType(ir.IntType(16), LANES)
_half, _hvec = ir.HalfType(), ir.VectorType(ir.HalfType(), LANES)

inline = njit(error_model="numpy", nogil=True)
"""Compiles a helper that kernels call. No fast-math: sums keep their order, NaN and infinity their meaning."""


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"vector{LANES}")


vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _vec)


def _define(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Turn ``emit(builder, *values)`` into an intrinsic. ``kinds`` are numba types; numbers are cast to them."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        def typing(typingctx: Any, *given: Any) -> Any:
            if len(given) != len(kinds):
                raise TypingError(f"{emit.__name__} takes {len(kinds)} arguments, got {len(given)}")
            return result(*kinds), codegen

        names = ", ".join(f"a{i}" for i in range(len(kinds)))
        scope: dict[str, Any] = {"typing": typing}
        exec(f"def {emit.__name__}(typingctx, {names}): return typing(typingctx, {names})", scope)
        return intrinsic(scope[emit.__name__])

    return decorate


def _at(builder: Any, address: Any, index: Any, element: Any, view: Any = None) -> Any:
    """A pointer to ``element`` number ``index`` after ``address``, seen as ``view``."""
    base = builder.inttoptr(address, element.as_pointer())
    pointer = builder.gep(base, [index])
    return builder.bitcast(pointer, view.as_pointer()) if view is not None else pointer


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(args[0].type, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args)


def _splat(builder: Any, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, LANES)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(_ivec, [0] * LANES))


def _const(value: float) -> Any:
    return ir.Constant(_vec, [ir.Constant(_f32, value)] * LANES)


def _iconst(value: int) -> Any:
    return ir.Constant(_ivec, [value] * LANES)


# ---- memory ----------------------------------------------------------------------------------------------------


@_define(types.int64, types.int64, types.int64)
def load_i64(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _i64))


@_define(types.int64, types.int64, types.int64)
def load_i32(builder: Any, address: Any, index: Any) -> Any:
    return builder.sext(builder.load(_at(builder, address, index, _i32)), _i64)


@_define(types.float32, types.int64, types.int64)
def load_f32(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _f32))


@_define(types.float32, types.int64, types.int64)
def load_bf16(builder: Any, address: Any, index: Any) -> Any:
    half = builder.load(_at(builder, address, index, ir.IntType(16)))
    return builder.bitcast(builder.shl(builder.zext(half, _i32), _i32(16)), _f32)


@_define(types.float32, types.int64, types.int64)
def load_f16(builder: Any, address: Any, index: Any) -> Any:
    return _widened(builder, builder.load(_at(builder, address, index, _half)), _f32)


@_define(types.void, types.int64, types.int64, types.int64)
def store_i64(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, _at(builder, address, index, _i64))


@_define(types.void, types.int64, types.int64, types.int64)
def store_i32(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(builder.trunc(value, _i32), _at(builder, address, index, _i32))


@_define(types.void, types.int64, types.int64, types.float32)
def store_f32(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, _at(builder, address, index, _f32))


@_define(types.void, types.int64, types.int64, types.float32)
def store_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    bits = _round_bf16(builder, value, builder.bitcast(value, _i32), _i32)
    builder.store(builder.trunc(bits, ir.IntType(16)), _at(builder, address, index, ir.IntType(16)))


@_define(types.void, types.int64, types.int64, types.float32)
def store_f16(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(_narrowed(builder, value, _half), _at(builder, address, index, _half))


@_define(vector, types.int64, types.int64)
def vload(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _f32, _vec), align=4)


@_define(types.void, types.int64, types.int64, vector)
def vstore(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, _at(builder, address, index, _f32, _vec), align=4)


@_define(vector, types.int64, types.int64)
def vload_bf16(builder: Any, address: Any, index: Any) -> Any:
    halves = builder.load(_at(builder, address, index, ir.IntType(16), _svec), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, _ivec), _iconst(16)), _vec)


@_define(types.void, types.int64, types.int64, vector)
def vstore_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    bits = _round_bf16(builder, value, builder.bitcast(value, _ivec), _ivec)
    target = _at(builder, address, index, ir.IntType(16), _svec)
    builder.store(builder.trunc(bits, _svec), target, align=2)


@_define(vector, types.int64, types.int64)
def vload_f16(builder: Any, address: Any, index: Any) -> Any:
    return _widened(builder, builder.load(_at(builder, address, index, _half, _hvec), align=2), _vec)


@_define(types.void, types.int64, types.int64, vector)
def vstore_f16(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(_narrowed(builder, value, _hvec), _at(builder, address, index, _half, _hvec), align=2)


def _widened(builder: Any, value: Any, kind: Any) -> Any:
    return builder.fpext(value, kind) if HAS_F16 else ir.Constant(kind, ir.Undefined)


def _narrowed(builder: Any, value: Any, kind: Any) -> Any:
    return builder.fptrunc(value, kind) if HAS_F16 else ir.Constant(kind, ir.Undefined)


@_define(vector, vector)
def vround_bf16(builder: Any, value: Any) -> Any:
    """The numbers that bfloat16 would keep."""
    bits = _round_bf16(builder, value, builder.bitcast(value, _ivec), _ivec)
    return builder.bitcast(builder.shl(bits, _iconst(16)), _vec)


def _round_bf16(builder: Any, value: Any, bits: Any, kind: Any) -> Any:
    """The bfloat16 nearest to ``value``, ties to even, in the low half; a NaN stays one."""
    constant = (lambda n: _iconst(n)) if kind is _ivec else (lambda n: _i32(n))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, constant(0x7FC0), rounded)


@_define(types.void, types.int64, types.int64)
def prefetch(builder: Any, address: Any, offset_bytes: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    pointer = builder.inttoptr(builder.add(address, offset_bytes), byte)
    kind = ir.FunctionType(ir.VoidType(), [byte, _i32, _i32, _i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, _i32(0), _i32(3), _i32(1)])


# ---- threads ---------------------------------------------------------------------------------------------------


@_define(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at address, as one indivisible step; the value before."""
    return builder.atomic_rmw("add", builder.inttoptr(address, _i64.as_pointer()), amount, "acq_rel")


@_define(types.int64, types.int64)
def load_shared(builder: Any, address: Any) -> Any:
    """The int64 at address, and all that was written before it was."""
    return builder.load_atomic(builder.inttoptr(address, _i64.as_pointer()), "acquire", 8)


# ---- arithmetic on vectors ------------------------------------------------------------------------------------


@_define(vector, types.float32)
def vsplat(builder: Any, scalar: Any) -> Any:
    return _splat(builder, scalar)


@_define(vector, vector, vector)
def vadd(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@_define(vector, vector, vector)
def vsub(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@_define(vector, vector, vector)
def vmul(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@_define(vector, vector, vector)
def vdiv(builder: Any, a: Any, b: Any) -> Any:
    return builder.fdiv(a, b)


@_define(vector, vector, vector, vector)
def vfma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", a, b, c)


@_define(vector, vector, vector)
def vmax(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each lane; a NaN in ``a`` stands, one in ``b`` is passed over."""
    return builder.select(builder.fcmp_ordered("olt", a, b), b, a)


@_define(vector, vector, vector, vector, vector)
def vselect_less(builder: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Lane by lane: ``yes`` where a < b, else ``no``."""
    return builder.select(builder.fcmp_ordered("olt", a, b), yes, no)


@_define(vector, vector, vector)
def vkeep_nan(builder: Any, a: Any, b: Any) -> Any:
    """``b`` where b is a NaN, else ``a``."""
    return builder.select(builder.fcmp_unordered("uno", b, b), b, a)


@_define(vector)
def lane_numbers(builder: Any) -> Any:
    return ir.Constant(_vec, [ir.Constant(_f32, float(i)) for i in range(LANES)])


@_define(types.float32, vector)
def vfirst(builder: Any, a: Any) -> Any:
    return builder.extract_element(a, _i32(0))


@_define(types.float32, vector)
def hsum(builder: Any, a: Any) -> Any:
    return _fold(builder, a, builder.fadd)


@_define(types.float32, vector)
def hmax(builder: Any, a: Any) -> Any:
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered("olt", x, y), y, x))


def _fold(builder: Any, a: Any, combine: Callable[[Any, Any], Any]) -> Any:
    step = LANES // 2
    while step:
        order = [(i + step) % LANES for i in range(LANES)]
        a = combine(a, builder.shuffle_vector(a, a, ir.Constant(_ivec, order)))
        step //= 2
    return builder.extract_element(a, _i32(0))


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


# ---- products held in registers -------------------------------------------------------------------------------


def _accumulators(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    return [[cgutils.alloca_once(builder, _vec) for _ in range(columns)] for _ in range(rows)]


def make_outer(rows: int, columns: int) -> Any:
    """``outer(a_rows, b, b_stride, c, c_stride, count)``: C[m, lanes] = sum over k of A[m, k] * B[k, lanes].

    ``rows`` rows of A, each found through an address in the table ``a_rows``; ``columns`` vectors of B and C. Strides
    count floats.
    """
    i = types.int64

    @_define(types.void, i, i, i, i, i, i)
    def outer(builder: Any, a_rows: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, count: Any) -> None:
        acc = _accumulators(builder, rows, columns)
        a = [builder.load(_at(builder, a_rows, _i64(m), _i64)) for m in range(rows)]
        for m in range(rows):
            for n in range(columns):
                builder.store(_const(0.0), acc[m][n])
        with cgutils.for_range(builder, count) as loop:
            k = loop.index
            at = builder.mul(k, b_stride)
            right = [
                builder.load(_at(builder, b, builder.add(at, _i64(n * LANES)), _f32, _vec), align=4)
                for n in range(columns)
            ]
            for m in range(rows):
                left = _splat(builder, builder.load(_at(builder, a[m], k, _f32)))
                for n in range(columns):
                    total = _call(builder, f"llvm.fma.v{LANES}f32", left, right[n], builder.load(acc[m][n]))
                    builder.store(total, acc[m][n])
        for m in range(rows):
            for n in range(columns):
                index = builder.add(builder.mul(_i64(m), c_stride), _i64(n * LANES))
                builder.store(builder.load(acc[m][n]), _at(builder, c, index, _f32, _vec), align=4)

    return outer


def make_mix(rows: int, columns: int) -> Any:
    """``mix(p, p_row, p_key, b_rows, offset, c, c_stride, alphas, count)``: C[m, lanes] = C * alphas[m] + sum over k
    of P[m, k] * B[k, offset + lanes].

    P's element stands at ``m * p_row + k * p_key``; row k of B is found through an address in the table ``b_rows``.
    """
    i = types.int64

    @_define(types.void, i, i, i, i, i, i, i, i, i)
    def mix(
        builder: Any, p: Any, p_row: Any, p_key: Any, b_rows: Any, offset: Any, c: Any, c_stride: Any, alphas: Any,
        count: Any,
    ) -> None:  # fmt: skip
        acc = _accumulators(builder, rows, columns)
        targets = []
        for m in range(rows):
            alpha = _splat(builder, builder.load(_at(builder, alphas, _i64(m), _f32)))
            for n in range(columns):
                index = builder.add(builder.add(builder.mul(_i64(m), c_stride), offset), _i64(n * LANES))
                targets.append(_at(builder, c, index, _f32, _vec))
                builder.store(builder.fmul(builder.load(targets[-1], align=4), alpha), acc[m][n])
        with cgutils.for_range(builder, count) as loop:
            k = loop.index
            row = builder.load(_at(builder, b_rows, k, _i64))
            right = [
                builder.load(_at(builder, row, builder.add(offset, _i64(n * LANES)), _f32, _vec), align=4)
                for n in range(columns)
            ]
            at = builder.mul(k, p_key)
            for m in range(rows):
                index = builder.add(at, builder.mul(_i64(m), p_row))
                left = _splat(builder, builder.load(_at(builder, p, index, _f32)))
                for n in range(columns):
                    total = _call(builder, f"llvm.fma.v{LANES}f32", left, right[n], builder.load(acc[m][n]))
                    builder.store(total, acc[m][n])
        for m in range(rows):
            for n in range(columns):
                builder.store(builder.load(acc[m][n]), targets[m * columns + n], align=4)

    return mix


@_define(vector, types.int64, types.int64, types.int64)
def dots(builder: Any, rows: Any, x: Any, chunks: Any) -> Any:
    """One dot product a lane: x with each of LANES rows, found through the address table ``rows``; ``chunks`` vectors
    long."""
    acc = _accumulators(builder, LANES, 1)
    for m in range(LANES):
        builder.store(_const(0.0), acc[m][0])

    def add(first: Any, width: int) -> None:
        at = [builder.mul(builder.add(first, _i64(n)), _i64(LANES)) for n in range(width)]
        right = [builder.load(_at(builder, x, index, _f32, _vec), align=4) for index in at]
        for m in range(LANES):
            row = builder.load(_at(builder, rows, _i64(m), _i64))
            total = builder.load(acc[m][0])
            for n in range(width):
                left = builder.load(_at(builder, row, at[n], _f32, _vec), align=4)
                total = _call(builder, f"llvm.fma.v{LANES}f32", left, right[n], total)
            builder.store(total, acc[m][0])

    fours = builder.lshr(chunks, _i64(2))
    with cgutils.for_range(builder, fours) as loop:
        add(builder.shl(loop.index, _i64(2)), 4)
    done = builder.shl(fours, _i64(2))
    with cgutils.for_range(builder, builder.sub(chunks, done)) as loop:
        add(builder.add(done, loop.index), 1)
    return _sum_each(builder, [builder.load(acc[m][0]) for m in range(LANES)])


def _sum_each(builder: Any, vectors: list[Any]) -> Any:
    """The sum of each of LANES vectors, in the lane of its number. At each level, two vectors whose numbers differ in
    one bit meet in one: lanes that have the bit clear keep the first's, the others the second's."""
    bit = 1
    while len(vectors) > 1:
        keep = [lane + LANES if lane & bit else lane for lane in range(LANES)]
        cross = [(lane ^ bit) + LANES if lane & bit else lane ^ bit for lane in range(LANES)]
        vectors = [
            builder.fadd(
                builder.shuffle_vector(one, other, ir.Constant(_ivec, keep)),
                builder.shuffle_vector(one, other, ir.Constant(_ivec, cross)),
            )
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        bit *= 2
    return vectors[0]


# ---- numbers of a dtype that is known only when the kernel runs ---------------------------------------------------


@inline
def size_of(dtype):
    """Bytes of one number, or code."""
    return 4 if dtype == F32 else 2 if dtype in (BF16, F16) else 1


@inline
def load_float(address, index, dtype):
    if dtype == F32:
        return load_f32(address, index)
    return load_bf16(address, index) if dtype == BF16 else load_f16(address, index)


@inline
def vload_float(address, index, dtype):
    if dtype == F32:
        return vload(address, index)
    return vload_bf16(address, index) if dtype == BF16 else vload_f16(address, index)


@inline
def store_float(address, index, dtype, value):
    if dtype == F32:
        store_f32(address, index, value)
    elif dtype == BF16:
        store_bf16(address, index, value)
    else:
        store_f16(address, index, value)


@inline
def vstore_float(address, index, dtype, value):
    if dtype == F32:
        vstore(address, index, value)
    elif dtype == BF16:
        vstore_bf16(address, index, value)
    else:
        vstore_f16(address, index, value)
