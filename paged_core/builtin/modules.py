"""Recognises modules by their parts, never by a model's name, for CPUs and GPUs alike.

Whether the parts are combined as expected is found out by a trial (trials.py). Modules that are not plainly understood
(a subclass, a quantised weight, a hook, a wrapped child) are not recognised.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

DECODER_LAYER = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
GATED_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


def is_gated_mlp(module: nn.Module) -> bool:
    """Return whether its children are those of ``down(silu(gate(x)) * up(x))``. The caller checks these three."""
    act = module._modules.get("act_fn")
    return (
        set(module._modules) == GATED_MLP
        and _owns_nothing(module)
        and act is not None
        and type(act).__name__ in ("SiLU", "SiLUActivation")
        and not is_listened_to(act)
        and _takes_one_tensor(module)
    )


def is_decoder_layer(module: nn.Module) -> bool:
    """Return whether its children are those of a decoder layer: norm, attention, norm, MLP."""
    return set(module._modules) == DECODER_LAYER and _owns_nothing(module) and head_dim(module) is not None


def head_dim(decoder_layer: nn.Module) -> int | None:
    """Return the head dim that its attention declares, or None."""
    found = getattr(decoder_layer._modules.get("self_attn"), "head_dim", None)
    return found if isinstance(found, int) else None


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether it has one vector of weights, and an epsilon."""
    weight = module._parameters.get("weight")
    return (
        len(module._parameters) == 1
        and not module._modules
        and not module._buffers
        and type(weight) in (Tensor, nn.Parameter)
        and weight is not None
        and weight.ndim == 1
        and eps_of(module) is not None
        and _takes_one_tensor(module)
    )


def eps_of(norm: nn.Module) -> float | None:
    """Return the epsilon of an RMS norm, under any of its names."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None


def known_eps(norm: nn.Module) -> float:
    """Return the epsilon of a module for which is_rms_norm is true."""
    eps = eps_of(norm)
    assert eps is not None, "see is_rms_norm"
    return eps


def is_listened_to(module: nn.Module) -> bool:
    """Return whether it has hooks, or another forward than its class's."""
    return bool(any(hooks_of(module))) or "forward" in module.__dict__


def hooks_of(module: nn.Module) -> tuple[Any, Any]:
    """Return its live containers of hooks, which stay the same objects while hooks come and go."""
    return module._forward_hooks, module._forward_pre_hooks


def device_type(module: nn.Module) -> str | None:
    """Return the device type of its parameters: "" if they are on several types, None if it has none."""
    types = {parameter.device.type for parameter in module.parameters()}
    return types.pop() if len(types) == 1 else "" if types else None


def dtype_among(module: nn.Module, dtypes: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """Return the dtype of its first parameter that has one of ``dtypes``."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.dtype in dtypes), None)


def _owns_nothing(module: nn.Module) -> bool:
    return not module._parameters and not module._buffers


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2
