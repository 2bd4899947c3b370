"""The variants that the attention launchers compile: those of common shapes, and then all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from paged_kernels.triton import decode, prefill, store, tiles, work
from paged_kernels.triton.variants import NAMES, Variant, Variants

_FACTS = ("window", "softcap", "key_bias", "sinks")
_CACHES = {**NAMES, torch.int8: "i8", torch.float8_e4m3fn: "u8"}
_CODES = (torch.int8, torch.float8_e4m3fn)
_DIMS = [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256)]
_BF16 = torch.bfloat16


def variants(card: str) -> Variants:
    """Return the common ones: four query heads of 128 per kv head, blocks of 16, in bfloat16; and float32 models."""
    for facts in ((), _FACTS):
        yield from _attention(card, facts=facts)
    yield from _attention(card, cache_dtype=torch.int8)
    yield from _attention(card, dtype=torch.float32, cache_dtype=torch.float32)
    yield from _writes(_BF16, _BF16)
    yield from _writes(_BF16, torch.float8_e4m3fn)
    yield from _lists(card)
    unit = "*i64"
    yield Variant.of(store.copy_kernel, {"addresses": "*i64", "pairs": "*i64", "unit": unit}, tiles.COPY_TILE)


def more_variants(card: str) -> Variants:
    """Return every head dim, dtype, fact and group, and some block sizes."""
    for dims in _DIMS:
        for cache_dtype in (_BF16, *_CODES):
            yield from _attention(card, dims, cache_dtype=cache_dtype)
            yield from _writes(_BF16, cache_dtype, dims)
    for dims in _DIMS:
        for dtype in (torch.float16, torch.float32):
            for cache_dtype in (dtype, *_CODES):
                yield from _attention(card, dims, dtype=dtype, cache_dtype=cache_dtype)
    yield from _attention(card, cache_dtype=torch.float32)
    for fact in _FACTS:
        yield from _attention(card, facts=(fact,))
    yield from _attention(card, cache_dtype=torch.float8_e4m3fn, facts=_FACTS)
    for group in (1, 7, 32, 71):
        yield from _attention(card, (64, 64), group=group)
        yield from _attention(card, group=group)
    for block_size in (8, 64, 128):
        yield from _attention(card, block_size=block_size)


def _attention(
    card: str,
    dims: tuple[int, int] = (128, 128),
    group: int = 4,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype = _BF16,
    facts: tuple[str, ...] = (),
    block_size: int = 16,
) -> Variants:
    own, cached = f"*{NAMES[dtype]}", f"*{_CACHES[cache_dtype]}"
    lists = dict.fromkeys(("item_rows", "item_starts", "query_starts", "seq_lens", "block_tables"), "*i32")
    counts = dict.fromkeys(("num_requests", "num_heads", "table_stride"), "i32")
    strides = ("q_token_stride", "q_head_stride", "key_block_stride", "value_block_stride")
    common = {"q": own, "key_cache": cached, "value_cache": cached, "scale": "fp32", **lists, **counts}
    common |= dict.fromkeys(strides, "i32:16")
    kinds = zip(_FACTS, ("i32", "fp32", "*fp32", own), strict=True)
    given = {name: kind for name, kind in kinds if name in facts}
    if "key_bias" in facts:
        given["bias_stride"] = "i32"
    if cache_dtype in _CODES:
        given |= {"key_scales": "*fp32", "value_scales": "*fp32"}
    common |= given
    sizes: dict[str, Any] = {"BLOCK_SIZE": block_size}
    shape = (group, *dims, dtype, cache_dtype, card)
    partials = {"partials": "*fp32", "partial_logs": "*fp32"}
    yield _variant(decode.split_kernel, common | partials, sizes | tiles.decode(*shape))
    yield _variant(prefill.prefill_kernel, common | {"out": own}, sizes | tiles.prefill(*shape))
    ends = {name: kind for name, kind in given.items() if name == "sinks"}
    combined = partials | ends | {"out": own, "item_starts": "*i32", "query_starts": "*i32", "num_heads": "i32"}
    yield _variant(decode.combine_kernel, combined, tiles.combine(*dims))


def _writes(dtype: torch.dtype, cache_dtype: torch.dtype, dims: tuple[int, int] = (128, 128)) -> Variants:
    own, cached = f"*{NAMES[dtype]}", f"*{_CACHES[cache_dtype]}"
    signature = {"k": own, "v": own, "key_cache": cached, "value_cache": cached, "slots": "*i64", "num_kv_heads": "i32"}
    strides = [f"{x}_{axis}_stride" for x in "kv" for axis in ("token", "head")]
    signature |= dict.fromkeys([*strides, "key_block_stride", "value_block_stride"], "i32:16")
    if cache_dtype in _CODES:
        signature |= {"key_scales": "*fp32", "value_scales": "*fp32", "scale_block_stride": "i32:16"}
    yield _variant(store.store_kernel, signature, {"BLOCK_SIZE": 16, **tiles.store(8, *dims)})


def _lists(card: str) -> Iterator[Variant]:
    shape = (4, 128, 128, _BF16, _BF16, card)
    room = {"ROOM": tiles.decode(*shape)["ROOM"], **tiles.SPLITS}
    listed = room | {"GROUP": 4, "BLOCK_M": tiles.prefill(*shape)["BLOCK_M"], **tiles.LIST_TILE}
    names = ("query_starts", "seq_lens", "block_tables", "decode_rows", "decode_starts")
    decodes = dict.fromkeys(names, "*i32") | dict.fromkeys(("num_requests", "table_stride"), "i32")
    both = decodes | dict.fromkeys(("prefill_rows", "prefill_starts"), "*i32")
    for signature in (decodes, both | {"window": "i32"}):
        yield _variant(work.list_items_kernel, signature, listed)
        yield _variant(work.share_kernel, signature, {"BLOCK_SIZE": 16, **room, **tiles.SHARE_TILE})


def _variant(kernel: Any, signature: dict[str, str], tile: dict[str, Any]) -> Variant:
    """Return a variant. Parameters that neither the signature nor the tile names are None."""
    mine = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
    absent = {name: None for name in kernel.arg_names if name not in mine and name not in tile}
    return Variant.of(kernel, mine, tile | absent)
