"""The attention of one step on random K/V, run by our kernels over blocks and by torch's over contiguous K/V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gpu_race import Work
from paged_kernels.layers import Extras, LayerCache
from paged_kernels.triton import launch

Heads = tuple[int, int, int]  # query heads, kv heads, head dim
LLAMA_8B, LLAMA_7B, TINY = (32, 8, 128), (32, 32, 128), (4, 2, 64)
_L2_BYTES = 256 << 20  # well beyond any device's


class RandomBlocks:
    """One layer's K/V in random blocks."""

    def __init__(self, num_blocks: int, num_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_blocks, num_kv_heads, 16, dim)
        self.keys, self.values = (_filled(shape, dtype, device) for _ in range(2))
        quantised = dtype.itemsize == 1
        scales = [torch.rand(shape[:3], device=device) * 0.01 for _ in range(2)] if quantised else [None, None]
        self.scales: tuple[Tensor | None, Tensor | None] = (scales[0], scales[1])


class AttentionStep:
    """The attention of one step, over as many layers as it takes to leave the L2 cache."""

    def __init__(
        self, rows: int, context: int, queries: int, heads: Heads, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_heads, num_kv_heads, dim = heads
        self.shape = rows, context, queries, heads
        self.dtype, self.device = dtype, device
        self.kv_bytes = 2 * rows * context * num_kv_heads * dim * dtype.itemsize
        self.num_layers = max(1, min(8, -(-_L2_BYTES // self.kv_bytes))) if device.type == "cuda" else 1
        blocks = -(-context // 16)
        self.layers = [
            RandomBlocks(rows * blocks + 1, num_kv_heads, dim, dtype, device) for _ in range(self.num_layers)
        ]
        order = torch.randperm(rows * blocks) + 1
        self.tables = order.view(rows, blocks).to(device, torch.int32)
        self.q = torch.randn(rows * queries, num_heads, dim, device=device).bfloat16()
        self.k, self.v = (torch.randn(rows * queries, num_kv_heads, dim, device=device).bfloat16() for _ in range(2))

    def paged(self) -> Work:
        """Run all layers. Decode stores its token too; torch's have all K/V already, and so has a prompt here."""
        rows, context, queries, (num_heads, num_kv_heads, dim) = self.shape
        starts = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device=self.device)
        lens = torch.full((rows,), context, dtype=torch.int32, device=self.device)
        positions = torch.arange(context - queries, context, device=self.device).repeat(rows)
        owners = torch.arange(rows, device=self.device).repeat_interleave(queries)
        slots = self.tables[owners, positions // 16].long() * 16 + positions % 16
        plan = launch.AttentionPlan(num_heads, num_kv_heads, dim, dim, None, torch.bfloat16, self.dtype)
        plan.plan(starts, lens, self.tables, slots, queries, context)
        k, v = (self.k, self.v) if queries == 1 else (None, None)

        def run() -> None:
            for layer in self.layers:
                cache = LayerCache(layer.keys, layer.values, *layer.scales)
                plan.run(self.q, k, v, cache, Extras(dim**-0.5))

        return run

    def sdpa(self) -> Work:
        """Torch's SDPA over contiguous K/V."""
        q, layers = self._contiguous()
        causal = self.shape[2] > 1

        def run() -> None:
            for k, v in layers:
                functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return run

    def flex(self) -> Work:
        """Torch's compiled flex_attention over contiguous K/V."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _, context, queries, _ = self.shape
        torch._dynamo.reset()  # it compiles a function for a few shapes only
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(_causal, None, None, queries, context, device=self.device) if queries > 1 else None
        q, layers = self._contiguous()

        def run() -> None:
            for k, v in layers:
                compiled(q, k, v, block_mask=mask, enable_gqa=True)

        return run

    def _contiguous(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """q [R,H,n,D], and each layer's K and V [R,K,context,D]."""
        rows, context, queries, (num_heads, num_kv_heads, dim) = self.shape
        q = self.q.view(rows, queries, num_heads, dim).transpose(1, 2)
        return q, [_contiguous(rows, num_kv_heads, context, dim, self.device) for _ in self.layers]


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _contiguous(rows: int, num_kv_heads: int, context: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(rows, num_kv_heads, context, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    return k, v


def _filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values that are not NaN in 8 bits either."""
    if dtype.itemsize == 1:
        return torch.randint(-100, 100, tuple(shape), dtype=torch.int8, device=device).to(dtype)
    return torch.randn(tuple(shape), device=device, dtype=dtype)
