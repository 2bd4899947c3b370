"""Linear layers over integer weights. Rows are quantised during the product, and sums are exact
(integer_product.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paged_kernels.cpu import host
from paged_kernels.cpu.integer_product import COLUMNS, SCRATCH_BYTES, IntegerProduct
from paged_kernels.cpu.integers import ZERO, Integers
from paged_kernels.cpu.intrinsics import BF16, F16, F32, HAS_F16
from paged_kernels.cpu.linear import Packed, bias_or_zeros, sides, workspace
from paged_kernels.cpu.product import LINE
from paged_kernels.cpu.recording import hold_for, keep_for_recording, most_rows, spoil_recording

X_GROUP = 64  # numbers of x that share a scale, if a whole row of weights shares one and isn't rotated
_LONGEST = 128  # longest group of 4-bit weights that the kernels take
_FLOATS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
_LARGEST_DEPTH = 1 << 17  # so that sums of products of bytes fit into 32 bits


class QuantizedLinear(Packed):
    """``y [..., N] = x [..., K] @ weight.T + bias`` for all ``weights``, with their outputs one after another.

    Args:
        weights: integers, all of one layout (``Integers.layout``).
        biases: ``[N_i]`` or None each.
        gated: if there are two weights, gate and up: the result is silu(gate) * up, ``[..., N_1]``.
        product: the way to compute; None: as ``host.choose_integers`` says.

    Raises:
        ValueError: the layouts differ, or the kernels don't support theirs; or the host can't run ``product``.
    """

    x_dtype = torch.float32  # so that results between two products need not be rounded

    def __init__(
        self,
        weights: Sequence[Integers],
        biases: Sequence[Tensor | None],
        gated: bool = False,
        product: IntegerProduct | None = None,
    ) -> None:
        if len({w.layout for w in weights}) > 1:
            raise ValueError("weights of several layouts can't be packed together")
        first = weights[0]
        self._for_few, self._for_more, self._few = host.choose_integers(first.bits, product)
        self._bits, self._depth, self._columns, self._gated = first.bits, first.depth, COLUMNS, gated
        self.num_columns = len(first.codes) if gated else sum(len(w.codes) for w in weights)
        self._group = kernel_group(first)
        self._units = -(-self._depth // self._group)
        self._filled = self._units * self._group
        self._has_bias = any(bias is not None for bias in biases)
        self._has_minima = first.minima is not None
        self._scales_dtype = first.scales.dtype if HAS_F16 or first.scales.dtype is not torch.float16 else torch.float32
        self._is_rotated = first.rotated_from is not None
        per_group = first.group < first.codes.shape[1]
        self._scale_step = COLUMNS * self._scales_dtype.itemsize if per_group else 0
        parts = sides(len(weights), gated)
        self._weight = torch.stack([_tiles([self._laid(weights[i]) for i in part]) for part in parts], 1).contiguous()
        self._lay_bias([bias_or_zeros(len(w.codes), b) for w, b in zip(weights, biases, strict=True)], parts)
        # Each row has the scales and sums of its groups, in whole cache lines, then its codes.
        self._codes_at = -(-8 * self._units // LINE) * LINE
        self._row_bytes = self._codes_at + -(-self._filled // LINE) * LINE
        self._scratch_bytes = SCRATCH_BYTES + 4 * self._filled if self._is_rotated else 0  # a row in float32

    def __call__(
        self,
        x: Tensor,
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See Packed. This also takes float16, which is converted to float32."""
        wanted = out_dtype or x.dtype
        if wanted is not torch.float16 or out is not None:
            return super().__call__(x, out_dtype, residual, out)
        wide = None if residual is None else residual.float()
        return super().__call__(x, torch.float32, wide).to(wanted)

    def _laid(self, weight: Integers) -> list[Tensor]:
        """Return scales, minima and codes, ``[N, bytes]`` each, in a tile's order."""
        codes = torch.nn.functional.pad(weight.codes, (0, self._filled - weight.codes.shape[1]))
        if self._bits == 4:
            low, high = codes.view(len(codes), -1, 2, 4).unbind(2)
            codes = (low | high << 4).reshape(len(codes), -1)
        repeats = weight.group // self._group if self._scale_step else 1
        floats = [each for each in (weight.scales, weight.minima) if each is not None]
        if self._scale_step:
            floats = [each.repeat_interleave(repeats, 1)[:, : self._units] for each in floats]
        return [*(each.to(self._scales_dtype).contiguous() for each in floats), codes.view(torch.int32)]

    def _launch(self, out: Tensor, x: Tensor, num_rows: int, start: int, addend: int) -> None:
        product = self._for_few if num_rows <= self._few else self._for_more
        hold_for(*((1, self._few) if num_rows <= self._few else (self._few + 1, None)))
        rows = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        rows = rows.reshape(num_rows, self._depth)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if rows.data_ptr() != x.data_ptr():
            spoil_recording()
        num_threads = torch.get_num_threads()
        space = workspace(num_threads, max(product.scratch_bytes, self._scratch_bytes))
        space.fill(
            _room(most_rows(num_rows) * self._row_bytes), self._row_bytes, self._weight.data_ptr(),
            start or self._bias.data_ptr(), self.num_columns if start else 0, out.data_ptr(), self.num_columns,
            num_rows, self.num_columns, self._units, self._weight.stride(1), self._gated,
            out.dtype is torch.bfloat16, addend, rows.data_ptr(), rows.stride(0) * rows.element_size(),
            _FLOATS[rows.dtype], self._depth, self._group, self._codes_at, _FLOATS[self._scales_dtype],
            self._scale_step, self._has_minima, self._is_rotated,
        )  # fmt: skip
        product.kernels[self._bits](space.address, num_threads, space.layout)


def warm_up(progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile, or load from disk, the products that this host uses. Calls ``progress(what, done, total)``."""
    todo = {p.kernels[bits] for bits in ZERO for p in host.choose_integers(bits)[:2]}
    for done, each in enumerate(todo):
        if progress is not None:
            progress("products of integers", done, len(todo))
        each.compile()
    if progress is not None:
        progress("products of integers", len(todo), len(todo))


def kernel_group(weight: Integers) -> int:
    """Return how many steps of k the kernels sum before they apply scales.

    Raises:
        ValueError: the kernels don't support such groups.
    """
    depth = weight.codes.shape[1]
    if depth >= _LARGEST_DEPTH:
        raise ValueError(f"rows of {depth} weights are too long for sums in 32 bits; use less than {_LARGEST_DEPTH}")
    if weight.rotated_from is not None:
        return depth
    if weight.group >= depth:
        return X_GROUP
    for group in (_LONGEST, 64, 32):
        if weight.group % group == 0:
            return group
    raise ValueError(f"groups of {weight.group} weights aren't known; use multiples of 32, or whole rows")


def _tiles(weights: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the rows ``[N_i, ...]`` of several weights, one after another, as tiles of bytes: each of their parts in
    turn."""
    parts = [torch.cat(part) for part in zip(*weights, strict=True)]
    num_rows = len(parts[0])
    num_tiles = -(-num_rows // COLUMNS)
    laid = []
    for part in parts:
        part = torch.nn.functional.pad(part, (0, 0, 0, num_tiles * COLUMNS - num_rows))
        tiles = part.view(num_tiles, COLUMNS, -1).transpose(1, 2).contiguous()  # [tiles, K, columns]
        laid.append(tiles.view(num_tiles, -1).view(torch.uint8))
    return torch.cat(laid, 1)


class _Rooms(threading.local):
    """Memory for quantised rows. Each Python thread has its own."""

    room = torch.empty(0, dtype=torch.uint8)


_ROOMS = _Rooms()


def _room(num_bytes: int) -> int:
    """Return the address of so many bytes, at the beginning of a cache line."""
    if _ROOMS.room.numel() < num_bytes + LINE:
        _ROOMS.room = torch.empty(num_bytes + num_bytes // 4 + LINE, dtype=torch.uint8, device="cpu")
    keep_for_recording(_ROOMS.room)
    return -(-_ROOMS.room.data_ptr() // LINE) * LINE
