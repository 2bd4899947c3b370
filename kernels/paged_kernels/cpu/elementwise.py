"""Launchers of the small operations between products: norms, rotary, argmax.

They take and return torch tensors of float32 or bfloat16, and have the signatures of ``paged_kernels.reference``. What
the kernels can't take (other dtypes, rows shorter than a vector) is computed by the reference.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paged_kernels import reference
from paged_kernels.cpu.elementwise_kernels import LAYOUT, NUM_ROWS, argmax_rows_kernel, rms_norm_kernel, rotary_kernel
from paged_kernels.cpu.intrinsics import BF16, F32, LANES
from paged_kernels.cpu.recording import ArgumentLayout, spoil_recording

_CODES = {torch.float32: F32, torch.bfloat16: BF16}
_ALONE_BYTES = 1 << 16  # for less work than this, waking another thread costs more than it saves


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Return ``x [..., N], weight [N] -> [..., N]``: x / rms(x) in x's dtype, times weight, as Llama does. The result
    goes to ``out`` (contiguous), if given."""
    rows = _rows(x)
    if not _fits(rows, weight):
        spoil_recording()
        normed = reference.rms_norm(x, weight, eps)
        return normed if out is None else out.copy_(normed)
    if rows.data_ptr() != x.data_ptr():
        spoil_recording()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    _run(rms_norm_kernel, rows, a=rows, b=out, c=weight, eps=eps)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``q [T,H,D], k [T,K,D]`` in place by ``cos, sin [T,rotary_dim]``: the first half with the second half, as
    Llama does. Dimensions past rotary_dim stay as they are."""
    plain = q.dtype in _CODES and q.dtype == k.dtype == cos.dtype == sin.dtype
    if not (plain and q.stride(-1) == k.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()):
        spoil_recording()
        reference.rotary(q, k, cos, sin)
        return
    _run(rotary_kernel, cos, a=q, b=k, d=cos, e=sin, heads=(q.shape[1], q.stride(1), k.shape[1], k.stride(1)))


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``logits [S,V] -> (index i64 [S], maximum f32 [S])``: the first of equal maxima.

    A row with a NaN has NaN as its maximum, and the first NaN's index.
    """
    if not _fits(logits):
        return reference.argmax_rows(logits)
    indices = torch.empty(logits.shape[0], dtype=torch.int64)
    maxima = torch.empty(logits.shape[0], dtype=torch.float32)
    _run(argmax_rows_kernel, logits, a=logits, b=indices, c=maxima)
    return indices, maxima


def warm_up(progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile, or load from disk, every kernel of this file. Calls ``progress(what, done, total)``."""
    todo = (rms_norm_kernel, rotary_kernel, argmax_rows_kernel)
    for done, each in enumerate(todo):
        if progress is not None:
            progress(each.name, done, len(todo))
        each.compile()
    if progress is not None:
        progress("elementwise kernels", len(todo), len(todo))


class _Arguments(threading.local):
    """A launch's arguments. Each thread has its own."""

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
    """Launch ``kernel`` over ``rows [rows, width]``, a few rows at a time."""
    num_rows, width = rows.shape
    if num_rows == 0:
        return
    num_threads, alone_rows = torch.get_num_threads(), _ALONE_BYTES // (a.numel() // num_rows * a.element_size())
    tail = heads or (struct.unpack("i", struct.pack("f", eps))[0], 0, 0, 0)
    LAYOUT.pack_into(
        _arguments.view, 0, 0, 0, 0, 0, 0, 0, 0, 0, num_rows, num_threads, width, _CODES[a.dtype],
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        0 if c is None else c.data_ptr(), 0 if d is None else d.data_ptr(),
        0 if e is None else e.data_ptr(), 0 if e is None else e.stride(0), *tail,
    )  # fmt: skip
    layout = ArgumentLayout(LAYOUT.size, NUM_ROWS, alone_rows)
    kernel(_arguments.address, num_threads, layout, num_rows <= alone_rows)


def _rows(x: Tensor) -> Tensor:
    """View ``[..., N]`` as ``[rows, N]``, with each row contiguous."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _fits(rows: Tensor, *others: Tensor) -> bool:
    """Return whether the kernels can take these: of one supported dtype, on the CPU, rows at least as long as a
    vector."""
    dtype = rows.dtype
    if dtype not in _CODES or rows.device.type != "cpu" or rows.shape[-1] < LANES or rows.stride(-1) != 1:
        return False
    return all(x.dtype is dtype and x.shape[-1] == rows.shape[-1] and x.stride(-1) == 1 for x in others)
