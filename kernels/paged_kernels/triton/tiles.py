"""Tile sizes: how much work one program does, with how many warps and stages, by head dims, dtype and card. There is no
kernel here.

A tile is a dict of constexprs and compiler options, as a launch takes them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from paged_kernels.triton.variants import FUSION

Tile = dict[str, Any]

MAX_PROGRAMS = 8192  # of a decode launch; if there are more items, programs take several
LIST_TILE: Tile = {"BLOCK": 256, "num_warps": 4, **FUSION}
SHARE_TILE: Tile = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, **FUSION}
COPY_TILE: Tile = {"NUM_WORDS": 1024, "num_warps": 4, **FUSION}
# The shortest split keeps a card's memory busy, and 32 splits fill the card with any number of kv heads.
SPLITS: Tile = {"SPLIT": 512, "MAX_SPLITS": 32}


# Pipeline stages of a loop that loads block ids, then the blocks' contents, then computes: one or two tiles of K/V are
# loaded ahead.
_ONE_AHEAD, _TWO_AHEAD = 3, 5


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@cache
def card_of(device: torch.device) -> str:
    """Return ``hip``, ``sm_90`` for NVIDIA cards with at least as much shared memory as that, else ``sm_80``."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "hip"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def dims(head_dim: int, value_head_dim: int) -> Tile:
    """Return the head dims, and the powers of two that hold them, at least 16, because matrix products need that."""
    pads = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_head_dim))
    return {"DIM": head_dim, "VALUE_DIM": value_head_dim, **dict(zip(("DIM_PAD", "VALUE_PAD"), pads, strict=True))}


def products(dtype: torch.dtype, cache_dtype: torch.dtype) -> Tile:
    """Return the dtypes in which queries and keys, then probabilities and values, are multiplied. Sums are always
    float32."""
    quantised = cache_dtype in (torch.int8, torch.float8_e4m3fn)
    if interpreted():  # the interpreter can't compute with bfloat16
        return {"DTYPE": tl.float32, "VALUE_DTYPE": tl.float32, "PRECISION": "ieee"}
    if dtype is torch.float32 or (cache_dtype is not dtype and not quantised):
        # Codes of a quantised cache have no more digits than tf32, and rounding the queries to tf32 costs less than the
        # codes' error.
        return {"DTYPE": tl.float32, "VALUE_DTYPE": tl.float32, "PRECISION": "tf32" if quantised else "ieee"}
    own = tl.bfloat16 if dtype is torch.bfloat16 else tl.float16
    # A probability times a value's scale may be smaller than any float16.
    return {"DTYPE": own, "VALUE_DTYPE": tl.bfloat16 if quantised else own, "PRECISION": "ieee"}


def decode(group: int, head_dim: int, value_head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, card: str
) -> Tile:  # fmt: skip
    """Return the tile of ``decode.split_kernel``: keys and values of 32 KiB at a time."""
    sizes, types = dims(head_dim, value_head_dim), products(dtype, cache_dtype)
    num_bytes = max(cache_dtype.itemsize, 2) * (sizes["DIM_PAD"] + sizes["VALUE_PAD"])
    keys = min(max(_power_below((32 << 10) // num_bytes), 16), 128 if cache_dtype.itemsize > 1 else 64)
    if types["DTYPE"] is tl.float32 and not interpreted():
        keys = min(keys, 16)
    rows = min(max(16, triton.next_power_of_2(group)), 64 if sizes["VALUE_PAD"] <= 128 else 16)
    options = {"num_warps": 4, "num_stages": 2 if card == "hip" else _TWO_AHEAD}
    sizes |= {"BLOCK_H": rows, "BLOCK_N": keys, "GROUP": group, "ROOM": max(rows // group, 1)}
    return {**sizes, **types, **SPLITS, **options, **FUSION}


def combine(head_dim: int, value_head_dim: int) -> Tile:
    """Return the tile of ``decode.combine_kernel``."""
    sizes = dims(head_dim, value_head_dim)
    sizes = {name: sizes[name] for name in ("VALUE_DIM", "VALUE_PAD")}
    return {"MAX_SPLITS": SPLITS["MAX_SPLITS"], "STEP": 8, **sizes, "num_warps": 4, **FUSION}


def prefill(group: int, head_dim: int, value_head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, card: str
) -> Tile:  # fmt: skip
    """Return the tile of ``prefill.prefill_kernel``."""
    sizes, types = dims(head_dim, value_head_dim), products(dtype, cache_dtype)
    widest = max(sizes["DIM_PAD"], sizes["VALUE_PAD"])
    wide = types["DTYPE"] is tl.float32 and not interpreted()
    rows, keys, warps = next(tile for limit, tile in (_FLOAT32 if wide else _PREFILL[card]) if widest <= limit)
    two_ahead = card != "hip" and widest <= 128
    stages = 2 if card == "hip" else _TWO_AHEAD if two_ahead else _ONE_AHEAD
    options = {"num_warps": warps, "num_stages": stages}
    return {"BLOCK_M": rows, "BLOCK_N": keys, "GROUP": group, **sizes, **types, **options, **FUSION}


# (widest padded head dim, (rows, keys, warps)). On sm_80 Triton arranges warps along the rows, where they need not
# synchronise for a softmax, only if there are as many rows as value dims.
_FLOAT32 = ((64, (32, 32, 4)), (256, (16, 16, 4)))
_PREFILL = {
    "sm_90": ((128, (128, 64, 8)), (256, (128, 32, 8))),
    "sm_80": ((64, (128, 64, 8)), (128, (128, 32, 8)), (256, (64, 32, 8))),
    "hip": ((128, (128, 32, 4)), (256, (64, 32, 8))),
}


@cache
def store(num_kv_heads: int, head_dim: int, value_head_dim: int) -> Tile:
    """Return the tile of ``store.store_kernel``: up to 4,096 numbers at a time."""
    sizes = dims(head_dim, value_head_dim)
    widest = max(sizes["DIM_PAD"], sizes["VALUE_PAD"])
    heads = min(triton.next_power_of_2(num_kv_heads), max(4096 // widest, 1))
    return {"HEADS": heads, **sizes, "num_warps": 4, **FUSION}


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number else 1
