"""ModelRunner: moves blocks, plans attention, calls the model. It takes no decision and owns the K/V tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from paged_core.execution.attend_op import AttendOp
from paged_core.execution.batch import Batch
from paged_core.execution.graphs import DecodeGraphs
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import Attend, AttentionBackend, PagedModel
from paged_core.execution.packed_blocks import pack, unpack
from paged_core.scheduling.block_table import BlockMove


class ModelRunner:
    """Runs batches of one model on one K/V cache. ``graphs``: decode batches are replayed through them."""

    def __init__(
        self, model: PagedModel, backend: AttentionBackend, cache: KVCache, graphs: DecodeGraphs | None = None
    ) -> None:
        self._model = model
        self._backend = backend
        self._cache = cache
        self._graphs = graphs
        attend: Attend = _LayerAttend(backend, cache)  # a method of ours would keep the cache alive
        self._attend = AttendOp(attend) if model.compiled else attend

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def backend(self) -> AttentionBackend:
        return self._backend

    @property
    def trouble(self) -> str | None:
        """Why nothing can be computed any more; None: nothing is known of that. For any thread."""
        return None

    @property
    def num_compiles(self) -> int:
        """Graphs captured and kernels compiled so far."""
        captures = self._graphs.num_captures if self._graphs is not None else 0
        return captures + self._backend.num_compiles

    @property
    def captured(self) -> frozenset[tuple[int, int]] | None:
        """(rows, longest sequence) of each graph; None: there are no graphs."""
        return self._graphs.captured if self._graphs is not None else None

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Capture every graph now. Not on a cache that will grow: its addresses will change, and graphs hold them."""
        if self._graphs is not None and self._cache.num_blocks == (self._cache.max_blocks or self._cache.num_blocks):
            self._graphs.warm_up(self._forward, self._replayable, progress)

    def grow(self, num_blocks: int) -> None:
        """Have memory for as many blocks as the pool hands out. Once per schedule, before its moves."""
        if num_blocks > self._cache.num_blocks:
            self.drop_graphs()  # first: the cache may want their memory
            self._cache.grow(num_blocks)

    def release(self) -> None:
        """Give the cache's memory back. No block may be in use."""
        self.drop_graphs()
        self._cache.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # torch would keep it for itself, and others on the device want it

    def drop_graphs(self) -> None:
        """What graphs were captured from has changed or moved: weights, modules, the cache."""
        if self._graphs is not None:
            self._graphs.drop()

    def move_blocks(self, moves: Sequence[BlockMove]) -> None:
        """Carry out a schedule's block moves, in order. Once per schedule, before its batch runs."""
        if moves:
            self._backend.copy_blocks(self._cache, [(move.source, move.target) for move in moves])

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """As KVCache.read."""
        return self._cache.read(block_table, num_tokens)

    def pack_blocks(self, blocks: Sequence[int], packed: Tensor) -> None:
        """What blocks hold, for a tier: into ``packed u8 [n, block_bytes]`` on the CPU."""
        pack(self._cache, blocks, packed)

    def unpack_blocks(self, blocks: Sequence[int], packed: Tensor) -> None:
        """Into blocks what ``pack_blocks`` has made of these or others. Between two steps."""
        unpack(self._cache, blocks, packed)

    @torch.inference_mode()
    def run(self, batch: Batch, *, eager: bool = False) -> Tensor:
        """Logits ``[S + P + E, vocab]`` of the batch's sample_indices; ``eager``: through no graph. May be repeated:
        K/V slots are just rewritten."""
        if self._graphs is not None and batch.decode and not eager:
            logits = self._graphs.run(batch, self._forward, self._replayable)
            if logits is not None:
                # A request's own selector may keep them beyond the next step.
                kept = any(request.selector is not None for request in batch.sample_requests)
                return logits.clone() if kept else logits
        return self._forward(batch)

    def close(self) -> None:
        """Nothing is computed any more. May be repeated."""

    def _replayable(self) -> bool:
        return self._model.replayable

    def _forward(self, batch: Batch) -> Tensor:
        self._backend.plan(batch.attention)
        return self._model.forward(batch.token_ids, batch.positions, self._attend, batch.sample_indices)


class _LayerAttend:
    """Attend, by a backend over a cache."""

    def __init__(self, backend: AttentionBackend, cache: KVCache) -> None:
        self._backend, self._cache = backend, cache

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        if key_bias is None:
            return self._backend.run(layer, q, k, v, self._cache, sinks)
        return self._backend.run(layer, q, k, v, self._cache, sinks, key_bias)

    def replay_key(self) -> Hashable | None:
        return self._backend.replay_key(self._cache)
