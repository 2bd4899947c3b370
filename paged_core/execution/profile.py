"""Measures how many blocks a device has room for beside the model and its largest step, by running that step.

This file knows memory and tensors. The engine's config says what share of a device the engine may use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from paged_core.execution import kv_cache
from paged_core.execution.batch import BatchBuilder
from paged_core.execution.fake_steps import largest_steps
from paged_core.execution.model import AttentionBackend, PagedModel, RequestSampler
from paged_core.execution.model_runner import ModelRunner
from paged_core.execution.spec import ModelSpec
from paged_core.scheduling.schedule import Limits


class Gauge(Protocol):
    """The memory of one device, in bytes."""

    def start(self) -> None:
        """Forget the peak."""
        ...

    def total(self) -> int: ...

    def used(self) -> int:
        """Return the bytes in use now, by any process, without memory that torch keeps for later use."""
        ...

    def peak(self) -> int:
        """Return the most that tensors took at once since ``start``, beyond what they took at ``start``."""
        ...


class CudaGauge:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def used(self) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


GAUGES: dict[str, Callable[[torch.device], Gauge]] = {"cuda": CudaGauge}
"""The Gauge for each type of device."""


def bytes_left(
    model: PagedModel,
    backend: AttentionBackend,
    sampler: RequestSampler,
    limits: Limits,
    block_size: int,
    dtype: torch.dtype,
    share: float,
) -> dict[torch.device, int]:
    """Return the bytes that K/V may take on each device that has layers, if the engine may fill ``share`` of its
    memory."""
    devices = {layer.device for layer in model.spec.layers} | {model.spec.device}
    gauges = {device: GAUGES[device.type](device) for device in devices if device.type in GAUGES}
    cache = kv_cache.allocate(model.spec, 1, block_size, dtype)
    for tensor in cache.tensors:
        tensor[0].zero_()  # these steps read the null block, and uninitialised memory may hold NaN
    runner, builder = ModelRunner(model, backend, cache), BatchBuilder(block_size, model.spec.device)
    for gauge in gauges.values():
        gauge.start()
    for schedule in largest_steps(limits, block_size):
        batch = builder.build(schedule)
        sampler.select(runner.run(batch, eager=True), batch.sample_requests)
    peaks = {device: gauge.peak() for device, gauge in gauges.items()}
    del cache, runner, builder, batch
    return {
        device: int(share * gauge.total()) - gauge.used() - peaks[device]
        for device, gauge in gauges.items()
        if any(layer.device == device for layer in model.spec.layers)
    }


def blocks_within(spec: ModelSpec, room: Mapping[torch.device, int], block_size: int, dtype: torch.dtype) -> int:
    """Return how many blocks fit into ``room``, the bytes of each device. Each device keeps the K/V of its own
    layers."""
    return min(
        num_bytes // kv_cache.bytes_per_block(_on(spec, device), block_size, dtype)
        for device, num_bytes in room.items()
    )


def _on(spec: ModelSpec, device: torch.device) -> ModelSpec:
    return replace(spec, layers=tuple(layer for layer in spec.layers if layer.device == device))
