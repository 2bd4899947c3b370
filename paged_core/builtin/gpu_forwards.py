"""Faster forwards for modules on a GPU, with the same results: norms, gated MLPs, rotations, a layer's sum and norm.

This plugin answers create_module_forward. Only operations between products are fused: linear layers are called as the
modules that they are, so that quantised weights, adapters and hooks stay in place. Every forward is compared with the
module that it replaces, and none waits for the device. This file knows torch modules, and never writes to one.
"""

from __future__ import annotations

import logging
import weakref
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.elementwise import rotary_forward
from paged_core.builtin.modules import (
    device_type,
    dtype_among,
    eps_of,
    is_decoder_layer,
    is_gated_mlp,
    is_listened_to,
    known_eps,
)
from paged_core.builtin.trials import CLOSE, alike, layer_agrees, norm_trial, random_rows, stock
from paged_core.execution.model import ModuleForward
from paged_core.hookspecs import hookimpl

_log = logging.getLogger("paged_core")
_DTYPES = tuple(CLOSE)


@hookimpl
def create_module_forward(module: nn.Module, device: torch.device) -> ModuleForward | None:
    """This serves CUDA devices and HIP devices, which torch both calls "cuda"."""
    return gpu_forward(module, device) if triton_works(device) else None


@cache
def triton_works(device: torch.device) -> bool:
    """Return whether kernels can be compiled and run there: Triton needs a C compiler on the host, and a recent
    card."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from paged_kernels.triton.elementwise import silu_mul

    try:
        x = torch.ones(1, 1, device=device)
        return bool(silu_mul(x, x).isfinite().all())
    except Exception as error:
        _log.warning("Triton can't be used on %s, so modules and the sampler run as torch has them: %s", device, error)
        return False


def gpu_forward(module: nn.Module, device: torch.device) -> ModuleForward | None:
    """Return a forward or None. Called for parents before their children. Tests call it for modules on the CPU, under
    Triton's interpreter."""
    if "forward" in module.__dict__ or device_type(module) != device.type:
        return None
    if is_decoder_layer(module):
        return _layer_forward(module)
    if is_gated_mlp(module):
        return _mlp_forward(module)
    return _norm_forward(module) or _rotary_forward(module, device)


# ---- norms -----------------------------------------------------------------------------------------------------


class _Norm(ModuleForward):
    """Computes round(x / rms(x)) * weight in one pass. The weight is the module's own, looked up at each call."""

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import rms_norm

        self._kernel, self._module, self._owner = rms_norm, weakref.ref(module), module._parameters
        self._eps = known_eps(module)

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight = self._owner["weight"]
        if weight is None or not _go_together(x, weight):
            return stock(_there(self._module), x)
        out: Tensor = self._kernel(x, weight, self._eps)
        return out

    def stale(self) -> bool:
        module = self._module()
        return module is None or eps_of(module) != self._eps


def _norm_forward(module: nn.Module) -> _Norm | None:
    trial = norm_trial(module, _DTYPES)
    if trial is None:
        return None
    twin, x = trial
    return _Norm(module) if alike(_Norm(twin)(x), stock(twin, x), CLOSE) else None


# ---- attention -------------------------------------------------------------------------------------------------


def _rotary_forward(module: nn.Module, device: torch.device) -> ModuleForward | None:
    from paged_kernels.triton.elementwise import rotated

    dtype = dtype_among(module, _DTYPES)
    return None if dtype is None else rotary_forward(module, rotated, device, (dtype,))


# ---- gated MLPs ------------------------------------------------------------------------------------------------


class _GatedMLP(ModuleForward):
    """Computes down(silu(gate(x)) * up(x)): the three linears are called as modules, and one kernel computes what is
    between them."""

    calls_children = True

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import silu_mul

        self._kernel, self._module = silu_mul, weakref.ref(module)
        self._act = module._modules["act_fn"]

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        module: Any = _there(self._module)
        if self._act is None or is_listened_to(self._act):
            return stock(module, x)
        out: Tensor = module.down_proj(self._kernel(module.gate_proj(x), module.up_proj(x)))
        return out

    def stale(self) -> bool:
        module = self._module()
        return module is None or module._modules.get("act_fn") is not self._act


def _mlp_forward(module: nn.Module) -> _GatedMLP | None:
    weight = getattr(module._modules["gate_proj"], "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES or weight.ndim != 2:
        return None  # a quantised layer, whose input dtype is unknown
    forward, x = _GatedMLP(module), random_rows(weight, weight.shape[1])
    with torch.no_grad():
        return forward if alike(forward(x), stock(module, x), CLOSE) else None


# ---- decoder layers --------------------------------------------------------------------------------------------


class _DecoderLayer(ModuleForward):
    """Computes norm, attention, sum and norm together, MLP, sum. All parts but the second norm are called as
    modules."""

    calls_children = True

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import add_rms_norm

        self._kernel, self._module = add_rms_norm, weakref.ref(module)
        self._norm = weakref.ref(module.get_submodule("post_attention_layernorm"))
        self._eps = known_eps(_there(self._norm))

    def __call__(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        module: Any = _there(self._module)
        norm = _there(self._norm)
        weight = norm._parameters["weight"]
        if rest or weight is None or not _go_together(hidden_states, weight) or is_listened_to(norm):
            return type(module).forward(module, hidden_states, *rest, **named)  # type: ignore[no-any-return]
        attended = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **named)[0]
        total, normed = self._kernel(attended, hidden_states, weight, self._eps)
        out: Tensor = total + module.mlp(normed)
        return out

    def stale(self) -> bool:
        module, norm = self._module(), self._norm()
        if module is None or norm is None:
            return True
        return module._modules.get("post_attention_layernorm") is not norm or eps_of(norm) != self._eps


def _layer_forward(module: nn.Module) -> _DecoderLayer | None:
    norm = module.get_submodule("post_attention_layernorm")
    if is_listened_to(norm) or _norm_forward(norm) is None:
        return None
    weight = norm._parameters["weight"]
    assert weight is not None
    forward = _DecoderLayer(module)
    return forward if layer_agrees(forward, module, random_rows(weight, len(weight)), CLOSE) else None


# ---- shared helpers --------------------------------------------------------------------------------------------


def _go_together(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is weight.dtype and x.device == weight.device


def _there(reference: weakref.ref[nn.Module]) -> nn.Module:
    module = reference()
    assert module is not None, "a forward lives no longer than its module"
    return module
