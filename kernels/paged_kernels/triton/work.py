"""The list of work of a step: which rows meet which keys, and whose keys are read together.

Kernels make it on the device from what steps bring (lengths, block tables), so that no size has to come back to the
host, and that a CUDA graph, replayed over other requests, lists and shares anew.

Requests with one query are decode's. Their keys are cut into stretches at fixed positions, and an item is a request's
stretch. Of requests whose tables have the same blocks for a whole stretch, as many as a tile has room for are attended
to by the first one's item: that kernel's tile has 16 rows in any case, since a product of matrices takes no fewer, and
with four query heads to a kv head 12 of them would hold nothing. So whoever is taken along costs no time, and a row's
sums are the same in its own item and in another's: the same program, the same keys in the same tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_size(num_keys, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys of a stretch. It depends on the row alone: so does the row's result, bit for bit, whatever else is in the
    batch. Long rows have longer stretches, not more: of a few sizes, four from one to its double, so that rows of about
    the same length are cut at the same positions."""
    QUARTER: tl.constexpr = SPLIT // 4
    quarters = tl.cdiv(num_keys, MAX_SPLITS * QUARTER)
    step = quarters * 0 + 1
    for _ in tl.static_range(6):  # of rows with more than 2,097,152 keys, a size differs from the next by no more
        step = tl.where(quarters > 8 * step, 2 * step, step)
    return tl.maximum(tl.cdiv(quarters, step) * step * QUARTER, SPLIT)


@triton.jit(
    do_not_specialize=["num_requests"],
    do_not_specialize_on_alignment=["query_starts", "seq_lens", "decode_rows", "decode_starts", "prefill_starts"],
)
def list_items_kernel(
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    decode_rows,  # i32 [items, 1+ROOM]  out: how many requests an item is for, at first 1; then which
    decode_starts,  # i32 [R+1]  out: the first item of each request, then their number
    prefill_rows,  # i32 [items]  out, the request of each item; or None
    prefill_starts,  # i32 [R+1]  out, or None
    num_requests,
    window,  # or None
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROOM: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Requests with one query are cut into stretches of keys, for decode; others into tiles of rows, for prefill."""
    tl.store(decode_starts, 0)
    if prefill_rows is not None:
        tl.store(prefill_starts, 0)
    num_splits, num_tiles = 0, 0
    for first in range(0, num_requests, BLOCK):
        r = first + tl.arange(0, BLOCK)
        mask = r < num_requests
        queries = tl.load(query_starts + r + 1, mask=mask, other=0) - tl.load(query_starts + r, mask=mask, other=0)
        keys = tl.load(seq_lens + r, mask=mask, other=0)
        if window is not None:
            keys = tl.minimum(keys, window)
        splits = tl.where(queries == 1, tl.cdiv(keys, split_size(keys, SPLIT, MAX_SPLITS)), 0)
        first_splits = _ends(decode_starts, num_splits, r, mask, splits) - splits
        for i in range(tl.max(splits, 0)):
            at = decode_rows + (first_splits + i) * (1 + ROOM)
            tl.store(at, 1, mask=i < splits)
            tl.store(at + 1, r, mask=i < splits)
        num_splits += tl.sum(splits, 0)
        if prefill_rows is not None:
            tiles = tl.where(queries > 1, tl.cdiv(queries * GROUP, BLOCK_M), 0)
            first_tiles = _ends(prefill_starts, num_tiles, r, mask, tiles) - tiles
            for i in range(tl.max(tiles, 0)):
                tl.store(prefill_rows + first_tiles + i, r, mask=i < tiles)
            num_tiles += tl.sum(tiles, 0)


@triton.jit
def _ends(starts, num_items, r, mask, counts):
    """Where the items of each of these requests end; the next one's begin there."""
    ends = num_items + tl.cumsum(counts, 0)
    tl.store(starts + r + 1, ends, mask=mask)
    return ends


@triton.jit(
    do_not_specialize=["num_requests", "table_stride"],
    do_not_specialize_on_alignment=["query_starts", "seq_lens", "block_tables", "decode_rows", "decode_starts"],
)
def share_kernel(
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    block_tables,  # i32 [R, B]
    decode_rows,  # i32 [items, 1+ROOM]  as listed; out: 0, or how many requests an item is for, and which
    decode_starts,  # i32 [R+1]
    num_requests,
    table_stride,
    window,  # or None
    BLOCK_SIZE: tl.constexpr,
    ROOM: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # requests that are looked at together
    COLUMNS: tl.constexpr,  # entries of their tables
):
    """One item: it is left to an earlier request with the same blocks, or takes along later ones."""
    item = tl.program_id(0)
    if item >= tl.load(decode_starts + num_requests):
        return
    mine = decode_rows + item * (1 + ROOM)
    row = tl.load(mine + 1)
    num_keys = tl.load(seq_lens + row)
    size = split_size(num_keys, SPLIT, MAX_SPLITS)
    stop = (item - tl.load(decode_starts + row) + 1) * size
    if _reach(num_keys, window) < stop:
        return
    num_before, num_after = 0, 0
    for first in range(0, num_requests, ROWS):
        others = first + tl.arange(0, ROWS)
        there = (others < num_requests) & (others != row)
        others_keys = tl.load(seq_lens + others, mask=there, other=0)
        first_query = tl.load(query_starts + others, mask=there, other=0)
        queries = tl.load(query_starts + others + 1, mask=there, other=0) - first_query
        there &= (queries == 1) & (_reach(others_keys, window) >= stop)
        there &= split_size(others_keys, SPLIT, MAX_SPLITS) == size
        agree = _agree(block_tables, table_stride, row, others, there, stop - size, stop, BLOCK_SIZE, COLUMNS)
        num_before += tl.sum((agree & (others < row)).to(tl.int32), 0)
        after = (agree & (others > row)).to(tl.int32)
        place = num_after + tl.cumsum(after, 0)  # counted from 1, which is the item's own request
        tl.store(mine + 1 + place, others, mask=(after > 0) & (place < ROOM))
        num_after += tl.sum(after, 0)
    tl.store(mine, tl.where(num_before % ROOM == 0, tl.minimum(1 + num_after, ROOM), 0))


@triton.jit
def _reach(num_keys, window):
    """How many keys may be shared: none if a window hides some, for then stretches don't begin at fixed positions."""
    return num_keys if window is None else tl.where(num_keys <= window, num_keys, 0)


@triton.jit
def _agree(
    tables, table_stride, row, others, mask, start, stop, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Which of the others have the row's very blocks for keys start to stop."""
    mine = tables + row.to(tl.int64) * table_stride
    theirs = tables + others.to(tl.int64) * table_stride
    last = (stop - 1) // BLOCK_SIZE
    agree = mask & (tl.load(theirs + last, mask=mask, other=0) == tl.load(mine + last))  # where few do, few are read
    for first in range(start // BLOCK_SIZE, last, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        own = tl.load(mine + columns, mask=columns < last, other=0)[None, :]
        inside = agree[:, None] & (columns < last)[None, :]
        found = tl.load(theirs[:, None] + columns[None, :], mask=inside, other=0)
        agree &= tl.sum((inside & (found != own)).to(tl.int32), 1) == 0
    return agree
