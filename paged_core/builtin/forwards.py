"""Faster forwards for modules on a CPU, with the same results: packed linears, siblings in one product, gated MLPs.

This plugin answers create_module_forward. A module is recognised by its parts, never by a model's name, and every
forward is compared with the module that it replaces before it is returned. Modules that are not plainly understood (a
subclass, a hook, a wrapped child, a quantised weight that the config doesn't ask for) are left alone. This file knows
torch modules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.decoder_layer import decoder_layer_forward, is_plain_decoder_layer
from paged_core.builtin.decoder_stack import decoder_stack_forward
from paged_core.builtin.elementwise import norm_forward, rotary_forward, rotated_on_cpu
from paged_core.builtin.linears import Linear
from paged_core.builtin.modules import hooks_of, is_gated_mlp, is_listened_to
from paged_core.builtin.packed import Layers, added_up, is_packable, is_packable_end, is_packable_shard
from paged_core.builtin.trials import alike, seen_with, stock, tolerances
from paged_core.config import EngineConfig
from paged_core.execution.model import ModuleForward
from paged_core.execution.split_linear import SplitLinear
from paged_core.execution.watched import version_of
from paged_core.hookspecs import hookimpl

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called on the same input, the first name first


@hookimpl
def create_module_forward(
    module: nn.Module, device: torch.device, config: EngineConfig | None = None
) -> ModuleForward | None:
    """Called for parents before their children. If a parent is left alone, its children that are siblings are
    remembered."""
    if device.type != "cpu" or "forward" in module.__dict__ or not _have_kernels():
        return None
    weights = None if config is None else config.weights
    if is_packable(module, weights):
        group = _GROUPS.get(module)
        sibling = None if group is None else group.forward_of(module)
        return sibling or _checked(_Linear(module, weights), module)
    if isinstance(module, SplitLinear):
        return _shard_forward(module)
    if _is_packable_mlp(module, weights):
        mlp = _checked(_GatedMLP(module, weights), module)
        if mlp is not None:
            return mlp
    layer = _decoder_layer(module, weights)
    if layer is not None:
        return layer
    if (stack := decoder_stack_forward(module)) is not None:
        return stack
    for names in _SIBLINGS:
        children = [module._modules.get(name) for name in names]
        if all(is_packable(child, weights) for child in children):
            _remember([child for child in children if child is not None], weights)
    return norm_forward(module) or rotary_forward(module, rotated_on_cpu, device)


def _decoder_layer(module: nn.Module, weights: str | None) -> ModuleForward | None:
    """Return a forward for a whole decoder layer, if all its parts are understood."""
    if not is_plain_decoder_layer(module):
        return None
    attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    *others, o_proj = (attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    plain = all(is_packable(each, weights) for each in others) and is_packable_end(o_proj, weights)
    plain = plain and _is_packable_mlp(mlp, weights)
    listened = any(is_listened_to(part) for part in module.modules() if part is not module)
    return decoder_layer_forward(module, weights) if plain and not listened else None


def _have_kernels() -> bool:
    return find_spec("numba") is not None


class _Packing(ModuleForward):
    """A forward over packed layers, which is stale when they are."""

    follows_module = True

    def __init__(self, weights: str | None, *layers: Layers) -> None:
        self.layers, self.quantized, self.tolerances = layers, weights is not None, tolerances(weights)

    def stale(self) -> bool:
        return any(layers.stale() for layers in self.layers)

    def release(self) -> bool:
        return sum(layers.release() for layers in self.layers) > 0

    def take_stood_for(self) -> dict[int, Tensor]:
        """See Layers."""
        return {owner: weight for layers in self.layers for owner, weight in layers.take_stood_for().items()}


class _Linear(_Packing):
    """Computes one linear layer from its packed weight."""

    def __init__(self, module: nn.Module, weights: str | None) -> None:
        self._layers = Layers([module], weights=weights)
        super().__init__(weights, self._layers)

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        product = self._layers.packed(x)
        return self._layers.alone(0, x) if product is None else product(x)


class _SplitLinear(ModuleForward):
    """Computes one rank's part of a linear layer from its packed weight."""

    follows_module = True

    def __init__(self, module: SplitLinear) -> None:
        self._product, self._before, self._after = _Linear(module, None), module.before, module.after

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return self._after(self._product(x if self._before is None else self._before(x)))

    def stale(self) -> bool:
        return self._product.stale()

    def release(self) -> bool:
        return self._product.release()


def _shard_forward(module: SplitLinear) -> ModuleForward | None:
    """Compare the product with torch's; the ranks' communication around it stays the same."""
    if not is_packable_shard(module):
        return None
    product = _Linear(module, None)
    x = product.layers[0].trial_rows()
    return _SplitLinear(module) if alike(product(x), nn.Linear.forward(module, x)) else None


class _Left(threading.local):
    """The results that the first of some siblings has computed for the others, for one input, in one thread."""

    product: Any = None
    x: Tensor | None = None
    version = -1
    parts: list[Tensor | None] = []  # noqa: RUF012


_LEFT = _Left()


class _Sibling(_Packing):
    """One of several linear layers over one input. The first one computes for all, and the others take their results.

    Any other input, an input that was written to, another order, or a second call finds no result, and is computed
    alone.
    """

    def __init__(self, layers: Layers, index: int, weights: str | None) -> None:
        super().__init__(weights, layers)
        self._layers, self._sizes, self._index = layers, layers.sizes, index

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        product, left, index = self._layers.packed(x), _LEFT, self._index
        if product is not None and index == 0:
            left.product, left.x, left.version = product, x, version_of(x)
            left.parts = list(product(x).split(self._sizes, -1))
        elif product is None or left.product is not product or left.x is not x or left.version != version_of(x):
            return self._layers.alone(index, x)
        part, left.parts[index] = left.parts[index], None
        if index == len(left.parts) - 1:
            left.product = left.x = None
        return self._layers.alone(index, x) if part is None else part


class _GatedMLP(_Packing):
    """Computes down(silu(gate(x)) * up(x)) in two products."""

    def __init__(self, module: nn.Module, weights: str | None) -> None:
        self._module = weakref.ref(module)
        self._children = dict(module._modules)
        gate, up, down = linears = [module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        self._inner, self._outer = Layers([gate, up], True, weights), Layers([down], weights=weights)
        super().__init__(weights, self._inner, self._outer)
        self._add_up = added_up(down)
        self._hooks = [h for part in (*linears, module.get_submodule("act_fn")) for h in hooks_of(part)]

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        inner, outer = self._inner.packed(x), self._outer.packed(x)
        if inner is None or outer is None or any(self._hooks):
            module = self._module()
            return type(module).forward(module, x)  # type: ignore[union-attr, no-any-return]
        out: Tensor = outer(inner(x, outer.x_dtype), x.dtype)  # between the products it rounds once at most
        return out if self._add_up is None else self._add_up(out)

    def stale(self) -> bool:
        module = self._module()
        return module is None or module._modules != self._children or super().stale()


# ---- recognising modules ---------------------------------------------------------------------------------------


def _is_packable_mlp(module: nn.Module, weights: str | None) -> bool:
    """Return whether it is a gated MLP of three linear layers without hooks."""
    if not is_gated_mlp(module):
        return False
    gate, up, down = parts = [module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = is_packable(gate, weights) and is_packable(up, weights) and is_packable_end(down, weights)
    return plain and not any(type(part).__name__ == "Conv1D" or is_listened_to(part) for part in parts)


# ---- siblings --------------------------------------------------------------------------------------------------


class _Siblings:
    """Siblings that their parent named. They are packed when a forward for the first one is asked for."""

    def __init__(self, modules: Sequence[nn.Module], weights: str | None) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._layers: Layers | None = None
        self._weights = weights

    def forward_of(self, module: nn.Module) -> _Sibling | None:
        modules = [m for m in (ref() for ref in self._modules) if m is not None and Linear.knows(m, self._weights)]
        if len(modules) < len(self._modules):
            return None
        if self._layers is None or self._layers.stale():
            self._layers = self._agreeing(modules)
        if self._layers is None:
            return None
        number = next(i for i, m in enumerate(modules) if m is module)
        return _Sibling(self._layers, number, self._weights)

    def _agreeing(self, modules: Sequence[nn.Module]) -> Layers | None:
        """Return the product of all, if its results are those of each module."""
        layers = Layers(modules, weights=self._weights)
        if not layers.alike:
            return None
        x = layers.trial_rows()
        product, stood_for = layers.packed(x), layers.take_stood_for()
        if product is None:
            return None
        for module, part in zip(modules, product(x).split(layers.sizes, -1), strict=True):
            if not alike(part, stock(seen_with(module, stood_for), x), tolerances(self._weights)):
                return None
        return layers


_GROUPS: weakref.WeakKeyDictionary[nn.Module, _Siblings] = weakref.WeakKeyDictionary()


def _remember(children: Sequence[nn.Module], weights: str | None) -> None:
    group = _Siblings(children, weights)
    for child in children:
        _GROUPS[child] = group


# ---- comparison with the module itself -------------------------------------------------------------------------


def _checked(forward: _Packing, module: nn.Module) -> ModuleForward | None:
    """Return ``forward``, if all of it is packed, and it computes what ``module`` computes; else None."""
    x = forward.layers[0].trial_rows()
    if any(layers.packed(x) is None for layers in forward.layers):
        return None
    theirs = stock(seen_with(module, forward.take_stood_for()), x)
    return forward if alike(forward(x), theirs, forward.tolerances) else None
