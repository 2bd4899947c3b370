"""What lies where in the array that attention's kernels get, and in the list of work. It computes nothing.

The array is of int64, and an address of it is all that a kernel is given. Addresses and strides of tensors, sizes,
counters that its threads share: each has its place below.
"""

from __future__ import annotations

import struct

# Counters first, each in a cache line of its own; what changes from layer to layer next.
NEXT_STORE, NUM_STORED, NEXT_ITEM, TICKET = 0, 8, 16, 24
(
    Q, Q_TOKEN, Q_HEAD,  # address; strides in elements
    K, K_TOKEN, K_HEAD,
    V, V_TOKEN, V_HEAD,
    OUT,  # [T, H, Dv]
    KEYS, VALUES,  # the caches
    KEY_SCALES, VALUE_SCALES,  # f32 [blocks, K, bs] of caches of codes
    SINKS,  # f32 [H], or 0
    KEY_BIAS, BIAS_STRIDE,  # f32 [H, positions], or 0
    DTYPE, CACHE_DTYPE,  # of q, k, v, out; of the caches
    BLOCK_SIZE,
    NUM_TOKENS,  # to store
    SCALE, SOFTCAP,  # float32 in the lower half; softcap 0 if none
    NUM_REQUESTS, SLOTS, QUERY_STARTS, SEQ_LENS, TABLES, TABLE_STRIDE,
    NUM_KV_HEADS, GROUP, HEAD_DIM, VALUE_DIM,
    WINDOW,  # keys a query sees, itself among them; larger than any context if all
    ITEMS, NUM_ITEMS,
    PARTIALS, NUM_PARTIALS,  # f32 rows of (maximum, sum, Dv values) of unfinished tiles
    COUNTERS, NUM_COUNTERS,  # int64: stretches finished of a tile
    SCRATCH, SCRATCH_STRIDE,  # bytes of each thread, parted as follows
    AT_Q, AT_SCORES, AT_OUT, AT_KEYS, AT_VALUES, AT_ROWS,
    NUM_ARGS,
) = range(32, 32 + 49)  # fmt: skip
EACH_LAYER = struct.Struct("256x21qf4xf4x")  # the counters at zero, then Q to SOFTCAP

# An item of the list of work.
REQUEST, FIRST_ROW, NUM_ROWS, KEY_START, KEY_STOP, SPLIT, NUM_SPLITS, PARTIAL, COUNTER, ITEM_SIZE = range(10)
