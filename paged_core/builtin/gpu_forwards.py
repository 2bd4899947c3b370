"""Faster forwards of the same meaning for modules on a GPU: norms, gated MLPs, rotations, a layer's sum and norm.

Answers create_module_forward. What is fused is only what stands between the products: linear layers are called as the
modules they are, so that quantised weights, adapters and hooks stay in place. Every forward is held against the module
it stands for, and none waits for the device. This file knows torch modules; it never writes to one.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.decoder_layer import mixing_attend
from paged_core.builtin.elementwise import CLOSE, alike, eps_of, norm_trial, rotary_forward, stock
from paged_core.execution.model import ModuleForward
from paged_core.hookspecs import hookimpl

_log = logging.getLogger("paged_core")
_DTYPES = tuple(CLOSE)
_ROWS = 5


@hookimpl
def create_module_forward(module: nn.Module, device: torch.device) -> ModuleForward | None:
    """CUDA's devices and HIP's, which torch calls by the same name."""
    return gpu_forward(module, device) if triton_works(device) else None


@cache
def triton_works(device: torch.device) -> bool:
    """Whether kernels can be compiled and run there: Triton wants a C compiler on the host, and not too old a card."""
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
    """Asked for parents before their children. Tests ask for modules on the CPU, under Triton's interpreter."""
    if "forward" in module.__dict__ or _device_type(module) != device.type:
        return None
    if _is_decoder_layer(module):
        return _layer_forward(module)
    if _is_gated_mlp(module):
        return _mlp_forward(module)
    return _norm_forward(module) or _rotary_forward(module, device)


# ---- norms -----------------------------------------------------------------------------------------------------


class _Norm(ModuleForward):
    """round(x / rms(x)) * weight, in one pass. The weight is the module's own, looked up at each call."""

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import rms_norm

        self._kernel, self._module, self._owner = rms_norm, weakref.ref(module), module._parameters
        self._eps = eps_of(module)

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

    dtype = next((p.dtype for p in module.parameters() if p.dtype in _DTYPES), None)
    return None if dtype is None else rotary_forward(module, rotated, device, (dtype,))


# ---- gated MLPs ------------------------------------------------------------------------------------------------


class _GatedMLP(ModuleForward):
    """down(silu(gate(x)) * up(x)): the three are called as modules, what stands between them is one kernel."""

    calls_children = True

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import silu_mul

        self._kernel, self._module = silu_mul, weakref.ref(module)
        self._act = module._modules["act_fn"]

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        module: Any = _there(self._module)
        if self._act is None or _listened_to(self._act):
            return stock(module, x)
        out: Tensor = module.down_proj(self._kernel(module.gate_proj(x), module.up_proj(x)))
        return out

    def stale(self) -> bool:
        module = self._module()
        return module is None or module._modules.get("act_fn") is not self._act


def _is_gated_mlp(module: nn.Module) -> bool:
    act = module._modules.get("act_fn")
    return (
        set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and not module._parameters
        and not module._buffers
        and act is not None
        and type(act).__name__ in ("SiLU", "SiLUActivation")
        and not _listened_to(act)
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def _mlp_forward(module: nn.Module) -> _GatedMLP | None:
    weight = getattr(module._modules["gate_proj"], "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES or weight.ndim != 2:
        return None  # quantised: nobody here knows what it takes
    forward, x = _GatedMLP(module), _rows_for(weight, weight.shape[1])
    with torch.no_grad():
        return forward if alike(forward(x), stock(module, x), CLOSE) else None


# ---- decoder layers --------------------------------------------------------------------------------------------


class _DecoderLayer(ModuleForward):
    """norm, attention, sum and norm at once, MLP, sum. All parts but the second norm are called as modules."""

    calls_children = True

    def __init__(self, module: nn.Module) -> None:
        from paged_kernels.triton.elementwise import add_rms_norm

        self._kernel, self._module = add_rms_norm, weakref.ref(module)
        self._norm = weakref.ref(module.get_submodule("post_attention_layernorm"))
        self._eps = eps_of(_there(self._norm))

    def __call__(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        module: Any = _there(self._module)
        norm = _there(self._norm)
        weight = norm._parameters["weight"]
        if rest or weight is None or not _go_together(hidden_states, weight) or _listened_to(norm):
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


def _is_decoder_layer(module: nn.Module) -> bool:
    """By the names of its parts; whether they are put together as Llama's are is found out by trying."""
    return (
        set(module._modules) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        and not module._parameters
        and isinstance(getattr(module._modules["self_attn"], "head_dim", None), int)
    )


def _layer_forward(module: nn.Module) -> _DecoderLayer | None:
    norm = module.get_submodule("post_attention_layernorm")
    if _listened_to(norm) or _norm_forward(norm) is None:
        return None
    weight = norm._parameters["weight"]
    assert weight is not None
    forward, x = _DecoderLayer(module), _rows_for(weight, len(weight))
    dim: int = module.get_submodule("self_attn").head_dim  # type: ignore[assignment]
    angles = torch.rand(1, _ROWS, dim // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2)
    rotation = (angles.cos().to(x), angles.sin().to(x))
    given = {"position_embeddings": rotation, "attention_mask": None, "attend": mixing_attend}
    try:
        with torch.no_grad():
            return forward if alike(forward(x, **given), type(module).forward(module, x, **given), CLOSE) else None
    except Exception:  # it wants more than we know to give
        return None


# ---- what they have in common ----------------------------------------------------------------------------------


def _device_type(module: nn.Module) -> str | None:
    """Where its parameters are; "" if they are in several kinds of places, None if it has none."""
    types = {parameter.device.type for parameter in module.parameters()}
    return types.pop() if len(types) == 1 else "" if types else None


def _go_together(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is weight.dtype and x.device == weight.device


def _listened_to(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rows_for(weight: Tensor, width: int) -> Tensor:
    """Random rows, by a generator of their own: the user's random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, _ROWS, width, generator=generator).to(weight.device, weight.dtype)


def _there(reference: weakref.ref[nn.Module]) -> nn.Module:
    module = reference()
    assert module is not None, "a forward lives no longer than its module"
    return module
