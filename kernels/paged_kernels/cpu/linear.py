"""Linear layers over a packed copy of their weights. Several over one input, or a gated pair, are one product.

This file knows tensors, and nothing of modules. The packed copy takes as much memory as the weights (``num_bytes``),
with columns padded to whole tiles, and inputs to whole steps (see product.py and host.py).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from paged_kernels.cpu import host, pages
from paged_kernels.cpu.product import COUNTERS, LINE, NUM_ROWS, NUM_THREADS, TICKET, Product
from paged_kernels.cpu.recording import ArgumentLayout, keep_for_recording, spoil_recording


class Packed:
    """The common part of packed products: the outputs of all weights, one after another, or silu(gate) * up of two
    weights.

    Subclasses fill ``_weight`` and ``_bias`` in tiles, and choose a kernel's arguments.
    """

    num_columns: int
    _columns: int  # of a tile
    _depth: int  # K
    _units: int  # steps of K in the packed form
    _weight: Tensor  # [tiles, parts, ...]
    _bias: Tensor  # float32 [tiles, parts, 1, columns]
    _gated: bool
    _has_bias: bool

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size() + self._bias.numel() * 4

    def __call__(
        self,
        x: Tensor,
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Multiply x of float32 or bfloat16. Sums are float32. The result has x's dtype, or ``out_dtype``, and goes to
        ``out`` if that is given.

        ``residual [..., N]`` is added: to float32 sums, or, if the result is bfloat16, to the rounded sums.
        """
        if out is None:
            out = torch.empty(*x.shape[:-1], self.num_columns, dtype=out_dtype or x.dtype, device="cpu")
        if residual is None:
            return self._into(out, x, 0, 0)
        start = self._takes(residual, out)
        if start is None:
            spoil_recording()
            return self._into(out, x, 0, 0).add_(residual)
        return self._into(out, x, *start)

    def _into(self, out: Tensor, x: Tensor, start: int, addend: int) -> Tensor:
        """Fill ``out``. ``start``: the address of what sums start from instead of a bias, or 0. ``addend``: the address
        of what is added to the result, or 0 (see _takes)."""
        num_rows = out.numel() // self.num_columns
        if num_rows:
            self._launch(out, x, num_rows, start, addend)
        return out

    def _launch(self, out: Tensor, x: Tensor, num_rows: int, start: int, addend: int) -> None:
        raise NotImplementedError

    def _lay_bias(self, vectors: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> None:
        num_tiles = -(-self.num_columns // self._columns)
        self._bias = torch.empty(num_tiles, len(parts), 1, self._columns, dtype=torch.float32, device="cpu")
        for number, part in enumerate(parts):
            lay((vectors[i][:, None] for i in part), self._bias[:, number])

    def _takes(self, residual: Tensor, out: Tensor) -> tuple[int, int] | None:
        """Return a residual's address twice, 0 in one place: as the start of sums, in place of a bias (only if columns
        are whole tiles and there is no bias), or as an addend of the result. None if the kernel can use it in neither
        way."""
        if residual.dtype is not out.dtype or residual.shape != out.shape or not residual.is_contiguous():
            return None
        if out.dtype is torch.bfloat16:
            return 0, residual.data_ptr()
        whole = self.num_columns % self._columns == 0 and not self._gated and not self._has_bias
        return (residual.data_ptr(), 0) if whole else None


class PackedLinear(Packed):
    """``y [..., N] = x [..., K] @ weight.T + bias`` for all ``weights``, with their outputs one after another.

    Args:
        weights: ``[N_i, K]`` each, float32 or bfloat16 (all of one dtype), on the CPU.
        biases: ``[N_i]`` or None each.
        gated: if there are two weights, gate and up: the result is silu(gate) * up, ``[..., N_1]``.
        product: the way to compute; None: as ``host.choose`` says.

    Raises:
        ValueError: the host can't run ``product``, or it is for weights of another dtype.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gated: bool = False,
        product: Product | None = None,
    ) -> None:
        self.dtype = weights[0].dtype
        self.product = product = host.choose(self.dtype, product)
        self.num_columns = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
        self._columns = columns = product.columns
        self._depth = weights[0].shape[1]
        self._filled = -(-self._depth // product.depth_step) * product.depth_step
        self._units = self._filled * self.dtype.itemsize // product.element.itemsize
        self._gated = gated
        self._has_bias = any(bias is not None for bias in biases)
        parts = sides(len(weights), gated)
        num_tiles = -(-self.num_columns // columns)
        weight = pages.empty((num_tiles, len(parts), self._units, columns), product.element)
        for number, part in enumerate(parts):
            lay((self._elements(weights[i]) for i in part), weight[:, number])
        self._lay_bias([bias_or_zeros(len(w), b) for w, b in zip(weights, biases, strict=True)], parts)
        self._weight = weight
        self._addresses = self._weight.data_ptr(), self._bias.data_ptr()

    @property
    def x_dtype(self) -> torch.dtype:
        """The dtype in which the kernel reads x. Other dtypes are converted; float32 is rounded to bfloat16, as a
        bfloat16 module would round it."""
        return self.product.x_dtype

    def _launch(self, out: Tensor, x: Tensor, num_rows: int, start: int, addend: int) -> None:
        rows = self._rows(x, num_rows)
        num_threads = torch.get_num_threads()
        space = workspace(num_threads, self.product.scratch_bytes)
        weight, bias = self._addresses
        space.fill(
            rows.data_ptr(), rows.stride(0) * rows.element_size(), weight, start or bias,
            self.num_columns if start else 0, out.data_ptr(), self.num_columns, num_rows, self.num_columns, self._units,
            self._units * self._columns * self._weight.element_size(), self._gated, out.dtype is torch.bfloat16, addend,
        )  # fmt: skip
        self.product.kernel(space.address, num_threads, space.layout)

    def _rows(self, x: Tensor, num_rows: int) -> Tensor:
        """Return x as the kernel reads it: ``[num_rows, K]``, with K padded and rows contiguous."""
        rows = x if x.dtype is self.product.x_dtype else x.to(self.product.x_dtype)
        rows = rows.reshape(num_rows, self._depth)
        if self._filled != self._depth:
            rows = torch.nn.functional.pad(rows, (0, self._filled - self._depth))
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        if rows.data_ptr() != x.data_ptr():
            spoil_recording()
        return rows

    def _elements(self, weight: Tensor) -> Tensor:
        """Return ``[N, K]`` as ``[N, elements]``, the units that are arranged in tiles."""
        weight, product = weight.detach(), self.product
        if product.element is weight.dtype:
            return weight
        if self._filled != self._depth:
            weight = torch.nn.functional.pad(weight, (0, self._filled - self._depth))
        weight = weight.contiguous()
        pairs = product.element.itemsize // weight.element_size()
        return (weight if weight.storage_offset() % pairs == 0 else weight.clone()).view(product.element)


def sides(num_weights: int, gated: bool) -> list[list[int]]:
    """Return which weights are side by side in a tile: all of them, or each of a gated pair by itself."""
    return [[0], [1]] if gated else [list(range(num_weights))]


def warm_up(dtype: torch.dtype, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile, or load from disk, the product for a model of this dtype. Calls ``progress(what, done, total)``."""
    if progress is not None:
        progress("product", 0, 1)
    host.choose(dtype if dtype is torch.bfloat16 else torch.float32).kernel.compile()
    if progress is not None:
        progress("product", 1, 1)


def can_pack(weight: Tensor) -> bool:
    """Return whether PackedLinear takes such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.ndim == 2
        and weight.numel() > 0
    )


class _Workspace:
    """A kernel's arguments and its threads' scratch memory, which each Python thread keeps between calls."""

    def __init__(self, num_threads: int, scratch_bytes: int) -> None:
        self.num_threads, self.scratch_bytes = num_threads, scratch_bytes
        stride = -(-scratch_bytes // LINE) * LINE
        self._scratch = torch.empty(num_threads * stride + LINE, dtype=torch.uint8)
        scratch = -(-self._scratch.data_ptr() // LINE) * LINE
        size = 8 * COUNTERS + LINE * num_threads
        self.layout = ArgumentLayout(size, NUM_ROWS)
        self._args = torch.zeros(size + LINE, dtype=torch.uint8)
        self.address = -(-self._args.data_ptr() // LINE) * LINE
        offset = self.address - self._args.data_ptr()
        self._view = self._args.numpy().data[offset : offset + size]
        self._tail = (num_threads, scratch, stride)
        self._zeros = bytes(size - 8 * TICKET)
        self._format, self._tail_format = (struct.Struct(f"={count}q") for count in (NUM_THREADS, len(self._tail)))

    def fill(self, *values: int) -> None:
        """Set the kernel's arguments, from the first on; the remaining ones are set to 0."""
        self._format.pack_into(self._view, 0, *values, *[0] * (NUM_THREADS - len(values)))
        self._tail_format.pack_into(self._view, 8 * NUM_THREADS, *self._tail)
        self._view[8 * TICKET :] = self._zeros


_local = threading.local()


def workspace(num_threads: int, scratch_bytes: int) -> _Workspace:
    space: _Workspace | None = getattr(_local, "space", None)
    if space is None or space.num_threads != num_threads or space.scratch_bytes < scratch_bytes:
        space = _local.space = _Workspace(num_threads, scratch_bytes)
    keep_for_recording(space)
    return space


def bias_or_zeros(num_columns: int, bias: Tensor | None) -> Tensor:
    if bias is None:
        # The dtype and device are given, because torch's defaults may be others.
        return torch.zeros(num_columns, dtype=torch.float32, device="cpu")
    return bias.detach().float()


def lay(weights: Iterable[Tensor], out: Tensor) -> None:
    """Copy ``weights [N_i, K]``, their rows one after another, into the columns of ``out [tiles, K, columns]``, in one
    pass, because touching fresh memory takes longer than the copy. Remaining columns are zero."""
    columns, row = out.transpose(1, 2), 0  # [tiles, columns, K]
    width = columns.shape[1]
    for weight in weights:
        weight, done = weight.detach(), 0
        while done < len(weight):
            tile, at = divmod(row, width)
            whole = 0 if at else (len(weight) - done) // width
            count = whole * width or min(width - at, len(weight) - done)
            rows = weight[done : done + count]
            if whole:
                columns[tile : tile + whole].copy_(rows.view(whole, width, -1))
            else:
                columns[tile, at : at + count].copy_(rows)
            row, done = row + count, done + count
    if row % width:
        columns[-1, row % width :] = 0
