"""Has anyone changed the weights? Told in a few milliseconds from identities, versions and some values of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any, Literal

import torch
from torch import Tensor, nn

_VECTOR = 1 << 18  # values of a vector that are all looked at
_SAMPLES = 32  # values looked at in a longer one: quantised weights lie so


class Watch:
    """Remembers every parameter and buffer of ``modules``, and the ``loose`` tensors besides.

    Writes through ``.data`` leave no trace but the values: rows, columns and more of a matrix are noticed, and every
    value of a vector. Less of a matrix can escape.
    """

    def __init__(self, modules: Iterable[nn.Module], loose: dict[str, Tensor] | None = None) -> None:
        self._owners = [own for module in modules for own in (module._parameters, module._buffers)]
        if loose:
            self._owners.append(loose)
        self._types: list[tuple[Any, ...]] | None = self._types_now()
        self._remember()

    def retyped(self) -> bool:
        """Whether tensors came, went, or changed shape, dtype or device."""
        return self._types is None or (not self._untouched() and self._types_now() != self._types)

    def distrust(self) -> None:
        """Have ``retyped`` say yes from now on."""
        self._types = None

    def changed(self) -> bool:
        """Whether weights changed since the last call. Each device is waited for once."""
        if self._untouched() and self._values_are_the_same():
            return False
        self._remember()
        return True

    def news(self) -> Literal["retyped", "changed"] | None:
        """Which of both is so, in one look. What was retyped is told again by the next."""
        if self._types is None:
            return "retyped"
        untouched = self._untouched()
        if untouched and self._values_are_the_same():
            return None
        if not untouched and self._types_now() != self._types:
            return "retyped"
        self._remember()
        return "changed"

    def _untouched(self) -> bool:
        """Whether the same tensors lie where they lay, and nobody has written to one without hiding it. Loops run in
        C: models have hundreds."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._lengths
            and list(chain.from_iterable(self._filled)) == self._names
            and all(map(is_, chain.from_iterable(map(_entries, self._filled)), self._entries))
            and list(map(_address, self._tensors)) == self._addresses
            and _versions(self._tensors) == self._versions
        )

    def _values_are_the_same(self) -> bool:
        told = [now.eq(seen).all() for now, seen in zip(self._values(), self._seen, strict=True)]
        return all(bool(same) for same in told)  # once all devices are at it

    def _values(self) -> list[Tensor]:
        """What is looked at on each device, as it is now: bytes, so that one comparison does for all dtypes."""
        return [
            torch.cat([torch.cat(views).view(torch.uint8) for views in by_dtype.values()])
            for by_dtype in self._views.values()
        ]

    def _remember(self) -> None:
        self._empty = [own for own in self._owners if not own]  # as most are
        self._filled = [own for own in self._owners if own]
        self._lengths = list(map(len, self._filled))
        self._names = list(chain.from_iterable(self._filled))
        self._entries = list(chain.from_iterable(map(_entries, self._filled)))  # some are None
        self._tensors = [tensor for tensor in self._entries if tensor is not None]
        self._addresses = list(map(_address, self._tensors))
        self._versions = _versions(self._tensors)
        self._views: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
        sampled = set()  # tied weights stand in several places
        for tensor in self._tensors:
            if id(tensor) in sampled:
                continue
            sampled.add(id(tensor))
            for view in (view for plain in _plain(tensor) for view in _samples(plain)):
                self._views.setdefault(view.device, {}).setdefault(view.dtype, []).append(view)
        self._seen = self._values()

    def _types_now(self) -> list[tuple[Any, ...]]:
        held = chain.from_iterable(map(_entries, self._owners))
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in held if tensor is not None]


_entries = methodcaller("values")
_address = methodcaller("data_ptr")
_version = attrgetter("_version")


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # those of inference mode have none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors inside a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _samples(tensor: Tensor) -> list[Tensor]:
    """One-dimensional views that follow the tensor's memory. Those of a matrix touch every row and every column."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return []
    if not tensor.is_contiguous():  # such as one that lies turned
        tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim)))
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
