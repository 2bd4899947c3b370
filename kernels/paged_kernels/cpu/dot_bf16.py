"""bfloat16 products by AVX-512's ``vdpbf16ps``: two products and two additions in each lane of a float32 sum.

Weights are packed as pairs of neighbours in K. x is bfloat16, and one of its pairs is copied to all lanes of a vector.
Each sum starts from the bias and runs over the pairs of k in order, stretch by stretch. The instruction treats denormal
numbers as zero, in its sums too, whatever the processor's modes are.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba.core import cgutils

from paged_kernels.cpu.bf16_words import OF_BF16, BFloat
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.passes import KStep, emit_splat, make_passes
from paged_kernels.cpu.product import Product, make_compute, scratch_bytes

LANES = 16  # of this instruction, whatever the vector width of other kernels
ROWS = 8
STRETCH = 96  # pairs that all rows use before the next


_i32 = ir.IntType(32)
_sums, _ints = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_i32, LANES)
# the type of the intrinsic's operands
_pairs = ir.VectorType(BFloat(), 2 * LANES) if llvm.llvm_version_info >= (16,) else _ints


def _load(b: Any, pointer: Any) -> list[Any]:
    return [b.bitcast(b.load(b.bitcast(pointer, _ints.as_pointer()), align=4), _pairs)]


def _spread(b: Any, pointer: Any) -> Any:
    pair = b.load(b.bitcast(pointer, _i32.as_pointer()), align=2)
    return b.bitcast(emit_splat(b, pair, LANES), _pairs)


def _add(b: Any, x: Any, weights: Any, sums: Any) -> Any:
    kind = ir.FunctionType(_sums, [_sums, _pairs, _pairs])
    return b.call(
        cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), [sums, x, weights]
    )


STEP = KStep(LANES, ROWS, 4, _load, _spread, _add)
TILE = STEP.columns
_passes = make_passes(STEP)


@inline
def _tile(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch):
    start, start_stride = bias, bias_stride
    for k in range(0, depth, STRETCH):
        count = min(STRETCH, depth - k)
        ahead = w + 4 * count * TILE
        _passes(x + 4 * k, x_stride, w, count, num_rows, y, y_stride, start, start_stride, ahead, 0)
        start, start_stride, w = y, y_stride, ahead


_compute = make_compute(_tile, TILE, ROWS, False, words=OF_BF16)


@kernel
def product_dot_bf16(args):
    _compute(args)


DOT = Product(
    "avx512_bf16", product_dot_bf16, TILE, torch.bfloat16, torch.bfloat16, 2, torch.int32, scratch_bytes(TILE)
)
