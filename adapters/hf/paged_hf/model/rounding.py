"""Tells rounding from mistakes. A model of 16-bit weights is computed once more with every operation in float32. A
difference is rounding if ours is about as near to that reading as stock's.

This file knows tensors and torch's dispatcher. It knows nothing of models' classes, attention or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = (torch.float16, torch.bfloat16)
_KEPT_BYTES = 1 << 30
_TIMES = 3.0  # how much further from the reading ours may be than stock: expert routers flip now and then
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02}  # mean error / deviation
_PEAK = 50.0  # the largest of many rounding errors is a few times their mean; beyond this it is a mistake
_COARSE = 0.06  # the same for bfloat16 and anything smaller


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, in this thread, every operation takes float16 and bfloat16 as float32, and gives float32.

    Nothing is written: what an operation changes in place keeps its dtype. Up to ``kept_bytes`` of float32 weights are
    kept from call to call.
    """

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a weight: the weight, and its float32 copy
        self._room = kept_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        return func(*map(self._widen, args), **{name: self._widen(value) for name, value in kwargs.items()})

    def _widen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._widened(value) if value.dtype in _NARROW else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._widen, value))
        return torch.float32 if isinstance(value, torch.dtype) and value in _NARROW else value

    def _widened(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.float()
        kept = self._kept.get(id(tensor))
        if kept is not None:
            return kept[1]
        wide = tensor.detach().float()
        num_bytes = wide.numel() * wide.element_size()
        if num_bytes <= self._room:
            self._room -= num_bytes
            self._kept[id(tensor)] = tensor, wide
        return wide


def narrow_dtype(model: nn.Module) -> torch.dtype | None:
    """The coarsest 16-bit dtype among the weights; None: there is none."""
    found = {parameter.dtype for parameter in model.parameters()}
    return next((dtype for dtype in reversed(_NARROW) if dtype in found), None)


def reading(compute: Callable[[], Any]) -> Any | None:
    """The result of ``compute`` in float32; None if a part of the model can't be computed so."""
    try:
        with Widened():
            return compute()
    except Exception:  # kernels that require 16 bits, or other calls of models
        return None


def difference(got: Tensor, want: Tensor) -> float:
    """Mean absolute difference, or a fiftieth of the largest if that is more: a single logit may be wrong. Both as a
    share of the standard deviation of the expected values, without infinities."""
    got, want = got.float(), want.float()
    told = want.isfinite()
    if not told.all():
        got, want = got[told], want[told]
    apart = (got - want).abs()
    worst = torch.maximum(apart.mean(), apart.max() / _PEAK) if apart.numel() else apart.sum()
    return (worst / want.std().clamp_min(1e-9)).item()


def usual_difference(got: Tensor, want: Tensor) -> float:
    """The same for ``[T, vocab]``, for most tokens: a few with large errors don't count."""
    return torch.tensor([difference(*pair) for pair in zip(got, want, strict=True)]).median().item()


def tolerance(dtype: torch.dtype) -> float:
    """The limit of ``difference`` between two ways of computing in such a dtype, if nothing better is known."""
    return _TOLERANCE.get(dtype, _COARSE)


def allowed_beside(stocks: float, dtype: torch.dtype) -> float:
    """The limit of our distance from the float32 reading, if stock's distance is ``stocks``."""
    return max(_TIMES * stocks, torch.finfo(dtype).eps)
