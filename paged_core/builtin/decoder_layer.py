"""A whole decoder layer in eight launches: norm; q, k and v; rotary; attention; output; norm; gate and up; down.

This is for layers built like Llama's (norm, attention, norm, gated MLP, a residual around each half), of any model. A
layer is recognised by its parts, and compared with its own forward on random numbers before it is replaced. This saves
no arithmetic, but the some hundred calls of small torch functions per layer. In bfloat16 it rounds where the modules
do, except between gate, up and down, where it rounds once at most.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paged_core.builtin.elementwise import norm_forward
from paged_core.builtin.modules import head_dim, hooks_of, is_decoder_layer
from paged_core.builtin.packed import Layers, added_up
from paged_core.builtin.trials import layer_agrees, random_rows, seen_with, tolerances
from paged_core.execution.model import ModuleForward

HONOURED = frozenset({"attend", "position_embeddings", "position_ids"})  # the angles already contain the last two


def is_plain_decoder_layer(module: nn.Module) -> bool:
    """Return whether this is a decoder layer whose attention is four projections. The caller checks the projections."""
    if not is_decoder_layer(module):
        return False
    attention = module.get_submodule("self_attn")
    own_nothing = not (attention._parameters or attention._buffers)
    return own_nothing and set(attention._modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def decoder_layer_forward(module: nn.Module, weights: str | None = None) -> ModuleForward | None:
    """Return a forward for the layer, or None if it computes something else than its parts suggest. ``weights``: see
    Layers."""
    norms: list[Any] = [
        norm_forward(module.get_submodule(name)) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    if None in norms:
        return None
    ours = DecoderLayer(module, norms[0], norms[1], weights)
    scale = norms[0].weight()
    x = random_rows(scale, len(scale))
    if ours.parts(x) is None:
        return None
    seen = seen_with(module, ours.take_stood_for())
    return ours if layer_agrees(ours, seen, x, tolerances(weights)) else None


def matters(value: Any) -> bool:
    """Return whether an argument asks for something, such as a cache or a mask under any name."""
    return value is not None and value is not False


class LayerParts(NamedTuple):
    """The products, norms and sizes of one layer as they are now. Results between launches are in reused buffers
    (rooms)."""

    qkv: Any
    out: Any
    inner: Any  # product of gate and up
    outer: Any
    norm_weight: Tensor
    norm_eps: float
    second_weight: Tensor
    second_eps: float
    heads: list[int]  # numbers of heads: of queries, keys, values
    head_dim: int

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any, y: Tensor) -> Tensor:
        """Compute the whole layer in eight launches: ``x [T,N], cos [T,D], sin [T,D] -> y [T,N]``."""
        from paged_kernels.cpu.elementwise import rms_norm
        from paged_kernels.cpu.recording import room

        attended = self.attended(x, cos, sin, attend)
        middle = self.out(attended, residual=x, out=room("middle", x.shape, x.dtype))
        normed = rms_norm(middle, self.second_weight, self.second_eps, room("normed", x.shape, x.dtype))
        gated = self.inner(normed, out=room("gated", (len(x), self.inner.num_columns), self.outer.x_dtype))
        return self.outer(gated, residual=middle, out=y)  # type: ignore[no-any-return]

    def attended(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """Compute norm, q/k/v, rotary and attention: ``-> [T,H*D]``."""
        from paged_kernels.cpu.elementwise import rms_norm, rotary
        from paged_kernels.cpu.recording import room

        normed = rms_norm(x, self.norm_weight, self.norm_eps, room("normed", x.shape, x.dtype))
        heads = self.qkv(normed, out=room("heads", (len(x), self.qkv.num_columns), x.dtype))
        q, k, v = torch.split(heads.view(len(x), -1, self.head_dim), self.heads, dim=1)
        rotary(q, k, cos, sin)
        return attend(q, k, v, None).reshape(len(x), -1)  # type: ignore[no-any-return]


class DecoderLayer(ModuleForward):
    """Replaces one layer's forward. Calls that don't come from the engine go to the module."""

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
        self.quantized = weights is not None
        self._heads = [size // dim for size in self._qkv.sizes]
        self.hooks = [hooks for part in module.modules() if part is not module for hooks in hooks_of(part)]

    def __call__(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Compute ``hidden_states [1,T,N] -> [1,T,N]``."""
        attend, rotation = named.get("attend"), named.get("position_embeddings")
        parts = self.parts(hidden_states)
        if (
            rest
            or attend is None
            or rotation is None
            or any(matters(value) for name, value in named.items() if name not in HONOURED)
            or hidden_states.shape[0] != 1
            or parts is None
            or any(self.hooks)
        ):
            module = self._module()
            return type(module).forward(module, hidden_states, *rest, **named)  # type: ignore[union-attr, no-any-return]
        x, (cos, sin) = hidden_states[0], rotation  # [T,N], [1,T,D] each
        if self._add_up is not None:
            return self._of_one_rank(parts, x, cos[0], sin[0], attend)
        return parts.compute(x, cos[0], sin[0], attend, torch.empty_like(x))[None]

    def parts(self, x: Tensor) -> LayerParts | None:
        """Return the current parts, or None if they can't take such an x."""
        qkv, out, inner, outer = products = [layers.packed(x) for layers in self._layers()]
        if None in products:
            return None
        first, second = self._norm, self._second_norm
        norms = first.weight(), first.eps, second.weight(), second.eps
        return LayerParts(qkv, out, inner, outer, *norms, self._heads, self._head_dim)

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where its weights are: dictionaries, and names in them."""
        return [place for each in (*self._layers(), self._norm, self._second_norm) for place in each.places()]

    @property
    def is_whole(self) -> bool:
        """Whether this rank has all of the layer."""
        return self._add_up is None

    def _of_one_rank(self, parts: LayerParts, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """Compute a layer that is split over ranks, which add up both products."""
        assert self._add_up is not None
        after_out, after_outer = self._add_up
        x = after_out(parts.out(parts.attended(x, cos, sin, attend))) + x
        return (after_outer(parts.outer(parts.inner(self._second_norm(x), parts.outer.x_dtype), x.dtype)) + x)[None]

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


def _as_it_is(x: Tensor) -> Tensor:
    return x
