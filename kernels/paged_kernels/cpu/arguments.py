"""What attention's kernels are given: one record, and the list of work. It computes nothing.

The address of the record is all that a kernel gets. Addresses and strides of tensors, sizes, counters that its threads
share: each has its field. All are int64, but two.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numba import from_dtype, types
from numba.extending import intrinsic

_COUNTERS = {"next_store": 0, "num_stored": 64, "next_item": 128, "ticket": 192}  # each in a cache line of its own
_OF_LAYER = (
    "q", "q_token", "q_head",  # address; strides in elements
    "k", "k_token", "k_head",
    "v", "v_token", "v_head",
    "out",  # [T, H, Dv]
    "keys", "values",  # the caches
    "key_scales", "value_scales",  # f32 [blocks, K, bs] of caches of codes
    "sinks",  # f32 [H], or 0
    "key_bias", "bias_stride",  # f32 [H, positions], or 0
    "dtype", "cache_dtype",  # of q, k, v, out; of the caches
    "block_size",
    "num_tokens",  # to store
    "scale", "softcap",  # float32; softcap 0 if none
)  # fmt: skip
_OF_STEP = (
    "num_requests", "slots", "query_starts", "seq_lens", "tables", "table_stride",
    "num_threads",
    "order", "reach", "nodes", "stack",  # see sharing.py
    "tokens",  # i32: all tokens as they come, then those of requests that share, in their order
)  # fmt: skip
_ROOM = (
    "states", "marks",  # rows of (maximum, sum, Dv values), and up to which key they go: see sums.py
    "items",
    "partials",  # rows of the same, of one tile of keys each
    "counters",  # int64: pieces finished of an item
    "scratch",
)  # fmt: skip
_COUNTED = ("num_nodes", "num_shared_tokens", "num_shared_rows", "num_items", "num_partials", "num_counters")
_OF_PLAN = (
    "num_kv_heads", "group", "head_dim", "value_dim",
    "window",  # keys a query sees, itself among them; larger than any context if all
    "planned_block_size",  # by which tables are compared; 0: nothing is shared
    "row_tile",  # query rows of an item, at most
    "few_rows",  # up to so many are cut along the keys, if threads would be idle
    "scratch_stride",  # bytes of each thread, parted as follows
    "at_q", "at_scores", "at_weights", "at_out", "at_sums", "at_keys", "at_values", "at_staging",
    "at_tables", "at_rows",
)  # fmt: skip
_FLOATS = ("scale", "softcap")
_FIRST = 256

_FIELDS = [*_OF_LAYER, *_OF_STEP, *_ROOM, *_COUNTED, *_OF_PLAN]
_NAMES = [*_COUNTERS, *_FIELDS]
_OFFSETS = [*_COUNTERS.values(), *range(_FIRST, _FIRST + 8 * len(_FIELDS), 8)]
ARGUMENTS = np.dtype(
    {
        "names": _NAMES,
        "formats": ["f4" if name in _FLOATS else "i8" for name in _NAMES],
        "offsets": _OFFSETS,
        "itemsize": _OFFSETS[-1] + 8,
    }
)
OFFSET = dict(zip(_NAMES, _OFFSETS, strict=True))
EACH_LAYER = struct.Struct(f"{_FIRST}x{len(_OF_LAYER) - 2}qf4xf4x")  # the counters at zero, then all of a layer
EACH_STEP, ROOM = struct.Struct(f"{len(_OF_STEP)}q"), struct.Struct(f"{len(_ROOM)}q")

ITEM = np.dtype(
    [
        (name, "i8")
        for name in (
            "request",  # whose block table is read
            "first_token",  # of its rows: where in the list of tokens
            "first_row",  # row r is head r % group of token first_token + r // group
            "num_rows",
            "first_position",  # of that token; others follow it. Rows of several requests see all of the item's keys
            "many_requests",  # 1 if so, else 0
            "key_start",
            "key_stop",
            "tile_start",  # of the keys' tiles, the first that this piece computes, and where it stops
            "tile_stop",
            "num_pieces",
            "partial",  # the first row of its partials
            "counter",
            "state",  # the first of its rows' states, or -1
            "goes_on",  # 1: rows begin with the state that is there
            "ends",  # 1: rows are written; 0: they become a state, that others go on from
        )
    ]
)

NODE = np.dtype([(name, "i8") for name in ("first", "stop", "key_start", "key_stop")])
"""Requests order[first:stop], whose tables are the same for keys key_start..key_stop."""


def _make_view(dtype: np.dtype[Any]) -> Any:
    record = from_dtype(dtype)

    @intrinsic
    def view(typingctx: Any, address: Any) -> Any:
        """The record at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return view


as_arguments, as_item, as_node = _make_view(ARGUMENTS), _make_view(ITEM), _make_view(NODE)
NEXT_STORE, NUM_STORED = OFFSET["next_store"], OFFSET["num_stored"]
NEXT_ITEM, TICKET = OFFSET["next_item"], OFFSET["ticket"]
