"""ModelRunner: moves blocks, plans attention, calls the model. It takes no decision and owns the K/V tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_core.execution.batch import Batch
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import AttentionBackend, PagedModel
from paged_core.scheduling.schedule import BlockMove


class ModelRunner:
    """Runs batches of one model on one K/V cache."""

    def __init__(self, model: PagedModel, backend: AttentionBackend, cache: KVCache) -> None:
        self._model = model
        self._backend = backend
        self._cache = cache

    @property
    def cache(self) -> KVCache:
        return self._cache

    def grow(self, num_blocks: int) -> None:
        """Have memory for as many blocks as the pool hands out. Once per schedule, before its moves."""
        self._cache.grow(num_blocks)

    def release(self) -> None:
        """Give the cache's memory back. No block may be in use."""
        self._cache.release()

    def move_blocks(self, moves: Sequence[BlockMove]) -> None:
        """Carry out a schedule's block moves, in order. Once per schedule, before its batch runs."""
        if moves:
            self._backend.copy_blocks(self._cache, [(move.source, move.target) for move in moves])

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits ``[S + P, vocab]`` of the batch's sample_indices. May be repeated: K/V slots are just rewritten."""
        self._backend.plan(batch.attention)
        return self._model.forward(batch.token_ids, batch.positions, self._attend, batch.sample_indices)

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        if key_bias is None:
            return self._backend.run(layer, q, k, v, self._cache, sinks)
        return self._backend.run(layer, q, k, v, self._cache, sinks, key_bias)
