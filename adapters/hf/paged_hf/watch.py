"""Has anyone changed the weights? Told in a few milliseconds from identities, versions and a few values of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 32  # values looked at in each tensor, for edits through ``.data``, which leave no other trace


class Watch:
    """Remembers every parameter and buffer of ``model``. Edits of single values through ``.data`` can escape it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._types = _types(model)
        self._remember()

    def retyped(self) -> bool:
        """Whether tensors came, went, or changed shape, dtype or device."""
        return _types(self._model) != self._types

    def distrust(self) -> None:
        """Have ``retyped`` say yes from now on."""
        self._types = []

    def changed(self) -> bool:
        """Whether weights changed since the last call. Each device is waited for once."""
        if (
            all(
                own.get(name) is tensor and (tensor.data_ptr(), _version(tensor)) == mark
                for own, name, tensor, mark in self._marks
            )
            and self._values_are_the_same()
        ):
            return False
        self._remember()
        return True

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
        self._marks = []  # (dict, key, tensor, (address, version))
        self._views: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
        for own, name in _slots(self._model):
            tensor = own[name]
            self._marks.append((own, name, tensor, (tensor.data_ptr(), _version(tensor))))
            for plain in _plain(tensor):
                view = _sample(plain)
                if view is not None:
                    self._views.setdefault(view.device, {}).setdefault(view.dtype, []).append(view)
        self._seen = self._values()


def _slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield own, name


def _types(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(own[name].shape, own[name].dtype, own[name].device) for own, name in _slots(model)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors inside a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor.detach()
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _sample(tensor: Tensor) -> Tensor | None:
    """A view of at most _SAMPLES values, evenly spread; it follows the tensor's memory."""
    plain = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not plain or not tensor.numel() or not tensor.is_contiguous():
        return None
    step = max(1, tensor.numel() // _SAMPLES)
    return tensor.view(-1)[::step][:_SAMPLES]
