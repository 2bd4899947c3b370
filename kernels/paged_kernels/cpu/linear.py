"""Linear layers from a packed copy of their weights; several over one input, or a gated pair, as one product.

Knows tensors; knows nothing of modules. The packed copy costs the weights' size once more (``num_bytes``), for a
number of columns rounded up to whole tiles. A row's result does not depend on the other rows (see product.py).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from paged_kernels.cpu import product
from paged_kernels.cpu.product import COUNTERS, LINE, TICKET, TILE


class PackedLinear:
    """``y [..., N] = x [..., K] @ weight.T + bias`` for the rows of all ``weights``, one after another.

    Args:
        weights: ``[N_i, K]`` each, float32 or bfloat16 (one dtype), on the CPU.
        biases: ``[N_i]`` or None each.
        gated: of two weights, gate and up, the result is silu(gate) * up, ``[..., N_1]``.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gated: bool = False) -> None:
        self.dtype = weights[0].dtype
        self.num_columns = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
        self._depth = weights[0].shape[1]
        vectors = [_bias_or_zeros(w, b) for w, b in zip(weights, biases, strict=True)]
        parts = [[0], [1]] if gated else [list(range(len(weights)))]  # which weights stand side by side in a tile
        num_tiles = -(-self.num_columns // TILE)
        weight = torch.empty(num_tiles, len(parts), self._depth, TILE, dtype=self.dtype, device="cpu")
        bias = torch.empty(num_tiles, len(parts), 1, TILE, dtype=torch.float32, device="cpu")
        for number, part in enumerate(parts):
            _lay([weights[i] for i in part], weight[:, number])
            _lay([vectors[i][:, None] for i in part], bias[:, number])
        self._weight, self._bias = weight, bias
        self._run = product.product_f32 if self.dtype is torch.float32 else product.product_bf16
        self._gated = gated
        self._has_bias = any(bias is not None for bias in biases)
        self._addresses = self._weight.data_ptr(), self._bias.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size() + self._bias.numel() * 4

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None, residual: Tensor | None = None) -> Tensor:
        """x of the weights' dtype or float32, in which all is computed; the result as x, or as asked of the two.

        ``residual [..., N]`` is added to it.
        """
        if residual is not None and not self._can_start_from(residual):
            return self(x, out_dtype) + residual
        out = torch.empty(*x.shape[:-1], self.num_columns, dtype=out_dtype or x.dtype, device="cpu")
        num_rows = out.numel() // self.num_columns
        if num_rows == 0:
            return out
        rows = x if x.dtype is torch.float32 else x.float()
        rows = rows.reshape(num_rows, self._depth)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_threads = torch.get_num_threads()
        space = _workspace(num_threads)
        weight, bias = self._addresses
        start, stride = (bias, 0) if residual is None else (residual.data_ptr(), self.num_columns)
        space.fill(
            rows.data_ptr(), rows.stride(0), weight, start, stride, out.data_ptr(), self.num_columns, num_rows,
            self.num_columns, self._depth, self._gated, out.dtype is torch.bfloat16,
        )  # fmt: skip
        self._run(space.address, num_threads)
        return out

    def _can_start_from(self, residual: Tensor) -> bool:
        """Whether the kernel's sums can start from it as they do from a bias: whole tiles, and no bias besides."""
        whole = self.num_columns % TILE == 0 and not self._gated and not self._has_bias
        return whole and residual.dtype is torch.float32 and residual.is_contiguous()


def can_pack(weight: Tensor) -> bool:
    """Whether PackedLinear takes such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.ndim == 2
        and weight.numel() > 0
    )


class _Workspace:
    """A kernel's arguments and its threads' scratch memory, kept between calls of one Python thread."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        stride = product.scratch_bytes()
        self._scratch = torch.empty(num_threads * stride, dtype=torch.uint8)
        size = 8 * COUNTERS + LINE * num_threads
        self._args = torch.zeros(size + LINE, dtype=torch.uint8)
        self.address = -(-self._args.data_ptr() // LINE) * LINE
        offset = self.address - self._args.data_ptr()
        self._view = self._args.numpy().data[offset : offset + size]
        self._tail = (num_threads, self._scratch.data_ptr(), stride)
        self._zeros = bytes(size - 8 * TICKET)
        self._format = struct.Struct(f"={TICKET}q")

    def fill(self, *values: int) -> None:
        self._format.pack_into(self._view, 0, *values, *self._tail)
        self._view[8 * TICKET :] = self._zeros


_local = threading.local()


def _workspace(num_threads: int) -> _Workspace:
    space: _Workspace | None = getattr(_local, "space", None)
    if space is None or space.num_threads != num_threads:
        space = _local.space = _Workspace(num_threads)
    return space


def _bias_or_zeros(weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    return bias.detach().float()


def _lay(weights: Sequence[Tensor], out: Tensor) -> None:
    """``weights [N_i, K]``, their rows one after another, into the columns of ``out [tiles, K, TILE]``, in one pass:
    fresh memory costs more than the copy. Columns that are left are zero."""
    columns, row = out.transpose(1, 2), 0  # [tiles, TILE, K]
    for weight in weights:
        weight, done = weight.detach(), 0
        while done < len(weight):
            tile, at = divmod(row, TILE)
            whole = 0 if at else (len(weight) - done) // TILE
            count = whole * TILE or min(TILE - at, len(weight) - done)
            rows = weight[done : done + count]
            if whole:
                columns[tile : tile + whole].copy_(rows.view(whole, TILE, -1))
            else:
                columns[tile, at : at + count].copy_(rows)
            row, done = row + count, done + count
    if row % TILE:
        columns[-1, row % TILE :] = 0
