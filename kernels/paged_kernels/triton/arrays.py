"""Tensors as kernels take them, and the device that launches are made on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say. It is asked before it is set: that is faster."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """x with each row's numbers side by side, and its strides from token to token and from head to head."""
    num_tokens, num_heads, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    # Of an axis of one the stride may be anything, and each kind of stride would be compiled for.
    head = x.stride(1) if num_heads > 1 else dim
    return x, x.stride(0) if num_tokens > 1 else num_heads * head, head


def bits_of(cache: Tensor) -> Tensor:
    """A cache as kernels read it: whole blocks in one piece, e4m3 as its bits."""
    assert cache[0].is_contiguous(), "a block is one piece of memory"
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
