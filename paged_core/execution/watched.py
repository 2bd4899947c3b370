"""WatchedTensors: whether tensors have changed, seen from their identities, versions, addresses and some of their
values.

This file knows tensors, quantised ones too. It knows nothing of modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_, methodcaller

import torch
from torch import Tensor

_VECTOR = 1 << 18  # up to this length, all values of a vector are compared
_SAMPLES = 32  # values compared of a longer vector, such as packed quantised weights


class WatchedTensors:
    """Remembers tensors, and None among them. Each question is about the tensors now in the same places: the same
    number of them, in the same order. The loops run in C, since models have hundreds of tensors.

    Writes through ``.data`` change nothing but values. Changes of whole rows, whole columns or more of a matrix are
    noticed, and changes of any value of a vector. Smaller changes of a matrix can go unnoticed.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._tensors = list(tensors)
        self._present = [tensor for tensor in self._tensors if tensor is not None]
        self._versions = _versions(self._present)
        self._addresses = list(map(_address, self._present))
        self._views: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
        for tensor in {id(tensor): tensor for tensor in self._present}.values():  # tied weights are in several places
            for view in (view for plain in plain_tensors(tensor) for view in _samples(plain)):
                self._views.setdefault(view.device, {}).setdefault(view.dtype, []).append(view)
        self._seen = self._values()

    def same(self, tensors: Iterable[Tensor | None]) -> bool:
        """Compare identities and version counters. This is fast enough for every call."""
        return all(map(is_, tensors, self._tensors)) and _versions(self._present) == self._versions

    def untouched(self, tensors: Iterable[Tensor | None]) -> bool:
        """Return whether the tensors are the same, lie at the same addresses, and have had no write that torch
        counts."""
        return self.same(tensors) and list(map(_address, self._present)) == self._addresses

    def values_are_the_same(self) -> bool:
        """Compare some values of each tensor. This reads memory: milliseconds for a model's weights. It waits once for
        each device."""
        told = [now.eq(seen).all() for now, seen in zip(self._values(), self._seen, strict=True)]
        return all(bool(same) for same in told)  # after all devices have got their work

    def stale(self, tensors: Iterable[Tensor | None]) -> bool:
        """Return whether anything has changed, by all these checks. This is for occasional use."""
        return not (self.untouched(tensors) and self.values_are_the_same())

    def _values(self) -> list[Tensor]:
        """Return, for each device, the compared values as bytes, so that one comparison serves all dtypes."""
        return [
            torch.cat([torch.cat(views).view(torch.uint8) for views in by_dtype.values()])
            for by_dtype in self._views.values()
        ]


def version_of(tensor: Tensor) -> int:
    """Return torch's count of writes to a tensor, or -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version


_address = methodcaller("data_ptr")
_version = attrgetter("_version")


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # an inference tensor is among them
        return list(map(version_of, tensors))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the ordinary tensors inside a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _samples(tensor: Tensor) -> list[Tensor]:
    """Return one-dimensional views, in the order of memory. Those of a matrix include values of every row and every
    column."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return []
    if not tensor.is_contiguous():  # such as a transposed one
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    if not tensor.is_contiguous():
        return [tensor[0], tensor[:, 0]] if tensor.ndim == 2 else []
    return [tensor.view(-1)[:: _step(tensor)]]


def _step(tensor: Tensor) -> int:
    """Return a stride through all values in memory order. It is at most a row's length, so that it reaches each row. It
    has no common divisor with that length, so that it reaches each column if there are rows enough."""
    rows, columns = tensor.shape[-2:] if tensor.ndim > 1 else (tensor.numel(), 1)
    if 1 in (rows, columns):
        return 1 if tensor.numel() <= _VECTOR else tensor.numel() // _SAMPLES
    step = min(rows, columns - 1)
    while math.gcd(step, columns) != 1:
        step -= 1
    return step
