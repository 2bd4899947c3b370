"""The reference: each operation in plain torch, with the same signature as its fast launchers.

It is written to be read and to be right, on any device and in any float dtype. Attention and norms compute in float32.

Shape letters: T tokens, R requests, B blocks per table, H query heads, K kv heads, D head dim, Dv value head dim, S
rows, V vocabulary, N width, bs block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_kernels.layers import Extras, LayerCache

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest magnitude of a quantised token


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Store ``k [T,K,D], v [T,K,Dv]`` in the cache at ``slot_mapping i64 [T]``, block * bs + offset.

    Values are rounded to the cache's dtype. Those of quantised caches get scales, which are stored too: see
    ``quantize``.
    """
    block_size = cache.keys.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    for x, into, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        if scales is None:
            if into.dtype in LARGEST:
                raise ValueError(f"a cache of {into.dtype} needs key_scales and value_scales")
            into[blocks, :, offsets] = x.to(into.dtype)
        else:
            codes, scale = quantize(x, into.dtype)
            # Written as bytes, because not every device can index float8.
            into.view(torch.uint8)[blocks, :, offsets] = codes.view(torch.uint8)
            scales[blocks, :, offsets] = scale


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x [...,D] -> (codes [...,D] of int8 or float8_e4m3fn, scale f32 [...])``, so that x is about codes *
    scale.

    The largest magnitude of each row becomes the largest number of ``dtype``, and the others are rounded half to even:
    a row's codes depend on that row only. A row of zeros has the scale 1. A row with an infinity or a NaN reads as NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1)
    # Divided by a tensor: for a number, GPUs would multiply by its rounded inverse.
    scale = scale / torch.full_like(scale, LARGEST[dtype])
    scale = scale.where(scale != 0, 1.0)
    codes = (x / scale[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype]).nan_to_num(0.0)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, target) in every cache ``[blocks, ...]``, one pair after another."""
    for source, target in pairs:
        for cache in caches:
            cache[target].copy_(cache[source])


def paged_attention(
    q: Tensor, cache: LayerCache, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, extras: Extras
) -> Tensor:
    """Compute causal attention of packed queries over the blocks of their own request.

    ``q [T,H,D], query_starts i32 [R+1], seq_lens i32 [R], block_tables i32 [R,B] -> [T,H,Dv]`` in q's dtype. Query i of
    a request's n is at position ``seq_len - n + i``. ALiBi's slope times the query's position is the same for all keys,
    so its bias depends on the key's position alone. Slots past ``seq_len``, and blocks that are wholly before the first
    query's window, never affect the result. A request with ``seq_len`` 0 is padding: its rows are zeros.
    """
    scale, sliding_window, softcap, sinks, key_bias = extras
    num_heads, num_kv_heads = q.shape[1], cache.keys.shape[1]
    out = q.new_empty(q.shape[0], num_heads, cache.values.shape[3])
    starts = query_starts.tolist()
    for r, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[r], starts[r + 1])
        num_queries = rows.stop - rows.start
        if seq_len == 0:
            out[rows] = 0
        if num_queries == 0 or seq_len == 0:
            continue
        first_query = seq_len - num_queries
        first_key = 0 if sliding_window is None else max(0, first_query - sliding_window + 1)
        keys = _tokens(cache.keys, cache.key_scales, block_tables[r], first_key, seq_len)  # f32 [K, n, D]
        values = _tokens(cache.values, cache.value_scales, block_tables[r], first_key, seq_len)  # f32 [K, n, Dv]
        keys = keys.repeat_interleave(num_heads // num_kv_heads, 0)  # [H, n, D]
        values = values.repeat_interleave(num_heads // num_kv_heads, 0)  # [H, n, Dv]

        scores = (q[rows].float().transpose(0, 1) @ keys.transpose(1, 2)) * scale  # [H, queries, n]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if key_bias is not None:
            scores = scores + key_bias[:, None, first_key:seq_len].float()
        query_pos = torch.arange(first_query, seq_len, device=q.device)[:, None]
        key_pos = torch.arange(first_key, seq_len, device=q.device)[None, :]
        hidden = key_pos > query_pos
        if sliding_window is not None:
            hidden |= key_pos <= query_pos - sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(-1, num_queries, 1)
            probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            probs = scores.softmax(-1)
        out[rows] = (probs @ values).transpose(0, 1).to(q.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x [..., N], weight [N] -> [..., N]``: x / rms(x) in x's dtype, times weight, as Llama does."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``x, residual [..., N], weight [N] -> (their sum, its norm) [..., N]``. The sum is rounded, then
    normed."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``gate, up [..., N] -> silu(gate) * up [..., N]``. The silu is rounded to gate's dtype before the
    product."""
    return torch.nn.functional.silu(gate) * up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``q [T,H,D], k [T,K,D]`` in place by ``cos, sin [T,rotary_dim]``: the first half with the second half, as
    Llama does. Dimensions past rotary_dim stay as they are."""
    rotary_dim = cos.shape[-1]
    for x in (q, k):
        part = x[..., :rotary_dim]
        first, second = part.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        part.copy_(part * cos[:, None] + turned * sin[:, None])


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as ``rotary``, into new contiguous tensors."""
    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    rotary(q, k, cos, sin)
    return q, k


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``logits [S,V] -> (index i64 [S], maximum f32 [S])``: the first of equal maxima.

    A row with a NaN has NaN as its maximum, and the first NaN's index.
    """
    maxima, indices = logits.float().max(-1)
    return indices, maxima


def top_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ``scores f32 [S,V] -> (values f32 [S,k], ids i64 [S,k])`` by (value descending, id ascending). There must
    be no NaN."""
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _tokens(cache: Tensor, scales: Tensor | None, table: Tensor, start: int, stop: int) -> Tensor:
    """Return tokens start..stop of one request, as float32 ``[K, stop - start, D]``."""
    block_size = cache.shape[2]
    first, last = start // block_size, -(-stop // block_size)
    used = table[first:last].long()
    if scales is None:
        blocks = cache[used].float()  # [blocks, K, bs, D]
    else:
        blocks = cache.view(torch.uint8)[used].view(cache.dtype).float() * scales[used][..., None]
    tokens = blocks.transpose(0, 1).flatten(1, 2)  # [K, blocks * bs, D]
    offset = first * block_size
    return tokens[:, start - offset : stop - offset]
