"""Forwards for the operations between products: norms, and attention modules that rotate their queries and keys.

This file recognises torch modules and functions by what they compute on random numbers. It never writes to one. Norms
and rotations are recognised in the same way on every device; the forwards of norms here are for CPUs.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.modules import eps_of, known_eps
from paged_core.builtin.trials import CLOSE, ROWS, alike, generator, norm_trial, stock
from paged_core.execution.model import ModuleForward
from paged_core.execution.watched import WatchedTensors

Rotated = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``q [T,H,D], k [T,K,D], cos [T,D], sin [T,D] -> (q, k)``, as new tensors."""

_DTYPES = (torch.float32, torch.bfloat16)  # dtypes that the CPU kernels know
_ROTATES = "apply_rotary_pos_emb"  # (q [B,H,T,D], k [B,K,T,D], cos [B,T,D], sin [B,T,D]) -> (q, k)


# ---- norms -----------------------------------------------------------------------------------------------------


def norm_forward(module: nn.Module) -> ModuleForward | None:
    """Return a forward for a norm on the CPU, or None."""
    trial = norm_trial(module, _DTYPES)
    if trial is None:
        return None
    twin, x = trial
    for plus_one in (False, True) if x.dtype is torch.float32 else (False,):
        if alike(_RMSNorm(twin, plus_one)(x), stock(twin, x), CLOSE):
            return _RMSNorm(module, plus_one)
    return None


class _RMSNorm(ModuleForward):
    """Computes x / rms(x) * weight, or * (1 + weight), in one pass."""

    follows_module = True

    def __init__(self, module: nn.Module, plus_one: bool) -> None:
        from paged_kernels.cpu.elementwise import rms_norm

        self._kernel, self._module, self._owner = rms_norm, weakref.ref(module), module._parameters
        self.eps, self._plus_one = known_eps(module), plus_one
        self._take()

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight = self.weight()
        if x.dtype is not weight.dtype or x.device.type != "cpu":
            module = self._module()
            return type(module).forward(module, x)  # type: ignore[union-attr, no-any-return]
        out: Tensor = self._kernel(x, weight, self.eps)
        return out

    def weight(self) -> Tensor:
        """Return the current weight by which rows are multiplied."""
        if not self._watched.same([self._owner.get("weight")]):
            self._take()
        return self._weight

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """See Layers.places."""
        return [(self._owner, "weight")]

    def stale(self) -> bool:
        module = self._module()
        return module is None or eps_of(module) != self.eps or self._watched.stale([self._owner.get("weight")])

    def _take(self) -> None:
        weight = self._owner["weight"]
        assert weight is not None
        self._watched = WatchedTensors([weight])
        self._weight = 1 + weight.detach() if self._plus_one else weight.detach()


# ---- rotary ----------------------------------------------------------------------------------------------------


def rotary_forward(
    module: nn.Module, rotated: Rotated, device: torch.device, dtypes: Sequence[torch.dtype] = _DTYPES
) -> ModuleForward | None:
    """Return a forward for a module whose forward calls apply_rotary_pos_emb: the same forward, which calls ``rotated``
    instead for tensors of ``dtypes`` on devices of this type."""
    forward = type(module).forward
    inner = inspect.unwrap(forward)
    if not (isinstance(forward, types.FunctionType) and isinstance(inner, types.FunctionType)):
        return None
    if _ROTATES not in inner.__code__.co_names:
        return None
    theirs = inner.__globals__.get(_ROTATES)
    if not callable(theirs):
        return None
    ours = _rotation(theirs, rotated, device.type, dtypes)
    dim = getattr(module, "head_dim", None)
    dim = dim if isinstance(dim, int) and dim % 2 == 0 else 32
    return _Rotating(module, forward, theirs, ours) if _rotates_as_llama(theirs, ours, device, dtypes, dim) else None


def rotated_on_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from paged_kernels.cpu.elementwise import rotary

    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    rotary(q, k, cos, sin)
    return q, k


class _Rotating(ModuleForward):
    """The module's own forward over a copy of its globals, in which one function is replaced. Its children are called
    as before."""

    calls_children = True

    def __init__(
        self, module: nn.Module, forward: types.FunctionType, theirs: Callable[..., Any], ours: Callable[..., Any]
    ) -> None:
        self._run, self._scope = _copied(forward, ours), inspect.unwrap(forward).__globals__
        self._module, self._forward, self._theirs = weakref.ref(module), forward, theirs

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._run(self._module(), *args, **named)

    def stale(self) -> bool:
        """Return whether the function that we replaced has been replaced by someone else."""
        module = self._module()
        return (
            module is None or type(module).forward is not self._forward or self._scope.get(_ROTATES) is not self._theirs
        )


def _copied(forward: types.FunctionType, ours: Callable[..., Any]) -> types.FunctionType:
    """Copy ``forward`` over a copy of its globals. Decorators around it are copied too, each over a copy of what it
    wraps; transformers has one that renames old arguments."""
    wrapped, scope, cells = getattr(forward, "__wrapped__", None), forward.__globals__, forward.__closure__
    if wrapped is None:
        scope = {**scope, _ROTATES: ours}
    else:
        inner = _copied(wrapped, ours)
        cells = tuple(types.CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells or ())
    made = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, cells)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotation(
    theirs: Callable[..., Any], rotated: Rotated, device_type: str, dtypes: Sequence[torch.dtype]
) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        known = q.dtype in dtypes and q.device.type == device_type
        if rest or named or not known or not _can_rotate(q, k, cos, sin):
            return theirs(q, k, cos, sin, *rest, **named)
        q, k = rotated(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])  # [T,H,D], [T,K,D]
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    return rotate


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[0] == k.shape[0] == cos.shape[0] == 1
        and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:]
        and q.dtype is k.dtype is cos.dtype is sin.dtype
    )


def _rotates_as_llama(
    theirs: Callable[..., Any], ours: Callable[..., Any], device: torch.device, dtypes: Sequence[torch.dtype], dim: int
) -> bool:
    random = generator()
    for dtype in dtypes:
        q, k = (torch.randn(1, heads, ROWS, dim, generator=random).to(device, dtype) for heads in (4, 2))
        cos, sin = (torch.randn(1, ROWS, dim, generator=random).to(device, dtype) for _ in range(2))
        try:
            pair = theirs(q.clone(), k.clone(), cos, sin)
        except Exception:  # another signature, or another layout
            return False
        if len(pair) != 2 or not all(alike(a, b, CLOSE) for a, b in zip(ours(q, k, cos, sin), pair, strict=True)):
            return False
    return True
