"""The core's own sampler, as a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_core.builtin.gpu_forwards import triton_works
from paged_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from paged_core.execution.spec import ModelSpec
    from paged_core.sampling.sampler import Sampler


@hookimpl
def create_sampler(spec: ModelSpec) -> Sampler:
    """Return the vectorised sampler, which honours all of SamplingParams. It uses kernels that read the logits once, if
    the device has them."""
    from paged_core.sampling.sampler import Sampler

    if triton_works(spec.device):
        from paged_kernels.triton import sampling

        sampling.warm_up(spec.vocab_size, spec.dtype, spec.device)
        return Sampler(sampling.argmax_rows, sampling.top_rows)
    if spec.device.type == "cpu":
        try:
            from paged_kernels.cpu.elementwise import argmax_rows
        except ImportError:  # numba is not installed
            return Sampler()
        return Sampler(argmax_rows)
    return Sampler()
