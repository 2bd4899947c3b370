"""Copies numbers between host and device: all integers of a step in one copy, and copies that the host does not wait
for.

This file knows lists and tensors, and nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Field = tuple[Sequence[int], torch.dtype]
"""Values, and the dtype that they have on the device: int64 or int32."""


def upload_fields(fields: Sequence[Field], device: torch.device) -> list[Tensor]:
    """Return each field as a tensor ``[len(values)]`` on ``device``. All fields are sent in one copy, which the host
    does not wait for.

    The tensors are views of one piece of memory. On a CPU the values are already in place, and nothing is copied.
    """
    sizes = [len(values) if dtype is torch.int64 else -(-len(values) // 2) for values, dtype in fields]  # in words
    # torch's caching allocator doesn't reuse pinned memory before the copy has read it.
    words = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    host, offset = words.numpy(), 0
    for (values, dtype), size in zip(fields, sizes, strict=True):
        part = host[offset : offset + size]
        if dtype is torch.int32:
            part = part.view("int32")[: len(values)]
        part[:] = values
        offset += size
    parts = torch.split(words.to(device, non_blocking=True), sizes)
    return [
        part if dtype is torch.int64 else part.view(torch.int32)[: len(values)]
        for part, (values, dtype) in zip(parts, fields, strict=True)
    ]


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy of ``values``, which are on the host, on ``device``. The host does not wait for the copy."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class Download:
    """A copy of ``values`` to the host, in the background. Work given to the device later doesn't delay it."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[Any]:
        """Wait for the copy. Returns nested lists, as ``values.tolist()`` would."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return those rows of ``x [R, ...]``, or x itself if they are all rows in order."""
    return x if len(rows) == x.shape[0] else x[upload(torch.tensor(rows, dtype=torch.int64), x.device)]
