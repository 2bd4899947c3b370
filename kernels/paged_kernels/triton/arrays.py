"""Tensors as kernels take them, and the device of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``device`` is current, because Triton launches on the current device. It is only set if
    it differs: asking is faster."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x with contiguous rows, and its strides from token to token and from head to head."""
    num_tokens, num_heads, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    # The stride of an axis of length one may be anything, and Triton would compile for each kind of stride.
    head = x.stride(1) if num_heads > 1 else dim
    return x, x.stride(0) if num_tokens > 1 else num_heads * head, head


def bits_of(cache: Tensor) -> Tensor:
    """Return a cache as kernels read it: contiguous, with e4m3 as its bits."""
    assert cache[0].is_contiguous(), "a block is one piece of memory"
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
