"""What decode and prefill kernels share: which program does what, rows of K and V out of their blocks, scores.

Kernels find their work in a list that a kernel has made, so that no size has to come back to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e38)  # a score that leaves no trace beside any other
SPLIT_STEP = tl.constexpr(64)  # keys

# Arguments that differ from step to step must not be compiled for, whatever they are.
CHANGING = ["num_requests", "table_stride", "bias_stride"]
LISTS = ["query_starts", "seq_lens", "block_tables", "item_rows", "item_starts"]


@triton.jit
def split_size(num_keys, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys that one program of decode attends to. It depends on the row alone: so does the row's result, bit for bit,
    whatever else is in the batch. Long rows have longer splits, not more."""
    longer = tl.cdiv(tl.cdiv(num_keys, MAX_SPLITS), SPLIT_STEP) * SPLIT_STEP
    return tl.maximum(longer, SPLIT)


@triton.jit(
    do_not_specialize=["num_requests"],
    do_not_specialize_on_alignment=["query_starts", "seq_lens", "decode_starts", "prefill_starts"],
)
def list_items_kernel(
    query_starts,  # i32 [R+1]
    seq_lens,  # i32 [R]
    decode_rows,  # i32 [items]  out: the request of each item
    decode_starts,  # i32 [R+1]  out: the first item of each request, then their number
    prefill_rows,  # i32 [items]  out, or None
    prefill_starts,  # i32 [R+1]  out, or None
    num_requests,
    window,  # or None
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
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
        num_splits = _list(decode_rows, decode_starts, num_splits, r, mask, splits)
        if prefill_rows is not None:
            tiles = tl.where(queries > 1, tl.cdiv(queries * GROUP, BLOCK_M), 0)
            num_tiles = _list(prefill_rows, prefill_starts, num_tiles, r, mask, tiles)


@triton.jit
def _list(rows, starts, num_items, r, mask, counts):
    ends = num_items + tl.cumsum(counts, 0)
    tl.store(starts + r + 1, ends, mask=mask)
    for i in range(tl.max(counts, 0)):
        tl.store(rows + ends - counts + i, r, mask=i < counts)
    return num_items + tl.sum(counts, 0)


@triton.jit
def attend(
    queries,  # [M, DIM_PAD]
    top,  # f32 [M]  the largest score so far
    total,  # f32 [M] or [M, N]  the powers of two of all scores less the top, summed; or what is yet to be summed
    sums,  # f32 [M, VALUE_PAD]  the values, each times that
    heads,  # [M]
    is_row,  # [M]
    positions,  # i32 [N]  of keys that there are
    visible,  # [M, N] or [1, N]  which of them count; None: all
    table,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    key_bias,
    kv_head,
    num_kv_heads,
    bias_stride,
    scale,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
):
    """Takes a tile of keys and values into the running softmax: ``top, total, sums`` with them."""
    DIM_PAD: tl.constexpr = queries.shape[1]
    VALUE_PAD: tl.constexpr = sums.shape[1]
    tokens = token_rows(table, positions, kv_head, num_kv_heads, BLOCK_SIZE)
    keys = load_tokens(key_cache, tokens, DIM, DIM_PAD, queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [M, N]
    if key_scales is not None:
        scores *= tl.load(key_scales + tokens)[None, :]
    scores = scaled_scores(scores, scale, softcap)
    if key_bias is not None:
        bias_at = key_bias + (heads[:, None] * bias_stride + positions[None, :])
        scores += tl.load(bias_at, mask=is_row[:, None], other=0.0) * LOG2E
    if visible is not None:
        scores = tl.where(visible, scores, HIDDEN)
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    probs = tl.exp2(scores - new_top[:, None])
    total = total * shrink + tl.sum(probs, 1) if len(total.shape) == 1 else total * shrink[:, None] + probs
    if value_scales is not None:
        probs *= tl.load(value_scales + tokens)[None, :]
    values = load_tokens(value_cache, tokens, VALUE_DIM, VALUE_PAD, VALUE_DTYPE)
    sums = tl.dot(probs.to(VALUE_DTYPE), values, sums * shrink[:, None], input_precision=PRECISION)
    return new_top, total, sums


@triton.jit
def token_rows(table, positions, kv_head, num_kv_heads, BLOCK_SIZE: tl.constexpr):
    """Which rows of ``[blocks * K * BLOCK_SIZE, DIM]`` hold these positions, u32: half the work of i64, and no cache
    has so many."""
    positions = positions.to(tl.uint32)  # a division by a power of two is then a shift
    blocks = tl.load(table + positions // BLOCK_SIZE).to(tl.uint32)
    return (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_tokens(cache, tokens, DIM: tl.constexpr, DIM_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """K or V in these rows of a cache, as ``[N, DIM_PAD]`` of DTYPE."""
    d = tl.arange(0, DIM_PAD)
    at = (cache + d)[None, :] + (tokens.to(tl.int64) * DIM)[:, None]  # bytes, and numbers, may exceed 2**31
    if DIM == DIM_PAD:
        numbers = tl.load(at)
    else:
        numbers = tl.load(at, mask=(d < DIM)[None, :], other=0)
    return e4m3_numbers(numbers, DTYPE) if cache.dtype.element_ty == tl.uint8 else numbers.to(DTYPE)


@triton.jit
def e4m3_numbers(bits, DTYPE: tl.constexpr):
    """e4m3 bits as numbers. A float16 has the same fields one bit further down, and an exponent that counts from
    2**8 times as little."""
    bits = (bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385  # the sign twice, less its second
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)


@triton.jit
def scaled_scores(scores, scale, softcap):
    """Scores times log2(e), so that a power of two is all that softmax takes."""
    if softcap is None:
        scores = scores * (scale * LOG2E)
    else:
        power = tl.exp2(scores * (scale / softcap * 2.0 * LOG2E))
        scores = softcap * LOG2E * (1.0 - 2.0 / (power + 1.0))  # tanh
    return scores
