"""Compiles a model with torch.compile while the engine is built, and compares its logits with those of the uncompiled
model.

A few small steps stand for all shapes: one token, several of one request, several requests. Their K/V go to a cache
that is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paged_core.execution import kv_cache
from paged_core.execution.batch import BatchBuilder
from paged_core.execution.fake_steps import first_step
from paged_core.execution.model import AttentionBackend, PagedModel
from paged_core.execution.model_runner import ModelRunner

_STEPS = ((3, 2, 1), (1,), (4,))  # tokens of each request


def compile_and_compare(
    model: PagedModel,
    backend: AttentionBackend,
    block_size: int,
    cache_dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
) -> float:
    """Compile ``model``, which must be compilable. Returns the mean change of its logits, in standard deviations of the
    logits."""
    expected = [_logits(model, backend, block_size, cache_dtype, step) for step in _STEPS]
    model.compile_forward(True)
    found = []
    for done, step in enumerate(_STEPS):
        progress("compiling the model", done, len(_STEPS))
        found.append(_logits(model, backend, block_size, cache_dtype, step))
    progress("compiling the model", len(_STEPS), len(_STEPS))
    wanted, got = torch.cat(expected).float(), torch.cat(found).float()
    return float((got - wanted).abs().mean() / wanted.std())


def tolerance(dtype: torch.dtype) -> float:
    """Return the change that rounding alone may cause."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _logits(
    model: PagedModel, backend: AttentionBackend, block_size: int, cache_dtype: torch.dtype, sizes: tuple[int, ...]
) -> Tensor:
    schedule, num_blocks = first_step(model.spec, sizes, block_size)
    runner = ModelRunner(model, backend, kv_cache.allocate(model.spec, num_blocks, block_size, cache_dtype))
    batch = BatchBuilder(block_size, model.spec.device).build(schedule)
    return runner.run(batch, eager=True).clone()
