"""Kernels that write K/V: a step's new tokens to their slots, and whole blocks to other places.

They know slots, block ids and addresses, and nothing of requests.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 near it has no fraction bits, and ties are rounded to even


@triton.jit(do_not_specialize_on_alignment=["slots"])
def store_kernel(
    k,  # [T, K, DIM]
    v,  # [T, K, VALUE_DIM]
    key_cache,  # [blocks, K, BLOCK_SIZE, DIM]
    value_cache,  # [blocks, K, BLOCK_SIZE, VALUE_DIM]
    key_scales,  # f32 [blocks, K, BLOCK_SIZE], or None
    value_scales,  # f32 [blocks, K, BLOCK_SIZE], or None
    slots,  # i64 [T]
    num_kv_heads,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    key_block_stride,
    value_block_stride,
    scale_block_stride,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # heads of one program
):
    """Store K and V of one token and some heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    is_head = heads < num_kv_heads
    rows = heads * BLOCK_SIZE + offset  # [HEADS]  rows within the block
    if key_scales is not None:
        key_scales += block * scale_block_stride
        value_scales += block * scale_block_stride
    _store_rows(
        k + token * k_token_stride, k_head_stride, key_cache + block * key_block_stride, key_scales, heads, rows,
        is_head, DIM, DIM_PAD,
    )  # fmt: skip
    _store_rows(
        v + token * v_token_stride, v_head_stride, value_cache + block * value_block_stride, value_scales, heads, rows,
        is_head, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip


@triton.jit
def _store_rows(
    source, head_stride, block, scales, heads, rows, is_head, DIM: tl.constexpr, DIM_PAD: tl.constexpr
):  # fmt: skip
    d = tl.arange(0, DIM_PAD)
    mask = is_head[:, None] & (d < DIM)[None, :]
    x = tl.load(source + heads[:, None] * head_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    at = block + rows[:, None] * DIM + d[None, :]
    if scales is None:
        tl.store(at, x.to(at.dtype.element_ty), mask=mask)
    else:
        IS_INT8: tl.constexpr = at.dtype.element_ty == tl.int8
        LARGEST: tl.constexpr = 127.0 if IS_INT8 else 448.0
        scale, numbers = _scaled(x, LARGEST)
        codes = (numbers + ROUNDER - ROUNDER).to(tl.int8) if IS_INT8 else e4m3_bits(numbers)
        tl.store(scales + rows, scale, mask=is_head)
        tl.store(at, codes, mask=mask)


@triton.jit
def _scaled(x, LARGEST: tl.constexpr):
    """Return each row's scale, and its numbers within LARGEST. A row with an infinity or a NaN becomes zeros, with a
    scale that isn't finite."""
    largest = tl.max(tl.abs(x), 1)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    scale = tl.where(largest == 0.0, 1.0, scale)
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    is_number = tl.abs(scale) < float("inf")
    numbers = tl.div_rn(x, tl.broadcast_to(tl.where(is_number, scale, 1.0)[:, None], x.shape))
    numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
    return scale, tl.where(is_number[:, None], numbers, 0.0)


@triton.jit
def e4m3_bits(x):
    """Return float32 numbers of at most 448 as the nearest e4m3 bits, half to even, by integer operations, because not
    every GPU has the type."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    size = bits.to(tl.float32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 3 fraction bits; bias 7 instead of 127
    subnormal = (size * 512.0 + ROUNDER - ROUNDER).to(tl.uint32)  # in steps of 2**-9; 8 is the smallest normal number
    return (sign | tl.where(size < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit(do_not_specialize_on_alignment=["addresses"])
def copy_kernel(
    addresses,  # i64 [caches, 3]  of the first block of source and of target, and words in a block
    pairs,  # i64 [P, 2]  source block, target block
    unit,  # has the type that is copied; it isn't read
    NUM_WORDS: tl.constexpr,  # words of one program
):
    """Copy a part of one block of one cache."""
    cache = addresses + tl.program_id(1) * 3
    pair = pairs + tl.program_id(0) * 2
    num_words = tl.load(cache + 2)
    words = tl.program_id(2) * NUM_WORDS + tl.arange(0, NUM_WORDS)
    source = tl.load(cache).to(unit.dtype)
    target = tl.load(cache + 1).to(unit.dtype)
    mask = words < num_words
    numbers = tl.load(source + tl.load(pair) * num_words + words, mask=mask)
    tl.store(target + tl.load(pair + 1) * num_words + words, numbers, mask=mask)
