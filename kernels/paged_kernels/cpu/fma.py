"""Products by float32's fused multiply-add, for float32 weights, and for bfloat16 weights that are widened first.

Every host has this instruction. Each sum starts from the bias and runs over k in order, stretch by stretch.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils

from paged_kernels.cpu.intrinsics import LANES, inline
from paged_kernels.cpu.memory import vload_bf16, vstore
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.passes import KStep, emit_splat, make_passes
from paged_kernels.cpu.product import Product, make_compute, scratch_bytes

ROWS = 8 if LANES == 16 else 4
STRETCH = 192  # steps of k that all rows use before the next are read; their weights stay in the nearest cache

_f32, _i16, _i32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)
_vector, _ints, _shorts = (ir.VectorType(kind, LANES) for kind in (_f32, _i32, _i16))


def _load_f32(b: Any, pointer: Any) -> list[Any]:
    return [b.load(b.bitcast(pointer, _vector.as_pointer()), align=4)]


def _load_bf16(b: Any, pointer: Any) -> list[Any]:
    halves = b.load(b.bitcast(pointer, _shorts.as_pointer()), align=2)
    return [b.bitcast(b.shl(b.zext(halves, _ints), ir.Constant(_ints, [16] * LANES)), _vector)]


def _spread(b: Any, pointer: Any) -> Any:
    return emit_splat(b, b.load(b.bitcast(pointer, _f32.as_pointer())), LANES)


def _add(b: Any, x: Any, weights: Any, sums: Any) -> Any:
    kind = ir.FunctionType(_vector, [_vector] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, weights, sums])


STEP = KStep(LANES, ROWS, 4, _load_f32, _spread, _add)
_STEP_BF16 = KStep(LANES, ROWS, 2, _load_bf16, _spread, _add)
TILE = STEP.columns
_passes_f32, _passes_bf16 = make_passes(STEP), make_passes(_STEP_BF16)


@inline
def _tile_f32(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch):
    start, start_stride = bias, bias_stride
    for k in range(0, depth, STRETCH):
        count = min(STRETCH, depth - k)
        ahead = w + 4 * count * TILE
        _passes_f32(x + 4 * k, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead, 0)
        start, start_stride, w = y, y_stride, ahead


@inline
def _tile_bf16(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch):
    """Do the same as _tile_f32. If many rows use a stretch, it is widened to float32 once, into scratch memory."""
    start, start_stride = bias, bias_stride
    for k in range(0, depth, STRETCH):
        count = min(STRETCH, depth - k)
        ahead = w + 2 * count * TILE
        if num_rows <= 2 * ROWS:
            _passes_bf16(x + 4 * k, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead, 0)
        else:
            for i in range(0, count * TILE, LANES):
                vstore(scratch, i, vload_bf16(w, i))
            _passes_f32(x + 4 * k, x_stride, scratch, count, num_rows, y, y_stride, start, start_stride, ahead, 0)
        start, start_stride, w = y, y_stride, ahead


_compute_f32 = make_compute(_tile_f32, TILE, ROWS, False)
_compute_bf16 = make_compute(_tile_bf16, TILE, ROWS, False)


@kernel
def product_f32(args):
    _compute_f32(args)


@kernel
def product_bf16(args):
    _compute_bf16(args)


FLOAT32 = Product("fma", product_f32, TILE, torch.float32, torch.float32, 1, torch.float32, scratch_bytes(TILE))
WIDENED = Product(
    "fma", product_bf16, TILE, torch.bfloat16, torch.float32, 1, torch.bfloat16,
    scratch_bytes(TILE) + 4 * STRETCH * TILE,
)  # fmt: skip
