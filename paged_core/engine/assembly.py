"""Builds the parts of an engine by calling hooks. Nothing here runs after the engine is built."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from paged_core.config import EngineConfig, EngineSizes, StepSizes
from paged_core.engine.accelerating import accelerate, compile_model
from paged_core.engine.loading import dtype_name, load_model
from paged_core.engine.sizes import engine_sizes, filled, limits, step_sizes
from paged_core.engine.team import EngineArgs, MakeRunner, Team
from paged_core.errors import ConfigError, PluginError, UnsupportedModel
from paged_core.execution import kv_cache
from paged_core.execution.fingerprint import fingerprint
from paged_core.execution.graphs import CudaRecorder, DecodeGraphs, Record
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import AttentionBackend, PagedModel, RequestSampler
from paged_core.execution.model_runner import ModelRunner
from paged_core.execution.spec import ModelSpec
from paged_core.plugins import Plugins, check_whole, describe
from paged_core.ranks.ranks import ALONE, Ranks
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.scheduler import Scheduler
from paged_core.tiers.costs import TierCosts
from paged_core.tiers.tier import BlockLayout, OffloadTier

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``, called while an engine is built."""

RECORDERS: dict[str, Callable[[torch.device], Record]] = {"cuda": CudaRecorder}
"""Makes graphs of decode steps, by type of device."""


class Computing(NamedTuple):
    """The parts that compute. Every rank has its own."""

    model: PagedModel
    sizes: EngineSizes
    sampler: RequestSampler  # for requests without their own selector
    runner: ModelRunner


class Parts(NamedTuple):
    """All parts of an engine."""

    computing: Computing
    scheduler: Scheduler
    tiers: Sequence[OffloadTier]
    costs: TierCosts  # costs of loading from the tiers


def assemble(
    manager: Plugins,
    model: Any,
    config: EngineConfig,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    progress: Progress | None,
) -> Parts:
    """Return all parts for ``model``, which may be whatever Engine accepts.

    Raises:
        PluginError, UnsupportedModel, ConfigError: see Engine.
    """
    asked = EngineArgs(model, config, None if device is None else str(device), dtype_name(dtype))
    progress = progress or _show
    if config.tensor_parallel_size == 1:
        computing = build(manager, asked, progress)
    else:
        team = Team(manager, asked)
        with team.building():
            computing = build(manager, asked, progress, team.ranks, team.runner)
    loaded, sizes, cache = computing.model, computing.sizes, computing.runner.cache
    tiers = create_tiers(manager, loaded, config, sizes, cache)
    costs = TierCosts(tiers, cache.block_bytes, sizes.block_size)
    scheduler = create_scheduler(manager, loaded.spec, config, sizes, tiers, costs)
    return Parts(computing, scheduler, tiers, costs)


def build(
    manager: Plugins,
    asked: EngineArgs,
    progress: Progress,
    ranks: Ranks = ALONE,
    make_runner: MakeRunner | None = None,
) -> Computing:
    """Return the parts that compute, for this rank. All ranks build theirs at the same time.

    Raises:
        See assemble.
    """
    config = asked.config
    loaded = load_model(manager, asked, ranks)
    steps = ranks.agree(step_sizes(config, loaded.spec))
    sampler = create_sampler(manager, loaded.spec, config, steps)
    backend = create_backend(manager, loaded.spec, config, steps, progress)
    compile_model(loaded, backend, config, steps, progress)
    with ranks.silent():
        accelerate(manager, loaded, config, owned=isinstance(asked.model, str | os.PathLike))
    sizes = engine_sizes(steps, config, loaded, backend, sampler, ranks.least)
    cache = create_cache(manager, loaded.spec, config, sizes)
    if make_runner is not None:
        return Computing(loaded, sizes, sampler, make_runner(loaded, backend, cache))
    runner = ModelRunner(loaded, backend, cache, create_graphs(loaded.spec, config, sizes, backend))
    runner.warm_up(progress)
    return Computing(loaded, sizes, sampler, runner)


def create_sampler(manager: Plugins, spec: ModelSpec, config: EngineConfig, sizes: StepSizes) -> RequestSampler:
    """Return the TokenSelector for requests without one of their own."""
    sampler = manager.hook.create_sampler(spec=spec, config=filled(config, sizes))
    if sampler is None:
        raise PluginError(f"no plugin brings a sampler; loaded plugins: {describe(manager)}")
    check_whole(sampler, RequestSampler.missing_in(sampler), "create_sampler")
    return RequestSampler.of(sampler)


def create_backend(
    manager: Plugins, spec: ModelSpec, config: EngineConfig, sizes: StepSizes, progress: Progress
) -> AttentionBackend:
    """Return the attention backend, warmed up: its kernels are compiled here, never during a request."""
    name = config.attention_backend
    ask = manager.hook.create_attention_backend
    found = ask(name=name, spec=spec, config=filled(config, sizes), sizes=sizes)
    if found is None:
        raise UnsupportedModel(
            f"no attention backend called {name!r} can run this model here; leave attention_backend out for one that "
            f"can; loaded plugins: {describe(manager)}"
        )
    check_whole(found, AttentionBackend.missing_in(found), "create_attention_backend")
    backend = AttentionBackend.of(found)
    if sizes.kv_dtype in kv_cache.QUANTIZED and not backend.reads_scales:
        raise ConfigError(
            f"attention backend {backend.name!r} does not read the scales of a K/V cache in {config.kv_cache_dtype}; "
            "leave kv_cache_dtype out, or set attention_backend to one that does (reference runs every model)"
        )
    backend.warm_up(progress)
    return backend


def create_tiers(
    manager: Plugins, model: PagedModel, config: EngineConfig, sizes: EngineSizes, cache: KVCache
) -> Sequence[OffloadTier]:
    """Return the tiers of all plugins, for blocks that the cache evicts."""
    layout = BlockLayout(cache.block_bytes, sizes.block_size, lambda: _fingerprint(model, sizes, cache, config))
    asked: dict[str, Any] = {"spec": model.spec, "config": filled(config, sizes), "sizes": sizes, "layout": layout}
    tiers = [tier for tier in manager.hook.create_offload_tier(**asked) if tier is not None]
    if tiers and not config.enable_prefix_caching:
        raise ConfigError(
            "K/V in tiers (kv_disk_path, kv_host_bytes) are found by the prefix cache's digests, and "
            "enable_prefix_caching is False; leave it out, or leave the tiers out"
        )
    if tiers and config.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, and a tier would get the first rank's part of the "
            "K/V only; leave one of them out"
        )
    keys = {tier.key for tier in tiers if tier.key is not None}
    if len(keys) > 1:
        raise ConfigError("two tiers want digests of different keys; use one of them")
    return tiers


def create_scheduler(
    manager: Plugins,
    spec: ModelSpec,
    config: EngineConfig,
    sizes: EngineSizes,
    tiers: Sequence[OffloadTier],
    costs: TierCosts,
) -> Scheduler:
    """Return the scheduler over a new block pool, with the policy that the config names."""
    name = config.scheduling_policy
    policy = manager.hook.create_scheduling_policy(name=name, config=filled(config, sizes))
    if policy is None:
        raise PluginError(f"no scheduling policy is called {name!r}; loaded plugins: {describe(manager)}")
    pool = BlockPool(
        sizes.num_blocks,
        sizes.block_size,
        sizes.num_slab_blocks,
        key=next((tier.key for tier in tiers if tier.key is not None), None),
        tells=bool(tiers),
        vocab_size=spec.vocab_size,
    )
    return Scheduler(pool, policy, limits(sizes, config, spec, sizes.watermark_blocks), costs if tiers else None)


def create_cache(manager: Plugins, spec: ModelSpec, config: EngineConfig, sizes: EngineSizes) -> KVCache:
    """Return the K/V tensors: a plugin's at full size, or the core's own at the size with which the block pool
    begins."""
    num_blocks, size, dtype = sizes.num_slab_blocks, sizes.block_size, sizes.kv_dtype
    ask = manager.hook.create_kv_cache
    cache = ask(spec=spec, num_blocks=sizes.num_blocks, config=filled(config, sizes), sizes=sizes)
    if cache is not None:
        return cache  # type: ignore[no-any-return]
    try:
        return kv_cache.allocate(spec, num_blocks, size, dtype, max_blocks=sizes.num_blocks)
    except torch.OutOfMemoryError as error:
        num_bytes = num_blocks * kv_cache.bytes_per_block(spec, size, dtype)
        raise ConfigError(
            f"no memory for a K/V cache of {num_blocks} blocks, {num_bytes} bytes; lower kv_cache_bytes, num_blocks or "
            "gpu_memory_utilization"
        ) from error


def create_graphs(
    spec: ModelSpec, config: EngineConfig, sizes: StepSizes, backend: AttentionBackend
) -> DecodeGraphs | None:
    """Return graphs of decode steps, if the config asks for them, or leaves it open and device and backend can."""
    obstacle = None
    if spec.device.type not in RECORDERS:
        obstacle = f"the model is on {spec.device}, not on a CUDA device"
    elif any(layer.device != spec.device for layer in spec.layers):
        obstacle = "the model's layers are on several devices"
    elif not backend.capturable:
        obstacle = f"attention backend {backend.name!r} can't be captured"
    if config.cuda_graphs and obstacle:
        raise ConfigError(f"cuda_graphs is True, but {obstacle}; leave it out, and they are used where they can be")
    if obstacle or config.cuda_graphs is False:
        return None
    shape = (sizes.max_num_seqs, sizes.max_model_len, sizes.block_size)
    return DecodeGraphs(*shape, spec.device, lambda: RECORDERS[spec.device.type](spec.device))


def _fingerprint(model: PagedModel, sizes: EngineSizes, cache: KVCache, config: EngineConfig) -> str | None:
    """Return a fingerprint of the model, the cache's layout and the code that computes, or None if the model has
    none."""
    own = model.fingerprint()
    if own is None:
        return None
    layout = [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in cache.tensors]
    how = config.attention_backend, config.weights
    return fingerprint((), own, layout, model.spec, sizes.block_size, how, torch.__version__)


def _show(what: str, done: int, total: int) -> None:
    """Show progress on the terminal, if there is one, in a line that is erased when the work is done."""
    if sys.stderr.isatty():
        line = f"{what}: {done} of {total}" if done < total else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
