"""Helpers for numba kernels: raw memory of all dtypes, and atomics.

Addresses are int64. Indices count elements of the type in the helper's name.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from paged_kernels.cpu.intrinsics import (
    BF16,
    F16,
    F32,
    HAS_F16,
    LANES,
    define,
    element_at,
    f32,
    i32,
    i64,
    iconst,
    inline,
    ivec,
    round_bf16,
    vec,
    vector,
)

_i8, _i16 = ir.IntType(8), ir.IntType(16)
_svec = ir.VectorType(_i16, LANES)
_half, _hvec = ir.HalfType(), ir.VectorType(ir.HalfType(), LANES)


@define(types.int64, types.int64, types.int64)
def load_i64(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(element_at(builder, address, index, i64))


@define(types.int64, types.int64, types.int64)
def load_i32(builder: Any, address: Any, index: Any) -> Any:
    return builder.sext(builder.load(element_at(builder, address, index, i32)), i64)


@define(types.float32, types.int64, types.int64)
def load_f32(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(element_at(builder, address, index, f32))


@define(types.float32, types.int64, types.int64)
def load_bf16(builder: Any, address: Any, index: Any) -> Any:
    half = builder.load(element_at(builder, address, index, _i16))
    return builder.bitcast(builder.shl(builder.zext(half, i32), i32(16)), f32)


@define(types.float32, types.int64, types.int64)
def load_f16(builder: Any, address: Any, index: Any) -> Any:
    return _widened(builder, builder.load(element_at(builder, address, index, _half)), f32)


@define(types.void, types.int64, types.int64, types.int64)
def store_i64(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, element_at(builder, address, index, i64))


@define(types.void, types.int64, types.int64, types.int64)
def store_i32(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(builder.trunc(value, i32), element_at(builder, address, index, i32))


@define(types.void, types.int64, types.int64, types.float32)
def store_f32(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, element_at(builder, address, index, f32))


@define(types.void, types.int64, types.int64, types.float32)
def store_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    bits = round_bf16(builder, value, builder.bitcast(value, i32), i32)
    builder.store(builder.trunc(bits, _i16), element_at(builder, address, index, _i16))


@define(types.void, types.int64, types.int64, types.float32)
def store_f16(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(_narrowed(builder, value, _half), element_at(builder, address, index, _half))


@define(vector, types.int64, types.int64)
def vload(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(element_at(builder, address, index, f32, vec), align=4)


@define(types.void, types.int64, types.int64, vector)
def vstore(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(value, element_at(builder, address, index, f32, vec), align=4)


@define(vector, types.int64, types.int64)
def vload_bf16(builder: Any, address: Any, index: Any) -> Any:
    halves = builder.load(element_at(builder, address, index, _i16, _svec), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, ivec), iconst(16)), vec)


@define(types.void, types.int64, types.int64, vector)
def vstore_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    bits = round_bf16(builder, value, builder.bitcast(value, ivec), ivec)
    target = element_at(builder, address, index, _i16, _svec)
    builder.store(builder.trunc(bits, _svec), target, align=2)


@define(vector, types.int64, types.int64)
def vload_f16(builder: Any, address: Any, index: Any) -> Any:
    return _widened(builder, builder.load(element_at(builder, address, index, _half, _hvec), align=2), vec)


@define(types.void, types.int64, types.int64, vector)
def vstore_f16(builder: Any, address: Any, index: Any, value: Any) -> None:
    builder.store(_narrowed(builder, value, _hvec), element_at(builder, address, index, _half, _hvec), align=2)


def _widened(builder: Any, value: Any, kind: Any) -> Any:
    return builder.fpext(value, kind) if HAS_F16 else ir.Constant(kind, ir.Undefined)


def _narrowed(builder: Any, value: Any, kind: Any) -> Any:
    return builder.fptrunc(value, kind) if HAS_F16 else ir.Constant(kind, ir.Undefined)


@define(vector, vector)
def vround_bf16(builder: Any, value: Any) -> Any:
    """Return the numbers that bfloat16 would keep."""
    bits = round_bf16(builder, value, builder.bitcast(value, ivec), ivec)
    return builder.bitcast(builder.shl(bits, iconst(16)), vec)


@define(types.void, types.int64, types.int64)
def prefetch(builder: Any, address: Any, offset_bytes: Any) -> None:
    byte = _i8.as_pointer()
    pointer = builder.inttoptr(builder.add(address, offset_bytes), byte)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, i32(0), i32(3), i32(1)])


# ---- threads ---------------------------------------------------------------------------------------------------


@define(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at address atomically. Returns the value before."""
    return builder.atomic_rmw("add", builder.inttoptr(address, i64.as_pointer()), amount, "acq_rel")


@define(types.int64, types.int64)
def load_shared(builder: Any, address: Any) -> Any:
    """Read the int64 at address. Everything written before that value is then visible too."""
    return builder.load_atomic(builder.inttoptr(address, i64.as_pointer()), "acquire", 8)


@define(types.void, types.int64, types.int64)
def store_shared(builder: Any, address: Any, value: Any) -> None:
    """Write the int64 at address. Threads that see it also see everything written before it."""
    builder.store_atomic(value, builder.inttoptr(address, i64.as_pointer()), "release", 8)


# ---- numbers whose dtype is known only at run time ----------------------------------------------------------------


@inline
def size_of(dtype):
    """Return the bytes of one number or code."""
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
