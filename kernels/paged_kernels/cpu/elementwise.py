"""The small operations between products: norms, rotary, argmax. Each reads its input once.

They round where stock modules round: a bfloat16 result of an inner step is rounded before the next. The public
functions take and give torch tensors of float32 or bfloat16 and have the signatures of ``paged_kernels.reference``;
what the kernels can't take (other dtypes, rows shorter than a vector) goes to the reference.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from numba import float32, int64
from torch import Tensor

from paged_kernels import reference
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.recording import Form, spoil_recording
from paged_kernels.cpu.vectors import (
    BF16,
    F32,
    LANES,
    fetch_add,
    hmax,
    hsum,
    inline,
    load_bf16,
    load_f32,
    load_i64,
    store_bf16,
    store_f32,
    store_i64,
    vadd,
    vfirst,
    vfma,
    vkeep_nan,
    vload,
    vload_bf16,
    vmax,
    vmul,
    vround_bf16,
    vsplat,
    vstore,
    vstore_bf16,
    vsub,
)

_CODES = {torch.float32: F32, torch.bfloat16: BF16}
_ALONE_BYTES = 1 << 16  # less work than this is not worth waking another thread
_SPAN = 1024  # logits between two looks at the running maximum

# Arguments: the first is the rows' counter, alone in its cache line.
NEXT = 0
NUM_ROWS, NUM_THREADS, WIDTH, DTYPE = range(8, 12)
A, A_ROW, B, B_ROW, C, D, E, E_ROW = range(12, 20)  # addresses, and elements from row to row
EPS = 20  # float32
NUM_HEADS, A_HEAD, NUM_KV_HEADS, B_HEAD = range(20, 24)
_LAYOUT = struct.Struct("24q")


@inline
def _get(address, i, dtype):  # type: ignore[no-untyped-def]
    return vload(address, i) if dtype == F32 else vload_bf16(address, i)


@inline
def _put(address, i, dtype, x):  # type: ignore[no-untyped-def]
    if dtype == F32:
        vstore(address, i, x)
    else:
        vstore_bf16(address, i, x)


@inline
def _get1(address, i, dtype):  # type: ignore[no-untyped-def]
    return load_f32(address, i) if dtype == F32 else load_bf16(address, i)


@inline
def _put1(address, i, dtype, x):  # type: ignore[no-untyped-def]
    if dtype == F32:
        store_f32(address, i, x)
    else:
        store_bf16(address, i, x)


@inline
def _rounded(x, dtype):  # type: ignore[no-untyped-def]
    return x if dtype == F32 else vround_bf16(x)


@inline
def _rows_at_once(args):  # type: ignore[no-untyped-def]
    """How many rows a thread takes at once."""
    return -(-load_i64(args, NUM_ROWS) // (4 * load_i64(args, NUM_THREADS)))


@inline
def _last(i, width):  # type: ignore[no-untyped-def]
    """The last vector of a row ends with the row: some numbers are computed twice instead of one by one."""
    return min(i, width - LANES)


@inline
def _norm(x, y, weight, width, eps, dtype):  # type: ignore[no-untyped-def]
    """One row: y = round(x / rms(x)) * weight."""
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
def _rms_norm(args):  # type: ignore[no-untyped-def]
    """A -> B, weight C."""
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
def _turn(x, cos, sin, half, dtype):  # type: ignore[no-untyped-def]
    """One head: each number of the first half with its partner in the second."""
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
def _rotary(args):  # type: ignore[no-untyped-def]
    """A (q) and B (k) in place, by cos D and sin E; WIDTH is the rotary dim."""
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
def _argmax_rows(args):  # type: ignore[no-untyped-def]
    """A -> indices B, maxima C."""
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


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x [..., N], weight [N] -> [..., N]``: x / rms(x) in x's dtype, times weight, as Llama does it; into ``out``
    (contiguous), if that is given."""
    rows = _rows(x)
    if not _fits(rows, weight):
        spoil_recording()
        normed = reference.rms_norm(x, weight, eps)
        return normed if out is None else out.copy_(normed)
    if rows.data_ptr() != x.data_ptr():
        spoil_recording()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    _run(_rms_norm, rows, a=rows, b=out, c=weight, eps=eps)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``q [T,H,D], k [T,K,D]`` in place by ``cos, sin [T,rotary_dim]``: first half with second half, as Llama
    does it. Dimensions past rotary_dim stay as they are."""
    plain = q.dtype in _CODES and q.dtype == k.dtype == cos.dtype == sin.dtype
    if not (plain and q.stride(-1) == k.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()):
        spoil_recording()
        reference.rotary(q, k, cos, sin)
        return
    _run(_rotary, cos, a=q, b=k, d=cos, e=sin, heads=(q.shape[1], q.stride(1), k.shape[1], k.stride(1)))


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``logits [S,V] -> (index i64 [S], maximum f32 [S])``. Of equal maxima the first.

    A row that holds a NaN has NaN for its maximum and the first NaN's place for its index.
    """
    if not _fits(logits):
        return reference.argmax_rows(logits)
    indices = torch.empty(logits.shape[0], dtype=torch.int64)
    maxima = torch.empty(logits.shape[0], dtype=torch.float32)
    _run(_argmax_rows, logits, a=logits, b=indices, c=maxima)
    return indices, maxima


def warm_up(progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile, or load from disk, every kernel of this file. ``progress(what, done, total)``."""
    todo = (_rms_norm, _rotary, _argmax_rows)
    for done, each in enumerate(todo):
        if progress is not None:
            progress(each.name, done, len(todo))
        each.compile()
    if progress is not None:
        progress("elementwise kernels", len(todo), len(todo))


class _Arguments(threading.local):
    """A launch's arguments; each thread has its own."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(24, dtype=torch.int64)
        self.address = self.buffer.data_ptr()
        self.view = self.buffer.numpy().data.cast("B")


_arguments = _Arguments()


def _run(
    kernel: Any,
    rows: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    eps: float = 0.0,
    heads: tuple[int, int, int, int] | None = None,
) -> None:
    """Launch over ``rows [rows, width]``, a few rows at a time."""
    num_rows, width = rows.shape
    if num_rows == 0:
        return
    num_threads, alone_rows = torch.get_num_threads(), _ALONE_BYTES // (a.numel() // num_rows * a.element_size())
    tail = heads or (struct.unpack("i", struct.pack("f", eps))[0], 0, 0, 0)
    _LAYOUT.pack_into(
        _arguments.view, 0, 0, 0, 0, 0, 0, 0, 0, 0, num_rows, num_threads, width, _CODES[a.dtype],
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        0 if c is None else c.data_ptr(), 0 if d is None else d.data_ptr(),
        0 if e is None else e.data_ptr(), 0 if e is None else e.stride(0), *tail,
    )  # fmt: skip
    form = Form(_LAYOUT.size, NUM_ROWS, alone_rows)
    kernel(_arguments.address, num_threads, form, num_rows <= alone_rows)


def _rows(x: Tensor) -> Tensor:
    """``[..., N]`` as ``[rows, N]``, each row's numbers side by side."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _fits(rows: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can take these: of one known dtype, on the CPU, rows of a vector at least."""
    dtype = rows.dtype
    if dtype not in _CODES or rows.device.type != "cpu" or rows.shape[-1] < LANES or rows.stride(-1) != 1:
        return False
    return all(x.dtype is dtype and x.shape[-1] == rows.shape[-1] and x.stride(-1) == 1 for x in others)
