"""WatchedTensors: have these tensors changed? It is told from identities, versions, addresses and some values of each.

This file knows tensors, quantised ones too, and nothing of modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_, methodcaller

import torch
from torch import Tensor

_VECTOR = 1 << 18  # values of a vector that are all looked at
_SAMPLES = 32  # values looked at in a longer one: quantised weights lie so


class WatchedTensors:
    """Remembers tensors, and None among them. Every question is about those that stand in their places now: as many,
    in the same order. Loops run in C: models have hundreds.

    Writes through ``.data`` leave no trace but the values: rows, columns and more of a matrix are noticed, and every
    value of a vector. Less of a matrix can escape.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._tensors = list(tensors)
        self._present = [tensor for tensor in self._tensors if tensor is not None]
        self._versions = _versions(self._present)
        self._addresses = list(map(_address, self._present))
        self._views: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
        for tensor in {id(tensor): tensor for tensor in self._present}.values():  # tied weights stand in several places
            for view in (view for plain in plain_tensors(tensor) for view in _samples(plain)):
                self._views.setdefault(view.device, {}).setdefault(view.dtype, []).append(view)
        self._seen = self._values()

    def same(self, tensors: Iterable[Tensor | None]) -> bool:
        """Identities and version counters: what every call can afford to look at."""
        return all(map(is_, tensors, self._tensors)) and _versions(self._present) == self._versions

    def untouched(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether the same tensors lie where they lay, and nobody has written to one without hiding it."""
        return self.same(tensors) and list(map(_address, self._present)) == self._addresses

    def values_are_the_same(self) -> bool:
        """Reads memory: milliseconds for a model's weights. Each device is waited for once."""
        told = [now.eq(seen).all() for now, seen in zip(self._values(), self._seen, strict=True)]
        return all(bool(same) for same in told)  # once all devices are at it

    def stale(self, tensors: Iterable[Tensor | None]) -> bool:
        """All of this: for when there is reason to ask."""
        return not (self.untouched(tensors) and self.values_are_the_same())

    def _values(self) -> list[Tensor]:
        """What is looked at on each device, as it is now: bytes, so that one comparison does for all dtypes."""
        return [
            torch.cat([torch.cat(views).view(torch.uint8) for views in by_dtype.values()])
            for by_dtype in self._views.values()
        ]


def version_of(tensor: Tensor) -> int:
    """Its count of writes; -1 for one of inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


_address = methodcaller("data_ptr")
_version = attrgetter("_version")


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # one of inference mode is among them
        return list(map(version_of, tensors))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors inside a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _samples(tensor: Tensor) -> list[Tensor]:
    """One-dimensional views that follow the tensor's memory. Those of a matrix touch every row and every column."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return []
    if not tensor.is_contiguous():  # such as one that lies turned
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    if not tensor.is_contiguous():
        return [tensor[0], tensor[:, 0]] if tensor.ndim == 2 else []
    return [tensor.view(-1)[:: _step(tensor)]]


def _step(tensor: Tensor) -> int:
    """Through all values, one after another: into each row, as it is no longer than one, and of the rows into each
    column, as it has no divisor in common with their length and there are rows enough."""
    rows, columns = tensor.shape[-2:] if tensor.ndim > 1 else (tensor.numel(), 1)
    if 1 in (rows, columns):
        return 1 if tensor.numel() <= _VECTOR else tensor.numel() // _SAMPLES
    step = min(rows, columns - 1)
    while math.gcd(step, columns) != 1:
        step -= 1
    return step
