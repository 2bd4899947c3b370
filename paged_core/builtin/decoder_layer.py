"""A whole decoder layer in eight launches: norm, q/k/v, rotary, attention, output, norm, gate and up, down.

For layers made as Llama's are (norm, attention, norm, gated MLP, a residual around each half), whatever model they
belong to: a layer is known by its parts, and held against its own forward on random numbers before it is stood for.
What is saved is not arithmetic but the way between it: some hundred calls of small torch functions a layer. In bfloat16
it rounds where the modules do, but for what lies between gate, up and down, which is rounded once at most.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.elementwise import norm_forward
from paged_core.builtin.modules import head_dim, hooks_of, is_decoder_layer
from paged_core.builtin.packed import Layers, added_up
from paged_core.builtin.replayed import Replayed, Rooms
from paged_core.builtin.trials import layer_agrees, random_rows, seen_with, tolerances
from paged_core.execution.model import ModuleForward

_HONOURED = frozenset({"attend", "position_embeddings", "position_ids"})  # the last are in the angles already


def is_plain_decoder_layer(module: nn.Module) -> bool:
    """A decoder layer whose attention is four projections; what they are the caller finds out."""
    if not is_decoder_layer(module):
        return False
    attention = module.get_submodule("self_attn")
    own_nothing = not (attention._parameters or attention._buffers)
    return own_nothing and set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def decoder_layer_forward(module: nn.Module, weights: str | None = None) -> ModuleForward | None:
    """None if the layer computes something else than its parts tell. ``weights``: as Layers takes it."""
    norms = [norm_forward(module.get_submodule(name)) for name in ("input_layernorm", "post_attention_layernorm")]
    weight = module.get_submodule("self_attn.q_proj").weight
    if None in norms:
        return None
    assert isinstance(weight, Tensor), "the caller knows its parts"
    ours = _DecoderLayer(module, norms[0], norms[1], weights)
    seen = seen_with(module, ours.take_stood_for())
    return ours if layer_agrees(ours, seen, random_rows(weight, weight.shape[1]), tolerances(weights)) else None


def _matters(value: Any) -> bool:
    """Whether an argument asks for something: a cache, a mask, whatever it may be called."""
    return value is not None and value is not False


class _DecoderLayer(ModuleForward):
    """Stands for one layer's forward. Calls that are not the engine's own go to the module."""

    follows_module = True

    def __init__(self, module: nn.Module, norm: Any, second_norm: Any, weights: str | None) -> None:
        attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
        q, k, v = (attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj"))
        dim = head_dim(module)
        assert dim is not None, "see is_plain_decoder_layer"
        self._module, self._head_dim = weakref.ref(module), dim
        self._parts = [(part, dict(part._modules)) for part in (module, attention, mlp)]
        self._norm, self._second_norm = norm, second_norm
        self._qkv = Layers([q, k, v], weights=weights)
        self._out = Layers([attention.get_submodule("o_proj")], weights=weights)
        self._inner = Layers([mlp.get_submodule(name) for name in ("gate_proj", "up_proj")], True, weights)
        self._outer = Layers([mlp.get_submodule("down_proj")], weights=weights)
        sums = added_up(attention.get_submodule("o_proj")), added_up(mlp.get_submodule("down_proj"))
        self._add_up = None if sums == (None, None) else [each or _as_it_is for each in sums]
        self._until_attention, self._from_attention_on = Replayed(_until_attention, 3), Replayed(_from_attention_on, 4)
        self.quantized = weights is not None
        self._heads = [len(layer._parameters["weight"]) // dim for layer in (q, k, v)]  # type: ignore[arg-type]
        self._hooks = [hooks for part in module.modules() if part is not module for hooks in hooks_of(part)]

    def __call__(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """``hidden_states [1,T,N] -> [1,T,N]``"""
        attend, rotation = named.get("attend"), named.get("position_embeddings")
        products = [layers.packed(hidden_states) for layers in self._layers()]
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
        x, (cos, sin) = hidden_states[0], rotation  # [T,N], [1,T,D] each
        heads = x.new_empty(len(x), sum(self._heads) * self._head_dim)
        basis: tuple[Any, ...] = (qkv, self._norm.weight(), self._norm.eps, self._heads, self._head_dim)
        self._until_attention(basis, heads, x, cos[0], sin[0])
        attended = attend(*_parted(heads, self._heads, self._head_dim), None).reshape(len(x), -1)
        if self._add_up is not None:
            return self._of_one_rank(attended, x, out, inner, outer)
        basis = (out, self._second_norm.weight(), self._second_norm.eps, inner, outer)
        return self._from_attention_on(basis, torch.empty_like(x), attended, x)[None]

    def _of_one_rank(self, attended: Tensor, x: Tensor, out: Any, inner: Any, outer: Any) -> Tensor:
        """The rest of the layer, where ranks add up what either product gives."""
        assert self._add_up is not None
        after_out, after_outer = self._add_up
        x = after_out(out(attended)) + x
        return (after_outer(outer(inner(self._second_norm(x), outer.x_dtype), x.dtype)) + x)[None]

    def stale(self) -> bool:
        return (
            self._module() is None
            or any(part._modules != children for part, children in self._parts)
            or any(each.stale() for each in (*self._layers(), self._norm, self._second_norm))
        )

    def release(self) -> bool:
        return sum(layers.release() for layers in self._layers()) > 0

    def take_stood_for(self) -> dict[int, Tensor]:
        """See Layers."""
        return {owner: weight for layers in self._layers() for owner, weight in layers.take_stood_for().items()}

    def _layers(self) -> tuple[Layers, ...]:
        return self._qkv, self._out, self._inner, self._outer


def _until_attention(basis: Any, heads: Tensor, tensors: Sequence[Tensor], rooms: Rooms) -> None:
    """Norm, q/k/v, rotary: ``x [T,N], cos [T,D], sin [T,D] -> heads [T,(H+2K)*D]``"""
    from paged_kernels.cpu.elementwise import rms_norm, rotary

    (x, cos, sin), (qkv, weight, eps, counts, dim) = tensors, basis
    qkv(rms_norm(x, weight, eps, rooms.room("normed", x.shape, x.dtype)), out=heads)
    q, k, _ = _parted(heads, counts, dim)
    rotary(q, k, cos, sin)


def _from_attention_on(basis: Any, y: Tensor, tensors: Sequence[Tensor], rooms: Rooms) -> None:
    """Output, norm, gate and up, down, with the residual around each half: ``attended [T,H*D], x [T,N] -> y [T,N]``"""
    from paged_kernels.cpu.elementwise import rms_norm

    (attended, x), (out, weight, eps, inner, outer) = tensors, basis
    middle = out(attended, residual=x, out=rooms.room("middle", x.shape, x.dtype))
    normed = rms_norm(middle, weight, eps, rooms.room("normed", x.shape, x.dtype))
    gated = inner(normed, out=rooms.room("gated", (len(x), inner.num_columns), outer.x_dtype))
    outer(gated, residual=middle, out=y)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _parted(heads: Tensor, counts: list[int], dim: int) -> Sequence[Tensor]:
    """``[T,(H+2K)*D] -> [T,H,D], [T,K,D], [T,K,D]``"""
    return torch.split(heads.view(len(heads), -1, dim), counts, dim=1)
