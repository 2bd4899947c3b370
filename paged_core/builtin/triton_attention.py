"""Attention on GPUs, by Triton kernels. This plugin answers create_attention_backend.

This file knows which layers it can honour, and the device of each. The kernels are in paged_kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paged_core.builtin.attention import PlannedBackend, layer_extras
from paged_core.builtin.gpu_forwards import triton_works
from paged_core.execution.model import AttentionBackend
from paged_core.hookspecs import hookimpl
from paged_kernels.layers import LayerCache

if TYPE_CHECKING:
    from paged_core.config import StepSizes
    from paged_core.execution.batch import AttentionMetadata
    from paged_core.execution.spec import LayerSpec, ModelSpec


@hookimpl
def create_attention_backend(name: str, spec: ModelSpec, sizes: StepSizes) -> AttentionBackend | None:
    """Return the backend for models whose layers are all on GPUs, in dtypes and sizes that the kernels know. If asked
    for by name, it also takes layers on the CPU while Triton's interpreter is on, for tests."""
    if name not in ("auto", "triton") or find_spec("triton") is None:
        return None
    from_name = name == "triton"
    if not all(_runs_on(layer.device, from_name) for layer in spec.layers):
        return None
    from paged_kernels.triton import launch

    sizes_fit = all(launch.fits(layer.head_dim, layer.value_head_dim) for layer in spec.layers)
    if not (sizes_fit and launch.supports(spec.dtype, sizes.kv_dtype)):
        return None
    return TritonBackend(spec, sizes.kv_dtype, sizes.block_size)


class TritonBackend(PlannedBackend):
    """Attention by Triton kernels. Layers of one shape and device share a plan; a step's metadata is copied to each
    device once."""

    name = "triton"
    reads_scales = True
    capturable = True

    def __init__(self, spec: ModelSpec, cache_dtype: torch.dtype, block_size: int) -> None:
        from paged_kernels.triton import launch

        self._ops = launch
        self._layers = spec.layers
        self._dtype, self._cache_dtype, self._block_size = spec.dtype, cache_dtype, block_size
        self._plans: dict[tuple[Any, ...], Any] = {}
        self._plan_of_layer = [self._plan_for(layer) for layer in spec.layers]

    def _plan_for(self, layer: LayerSpec) -> Any:
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_head_dim, layer.sliding_window)
        key = (layer.device, *shape)
        if key not in self._plans:
            self._plans[key] = self._ops.AttentionPlan(*shape, self._dtype, self._cache_dtype, self._block_size)
        return self._plans[key]

    @property
    def num_compiles(self) -> int:
        """Kernels compiled so far. After warm_up there should be no more."""
        return int(self._ops.num_compiles())

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compile, or load from disk, the kernels that steps need, so that no request waits for them. Calls
        ``progress(what, done, total)``."""
        facts = ("device", "num_heads", "num_kv_heads", "head_dim", "value_head_dim", "sliding_window", "has_sinks",
                 "has_key_bias")  # fmt: skip
        kinds = {(*(getattr(layer, fact) for fact in facts), layer.softcap is None): layer for layer in self._layers}
        for done, layer in enumerate(kinds.values()):
            if progress is not None:
                progress("attention kernels for GPUs", done, len(kinds))
            self._try(layer)
        if progress is not None:
            progress("attention kernels for GPUs", len(kinds), len(kinds))

    def _try(self, layer: LayerSpec) -> None:
        """Run a step of one new token, then a step of a token and a chunk, in a cache of their own."""
        device, plan, size = layer.device, self._plan_for(layer), self._block_size
        shape = (4, layer.num_kv_heads, size)
        dims = (layer.head_dim, layer.value_head_dim)
        keys, values = (torch.zeros(*shape, dim, device=device).to(self._cache_dtype) for dim in dims)
        quantised = self._cache_dtype.itemsize == 1
        scales = [torch.ones(shape, device=device) for _ in range(2)] if quantised else [None, None]
        sinks = torch.zeros(layer.num_heads, dtype=self._dtype, device=device) if layer.has_sinks else None
        bias = torch.zeros(layer.num_heads, 2 * size, device=device) if layer.has_key_bias else None
        longest = self._ops.tiles.SPLITS["SPLIT"] + 1  # so long that the kernels look for common blocks
        tables = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32, device=device)  # blocks may hold a single token
        for queries in ([1], [1, 2]):
            num_rows, num_tokens = len(queries), sum(queries)
            starts = torch.tensor([0, 1, 3][: num_rows + 1], dtype=torch.int32, device=device)
            lens = torch.tensor(queries, dtype=torch.int32, device=device)
            slots = torch.tensor([size, 2 * size, 2 * size + 1][:num_tokens], device=device)
            plan.plan(starts, lens, tables[:num_rows], slots, max(queries), longest)
            q = torch.zeros(num_tokens, layer.num_heads, dims[0], dtype=self._dtype, device=device)
            k, v = (q.new_zeros(num_tokens, layer.num_kv_heads, dim) for dim in dims)
            plan.run(q, k, v, LayerCache(keys, values, *scales), layer_extras(layer, sinks, bias))
        self._ops.copy_blocks([keys, values, *(scale for scale in scales if scale is not None)], [(1, 2)])

    def plan(self, metadata: AttentionMetadata) -> None:
        tensors = (metadata.query_starts, metadata.seq_lens, metadata.block_tables, metadata.slot_mapping)
        there: dict[torch.device, list[Tensor]] = {}
        for (device, *_), plan in self._plans.items():
            if device not in there:
                there[device] = [tensor.to(device, non_blocking=True) for tensor in tensors]
            plan.plan(*there[device], metadata.max_query_len, metadata.max_seq_len)


def _runs_on(device: torch.device, from_name: bool) -> bool:
    if device.type == "cpu" and from_name:
        from paged_kernels.triton import tiles

        return bool(tiles.interpreted())
    return triton_works(device)
