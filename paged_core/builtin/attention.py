"""The core's attention backends ``cpu`` and ``reference``, registered as other projects' are.

``reference`` runs everywhere and is slow; ``cpu`` runs kernels compiled for the host. This file knows which layers a
backend can honour. The kernels are in paged_kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paged_core.execution.model import AttentionBackend
from paged_core.hookspecs import hookimpl
from paged_kernels.layers import Extras, LayerCache

if TYPE_CHECKING:
    from paged_core.config import EngineConfig, StepSizes
    from paged_core.execution.batch import AttentionMetadata
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.spec import LayerSpec, ModelSpec


_log = logging.getLogger("paged_core")


@hookimpl
def create_attention_backend(
    name: str, spec: ModelSpec, config: EngineConfig, sizes: StepSizes
) -> AttentionBackend | None:
    """Return the CPU backend, if every layer is on the CPU in a dtype that it knows, and numba is installed."""
    if name not in ("auto", "cpu") or any(layer.device.type != "cpu" for layer in spec.layers):
        return None
    try:
        from paged_kernels.cpu import launch
    except ImportError:
        return None
    if not launch.supports(spec.dtype, sizes.kv_dtype):
        return None
    return CpuBackend(spec, sizes.kv_dtype, sizes.block_size, config.weights)


@hookimpl(trylast=True, specname="create_attention_backend")
def create_reference_backend(name: str, spec: ModelSpec) -> AttentionBackend | None:
    """Return the reference backend. It is asked last, and takes every model if the name is "auto"."""
    if name == "auto":
        _log.warning("no fast attention backend takes this model on %s: the slow reference runs it", spec.device)
    return ReferenceBackend(spec) if name in ("auto", "reference") else None


class ReferenceBackend(AttentionBackend):
    """Attention in plain torch, on any device. Tests compare the other backends with it."""

    name = "reference"
    reads_scales = True

    def __init__(self, spec: ModelSpec) -> None:
        from paged_kernels import reference

        self._ops = reference
        self._layers = spec.layers
        self._metadata: AttentionMetadata | None = None

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def run(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        meta = self._metadata
        assert meta is not None, "plan() comes before run()"
        part = layer_cache(cache, layer)
        device = part.keys.device
        self._ops.store_kv(k, v, part, meta.slot_mapping.to(device))
        tables = meta.block_tables.to(device)
        extras = layer_extras(self._layers[layer], sinks, key_bias)
        out: Tensor = self._ops.paged_attention(q, part, meta.query_starts, meta.seq_lens, tables, extras)
        return out

    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        self._ops.copy_blocks(cache.tensors, pairs)


class PlannedBackend(AttentionBackend):
    """The common part of backends whose kernels are given a plan. Each layer runs by its plan, in one launch or
    more."""

    _ops: Any  # the module of launchers
    _layers: Sequence[LayerSpec]
    _plan_of_layer: list[Any]

    def run(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        extras = layer_extras(self._layers[layer], sinks, key_bias)
        out: Tensor = self._plan_of_layer[layer].run(q, k, v, layer_cache(cache, layer), extras)
        return out

    def copy_blocks(self, cache: KVCache, pairs: Sequence[tuple[int, int]]) -> None:
        self._ops.copy_blocks(cache.tensors, pairs)


class CpuBackend(PlannedBackend):
    """Stores K/V and attends in one launch per layer, on torch's own threads. Blocks that several requests begin with
    are read once for all of them, which changes no result."""

    name = "cpu"
    reads_scales = True

    def __init__(self, spec: ModelSpec, cache_dtype: torch.dtype, block_size: int, weights: str | None = None) -> None:
        from paged_kernels.cpu import launch

        self._ops = launch
        self._layers = spec.layers
        self._dtype, self._cache_dtype, self._block_size = spec.dtype, cache_dtype, block_size
        self._weights = weights
        self._plans: dict[tuple[int | None, ...], Any] = {}  # layers of one shape share a plan
        self._plan_of_layer = [self._plan_for(layer) for layer in spec.layers]

    def _plan_for(self, layer: LayerSpec) -> Any:
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_head_dim, layer.sliding_window)
        if shape not in self._plans:
            self._plans[shape] = self._ops.AttentionPlan(*shape, self._block_size)
        return self._plans[shape]

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compile, or load from disk, all kernels that a step needs, so that no request waits for them: those of
        attention, of this folder's forwards, and of the sampler. Calls ``progress(what, done, total)``."""
        from paged_kernels.cpu import elementwise, linear, quantized

        self._ops.warm_up(progress, self._cache_dtype, self._dtype)
        elementwise.warm_up(progress)
        linear.warm_up(self._dtype, progress)
        if self._weights is not None:
            quantized.warm_up(progress)

    def replay_key(self, cache: KVCache) -> Hashable:
        return self, *(tensor.data_ptr() for tensor in cache.tensors)

    def plan(self, metadata: AttentionMetadata) -> None:
        for plan in self._plans.values():
            plan.plan(metadata.query_starts, metadata.seq_lens, metadata.block_tables, metadata.slot_mapping)


def layer_cache(cache: KVCache, layer: int) -> LayerCache:
    """Return a layer's K/V in the form that kernels take."""
    if not cache.key_scales:
        return LayerCache(cache.keys[layer], cache.values[layer])
    return LayerCache(cache.keys[layer], cache.values[layer], cache.key_scales[layer], cache.value_scales[layer])


def layer_extras(facts: LayerSpec, sinks: Tensor | None, key_bias: Tensor | None) -> Extras:
    """Return the facts of a layer's attention in the form that kernels take."""
    return Extras(facts.scale, facts.sliding_window, facts.softcap, sinks, key_bias)
