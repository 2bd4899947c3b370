"""Operations on whole rows of logits for choosing tokens: the largest, and the k largest without sorting the others.

One int64 key holds (value, id), so that a plain maximum has the right order: value descending, id ascending, NaN first.
Launchers have the signatures of ``paged_kernels.reference``. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paged_kernels import reference
from paged_kernels.triton.variants import FUSION, NAMES, Variant, Variants, row_stride

_PART = 4096  # ids for one program of argmax
_CHUNK = 64  # ids of which the largest is found first, for the k largest
_CHUNKS = 32  # chunks for one program
_LOW31 = 0x7FFFFFFF


# ---- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _keys(values, ids):
    """Return int64 keys in the order of (float32 value, -id). -0.0 counts as 0.0; NaN is above everything."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _argmax_parts(x, x_row, keys, width, BLOCK: tl.constexpr):
    """Find the largest key of ``BLOCK`` ids of a row. Ids past ``width`` come after every real -inf."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * x_row + ids, mask=ids < width, other=float("-inf")).to(tl.float32)
    tl.store(keys + row * tl.num_programs(1) + part, tl.max(_keys(values, ids), 0))


@triton.jit
def _argmax_combine(x, x_row, keys, num_parts, indices, maxima, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    lowest = -0x7FFFFFFFFFFFFFFF
    key = tl.max(tl.load(keys + row * num_parts + part, mask=part < num_parts, other=lowest), 0)
    index = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    tl.store(indices + row, index)
    tl.store(maxima + row, tl.load(x + row * x_row + index).to(tl.float32))


@triton.jit
def _chunk_peaks(x, x_row, keys, num_chunks, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Store for each chunk of consecutive ids the key of (its largest value, its own number)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    ids = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    values = tl.load(x + row * x_row + ids, mask=ids < width, other=float("-inf")).to(tl.float32)
    peaks = tl.max(_keys(values, tl.broadcast_to(chunk[:, None], CHUNKS, CHUNK)), 1)
    tl.store(keys + row * num_chunks + chunk, peaks, mask=chunk < num_chunks)


@triton.jit
def _chunk_keys(x, x_row, chosen, keys, width, CHUNK: tl.constexpr):
    """Store the keys of all ids of one chosen chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    chunk = (0x7FFFFFFF - (tl.load(chosen + place) & 0x7FFFFFFF)).to(tl.int32)
    at = tl.arange(0, CHUNK)
    ids = chunk * CHUNK + at
    values = tl.load(x + row * x_row + ids, mask=ids < width, other=float("-inf")).to(tl.float32)
    tl.store(keys + place * CHUNK + at, _keys(values, ids))


# ---- launchers -------------------------------------------------------------------------------------------------


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``logits [S,V] -> (index i64 [S], maximum f32 [S])``: the first of equal maxima.

    A row with a NaN has NaN as its maximum, and the first NaN's index.
    """
    if not _fits(logits):
        return reference.argmax_rows(logits)
    (num_rows, width), device = logits.shape, logits.device
    indices = torch.empty(num_rows, dtype=torch.int64, device=device)
    maxima = torch.empty(num_rows, dtype=torch.float32, device=device)
    num_parts = triton.cdiv(width, _PART)
    keys = torch.empty(num_rows, num_parts, dtype=torch.int64, device=device)
    if num_rows:
        with torch.cuda.device_of(logits):
            _argmax_parts[(num_rows, num_parts)](logits, row_stride(logits), keys, width, **_PARTS_TILE)
            _argmax_combine[(num_rows,)](
                logits, row_stride(logits), keys, num_parts, indices, maxima, **_combine_tile(num_parts)
            )
    return indices, maxima


def top_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ``scores f32 [S,V] -> (values f32 [S,k], ids i64 [S,k])`` by (value descending, id ascending). There must
    be no NaN.

    The k chunks with the largest maxima (the lowest chunks of equals) hold the k largest; only those chunks are sorted.
    """
    if not _fits(scores):
        return reference.top_rows(scores, k)
    (num_rows, width), device = scores.shape, scores.device
    num_chunks = triton.cdiv(width, _CHUNK)
    chosen = torch.empty(num_rows, num_chunks, dtype=torch.int64, device=device)
    if num_rows:
        grid = (num_rows, triton.cdiv(num_chunks, _CHUNKS))
        with torch.cuda.device_of(scores):
            _chunk_peaks[grid](scores, row_stride(scores), chosen, num_chunks, width, **_PEAKS_TILE)
    if k < num_chunks:
        chosen = chosen.topk(k).values  # i64 [S,k]
    keys = torch.empty(num_rows, chosen.shape[1] * _CHUNK, dtype=torch.int64, device=device)
    if num_rows and k:
        with torch.cuda.device_of(scores):
            _chunk_keys[chosen.shape](scores, row_stride(scores), chosen, keys, width, **_CHUNK_TILE)
    ids = _LOW31 - (keys.topk(k).values & _LOW31)
    return scores.gather(1, ids), ids


def warm_up(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile, or load from disk, the kernels that rows of this kind need."""
    for each in {dtype, torch.float32}:  # logits that were changed are float32
        argmax_rows(torch.zeros(2, width, dtype=each, device=device))
    top_rows(torch.zeros(2, width, device=device), 1)


def _fits(rows: Tensor) -> bool:
    return rows.dtype in NAMES and rows.stride(1) == 1 and rows.shape[1] > 0


# ---- tiles -----------------------------------------------------------------------------------------------------

_PARTS_TILE = {"BLOCK": _PART, "num_warps": 4, **FUSION}
_PEAKS_TILE = {"CHUNK": _CHUNK, "CHUNKS": _CHUNKS, "num_warps": 4, **FUSION}
_CHUNK_TILE = {"CHUNK": _CHUNK, "num_warps": 1, **FUSION}


def _combine_tile(num_parts: int) -> dict[str, int]:
    return {"PARTS": triton.next_power_of_2(num_parts), "num_warps": 1, **FUSION}


# ---- variants that launchers compile ---------------------------------------------------------------------------


def variants(card: str) -> Variants:
    """Return what the sampler uses: bfloat16 logits for argmax, float32 scores for the k largest."""
    yield from _argmax_variants("bf16", (32,))
    yield from _top_variants("fp32")


def more_variants(card: str) -> Variants:
    """Return every dtype, and vocabularies from small to huge."""
    for name in NAMES.values():
        yield from _argmax_variants(name, (1, 8, 64))
        yield from _top_variants(name)


def _argmax_variants(dtype: str, parts: tuple[int, ...]) -> Variants:
    rows = {"x": f"*{dtype}", "x_row": "i32:16", "keys": "*i64"}
    yield Variant.of(_argmax_parts, rows | {"width": "i32:16"}, _PARTS_TILE)
    for num in parts:
        signature = rows | {"num_parts": "i32", "indices": "*i64", "maxima": "*fp32"}
        yield Variant.of(_argmax_combine, signature, _combine_tile(num))


def _top_variants(dtype: str) -> Variants:
    rows = {"x": f"*{dtype}", "x_row": "i32:16", "keys": "*i64", "width": "i32:16"}
    yield Variant.of(_chunk_peaks, rows | {"num_chunks": "i32"}, _PEAKS_TILE)
    yield Variant.of(_chunk_keys, rows | {"chosen": "*i64"}, _CHUNK_TILE)
