"""bfloat16 products by AMX's ``tdpbf16ps``: one instruction multiplies 16 rows of x and 16 columns of weights over 32
steps of k.

Weights are packed as pairs of neighbours in K, 32 columns side by side. The rows of x are divided into groups of up to
32 rows, whose sizes differ by at most one, and each group into two halves that may overlap. So all halves of a launch
have one size, and no row beyond x is read. A sum starts from the bias and runs over k in order, 32 at a time; within
these, the even ones and the odd ones are summed first. The instruction has that order for any number of rows. It treats
denormal numbers as zero, in its sums too.

A thread configures its tiles at its start and releases them at its end. The process must have asked Linux for
permission to use them (host.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paged_kernels.cpu.bf16_words import OF_BF16
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.memory import load_i64, store_i64
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.passes import emit_prefetch
from paged_kernels.cpu.product import LINE, NUM_ROWS, Product, make_compute, scratch_bytes

TILE = 32  # output columns
MOST_ROWS = 256  # rows of a block
GROUP = 32  # rows of x in the tile registers at once
PAIRS = 16  # pairs of k in one step
STEP_BYTES = PAIRS * TILE * 4  # bytes of weights in one step
# Steps that all groups take before the next part. The weights of so many steps, and a group's x, stay in the nearest
# cache.
PART = 6
# With a single group: prefetched weights are this many bytes ahead of those being multiplied.
AHEAD = 4096

# Tile registers: sums of both halves of a group with both halves of the columns; rows of x; weights.
SUMS, X, W = ((0, 1), (2, 3)), (4, 5), (6, 7)

_i8, _i64 = ir.IntType(8), ir.IntType(64)
_byte = _i8.as_pointer()


def call(b: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), args)


def move(b: Any, name: str, register: int, address: Any, stride: Any) -> None:
    call(b, name, _i8(register), b.inttoptr(address, _byte), stride)


def emit_group(halves: int, num_prefetches: int, b: Any, args: Any) -> None:
    """Emit ``y = start + x @ w`` for one or two halves of a group and one tile. ``down``: the distance in rows from the
    first half to the second. Arguments are addresses; strides are in bytes. Each step prefetches lines from ``ahead``
    on."""
    x, x_stride, w, count, y, y_stride, start, start_stride, down, ahead = args
    cells = [(h, c) for h in range(halves) for c in range(2)]

    def cell(base: Any, stride: Any, h: int, c: int) -> Any:
        return b.add(b.add(base, b.mul(b.mul(stride, down), _i64(h))), _i64(c * LINE))

    for h, c in cells:
        move(b, "tileloadd64", SUMS[h][c], cell(start, start_stride, h, c), start_stride)
    with cgutils.for_range(b, count) as loop:
        rows = b.add(x, b.mul(loop.index, _i64(LINE)))
        done = b.mul(loop.index, _i64(STEP_BYTES))
        for c in range(2):
            move(b, "tileloadd64", W[c], b.add(b.add(w, done), _i64(c * LINE)), _i64(TILE * 4))
        for h in range(halves):
            move(b, "tileloadd64", X[h], cell(rows, x_stride, h, 0), x_stride)
        for h, c in cells:
            call(b, "tdpbf16ps", _i8(SUMS[h][c]), _i8(X[h]), _i8(W[c]))
        for n in range(num_prefetches):
            emit_prefetch(b, b.add(b.add(ahead, done), _i64(n * LINE)))
    for h, c in cells:
        move(b, "tilestored64", SUMS[h][c], cell(y, y_stride, h, c), y_stride)


def _make_group(halves: int, num_prefetches: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_group(halves, num_prefetches, builder, args)
        return context.get_dummy_value()

    @intrinsic
    def group(typingctx, x, x_stride, w, count, y, y_stride, start, start_stride, down, ahead):
        return types.void(*[types.int64] * 10), codegen

    return group


def _word(emit: Callable[..., None], *kinds: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, *args)
        return context.get_dummy_value()

    if kinds:
        return intrinsic(lambda typingctx, a: (types.void(*kinds), codegen))
    return intrinsic(lambda typingctx: (types.void(), codegen))


load_config = _word(lambda b, address: call(b, "ldtilecfg", b.inttoptr(address, _byte)), types.int64)
release = _word(lambda b: call(b, "tilerelease"))
_LINES = STEP_BYTES // LINE
_one, _two = _make_group(1, _LINES), _make_group(2, _LINES)
_two_of_two, _two_of_more = _make_group(2, _LINES // 2), _make_group(2, 0)


@inline
def half_of(total_rows):
    """Return the number of rows of each half, which is the same in the whole launch."""
    if total_rows <= GROUP // 2:
        return total_rows
    largest = -(-total_rows // -(-total_rows // GROUP))
    return -(-largest // 2)


@inline
def _begin(args, config):
    """Configure the tiles with 64 bytes in each row. Tiles for sums and x have a half's rows, those for weights 16."""
    for word in range(8):
        store_i64(config, word, 0)
    store_i64(config, 0, 1)
    store_i64(config, 2, 0x0040004000400040)
    store_i64(config, 3, 0x0040004000400040)
    store_i64(config, 6, 0x1010000000000000 + half_of(load_i64(args, NUM_ROWS)) * 0x010101010101)
    load_config(config)


@inline
def _end():
    release()


@inline
def _tile(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch):
    count, half = depth // PAIRS, half_of(load_i64(args, NUM_ROWS))
    num_groups = -(-num_rows // GROUP)
    num_parts = 1 if num_groups == 1 else -(-count // PART)
    for part in range(num_parts):
        first = count * part // num_parts
        steps = count * (part + 1) // num_parts - first
        xp, wp = x + first * LINE, w + first * STEP_BYTES
        for group in range(num_groups):
            row = num_rows * group // num_groups
            rows = num_rows * (group + 1) // num_groups - row
            xr, yr, br = xp + row * x_stride, y + 4 * row * y_stride, bias + 4 * row * bias_stride
            stride = 4 * y_stride
            start, start_stride = (br, 4 * bias_stride) if part == 0 else (yr, stride)
            ahead = wp + AHEAD if num_groups == 1 else wp + steps * STEP_BYTES + group * STEP_BYTES // 2
            if rows == half:
                _one(xr, x_stride, wp, steps, yr, stride, start, start_stride, 0, ahead)
            elif num_groups == 1:
                _two(xr, x_stride, wp, steps, yr, stride, start, start_stride, rows - half, ahead)
            elif group < 2:  # the first two groups prefetch a half of the next part each
                _two_of_two(xr, x_stride, wp, steps, yr, stride, start, start_stride, rows - half, ahead)
            else:
                _two_of_more(xr, x_stride, wp, steps, yr, stride, start, start_stride, rows - half, ahead)


_compute = make_compute(_tile, TILE, GROUP, True, _begin, _end, MOST_ROWS, OF_BF16)


@kernel
def product_amx_bf16(args):
    _compute(args)


AMX = Product(
    "amx_bf16",
    product_amx_bf16,
    TILE,
    torch.bfloat16,
    torch.bfloat16,
    32,
    torch.int32,
    scratch_bytes(TILE, MOST_ROWS) + LINE,
)
