"""Helpers for numba kernels that use AVX-512 BF16. Results that become bfloat16 are computed less exactly, and
faster."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from paged_kernels.cpu.finish import Words
from paged_kernels.cpu.intrinsics import const, define, element_at, vector


class BFloat:
    """LLVM's bfloat, which llvmlite lacks: the part of it that a vector type needs."""

    def __str__(self) -> str:
        return "bfloat"


_i16, _i32 = ir.IntType(16), ir.IntType(32)
_words, _floats, _halves = ir.VectorType(_i32, 16), ir.VectorType(ir.FloatType(), 16), ir.VectorType(_i16, 16)
_bfloats = ir.VectorType(BFloat(), 16) if llvm.llvm_version_info >= (16,) else _halves

# The coefficients of 2**f on [-0.5, 0.5]. They minimise the largest relative error, which is 2.6e-6; rounding to
# bfloat16 costs up to 4e-3.
_EXP2 = (0.99999926, 0.69312181, 0.24024745, 0.05591786, 0.0095701)
_LOG2E = 1.4426950408889634
# Constants for AVX-512 instructions: round to the nearest integer; all lanes; the processor's current rounding mode.
_NEAREST, _EVERY, _DEFAULT = _i32(0), _i16(-1), _i32(4)
_ANYTHING = ir.Constant(_floats, ir.Undefined)


def _intrinsic(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _of_avx512(b: Any, name: str, *args: Any) -> Any:
    return _intrinsic(b, f"llvm.x86.avx512.{name}.512", _floats, *args)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _intrinsic(b, "llvm.fma.v16f32", _floats, x, y, z)


def _exp2(b: Any, x: Any) -> Any:
    f = _of_avx512(b, "mask.reduce.ps", x, _NEAREST, _ANYTHING, _EVERY, _DEFAULT)  # 0 for infinity
    total = const(_EXP2[-1])
    for c in reversed(_EXP2[:-1]):
        total = _fma(b, total, f, const(c))
    return _of_avx512(b, "mask.scalef.ps", total, b.fsub(x, f), _ANYTHING, _EVERY, _DEFAULT)


def _rounded(b: Any, x: Any) -> Any:
    return b.bitcast(_intrinsic(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", _bfloats, x), _halves)


@define(vector, vector)
def vexp2_for_bf16(b: Any, x: Any) -> Any:
    """Return 2**x to about 3e-6, for x <= 0 (the result may be denormal); 0 for -inf, NaN for NaN."""
    return _exp2(b, x)


@define(vector, vector)
def vsilu_for_bf16(b: Any, x: Any) -> Any:
    """Return x / (1 + exp(-x)) to about 3e-6; NaN for NaN, and NaN for -inf, as torch does."""
    power = b.fmul(x, const(-_LOG2E))
    top = const(126.0)
    power = b.select(b.fcmp_ordered("ogt", power, top), top, power)
    below = b.fadd(const(1.0), _exp2(b, power))
    guess = _of_avx512(b, "rcp14.ps", below, _ANYTHING, _EVERY)
    error = _fma(b, b.fneg(below), guess, const(1.0))
    return b.fmul(x, _fma(b, guess, error, guess))


@define(types.void, types.int64, types.int64, vector)
def vstore_as_bf16(b: Any, address: Any, index: Any, value: Any) -> None:
    """Round by the processor's own instruction, which treats denormal numbers as zero, and store."""
    b.store(_rounded(b, value), element_at(b, address, index, _i16, _halves), align=2)


@define(vector, vector)
def vround_as_bf16(b: Any, value: Any) -> Any:
    """Return the numbers that vstore_as_bf16 would store."""
    return b.bitcast(b.shl(b.zext(_rounded(b, value), _words), ir.Constant(_words, [16] * 16)), _floats)


OF_BF16 = Words(vstore_as_bf16, vround_as_bf16, vsilu_for_bf16)
