"""Makes a step's list of work items: which rows are computed with which keys, and whose keys are read together.

Kernels make the list on the device from the step's tensors (lengths, block tables), so that no size has to be copied to
the host, and a CUDA graph that is replayed for other requests makes a new list.

Requests with one query are decode's. Their keys are divided into stretches at fixed positions, and an item is a stretch
of a request. If several requests have the same blocks for a whole stretch, the first one's item computes as many of
them as its tile has room for. That kernel's tile has 16 rows in any case, because matrix products take no fewer, and
with four query heads per kv head 12 rows would be empty. So the other requests cost no time. A row's sums are the same
in its own item and in another's: the same program, and the same keys in the same tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_size(num_keys, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return the keys of a stretch. It depends on the row alone, and so does the row's result, bit for bit, whatever
    else is in the batch. Long rows have longer stretches, not more. There are four sizes between one and its double, so
    that rows of about the same length are divided at the same positions."""
    QUARTER: tl.constexpr = SPLIT // 4
    quarters = tl.cdiv(num_keys, MAX_SPLITS * QUARTER)
    step = quarters * 0 + 1
    # For rows with more than 2,097,152 keys, the step between sizes no longer grows.
    for _ in tl.static_range(6):
        step = tl.where(quarters > 8 * step, 2 * step, step)
    return tl.maximum(tl.cdiv(quarters, step) * step * QUARTER, SPLIT)


@triton.jit(
    do_not_specialize=["num_requests"],
    do_not_specialize_on_alignment=["query_starts", "seq_lens", "decode_rows", "decode_starts", "prefill_starts"],
)
def list_items_kernel(
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    decode_rows,  # i32 [items, 1+ROOM]  out: an item's number of requests, at first 1; then their indices
    decode_starts,  # i32 [R+1]  out: the first item of each request, then the number of items
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
    """List stretches of keys for requests with one query (decode), and tiles of rows for the others (prefill)."""
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
    """Return where the items of each of these requests end, which is where the next request's begin."""
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
    decode_rows,  # i32 [items, 1+ROOM]  as listed; out: an item's number of requests (may be 0), and their indices
    decode_starts,  # i32 [R+1]
    num_requests,
    table_stride,
    window,  # or None
    BLOCK_SIZE: tl.constexpr,
    ROOM: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # requests that are compared at once
    COLUMNS: tl.constexpr,  # entries of their tables that are compared at once
):
    """Decide for one item: leave it to an earlier request with the same blocks, or take later requests along."""
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
        place = num_after + tl.cumsum(after, 0)  # counted from 1, because 0 is the item's own request
        tl.store(mine + 1 + place, others, mask=(after > 0) & (place < ROOM))
        num_after += tl.sum(after, 0)
    tl.store(mine, tl.where(num_before % ROOM == 0, tl.minimum(1 + num_after, ROOM), 0))


@triton.jit
def _reach(num_keys, window):
    """Return how many keys may be shared: none if a window hides some, because stretches then don't begin at fixed
    positions."""
    return num_keys if window is None else tl.where(num_keys <= window, num_keys, 0)


@triton.jit
def _agree(
    tables, table_stride, row, others, mask, start, stop, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Return which of the others have the same blocks as the row for keys start to stop."""
    mine = tables + row.to(tl.int64) * table_stride
    theirs = tables + others.to(tl.int64) * table_stride
    last = (stop - 1) // BLOCK_SIZE
    # The last entry is compared first: if few agree there, few tables are read whole.
    agree = mask & (tl.load(theirs + last, mask=mask, other=0) == tl.load(mine + last))
    for first in range(start // BLOCK_SIZE, last, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        own = tl.load(mine + columns, mask=columns < last, other=0)[None, :]
        inside = agree[:, None] & (columns < last)[None, :]
        found = tl.load(theirs[:, None] + columns[None, :], mask=inside, other=0)
        agree &= tl.sum((inside & (found != own)).to(tl.int32), 1) == 0
    return agree
