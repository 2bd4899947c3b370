"""Forwards for what stands between the products: norms, and attention modules that rotate their queries and keys.

This file knows torch modules and functions by what they compute, tried on random numbers. It never writes to one.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from paged_core.execution.model import ModuleForward

_ROWS = 5
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest value, for sums in another order
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # where only the last bit may differ
_ROTATES = "apply_rotary_pos_emb"  # (q [B,H,T,D], k [B,K,T,D], cos [B,T,D], sin [B,T,D]) -> (q, k)


# ---- held against the module itself ----------------------------------------------------------------------------


@torch.no_grad()
def stock(module: nn.Module, x: Tensor) -> Tensor:
    """What the module's own forward gives, hooks left out."""
    return type(module).forward(module, x)  # type: ignore[no-any-return]


def alike(ours: Tensor, theirs: Tensor, tolerances: dict[torch.dtype, float] = _TOLERANCE) -> bool:
    if type(theirs) is not Tensor or ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
        return False
    a, b = ours.float(), theirs.float()
    scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return torch.allclose(a, b, rtol=0.0, atol=tolerances[ours.dtype] * scale, equal_nan=True)


# ---- norms -----------------------------------------------------------------------------------------------------


def _is_rms_norm(module: nn.Module) -> bool:
    """One vector of weights and an epsilon; what it computes with them is found out by trying."""
    weight = module._parameters.get("weight")
    return (
        len(module._parameters) == 1
        and not module._modules
        and not module._buffers
        and type(weight) in (Tensor, nn.Parameter)
        and weight is not None
        and weight.ndim == 1
        and weight.dtype in _TOLERANCE
        and _eps(module) is not None
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def norm_forward(module: nn.Module) -> ModuleForward | None:
    """Tried on a copy with weights of its own: those of the module may not tell one formula from another."""
    if not _is_rms_norm(module):
        return None
    weight, generator = module._parameters["weight"], torch.Generator().manual_seed(0)
    assert weight is not None
    twin = copy.copy(module)
    drawn = torch.rand(weight.shape, generator=generator).to(weight.dtype)
    twin.__dict__["_parameters"] = {"weight": drawn}
    x = torch.randn(1, _ROWS, len(weight), generator=generator).to(weight.dtype)
    for plus_one in (False, True) if weight.dtype is torch.float32 else (False,):
        if alike(_RMSNorm(twin, plus_one)(x), stock(twin, x), _CLOSE):
            return _RMSNorm(module, plus_one)
    return None


class _RMSNorm:
    """x / rms(x) * weight, or * (1 + weight), in one pass."""

    def __init__(self, module: nn.Module, plus_one: bool) -> None:
        from paged_kernels.cpu.elementwise import rms_norm

        self._kernel, self._module, self._owner = rms_norm, weakref.ref(module), module._parameters
        self._eps, self._plus_one = _eps(module), plus_one
        self._take()

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        if not self._watch.same([self._owner.get("weight")]):
            self._take()
        if x.dtype is not self._weight.dtype or x.device.type != "cpu":
            module = self._module()
            return type(module).forward(module, x)  # type: ignore[union-attr, no-any-return]
        out: Tensor = self._kernel(x, self._weight, self._eps)
        return out

    def stale(self) -> bool:
        module = self._module()
        return module is None or _eps(module) != self._eps or bool(self._watch.stale([self._owner.get("weight")]))

    def _take(self) -> None:
        from paged_kernels.cpu.linear import WatchedTensors

        weight = self._owner["weight"]
        assert weight is not None
        self._watch = WatchedTensors([weight])
        self._weight = 1 + weight.detach() if self._plus_one else weight.detach()


# ---- rotary ----------------------------------------------------------------------------------------------------


def rotary_forward(module: nn.Module) -> ModuleForward | None:
    """For a module whose forward calls apply_rotary_pos_emb: the same forward, calling ours instead."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _ROTATES not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(_ROTATES)
    return _Rotating(module, forward, theirs) if callable(theirs) and _rotates_as_llama(theirs) else None


class _Rotating:
    """The module's own forward over a copy of its globals, in which one function is another. Its children are called
    as always."""

    calls_children = True

    def __init__(self, module: nn.Module, forward: types.FunctionType, theirs: Callable[..., Any]) -> None:
        scope = {**forward.__globals__, _ROTATES: _rotation(theirs)}
        self._run = types.FunctionType(
            forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
        )
        self._run.__kwdefaults__ = forward.__kwdefaults__
        self._module, self._forward, self._theirs = weakref.ref(module), forward, theirs

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._run(self._module(), *args, **named)

    def stale(self) -> bool:
        """Whether someone has put another function in the place of the one we stand for."""
        module = self._module()
        return (
            module is None
            or type(module).forward is not self._forward
            or self._forward.__globals__.get(_ROTATES) is not self._theirs
        )


def _rotation(theirs: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    from paged_kernels.cpu.elementwise import rotary

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or not _can_rotate(q, k, cos, sin):
            return theirs(q, k, cos, sin, *rest, **named)
        q, k = (x[0].transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in (q, k))  # [T,H,D]
        rotary(q, k, cos[0], sin[0])
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    return rotate


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[0] == k.shape[0] == cos.shape[0] == 1
        and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:]
        and q.dtype is k.dtype is cos.dtype is sin.dtype
        and q.dtype in _TOLERANCE
        and q.device.type == "cpu"
    )


def _rotates_as_llama(theirs: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype in _TOLERANCE:
        q, k = (torch.randn(1, heads, _ROWS, 32, generator=generator).to(dtype) for heads in (4, 2))
        cos, sin = (torch.randn(1, _ROWS, 32, generator=generator).to(dtype) for _ in range(2))
        try:
            pair = theirs(q.clone(), k.clone(), cos, sin)
        except Exception:  # another signature, or another layout
            return False
        ours = _rotation(theirs)(q, k, cos, sin)
        if len(pair) != 2 or not all(alike(a, b, _CLOSE) for a, b in zip(ours, pair, strict=True)):
            return False
    return True
