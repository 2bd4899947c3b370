"""Helpers for numba kernels: int8 and float8 (e4m3) codes of one byte, and the numbers that they mean.

A code is a number divided by the scale of its row, rounded half to even. This file does not know what a row is, nor
where scales are kept. e4m3 is decoded and encoded with integer instructions, because few processors support it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from paged_kernels.cpu.intrinsics import LANES, const, define, element_at, f32, i32, iconst, ivec, vec, vector
from paged_kernels.cpu.vectors import _fold

INT8, FP8 = 2, 3  # dtype codes, besides F32, BF16 and F16 in intrinsics.py

_i8 = ir.IntType(8)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_LEAST = 2.0**-6  # e4m3's smallest normal number; smaller ones have steps of 2**-9


class _Width(NamedTuple):
    """The LLVM types and constants for one number, or for a vector."""

    floats: Any
    ints: Any
    bytes: Any
    number: Any
    integer: Any


_ONE = _Width(f32, i32, _i8, lambda x: ir.Constant(f32, x), i32)
_MANY = _Width(vec, ivec, ir.VectorType(_i8, LANES), const, iconst)


def _load(builder: Any, address: Any, index: Any, width: _Width) -> Any:
    return builder.load(element_at(builder, address, index, _i8, width.bytes), align=1)


def _store(builder: Any, address: Any, index: Any, code: Any, width: _Width) -> None:
    builder.store(builder.trunc(code, width.bytes), element_at(builder, address, index, _i8, width.bytes), align=1)


def _bounded(builder: Any, y: Any, largest: float, width: _Width) -> Any:
    """Limit y to -largest .. largest; NaN becomes 0."""
    low, high = width.number(-largest), width.number(largest)
    y = builder.select(builder.fcmp_unordered("uno", y, y), width.number(0.0), y)
    y = builder.select(builder.fcmp_ordered("olt", y, low), low, y)
    return builder.select(builder.fcmp_ordered("olt", high, y), high, y)


def _from_int8(builder: Any, code: Any, width: _Width) -> Any:
    return builder.sitofp(builder.sext(code, width.ints), width.floats)


def _to_int8(builder: Any, y: Any, width: _Width) -> Any:
    y = _bounded(builder, y, 127.0, width)
    return builder.bitcast(builder.fadd(y, width.number(_ROUND)), width.ints)


def _from_fp8(builder: Any, code: Any, width: _Width) -> Any:
    """Move exponent and mantissa to their places in a float32. Numbers below the smallest normal one get a leading one,
    which is subtracted again."""
    n, code = width.integer, builder.zext(code, width.ints)
    size = builder.and_(code, n(0x7F))
    shifted = builder.shl(size, n(20))
    normal = builder.add(shifted, n(120 << 23))
    lent = builder.bitcast(builder.add(shifted, n(121 << 23)), width.floats)
    small = builder.bitcast(builder.fsub(lent, width.number(_LEAST)), width.ints)
    bits = builder.select(builder.icmp_unsigned("<", size, n(8)), small, normal)
    sign = builder.shl(builder.and_(code, n(0x80)), n(24))
    return builder.bitcast(builder.or_(bits, sign), width.floats)


def _to_fp8(builder: Any, y: Any, width: _Width) -> Any:
    n = width.integer
    bits = builder.bitcast(_bounded(builder, y, 448.0, width), width.ints)
    size = builder.and_(bits, n(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, n(20)), n(1))
    rounded = builder.lshr(builder.add(size, builder.add(odd, n(0x7FFFF))), n(20))
    normal = builder.sub(rounded, n(120 << 3))
    lifted = builder.fadd(builder.bitcast(size, width.floats), width.number(2.0**14))  # its last bit is 2**-9
    small = builder.sub(builder.bitcast(lifted, width.ints), n(141 << 23))
    code = builder.select(builder.icmp_unsigned("<", size, n(121 << 23)), small, normal)
    return builder.or_(code, builder.lshr(builder.and_(bits, n(-0x80000000)), n(24)))


@define(types.float32, types.int64, types.int64)
def load_int8(builder: Any, address: Any, index: Any) -> Any:
    return _from_int8(builder, _load(builder, address, index, _ONE), _ONE)


@define(vector, types.int64, types.int64)
def vload_int8(builder: Any, address: Any, index: Any) -> Any:
    return _from_int8(builder, _load(builder, address, index, _MANY), _MANY)


@define(types.float32, types.int64, types.int64)
def load_fp8(builder: Any, address: Any, index: Any) -> Any:
    return _from_fp8(builder, _load(builder, address, index, _ONE), _ONE)


@define(vector, types.int64, types.int64)
def vload_fp8(builder: Any, address: Any, index: Any) -> Any:
    return _from_fp8(builder, _load(builder, address, index, _MANY), _MANY)


@define(types.void, types.int64, types.int64, types.float32)
def store_int8(builder: Any, address: Any, index: Any, value: Any) -> None:
    _store(builder, address, index, _to_int8(builder, value, _ONE), _ONE)


@define(types.void, types.int64, types.int64, vector)
def vstore_int8(builder: Any, address: Any, index: Any, value: Any) -> None:
    _store(builder, address, index, _to_int8(builder, value, _MANY), _MANY)


@define(types.void, types.int64, types.int64, types.float32)
def store_fp8(builder: Any, address: Any, index: Any, value: Any) -> None:
    _store(builder, address, index, _to_fp8(builder, value, _ONE), _ONE)


@define(types.void, types.int64, types.int64, vector)
def vstore_fp8(builder: Any, address: Any, index: Any, value: Any) -> None:
    _store(builder, address, index, _to_fp8(builder, value, _MANY), _MANY)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned("<", a, b), b, a)


@define(vector, vector, vector)
def vlarger(builder: Any, a: Any, b: Any) -> Any:
    """Return in each lane the magnitude of b, or ``a`` if that is larger. NaN is larger than any number."""
    size = builder.and_(builder.bitcast(b, ivec), iconst(0x7FFFFFFF))
    return builder.bitcast(_larger(builder, builder.bitcast(a, ivec), size), vec)


@define(types.float32, vector)
def hlargest(builder: Any, a: Any) -> Any:
    """Return the largest lane of magnitudes, or NaN if there is one."""
    bits = _fold(builder, builder.bitcast(a, ivec), lambda x, y: _larger(builder, x, y))
    return builder.bitcast(bits, f32)
