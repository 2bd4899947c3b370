"""Chooses every size of an engine from its EngineConfig, its model and its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from paged_core.config import EngineConfig, EngineSizes, StepSizes
from paged_core.errors import ConfigError
from paged_core.execution import kv_cache, profile
from paged_core.execution.model import AttentionBackend, PagedModel, RequestSampler
from paged_core.execution.spec import ModelSpec
from paged_core.scheduling.schedule import Limits


def step_sizes(config: EngineConfig, spec: ModelSpec) -> StepSizes:
    """Return the config's sizes, and for those left open sizes that suit model and device."""
    on_cpu = spec.device.type == "cpu"
    # On a CPU the time of a step grows with its tokens. Steps have few tokens, so that a long prompt doesn't delay
    # others.
    usual = min(max(_tokens_a_thread(config, spec) * torch.get_num_threads(), 128), 2048) if on_cpu else 8192
    budget = config.max_num_batched_tokens or max(usual, config.max_num_seqs or 0)
    return StepSizes(
        block_size=config.block_size or (8 if on_cpu else 16),
        max_num_seqs=config.max_num_seqs or min(256, max(1, budget // 2)),
        max_num_batched_tokens=budget,
        max_model_len=min(config.max_model_len or spec.max_model_len, spec.max_model_len),
        kv_dtype=getattr(torch, config.kv_cache_dtype) if config.kv_cache_dtype else spec.dtype,
    )


def _tokens_a_thread(config: EngineConfig, spec: ModelSpec) -> int:
    """Return as many tokens as take about a tenth of a second in a model of 135 million weights (docs/cpu.md)."""
    tiles = "amx_int8" if config.weights else "amx_bf16" if spec.dtype is torch.bfloat16 else None
    can: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # in newer releases of torch
    return 256 if tiles is not None and can.get(tiles) else 64


def engine_sizes(
    steps: StepSizes,
    config: EngineConfig,
    model: PagedModel,
    backend: AttentionBackend,
    sampler: RequestSampler,
    least: Callable[[int], int],
) -> EngineSizes:
    """Return all sizes, with the number of blocks: the config's, or as many as fit into its bytes, or as many as a step
    of the largest size leaves room for. ``least`` returns the smallest of all ranks' numbers.

    Raises:
        ConfigError: there is no room for a single block, or for the largest step.
    """
    spec = model.spec
    share = config.gpu_memory_utilization
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif share is not None and _measurable(config, spec):
        num_blocks = min(_blocks_left(steps, config, model, backend, sampler, share), _most_blocks(steps))
    else:
        num_blocks = min(_blocks_in_budget(steps, config, spec), _most_blocks(steps))
    num_blocks = least(num_blocks)
    slab = config.kv_cache_slab_bytes
    return EngineSizes(
        **vars(steps),
        num_blocks=num_blocks,
        num_slab_blocks=num_blocks if slab is None else max(1, min(slab // _block_bytes(steps, spec), num_blocks)),
        watermark_blocks=int(config.watermark * num_blocks),
    )


def limits(steps: StepSizes, config: EngineConfig, spec: ModelSpec, watermark_blocks: int = 0) -> Limits:
    """Return the scheduler's limits. The watermark is 0 until the number of blocks is known."""
    windows = [layer.sliding_window for layer in spec.layers]
    return Limits(
        max_num_seqs=steps.max_num_seqs,
        max_num_batched_tokens=steps.max_num_batched_tokens,
        max_model_len=steps.max_model_len,
        watermark_blocks=watermark_blocks,
        max_prompt_logprob_rows=config.max_prompt_logprob_rows,
        sliding_window=None if None in windows else max(w for w in windows if w is not None),
        enable_prefix_caching=config.enable_prefix_caching,
    )


def filled(config: EngineConfig, steps: StepSizes) -> EngineConfig:
    """Return the config with all these sizes set, for hooks."""
    known = {name: value for name, value in asdict(steps).items() if name in EngineConfig.__dataclass_fields__}
    return replace(config, **known)


def _measurable(config: EngineConfig, spec: ModelSpec) -> bool:
    return config.kv_cache_bytes is None and all(layer.device.type in profile.GAUGES for layer in spec.layers)


def _blocks_in_budget(steps: StepSizes, config: EngineConfig, spec: ModelSpec) -> int:
    per_block = _block_bytes(steps, spec)
    num_bytes = config.kv_cache_bytes or min(4 << 30, kv_cache.free_memory(spec.device) // 4)
    if num_bytes < per_block:
        raise ConfigError(
            f"kv_cache_bytes ({num_bytes}) holds no block: {steps.block_size} tokens take {per_block} bytes"
        )
    return num_bytes // per_block


def _blocks_left(
    steps: StepSizes,
    config: EngineConfig,
    model: PagedModel,
    backend: AttentionBackend,
    sampler: RequestSampler,
    share: float,
) -> int:
    """Return how many blocks fit into the devices' memory beside everything else, measured by running the largest
    step."""
    spec, size, dtype = model.spec, steps.block_size, steps.kv_dtype
    try:
        room = profile.bytes_left(model, backend, sampler, limits(steps, config, spec), size, dtype, share)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"no memory for a step of {steps.max_num_batched_tokens} tokens; lower max_num_batched_tokens"
        ) from error
    num_blocks = profile.blocks_within(spec, room, size, dtype)
    if num_blocks < 1:
        left = ", ".join(f"{num_bytes} bytes on {device}" for device, num_bytes in room.items())
        raise ConfigError(
            f"gpu_memory_utilization ({share}) leaves no room for K/V beside the model and a step of "
            f"{steps.max_num_batched_tokens} tokens ({left}); raise it, or lower max_num_batched_tokens"
        )
    return num_blocks


def _most_blocks(steps: StepSizes) -> int:
    """Return how many blocks could ever be used."""
    return steps.max_num_seqs * -(-steps.max_model_len // steps.block_size)


def _block_bytes(steps: StepSizes, spec: ModelSpec) -> int:
    return kv_cache.bytes_per_block(spec, steps.block_size, steps.kv_dtype)
