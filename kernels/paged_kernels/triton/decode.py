"""Attention of one query over the blocks of its request: the keys in stretches, side by side, then put together.

The query heads of a kv head share the tile of keys that they all read. It knows nothing of the query's chunk: rows
with more queries are prefill's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paged_kernels.triton.attention import (
    CHANGING,
    HIDDEN,
    LISTS,
    LOG2E,
    block_ids,
    load_scales,
    load_tokens,
    scaled_scores,
    split_size,
)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=LISTS)
def split_kernel(
    q,  # [T, H, DIM]
    key_cache,  # [blocks, K, BLOCK_SIZE, DIM]
    value_cache,  # [blocks, K, BLOCK_SIZE, VALUE_DIM]
    key_scales,  # f32 [blocks, K, BLOCK_SIZE], or None
    value_scales,
    key_bias,  # f32 [H, P], or None
    partials,  # f32 [items, H, VALUE_DIM]  out: the attention over an item's keys alone
    partial_logs,  # f32 [items, H]  out: log2 of its softmax's denominator
    item_rows,  # i32 [items]
    item_starts,  # i32 [R+1]
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    block_tables,  # i32 [R, B]
    num_requests,
    num_heads,
    q_token_stride,
    q_head_stride,
    key_block_stride,
    value_block_stride,
    scale_block_stride,
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
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,  # of queries, keys and their product's factors
    VALUE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // TILES
    in_group = tl.program_id(1) % TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = in_group < GROUP
    heads = kv_head * GROUP + in_group
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, VALUE_PAD)

    for item in range(tl.program_id(0), tl.load(item_starts + num_requests), tl.num_programs(0)):
        row = tl.load(item_rows + item)
        token = tl.load(query_starts + row).to(tl.int64)
        end = tl.load(seq_lens + row)
        num_keys = end
        if window is not None:
            num_keys = tl.minimum(end, window)
        size = split_size(num_keys, SPLIT, MAX_SPLITS)
        start = end - num_keys + (item - tl.load(item_starts + row)) * size
        stop = tl.minimum(start + size, end)
        table = block_tables + row.to(tl.int64) * table_stride

        q_at = q + token * q_token_stride + heads[:, None] * q_head_stride + d[None, :]
        queries = tl.load(q_at, mask=is_head[:, None] & (d < DIM)[None, :], other=0.0).to(DTYPE)  # [BLOCK_H, DIM_PAD]
        top = tl.full([BLOCK_H], HIDDEN, tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        out = tl.zeros([BLOCK_H, VALUE_PAD], tl.float32)
        for first in range(start, stop, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            mask = positions < stop
            blocks = block_ids(table, positions, mask, BLOCK_SIZE)
            keys = load_tokens(
                key_cache, key_block_stride, blocks, kv_head, positions, mask, DIM, DIM_PAD, BLOCK_SIZE, DTYPE
            )
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_H, BLOCK_N]
            if key_scales is not None:
                factors = load_scales(key_scales, scale_block_stride, blocks, kv_head, positions, mask, BLOCK_SIZE)
                scores *= factors[None, :]
            scores = scaled_scores(scores, scale, softcap)
            if key_bias is not None:
                bias_at = key_bias + heads[:, None] * bias_stride + positions[None, :]
                scores += tl.load(bias_at, mask=is_head[:, None] & mask[None, :], other=0.0) * LOG2E
            scores = tl.where(mask[None, :], scores, HIDDEN)
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            probs = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(probs, 1)
            if value_scales is not None:
                factors = load_scales(value_scales, scale_block_stride, blocks, kv_head, positions, mask, BLOCK_SIZE)
                probs *= factors[None, :]
            values = load_tokens(
                value_cache, value_block_stride, blocks, kv_head, positions, mask, VALUE_DIM, VALUE_PAD, BLOCK_SIZE,
                VALUE_DTYPE,
            )  # fmt: skip
            out = tl.dot(probs.to(VALUE_DTYPE), values, out * shrink[:, None], input_precision=PRECISION)
            top = new_top

        at = (item * num_heads + heads).to(tl.int64)  # [BLOCK_H]
        inside = is_head[:, None] & (dv < VALUE_DIM)[None, :]
        total = tl.where(total == 0.0, 1.0, total)  # a bias hides all of the item's keys: zeros, and a log of HIDDEN
        tl.store(partials + at[:, None] * VALUE_DIM + dv[None, :], out * (1.0 / total)[:, None], mask=inside)
        tl.store(partial_logs + at, top + tl.log2(total), mask=is_head)


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
    STEP: tl.constexpr,  # splits taken at once
):
    """One head of one request: its splits' results, each by its share of the softmax. Zeros if it has no keys."""
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
