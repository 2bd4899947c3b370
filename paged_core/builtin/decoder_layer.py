"""A whole decoder layer in eight launches: norm, q/k/v, rotary, attention, output, norm, gate and up, down.

For layers made as Llama's are (norm, attention, norm, gated MLP, a residual around each half), whatever model they
belong to: a layer is known by its parts, and held against its own forward on random numbers before it is stood for.
What is saved is not arithmetic but the way between it: some hundred calls of small torch functions a layer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.elementwise import alike, norm_forward
from paged_core.builtin.packed import Layers
from paged_core.execution.model import ModuleForward

_ROWS = 5
_HONOURED = frozenset({"attend", "position_embeddings", "position_ids"})  # the last are in the angles already


def is_decoder_layer(module: nn.Module) -> bool:
    """By the names of its parts; what is in them the caller finds out."""
    attention = module._modules.get("self_attn")
    return (
        set(module._modules) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        and not (module._parameters or module._buffers)
        and attention is not None
        and set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and not (attention._parameters or attention._buffers)
        and isinstance(getattr(attention, "head_dim", None), int)
    )


def decoder_layer_forward(module: nn.Module) -> ModuleForward | None:
    """None if the layer computes something else than its parts tell."""
    norms = [norm_forward(module.get_submodule(name)) for name in ("input_layernorm", "post_attention_layernorm")]
    weight = module.get_submodule("self_attn.q_proj").weight
    if None in norms or weight.dtype is not torch.float32:  # bfloat16 rounds between the parts, as the module does
        return None
    ours = _DecoderLayer(module, *norms)
    dim = ours.head_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _ROWS, weight.shape[1], generator=generator)
    angles = torch.rand(1, _ROWS, dim // 2, generator=generator).repeat(1, 1, 2)
    given = {"position_embeddings": (angles.cos(), angles.sin()), "attend": mixing_attend}
    try:
        with torch.no_grad():
            return ours if alike(ours(x, **given), type(module).forward(module, x, **given)) else None
    except Exception:  # it wants more than we know to give, or its parts have other shapes
        return None


def mixing_attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """Some function of all three that tells heads and tokens apart."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return q.tanh() * k + v.cumsum(0)


def _matters(value: Any) -> bool:
    """Whether an argument asks for something: a cache, a mask, whatever it may be called."""
    return value is not None and value is not False


class _DecoderLayer(ModuleForward):
    """Stands for one layer's forward. Calls that are not the engine's own go to the module."""

    follows_module = True

    def __init__(self, module: nn.Module, norm: Any, second_norm: Any) -> None:
        attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
        q, k, v = (attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj"))
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]
        self._module = weakref.ref(module)
        self._parts = [(part, dict(part._modules)) for part in (module, attention, mlp)]
        self._norm, self._second_norm = norm, second_norm
        self._qkv = Layers([q, k, v])
        self._out = Layers([attention.get_submodule("o_proj")])
        self._inner = Layers([mlp.get_submodule(name) for name in ("gate_proj", "up_proj")], gated=True)
        self._outer = Layers([mlp.get_submodule("down_proj")])
        self._heads = [layer.out_features // self.head_dim for layer in (q, k, v)]  # type: ignore[operator]
        self._hooks = [
            hooks
            for part in module.modules()
            if part is not module
            for hooks in (part._forward_hooks, part._forward_pre_hooks)
        ]

    def __call__(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """``hidden_states [1,T,N] -> [1,T,N]``"""
        from paged_kernels.cpu.elementwise import rotary

        attend, rotation = named.get("attend"), named.get("position_embeddings")
        products = [layers.packed(hidden_states) for layers in (self._qkv, self._out, self._inner, self._outer)]
        if (
            rest
            or attend is None
            or rotation is None
            or any(_matters(value) for name, value in named.items() if name not in _HONOURED)
            or hidden_states.shape[0] != 1
            or None in products
            or any(self._hooks)
        ):
            module = self._module()
            return type(module).forward(module, hidden_states, *rest, **named)  # type: ignore[union-attr, no-any-return]
        qkv, out, inner, outer = products
        x = hidden_states[0]  # [T,N]
        heads = qkv(self._norm(x)).view(len(x), -1, self.head_dim)  # type: ignore[misc]
        q, k, v = heads.split(self._heads, dim=1)  # [T,H,D], [T,K,D], [T,K,D]
        cos, sin = rotation
        rotary(q, k, cos[0], sin[0])
        x = out(attend(q, k, v, None).reshape(len(x), -1), residual=x)  # type: ignore[misc]
        x = outer(inner(self._second_norm(x)), residual=x)  # type: ignore[misc]
        whole: Tensor = x[None]
        return whole

    def stale(self) -> bool:
        layers = (self._qkv, self._out, self._inner, self._outer)
        return (
            self._module() is None
            or any(part._modules != children for part, children in self._parts)
            or any(each.stale() for each in (*layers, self._norm, self._second_norm))
        )
