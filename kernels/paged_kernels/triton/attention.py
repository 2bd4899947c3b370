"""What the decode and prefill kernels share: loading rows of K and V from blocks, scores, and the running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e38)  # a score so low that it has no effect beside any other

# These arguments change from step to step, so Triton must not compile for their values.
CHANGING = ["num_requests", "table_stride", "bias_stride"]
LISTS = ["query_starts", "seq_lens", "block_tables", "item_rows", "item_starts"]


@triton.jit
def load_queries(
    q, tokens, heads, is_row, token_stride, head_stride, DIM: tl.constexpr, DIM_PAD: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Load a row for each token and head: ``[M, DIM_PAD]`` of DTYPE."""
    d = tl.arange(0, DIM_PAD)
    at = q + tokens[:, None] * token_stride + heads[:, None] * head_stride + d[None, :]
    return tl.load(at, mask=is_row[:, None] & (d < DIM)[None, :], other=0.0).to(DTYPE)


@triton.jit
def attend(
    queries,  # [M, DIM_PAD]
    heads,  # [M]
    is_row,  # [M]
    top,  # f32 [M]  the largest score so far
    # f32 [M] or [M, N]: the sum of 2 ** (score - top) over all scores; with [M, N] it is not summed up yet.
    total,
    sums,  # f32 [M, VALUE_PAD]  the sum of the values with these weights
    positions,  # i32 [N]  of the keys
    visible,  # [M, N] or [1, N]  which keys count; None: all
    table,
    cache,  # (key_cache, value_cache, key_scales, value_scales)
    kv_head,
    num_kv_heads,
    facts,  # (key_bias, bias_stride, scale, softcap)
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
):
    """Take a tile of keys and values into the running softmax. Returns the new ``top, total, sums``."""
    key_cache, value_cache, key_scales, value_scales = cache
    tokens = token_rows(table, positions, kv_head, num_kv_heads, BLOCK_SIZE)
    keys = load_tokens(key_cache, tokens, DIM, queries.shape[1], queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [M, N]
    if key_scales is not None:
        scores *= tl.load(key_scales + tokens)[None, :]
    scores = finished_scores(scores, heads, is_row, positions, visible, facts)
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new_top)
    probs = tl.exp2(scores - new_top[:, None])
    total = total * shrink + tl.sum(probs, 1) if len(total.shape) == 1 else total * shrink[:, None] + probs
    if value_scales is not None:
        probs *= tl.load(value_scales + tokens)[None, :]
    values = load_tokens(value_cache, tokens, VALUE_DIM, sums.shape[1], VALUE_DTYPE)
    sums = tl.dot(probs.to(VALUE_DTYPE), values, sums * shrink[:, None], input_precision=PRECISION)
    return new_top, total, sums


@triton.jit
def finished_scores(scores, heads, is_row, positions, visible, facts):
    """Return the products of queries and keys as the softmax takes them: scaled, capped, with their bias, and HIDDEN
    where a key is not visible."""
    key_bias, bias_stride, scale, softcap = facts
    scores = scaled_scores(scores, scale, softcap)
    if key_bias is not None:
        bias_at = key_bias + (heads[:, None] * bias_stride + positions[None, :])
        scores += tl.load(bias_at, mask=is_row[:, None], other=0.0) * LOG2E
    if visible is not None:
        scores = tl.where(visible, scores, HIDDEN)
    return scores


@triton.jit
def token_rows(table, positions, kv_head, num_kv_heads, BLOCK_SIZE: tl.constexpr):
    """Return the rows of ``[blocks * K * BLOCK_SIZE, DIM]`` that hold these positions, as u32: that is half the work of
    i64, and no cache has so many rows."""
    positions = positions.to(tl.uint32)  # so that a division by a power of two is a shift
    blocks = tl.load(table + positions // BLOCK_SIZE).to(tl.uint32)
    return (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_tokens(cache, tokens, DIM: tl.constexpr, DIM_PAD: tl.constexpr, DTYPE: tl.constexpr):
    """Load K or V from these rows of a cache, as ``[N, DIM_PAD]`` of DTYPE."""
    d = tl.arange(0, DIM_PAD)
    at = (cache + d)[None, :] + (tokens.to(tl.int64) * DIM)[:, None]  # an offset may exceed 2**31
    if DIM == DIM_PAD:
        numbers = tl.load(at)
    else:
        numbers = tl.load(at, mask=(d < DIM)[None, :], other=0)
    return e4m3_numbers(numbers, DTYPE) if cache.dtype.element_ty == tl.uint8 else numbers.to(DTYPE)


@triton.jit
def e4m3_numbers(bits, DTYPE: tl.constexpr):
    """Convert e4m3 bits to numbers. A float16 has the same fields one bit lower, with an exponent bias that makes the
    same bits mean 2**8 times less."""
    bits = (bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385  # the sign is in two bits; clear the lower
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)


@triton.jit
def scaled_scores(scores, scale, softcap):
    """Return the scores times log2(e), so that the softmax needs powers of two only."""
    if softcap is None:
        scores = scores * (scale * LOG2E)
    else:
        power = tl.exp2(scores * (scale / softcap * 2.0 * LOG2E))
        scores = softcap * LOG2E * (1.0 - 2.0 / (power + 1.0))  # tanh
    return scores
