"""The base of helpers for numba kernels: a numba type for a vector of the host's width, and a way to make LLVM's
instructions callable from kernels.

This file knows LLVM, and nothing of memory or attention.
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

F32, BF16, F16 = 0, 1, 4  # dtype codes for kernels; for 2 and 3 see codes.py
HAS_F16 = bool(_FEATURES.get("f16c")) or platform.machine().lower() not in ("x86_64", "amd64")
"""Whether the host has instructions to convert float16. If not, the float16 helpers exist, but must not be used."""

i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
vec, ivec = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)

inline = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles a helper that only kernels can call: making it callable from Python would take a seventh of the compile
time. There is no fast-math: sums keep their order, and NaN and infinity their meaning."""


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"vector{LANES}")


vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, vec)


def define(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
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


def element_at(builder: Any, address: Any, index: Any, element: Any, view: Any = None) -> Any:
    """Return a pointer to ``element`` number ``index`` after ``address``, cast to ``view``."""
    base = builder.inttoptr(address, element.as_pointer())
    pointer = builder.gep(base, [index])
    return builder.bitcast(pointer, view.as_pointer()) if view is not None else pointer


def call_llvm(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(args[0].type, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, args)


def splat(builder: Any, scalar: Any) -> Any:
    kind = ir.VectorType(scalar.type, LANES)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, i32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(ivec, [0] * LANES))


def const(value: float) -> Any:
    return ir.Constant(vec, [ir.Constant(f32, value)] * LANES)


def iconst(value: int) -> Any:
    return ir.Constant(ivec, [value] * LANES)


def round_bf16(builder: Any, value: Any, bits: Any, kind: Any) -> Any:
    """Return the bfloat16 nearest to ``value`` (ties to even) in the low half; NaN stays NaN."""
    constant = (lambda n: iconst(n)) if kind is ivec else (lambda n: i32(n))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, constant(0x7FC0), rounded)
