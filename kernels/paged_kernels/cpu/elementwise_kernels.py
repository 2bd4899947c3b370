"""The kernels of elementwise.py: norms, rotary, argmax. Each reads its input once.

They round where stock modules round: a bfloat16 result of an intermediate step is rounded before the next.
"""

from __future__ import annotations

import math
import struct

from numba import float32, int64

from paged_kernels.cpu.intrinsics import F32, LANES, inline
from paged_kernels.cpu.memory import (
    fetch_add,
    load_bf16,
    load_f32,
    load_i64,
    store_bf16,
    store_f32,
    store_i64,
    vload,
    vload_bf16,
    vround_bf16,
    vstore,
    vstore_bf16,
)
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.vectors import hmax, hsum, vadd, vfirst, vfma, vkeep_nan, vmax, vmul, vsplat, vsub

_SPAN = 1024  # logits between two comparisons with the running maximum

# The indices of arguments. The first is the rows' counter, which has its own cache line.
NEXT = 0
NUM_ROWS, NUM_THREADS, WIDTH, DTYPE = range(8, 12)
A, A_ROW, B, B_ROW, C, D, E, E_ROW = range(12, 20)  # addresses, and strides of rows in elements
EPS = 20  # float32
NUM_HEADS, A_HEAD, NUM_KV_HEADS, B_HEAD = range(20, 24)
LAYOUT = struct.Struct("24q")


@inline
def _get(address, i, dtype):
    return vload(address, i) if dtype == F32 else vload_bf16(address, i)


@inline
def _put(address, i, dtype, x):
    if dtype == F32:
        vstore(address, i, x)
    else:
        vstore_bf16(address, i, x)


@inline
def _get1(address, i, dtype):
    return load_f32(address, i) if dtype == F32 else load_bf16(address, i)


@inline
def _put1(address, i, dtype, x):
    if dtype == F32:
        store_f32(address, i, x)
    else:
        store_bf16(address, i, x)


@inline
def _rounded(x, dtype):
    return x if dtype == F32 else vround_bf16(x)


@inline
def _rows_at_once(args):
    """Return how many rows a thread takes at once."""
    return -(-load_i64(args, NUM_ROWS) // (4 * load_i64(args, NUM_THREADS)))


@inline
def _last(i, width):
    """Return where the vector at i must begin, so that a row's last vector ends with the row. Some numbers are then
    computed twice."""
    return min(i, width - LANES)


@inline
def _norm(x, y, weight, width, eps, dtype):
    """Compute one row: y = round(x / rms(x)) * weight."""
    s0, s1 = vsplat(float32(0.0)), vsplat(float32(0.0))
    whole = width // (2 * LANES) * (2 * LANES)
    for i in range(0, whole, 2 * LANES):
        a, b = _get(x, i, dtype), _get(x, i + LANES, dtype)
        s0, s1 = vfma(a, a, s0), vfma(b, b, s1)
    total = hsum(vadd(s0, s1))
    for i in range(whole, width):
        one = _get1(x, i, dtype)
        total += one * one
    factor = vsplat(float32(1.0) / float32(math.sqrt(total / float32(width) + eps)))
    for i in range(0, width, LANES):
        at = _last(i, width)
        normed = _rounded(vmul(_get(x, at, dtype), factor), dtype)
        _put(y, at, dtype, vmul(_get(weight, at, dtype), normed))


@kernel
def rms_norm_kernel(args):
    """Norm the rows of A into B, with weight C."""
    width, dtype, num_rows = load_i64(args, WIDTH), load_i64(args, DTYPE), load_i64(args, NUM_ROWS)
    grab = _rows_at_once(args)
    size = 4 if dtype == F32 else 2
    while True:
        first = fetch_add(args, 1) * grab
        if first >= num_rows:
            break
        for row in range(first, min(num_rows, first + grab)):
            x = load_i64(args, A) + row * load_i64(args, A_ROW) * size
            y = load_i64(args, B) + row * width * size
            _norm(x, y, load_i64(args, C), width, load_f32(args, 2 * EPS), dtype)


@inline
def _turn(x, cos, sin, half, dtype):
    """Rotate one head: each number of the first half with its partner in the second half."""
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        a, b = _get(x, i, dtype), _get(x, half + i, dtype)
        low = vsub(_rounded(vmul(a, _get(cos, i, dtype)), dtype), _rounded(vmul(b, _get(sin, i, dtype)), dtype))
        high = vadd(
            _rounded(vmul(b, _get(cos, half + i, dtype)), dtype),
            _rounded(vmul(a, _get(sin, half + i, dtype)), dtype),
        )
        _put(x, i, dtype, low)
        _put(x, half + i, dtype, high)
    for i in range(whole, half):
        a, b = vsplat(_get1(x, i, dtype)), vsplat(_get1(x, half + i, dtype))
        c, s = vsplat(_get1(cos, i, dtype)), vsplat(_get1(sin, i, dtype))
        c2, s2 = vsplat(_get1(cos, half + i, dtype)), vsplat(_get1(sin, half + i, dtype))
        _put1(x, i, dtype, vfirst(vsub(_rounded(vmul(a, c), dtype), _rounded(vmul(b, s), dtype))))
        _put1(x, half + i, dtype, vfirst(vadd(_rounded(vmul(b, c2), dtype), _rounded(vmul(a, s2), dtype))))


@kernel
def rotary_kernel(args):
    """Rotate A (q) and B (k) in place, by cos D and sin E. WIDTH is the rotary dim."""
    half, dtype, num_rows = load_i64(args, WIDTH) // 2, load_i64(args, DTYPE), load_i64(args, NUM_ROWS)
    grab = _rows_at_once(args)
    size = 4 if dtype == F32 else 2
    while True:
        first = fetch_add(args, 1) * grab
        if first >= num_rows:
            break
        for row in range(first, min(num_rows, first + grab)):
            cos = load_i64(args, D) + row * 2 * half * size
            sin = load_i64(args, E) + row * 2 * half * size
            q = load_i64(args, A) + row * load_i64(args, A_ROW) * size
            for head in range(load_i64(args, NUM_HEADS)):
                _turn(q + head * load_i64(args, A_HEAD) * size, cos, sin, half, dtype)
            k = load_i64(args, B) + row * load_i64(args, B_ROW) * size
            for head in range(load_i64(args, NUM_KV_HEADS)):
                _turn(k + head * load_i64(args, B_HEAD) * size, cos, sin, half, dtype)


@kernel
def argmax_rows_kernel(args):
    """Write the indices of A's rows to B, their maxima to C."""
    width, dtype, num_rows = load_i64(args, WIDTH), load_i64(args, DTYPE), load_i64(args, NUM_ROWS)
    size = 4 if dtype == F32 else 2
    lowest = vsplat(float32(-math.inf))
    while True:
        row = fetch_add(args, 1)
        if row >= num_rows:
            break
        x = load_i64(args, A) + row * load_i64(args, A_ROW) * size
        best, span = float32(-math.inf), int64(0)
        nans = vsplat(float32(0.0))
        for start in range(0, width, _SPAN):
            m0, m1 = lowest, lowest
            for i in range(start, min(width, start + _SPAN), 2 * LANES):
                a, b = _get(x, _last(i, width), dtype), _get(x, _last(i + LANES, width), dtype)
                m0, m1 = vmax(m0, a), vmax(m1, b)
                nans = vkeep_nan(vkeep_nan(nans, a), b)
            m = hmax(vmax(m0, m1))
            if m > best:
                best, span = m, start
        has_nan = math.isnan(hsum(nans))
        index = int64(0) if has_nan else span
        while index < width - 1:
            value = _get1(x, index, dtype)
            if math.isnan(value) if has_nan else value == best:
                break
            index += 1
        store_i64(load_i64(args, B), row, index)
        store_f32(load_i64(args, C), row, float32(math.nan) if has_nan else best)
