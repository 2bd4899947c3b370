"""The arguments of the attention kernels: one record, and the list of work items. Nothing is computed here.

A kernel gets only the record's address. The record has a field for each address and stride of a tensor, each size, and
each counter that the threads share. All fields are int64, except two floats.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numba import from_dtype, types
from numba.extending import intrinsic

_COUNTERS = {"next_store": 0, "num_stored": 64, "next_item": 128, "ticket": 192}  # offsets; each has its own cache line
_OF_LAYER = (
    "q", "q_token", "q_head",  # address; strides in elements
    "k", "k_token", "k_head",
    "v", "v_token", "v_head",
    "out",  # [T, H, Dv]
    "keys", "values",  # caches
    "key_scales", "value_scales",  # f32 [blocks, K, bs], for caches of codes
    "sinks",  # f32 [H], or 0
    "key_bias", "bias_stride",  # f32 [H, positions], or 0
    "dtype", "cache_dtype",  # of q, k, v and out; of the caches
    "block_size",
    "num_tokens",  # tokens whose K/V are stored
    "scale", "softcap",  # float32; softcap is 0 if there is none
)  # fmt: skip
_OF_STEP = (
    "num_requests", "slots", "query_starts", "seq_lens", "tables", "table_stride",
    "num_threads",
    "order", "reach", "nodes", "stack",  # see sharing.py
    "tokens",  # i32: all tokens in order, then those of requests that share blocks, in the order of the groups
)  # fmt: skip
_ROOM = (
    "states", "marks",  # rows of (maximum, sum, Dv values), and the key up to which each has got: see sums.py
    "items",
    "partials",  # rows of the same, each for one tile of keys
    "counters",  # int64: finished pieces of each divided item
    "scratch",
)  # fmt: skip
_COUNTED = ("num_nodes", "num_shared_tokens", "num_shared_rows", "num_items", "num_partials", "num_counters")
_OF_PLAN = (
    "num_kv_heads", "group", "head_dim", "value_dim",
    "window",  # keys that a query sees, its own included; larger than any context if there is no window
    "planned_block_size",  # for comparing block tables; 0: nothing is shared
    "row_tile",  # most query rows of an item
    "few_rows",  # requests with at most this many rows are divided along the keys, if threads would be idle
    "scratch_stride",  # bytes of each thread; the offsets follow
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
EACH_LAYER = struct.Struct(f"{_FIRST}x{len(_OF_LAYER) - 2}qf4xf4x")  # counters, set to zero, then all fields of a layer
EACH_STEP, ROOM = struct.Struct(f"{len(_OF_STEP)}q"), struct.Struct(f"{len(_ROOM)}q")

ITEM = np.dtype(
    [
        (name, "i8")
        for name in (
            "request",  # the request whose block table is read
            "first_token",  # of the item's rows: index into the list of tokens
            "first_row",  # row r is head r % group of token first_token + r // group
            "num_rows",
            "first_position",  # of that token; others follow it. Rows of several requests see all of the item's keys
            "many_requests",  # 1 if the item's rows belong to several requests, else 0
            "key_start",
            "key_stop",
            "tile_start",  # the first tile of keys that this piece computes, and where it stops
            "tile_stop",
            "num_pieces",
            "partial",  # the first row of its partials
            "counter",
            "state",  # the first of its rows' states, or -1
            "goes_on",  # 1: rows begin with the state that is there
            "ends",  # 1: the rows are complete and written; 0: their states are kept for other items
        )
    ]
)

NODE = np.dtype([(name, "i8") for name in ("first", "stop", "key_start", "key_stop")])
"""Requests order[first:stop], whose tables are the same for keys key_start..key_stop."""


def _make_view(dtype: np.dtype[Any]) -> Any:
    record = from_dtype(dtype)

    @intrinsic
    def view(typingctx: Any, address: Any) -> Any:
        """Return the record at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return view


as_arguments, as_item, as_node = _make_view(ARGUMENTS), _make_view(ITEM), _make_view(NODE)
NEXT_STORE, NUM_STORED = OFFSET["next_store"], OFFSET["num_stored"]
NEXT_ITEM, TICKET = OFFSET["next_item"], OFFSET["ticket"]
