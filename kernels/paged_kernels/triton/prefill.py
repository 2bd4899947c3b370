"""Causal attention of chunks of queries over the blocks of their request, which already hold the chunk's own K/V.

A tile's rows are queries times the query heads of one kv head, which share the keys that they all read. Requests with a
single query are left to decode.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kernels.triton.attention import CHANGING, HIDDEN, LISTS, LOG2E, attend, load_queries


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=LISTS)
def prefill_kernel(
    q,  # [T, H, DIM]
    key_cache,  # [blocks, K, BLOCK_SIZE, DIM]
    value_cache,  # [blocks, K, BLOCK_SIZE, VALUE_DIM]
    key_scales,  # f32 [blocks, K, BLOCK_SIZE], or None
    value_scales,
    key_bias,  # f32 [H, P], or None
    sinks,  # [H], or None
    out,  # [T, H, VALUE_DIM]
    item_rows,  # i32 [items]
    item_starts,  # i32 [R+1]
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    block_tables,  # i32 [R, B]
    num_requests,
    num_heads,
    q_token_stride,
    q_head_stride,
    table_stride,
    bias_stride,
    window,  # or None
    scale,
    softcap,  # or None
    GROUP: tl.constexpr,  # query heads of a kv head
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,  # of queries and keys when they are multiplied
    VALUE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    if item >= tl.load(item_starts + num_requests):
        return
    row = tl.load(item_rows + item)
    first_token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - first_token
    seq_len = tl.load(seq_lens + row)
    table = block_tables + row.to(tl.int64) * table_stride
    cache = (key_cache, value_cache, key_scales, value_scales)
    facts = (key_bias, bias_stride, scale, softcap)

    query, heads, first_query, last_query = _rows_of(item, item_starts + row, kv_head, GROUP, BLOCK_M)
    is_row = query < num_queries
    query_positions = seq_len - num_queries + query
    first_position = seq_len - num_queries + first_query
    last_position = tl.minimum(seq_len - num_queries + last_query, seq_len - 1)
    tokens = (first_token + query).to(tl.int64)
    queries = load_queries(q, tokens, heads, is_row, q_token_stride, q_head_stride, DIM, DIM_PAD, DTYPE)
    top, total = _begin(sinks, heads, is_row)
    sums = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)

    # keys   start ....... all_see ....... stop
    #         every row sees    which row sees
    #         all of them       which is asked
    start, all_see, stop = _keys_in_sight(first_position, last_position, window, BLOCK_N)
    FIRST_PART: tl.constexpr = 0 if window is None else 1
    for part in tl.static_range(FIRST_PART, 2):
        for first in range(start if part == 0 else all_see, all_see if part == 0 else stop, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            visible = None
            if part == 1:
                visible = _visible(positions, tl.minimum(query_positions, last_position), query_positions, window)
                positions = tl.minimum(positions, last_position)
            top, total, sums = attend(
                queries, heads, is_row, top, total, sums, positions, visible, table, cache, kv_head,
                num_heads // GROUP, facts, DIM, VALUE_DIM, BLOCK_SIZE, PRECISION, VALUE_DTYPE,
            )  # fmt: skip

    _store(out, (tokens * num_heads + heads) * VALUE_DIM, is_row, total, sums, VALUE_DIM)


@triton.jit
def _rows_of(item, starts, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the query and the head of each row of an item, i32 ``[M]``, and its first and last query. ``starts``
    points to the first items of the request and of the next one.

    The tiles with the last queries see the most keys. They come first, so that none of them ends long after the
    others."""
    first_row = (tl.load(starts + 1) - 1 - item) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    return rows // GROUP, kv_head * GROUP + rows % GROUP, first_row // GROUP, (first_row + BLOCK_M - 1) // GROUP


@triton.jit
def _begin(sinks, heads, is_row):
    """Return the running softmax before any key: the largest score and the sum, f32 ``[M]``."""
    top = tl.full(heads.shape, HIDDEN, tl.float32)
    total = tl.zeros(heads.shape, tl.float32)
    if sinks is not None:
        top = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    return top, total


@triton.jit
def _keys_in_sight(first_position, last_position, window, BLOCK_N: tl.constexpr):
    """Return for rows at these positions the first key, the key from which on some rows see less than others, and the
    end."""
    if window is None:
        start = 0
        all_see = tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N
    else:
        start = tl.maximum(first_position + 1 - window, 0)
        all_see = start
    return start, all_see, last_position + 1


@triton.jit
def _visible(positions, lasts, query_positions, window):
    """Return which keys ``[N]`` each row ``[M]`` sees: up to its own position, and only those within the window."""
    visible = positions[None, :] <= lasts[:, None]
    if window is not None:
        visible &= positions[None, :] > (query_positions - window)[:, None]
    return visible


@triton.jit
def _store(out, at, is_row, total, sums, VALUE_DIM: tl.constexpr):
    """Store the results. A request without keys gets zeros."""
    dv = tl.arange(0, sums.shape[1])
    sums *= (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    inside = is_row[:, None] & (dv < VALUE_DIM)[None, :]
    tl.store(out + at[:, None] + dv[None, :], sums.to(out.dtype.element_ty), mask=inside)
