"""ModelRunner: moves blocks, plans attention, calls the model. It takes no decision and owns the K/V tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from paged_core.execution.attend_op import AttendOp
from paged_core.execution.batch import Batch
from paged_core.execution.graphs import DecodeGraphs
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import Attend, AttentionBackend, KeyedAttend, PagedModel
from paged_core.execution.packed_blocks import pack, unpack
from paged_core.scheduling.block_table import BlockMove


class ModelRunner:
    """Runs batches of one model on one K/V cache. Decode batches are replayed through ``graphs``, if there are any."""

    def __init__(
        self, model: PagedModel, backend: AttentionBackend, cache: KVCache, graphs: DecodeGraphs | None = None
    ) -> None:
        self._model = model
        self._backend = backend
        self._cache = cache
        self._graphs = graphs
        attend: Attend = _LayerAttend(backend, cache)  # not a method of self, which would keep the cache alive
        self._attend = AttendOp(attend) if model.compiled else attend

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def backend(self) -> AttentionBackend:
        return self._backend

    @property
    def trouble(self) -> str | None:
        """Why the runner can't compute any more, or None. Any thread may ask."""
        return None

    @property
    def num_compiles(self) -> int:
        """The number of graphs captured and kernels compiled so far."""
        captures = self._graphs.num_captures if self._graphs is not None else 0
        return captures + self._backend.num_compiles

    @property
    def captured(self) -> frozenset[tuple[int, int]] | None:
        """The (rows, longest sequence) of each graph, or None if there are no graphs."""
        return self._graphs.captured if self._graphs is not None else None

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Capture every graph now, unless the cache will grow: graphs hold its addresses, which then change."""
        if self._graphs is not None and self._cache.num_blocks == (self._cache.max_blocks or self._cache.num_blocks):
            self._graphs.warm_up(self._forward, self._replayable, progress)

    def grow(self, num_blocks: int) -> None:
        """Allocate memory for as many blocks as the pool hands out. Called once per schedule, before its moves."""
        if num_blocks > self._cache.num_blocks:
            self.drop_graphs()  # first, because the cache may need their memory
            self._cache.grow(num_blocks)

    def release(self) -> None:
        """Free the cache's memory. No block may be in use."""
        self.drop_graphs()
        self._cache.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # otherwise torch would keep the memory, which others on the device may need

    def drop_graphs(self) -> None:
        """Forget all graphs, because weights, modules or the cache have changed or moved."""
        if self._graphs is not None:
            self._graphs.drop()

    def move_blocks(self, moves: Sequence[BlockMove]) -> None:
        """Carry out a schedule's block moves, in order. Called once per schedule, before its batch runs."""
        if moves:
            self._backend.copy_blocks(self._cache, [(move.source, move.target) for move in moves])

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """See KVCache.read."""
        return self._cache.read(block_table, num_tokens)

    def pack_blocks(self, blocks: Sequence[int], packed: Tensor) -> None:
        """Copy the contents of blocks, for a tier, into ``packed u8 [n, block_bytes]`` on the CPU."""
        pack(self._cache, blocks, packed)

    def unpack_blocks(self, blocks: Sequence[int], packed: Tensor) -> None:
        """Write contents that ``pack_blocks`` has packed into blocks, which may be others. Called between two steps
        only."""
        unpack(self._cache, blocks, packed)

    @torch.inference_mode()
    def run(self, batch: Batch, *, eager: bool = False) -> Tensor:
        """Return the logits ``[S + P + E, vocab]`` of the batch's sample_indices. ``eager``: use no graph. A batch may
        run again: it writes the same K/V to the same slots."""
        if self._graphs is not None and batch.decode and not eager:
            logits = self._graphs.run(batch, self._forward, self._replayable)
            if logits is not None:
                # A request's own selector may keep the logits beyond the next step.
                kept = any(request.selector is not None for request in batch.sample_requests)
                return logits.clone() if kept else logits
        return self._forward(batch)

    def close(self) -> None:
        """End the runner: it computes nothing any more. May be called again."""

    def _replayable(self) -> bool:
        return self._model.replayable

    def _forward(self, batch: Batch) -> Tensor:
        self._backend.plan(batch.attention)
        return self._model.forward(batch.token_ids, batch.positions, self._attend, batch.sample_indices)


class _LayerAttend(KeyedAttend):
    """Calls a backend with a cache, as the model's ``attend``."""

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
