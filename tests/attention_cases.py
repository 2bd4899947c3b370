"""Cases for tests of attention kernels: random tokens in blocks, and calls of a launcher or the reference on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from paged_kernels import reference
from paged_kernels.layers import Extras, LayerCache

CODED = (torch.int8, torch.float8_e4m3fn)  # dtypes of caches with a scale for each token and kv head


@dataclass
class Case:
    """The arguments of ``reference.paged_attention``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def cache(self) -> LayerCache:
        return LayerCache(self.keys, self.values, self.key_scales, self.value_scales)

    @property
    def extras(self) -> Extras:
        return Extras(self.scale, self.sliding_window, self.softcap, self.sinks, self.key_bias)

    def run(self, attention) -> Tensor:
        return attention(self.q, self.cache, self.query_starts, self.seq_lens, self.block_tables, self.extras)

    def on(self, device: torch.device) -> Case:
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Case(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in moved.items()})

    def row(self, request: int) -> Case:
        """Return the case with one request alone, in the same cache."""
        start, stop = self.query_starts[request : request + 2].tolist()
        return replace(
            self,
            q=self.q[start:stop],
            query_starts=torch.tensor([0, stop - start], dtype=torch.int32, device=self.q.device),
            seq_lens=self.seq_lens[request : request + 1],
            block_tables=self.block_tables[request : request + 1],
        )


def make_case(
    lens, queries, heads=(4, 2), dims=(64, 64), block_size=16, dtype=torch.float32, window=None, softcap=None,
    sinks=False, cache_dtype=None, bias=False,
) -> Case:  # fmt: skip
    """Make a case with random tokens in blocks that are handed out in random order. Slots without a token are NaN (or a
    code with the scale NaN). Blocks before the window are released: their entries are block 0, which is NaN too."""
    g = torch.Generator().manual_seed(len(lens) + heads[0] + dims[0] + block_size)
    (num_heads, num_kv_heads), cache_dtype = heads, cache_dtype or dtype
    needed = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(needed), generator=g).int() + 1
    tables = torch.zeros(len(lens), max(needed) + 2, dtype=torch.int32)
    shape = (sum(needed) + 1, num_kv_heads, block_size)
    coded = cache_dtype in CODED
    caches = [torch.full((*shape, d), 7 if coded else torch.nan).to(cache_dtype) for d in dims]
    scales = [torch.full(shape, torch.nan) for _ in dims] if coded else [None, None]
    for r, (count, blocks) in enumerate(zip(lens, order.split(needed), strict=True)):
        tables[r, : len(blocks)] = blocks
        at = torch.arange(count)
        slots = blocks.long()[at // block_size] * block_size + at % block_size
        k, v = (torch.randn(count, num_kv_heads, d, generator=g).to(dtype) for d in dims)
        reference.store_kv(k, v, LayerCache(*caches, *scales), slots)
        if window is not None:
            tables[r, : max(0, count - queries[r] - window + 1) // block_size] = 0
    longest = max(lens)
    return Case(
        torch.randn(sum(queries), num_heads, dims[0], generator=g).to(dtype),
        *caches,
        torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        tables,
        dims[0] ** -0.5,
        window,
        softcap,
        torch.randn(num_heads, generator=g).to(dtype) if sinks else None,
        torch.randn(num_heads, longest, generator=g) - torch.arange(longest) / 9 if bias else None,
        *scales,
    )


def with_common_beginnings(case: Case, families: list[tuple[int, list[int], int]]) -> Case:
    """Return the case with other block tables. ``families``: (a request, others, how many tokens they share with
    it)."""
    tables = case.block_tables.clone()
    for of, others, num_tokens in families:
        theirs = tables[of, : num_tokens // case.keys.shape[2]]
        for r in others:
            own = tables[r, : len(theirs)]
            own.copy_(torch.where(theirs != 0, theirs, own))  # 0: a block that was released, behind a window
    return replace(case, block_tables=tables)
