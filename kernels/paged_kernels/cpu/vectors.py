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


@_define(types.void, types.int64, types.int64)
def store_shared(builder: Any, address: Any, value: Any) -> None:
    """Write the int64 at address, for others to see after all that was written before."""
    builder.store_atomic(value, builder.inttoptr(address, _i64.as_pointer()), "release", 8)


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
