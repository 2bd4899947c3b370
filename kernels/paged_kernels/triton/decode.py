"""Attention of one query over the blocks of its request. The keys are divided into stretches, which are computed in
parallel and then combined.

The query heads of a kv head share its tiles of keys, and so do requests with the same blocks (``work.py``). Requests
with more than one query are left to prefill.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kernels.triton.attention import CHANGING, HIDDEN, LISTS, LOG2E, attend, load_queries
from paged_kernels.triton.work import split_size


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=LISTS)
def split_kernel(
    q,  # [T, H, DIM]
    key_cache,  # [blocks, K, BLOCK_SIZE, DIM]
    value_cache,  # [blocks, K, BLOCK_SIZE, VALUE_DIM]
    key_scales,  # f32 [blocks, K, BLOCK_SIZE], or None
    value_scales,
    key_bias,  # f32 [H, P], or None
    partials,  # f32 [items, H, VALUE_DIM]  out: a request's attention over one item's keys
    partial_logs,  # f32 [items, H]  out: log2 of its softmax's denominator
    item_rows,  # i32 [items, 1+ROOM]  an item's number of requests, then their indices; the first one's keys are read
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
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROOM: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,  # of queries and keys when they are multiplied
    VALUE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // TILES
    lanes = tl.program_id(1) % TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + lanes % GROUP
    cache = (key_cache, value_cache, key_scales, value_scales)
    facts = (key_bias, bias_stride, scale, softcap)
    for item in range(tl.program_id(0), tl.load(item_starts + num_requests), tl.num_programs(0)):
        requests = item_rows + item * (1 + ROOM)
        is_row = lanes // GROUP < tl.load(requests)  # none, if another item serves this one's request
        rows = tl.load(requests + 1 + lanes // GROUP, mask=is_row, other=0)  # [BLOCK_H]
        row = tl.load(requests + 1)
        split = item - tl.load(item_starts + row)
        start, stop = _stretch(split, tl.load(seq_lens + row), window, SPLIT, MAX_SPLITS)
        stop = tl.where(tl.load(requests) > 0, stop, start)
        table = block_tables + row.to(tl.int64) * table_stride
        tokens = tl.load(query_starts + rows, mask=is_row, other=0).to(tl.int64)
        queries = load_queries(q, tokens, heads, is_row, q_token_stride, q_head_stride, DIM, DIM_PAD, DTYPE)
        top = tl.full([BLOCK_H], HIDDEN, tl.float32)
        # It is summed up at the end, because warps have to synchronise for a sum
        total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        sums = tl.zeros([BLOCK_H, VALUE_PAD], tl.float32)
        for first in range(start, stop, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            top, total, sums = attend(
                queries, heads, is_row, top, total, sums, tl.minimum(positions, stop - 1), (positions < stop)[None, :],
                table, cache, kv_head, num_heads // GROUP, facts, DIM, VALUE_DIM, BLOCK_SIZE, PRECISION, VALUE_DTYPE,
            )  # fmt: skip
        items = tl.load(item_starts + rows, mask=is_row, other=0) + split
        at = (items * num_heads + heads).to(tl.int64)  # [BLOCK_H]
        _store_partials(partials, partial_logs, at, is_row, top, tl.sum(total, 1), sums, VALUE_DIM)


@triton.jit
def _stretch(split, seq_len, window, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return the first key of a stretch, and where it ends."""
    num_keys = seq_len if window is None else tl.minimum(seq_len, window)
    size = split_size(num_keys, SPLIT, MAX_SPLITS)
    start = seq_len - num_keys + split * size
    return start, tl.minimum(start + size, seq_len)


@triton.jit
def _store_partials(partials, partial_logs, at, is_row, top, total, sums, VALUE_DIM: tl.constexpr):
    dv = tl.arange(0, sums.shape[1])
    inside = is_row[:, None] & (dv < VALUE_DIM)[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # if a bias hides all of the item's keys: zeros, and a log of HIDDEN
    tl.store(partials + at[:, None] * VALUE_DIM + dv[None, :], sums * (1.0 / total)[:, None], mask=inside)
    tl.store(partial_logs + at, top + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize_on_alignment=LISTS)
def combine_kernel(
    partials,  # f32 [items, H, VALUE_DIM]
    partial_logs,  # f32 [items, H]
    sinks,  # [H], or None
    out,  # [T, H, VALUE_DIM]
    item_starts,  # i32 [R+1]
    query_starts,  # i32 [R+1]
    num_heads,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    STEP: tl.constexpr,  # splits combined at once
):
    """Combine the splits of one head of one request, each with its share of the softmax. The result is zeros if there
    are no keys."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    first = tl.load(item_starts + row).to(tl.int64)
    num_splits = (tl.load(item_starts + row + 1) - first).to(tl.int32)
    i = tl.arange(0, MAX_SPLITS)
    logs = tl.load(partial_logs + (first + i) * num_heads + head, mask=i < num_splits, other=HIDDEN)
    top = tl.max(logs, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(logs - top), 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    dv = tl.arange(0, VALUE_PAD)
    is_value = dv < VALUE_DIM
    result = tl.zeros([VALUE_PAD], tl.float32)
    for start in range(0, num_splits, STEP):
        taken = start + tl.arange(0, STEP)
        at = (first + taken) * num_heads + head
        log = tl.load(partial_logs + at, mask=taken < num_splits, other=HIDDEN)
        inside = (taken < num_splits)[:, None] & is_value[None, :]
        part = tl.load(partials + at[:, None] * VALUE_DIM + dv[None, :], mask=inside, other=0.0)
        result += tl.sum(part * tl.exp2(log - top)[:, None], 0)
    tl.store(
        out + (token * num_heads + head) * VALUE_DIM + dv, (result / total).to(out.dtype.element_ty), mask=is_value
    )
