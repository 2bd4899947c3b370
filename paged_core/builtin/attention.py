"""The core's own attention backends, registered as a stranger's would be.

``reference`` runs everywhere and is slow; ``cpu`` runs kernels compiled for the host. This file knows which
layers a backend can honour; what a kernel does is paged_kernels' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from paged_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from paged_core.execution.batch import AttentionMetadata
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.model import AttentionBackend, ModelSpec


@hookimpl(trylast=True, specname="create_attention_backend")
def create_reference_backend(name: str, spec: ModelSpec) -> AttentionBackend | None:
    """Asked last, and never passes on "auto"."""
    return ReferenceBackend(spec) if name in ("auto", "reference") else None


class ReferenceBackend:
    """Attention in plain torch, on any device: the answer the others are held against."""

    name = "reference"

    def __init__(self, spec: ModelSpec) -> None:
        from paged_kernels import reference

        self._ops = reference
        self._layers = spec.layers
        self._metadata: AttentionMetadata | None = None

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def run(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, sinks: Tensor | None = None
    ) -> Tensor:
        meta, facts = self._metadata, self._layers[layer]
        assert meta is not None, "plan() comes before run()"
        keys, values = cache.keys[layer], cache.values[layer]
        self._ops.store_kv(k, v, keys, values, meta.slot_mapping.to(keys.device))
        out: Tensor = self._ops.paged_attention(
            q,
            keys,
            values,
            meta.query_starts,
            meta.seq_lens,
            meta.block_tables.to(keys.device),
            facts.scale,
            facts.sliding_window,
            facts.softcap,
            sinks,
        )
        return out

    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        self._ops.copy_blocks((*cache.keys, *cache.values), pairs)
