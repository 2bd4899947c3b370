"""Products with packed weights on the host's cores: y = x @ weight.T + bias, and silu(gate) * up of two weights.

This file has what all products share: how a launch is divided into items. fma.py, dot_bf16.py and amx.py compute sums,
finish.py turns them into results, and host.py chooses the product.

A packed weight is divided into tiles of some output columns. A tile is stored in the order in which it is read. Every
sum is float32 and runs over k in one order, whatever else is computed. So a row's result does not depend, to the last
bit, on the number of other rows or on the threads. That is one reason to have these products; the other is speed. With
oneDNN, a row's result depends on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paged_kernels.cpu.finish import ANY_HOST, Words, make_add_rounded, make_gate, make_write_out
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.memory import fetch_add, load_i64
from paged_kernels.cpu.parallel import Kernel

BLOCK = 64  # rows of x for which one thread computes one tile; some products use larger blocks
X_BYTES = 1 << 19  # of x in a larger block, which the second-level cache holds beside a tile's weights
ITEMS_A_THREAD = 4  # at least, before blocks become larger
LINE = 64  # bytes

# The kernels' array of int64. Strides of x are in bytes, others in elements. RESIDUAL: 0, or the address of what is
# added to the rounded result, with y's strides. Integer products also get the rows from which X is made, their width,
# and how X is divided (see integer_product.py). The counters (threads' numbers, rows begun and done, and one for each
# thread's items) have cache lines of their own.
(X, X_STRIDE, WEIGHT, BIAS, BIAS_STRIDE, Y, Y_STRIDE, NUM_ROWS, NUM_COLUMNS, DEPTH, TILE_BYTES, GATED, OUT_BF16,
 RESIDUAL, RAW, RAW_STRIDE, RAW_DTYPE, WIDTH, GROUP, CODES_AT, SCALE_DTYPE, SCALE_STEP, HAS_MINIMA,
 ROTATED, NUM_THREADS, SCRATCH, SCRATCH_STRIDE) = range(27)  # fmt: skip
TICKET, NEXT_ROW, ROWS_DONE, COUNTERS = 32, 40, 48, 56


@dataclass(frozen=True)
class Product:
    """One way to compute products of weights of one dtype."""

    name: str
    kernel: Kernel
    columns: int  # of a tile
    dtype: torch.dtype  # of the weights
    x_dtype: torch.dtype  # of the rows that the kernel reads; others are converted
    depth_step: int  # K is padded with zeros to a multiple of it
    element: torch.dtype  # the packed unit: a weight, or a pair of neighbours in K
    scratch_bytes: int  # for each thread


def scratch_bytes(columns: int, most_rows: int = BLOCK) -> int:
    """Return the bytes of a block's sums, with gate beside up."""
    return 4 * most_rows * 2 * columns


@inline
def no_begin(args, scratch):
    """For make_compute, if a thread has nothing to do before its first item."""


@inline
def no_end():
    """For make_compute, if a thread has nothing to do after its last item."""


def make_compute(
    tile: Any,
    columns: int,
    group: int,
    even: bool,
    begin: Any = no_begin,
    end: Any = no_end,
    most_rows: int = BLOCK,
    words: Words = ANY_HOST,
) -> Any:
    """Make the function for one thread's part of a launch. Items are ordered by tile, then by block of rows. A thread
    starts with its own stretch of items, and helps others when that is done.

    Args:
        tile: ``tile(x, x_stride, w, depth, num_rows, y, y_stride, bias, bias_stride, args, scratch)`` computes one tile
            for a block of rows; ``depth`` counts packed units.
        group: rows in registers at once; a block has whole groups.
        even: whether all groups have about the same size; if not, all but the last are full.
        begin, end: called by each thread before its first and after its last item: ``begin(args, scratch)``, ``end()``.
        most_rows: most rows of a block: BLOCK times a power of two.
        words: the functions that turn sums into results.
    """
    block_rows = _make_block_rows(most_rows)
    compute_item = _make_item(tile, columns, _make_rows_of(group, even), words)
    sums_bytes = scratch_bytes(columns, most_rows)

    @inline
    def compute(args):
        num_rows, num_threads = load_i64(args, NUM_ROWS), load_i64(args, NUM_THREADS)
        num_tiles = -(-load_i64(args, NUM_COLUMNS) // columns)
        num_blocks = -(-num_rows // block_rows(num_rows, num_tiles, num_threads, load_i64(args, X_STRIDE)))
        num_items = num_tiles * num_blocks
        me = fetch_add(args + 8 * TICKET, 1)
        sums = load_i64(args, SCRATCH) + me * load_i64(args, SCRATCH_STRIDE)
        scratch = sums + sums_bytes
        begin(args, scratch)
        for turn in range(num_threads):
            owner = (me + turn) % num_threads
            counter = args + 8 * COUNTERS + LINE * owner
            first, last = num_items * owner // num_threads, num_items * (owner + 1) // num_threads
            while True:
                item = first + fetch_add(counter, 1)
                if item >= last:
                    break
                compute_item(args, item, num_blocks, sums, scratch)
        end()

    return compute


def _make_block_rows(most_rows: int) -> Any:
    @inline
    def block_rows(num_rows, num_tiles, num_threads, x_stride):
        """Return the most rows of a block: as many as X_BYTES holds, but few enough that all threads get blocks."""
        block = most_rows
        while block > BLOCK and (
            block * x_stride > X_BYTES or num_tiles * -(-num_rows // block) < ITEMS_A_THREAD * num_threads
        ):
            block //= 2
        return block

    return block_rows


def _make_rows_of(group: int, even: bool) -> Any:
    @inline
    def first_row(num_rows, num_groups, group_number):
        if even:
            return num_rows * group_number // num_groups
        return min(num_rows, group * group_number)

    @inline
    def rows_of(num_rows, block, num_blocks):
        """Return the first row of a block, and its number of rows, in whole groups."""
        num_groups = -(-num_rows // group)
        row = first_row(num_rows, num_groups, num_groups * block // num_blocks)
        return row, first_row(num_rows, num_groups, num_groups * (block + 1) // num_blocks) - row

    return rows_of


def _make_item(tile: Any, columns: int, rows_of: Any, words: Words) -> Any:
    write_out, gate_in_place, add_rounded = (
        make(columns, words) for make in (make_write_out, make_gate, make_add_rounded)
    )

    @inline
    def compute_item(args, item, num_blocks, sums, scratch):
        """Compute a tile of columns for a block of rows. Of a gated product, compute gate's and up's, which are
        neighbours."""
        num_rows, num_columns, depth = load_i64(args, NUM_ROWS), load_i64(args, NUM_COLUMNS), load_i64(args, DEPTH)
        x_stride, y_stride, out_bf16 = load_i64(args, X_STRIDE), load_i64(args, Y_STRIDE), load_i64(args, OUT_BF16)
        num_parts = 2 if load_i64(args, GATED) else 1
        column, (row, rows) = item // num_blocks * columns, rows_of(num_rows, item % num_blocks, num_blocks)
        width = min(columns, num_columns - column)
        x = load_i64(args, X) + row * x_stride
        place = (2 if out_bf16 else 4) * (row * y_stride + column)
        y, residual = load_i64(args, Y) + place, load_i64(args, RESIDUAL)
        part, tile_bytes = num_parts * (item // num_blocks), load_i64(args, TILE_BYTES)
        w, bias_stride = load_i64(args, WEIGHT) + part * tile_bytes, load_i64(args, BIAS_STRIDE)
        bias = load_i64(args, BIAS) + 4 * (part * columns + row * bias_stride)
        if num_parts == 1 and width == columns and not out_bf16:
            tile(x, x_stride, w, depth, rows, y, y_stride, bias, bias_stride, args, scratch)
            return
        tile(x, x_stride, w, depth, rows, sums, 2 * columns, bias, bias_stride, args, scratch)
        if num_parts == 2:
            w, bias, up = w + tile_bytes, bias + 4 * columns, sums + 4 * columns
            tile(x, x_stride, w, depth, rows, up, 2 * columns, bias, bias_stride, args, scratch)
            gate_in_place(sums, rows)
        if residual:
            add_rounded(sums, rows, width, residual + place, y, y_stride)
        else:
            write_out(sums, rows, width, y, y_stride, out_bf16)

    return compute_item
