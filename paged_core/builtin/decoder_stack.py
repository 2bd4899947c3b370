"""All decoder layers of a model, one after another. From the second step on, Python makes a single call for all of
them.

This is for models built like Llama (embeddings, layers, norm, one rotation for all layers), under any name. A model is
recognised by its parts, and compared with its own forward, with stand-ins for its layers, before it is replaced. Layers
that decoder_layer.py replaces consist of launches only, attention included, if the backend allows it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paged_core.builtin.decoder_layer import HONOURED, DecoderLayer, LayerParts, matters
from paged_core.builtin.modules import hooks_of
from paged_core.builtin.replayed import Basis, Replayed
from paged_core.builtin.trials import ROWS, mixing_attend
from paged_core.execution.model import KeyedAttend, ModuleForward
from paged_core.execution.watched import WatchedTensors

STACK = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_LAUNCHES = 8  # of one layer
_GIVEN = HONOURED | {"input_ids"}


def decoder_stack_forward(module: nn.Module) -> ModuleForward | None:
    """Return a forward for the model, or None if it isn't such a model, or does more with its parts."""
    if set(module._modules) != STACK or not isinstance(module._modules["layers"], nn.ModuleList):
        return None
    result = _result_of(module)
    return None if result is None else _DecoderStack(module, result)


class _DecoderStack(ModuleForward):
    """Replaces the forward of a model without its output layer. Calls that don't come from the engine go to the module,
    and so do all calls until each of its layers is replaced."""

    follows_module = True
    calls_children = True

    def __init__(self, module: nn.Module, result: type) -> None:
        self._module, self._forward, self._result = weakref.ref(module), type(module).forward, result
        self._hooks = [hooks for part in module.modules() if part is not module for hooks in hooks_of(part)]
        self._layers: list[Any] = []
        self._replayed = Replayed(0)
        self._places: list[tuple[dict[str, Any], str]] = []
        self._parts: list[LayerParts] | None = None
        self._watched, self._dtype = WatchedTensors(()), torch.float32

    def __call__(self, input_ids: Tensor | None = None, **named: Any) -> Any:
        """Compute ``input_ids [1,T] -> last_hidden_state [1,T,N]``."""
        module, attend, position_ids = self._module(), named.get("attend"), named.get("position_ids")
        assert module is not None, "it is calling us"
        plain = input_ids is not None and len(input_ids) == 1 and attend is not None and position_ids is not None
        others = any(matters(value) for name, value in named.items() if name not in _GIVEN)
        if not plain or others or any(self._hooks) or not self._knows_all(module):
            return self._forward(module, input_ids, **named)
        x = module.get_submodule("embed_tokens")(input_ids)
        rotation = module.get_submodule("rotary_emb")(x, position_ids=position_ids)
        x = self._through(x, rotation, attend)
        return self._result(last_hidden_state=module.get_submodule("norm")(x))

    def stale(self) -> bool:
        module = self._module()
        if module is None or type(module).forward is not self._forward:
            return True
        return set(module._modules) != STACK or _result_of(module) is not self._result

    def _knows_all(self, module: nn.Module) -> bool:
        """Return whether each layer is replaced, and remember the replacements."""
        layers = [layer.__dict__.get("forward") for layer in module.get_submodule("layers").children()]
        if layers != self._layers:
            self._layers, self._parts = layers, None
            self._replayed = Replayed(_LAUNCHES * len(layers))
            known = [layer for layer in layers if type(layer) is DecoderLayer and layer.is_whole]
            self._places = [place for layer in known for place in layer.places()] if len(known) == len(layers) else []
        return bool(self._places)

    def _through(self, x: Tensor, rotation: Any, attend: Any) -> Tensor:
        """Compute ``x [1,T,N] -> [1,T,N]``."""
        key, parts = KeyedAttend.of(attend).replay_key(), self._parts_for(x)
        if key is None or parts is None or x.shape[0] != 1:
            for layer in self._layers:
                x = layer(x, attend=attend, position_embeddings=rotation)
            return x
        first, cos, sin, out = x[0], rotation[0][0], rotation[1][0], torch.empty_like(x[0])
        basis = Basis((parts,), key)  # a new list whenever one of the parts has changed
        if self._replayed.run(lambda: _compute(parts, first, cos, sin, attend, out), basis, out, first, cos, sin):
            attend.skip(len(parts))
        return out[None]

    def _parts_for(self, x: Tensor) -> list[LayerParts] | None:
        """Return the current parts of all layers, or None if one of them can't take x."""
        tensors = [owner.get(name) for owner, name in self._places]
        if self._parts is None or x.dtype is not self._dtype or not self._watched.same(tensors):
            found = [layer.parts(x) for layer in self._layers]
            self._parts = None if None in found else found
            self._watched, self._dtype = WatchedTensors([owner.get(name) for owner, name in self._places]), x.dtype
        return self._parts


def _compute(layers: Sequence[LayerParts], x: Tensor, cos: Tensor, sin: Tensor, attend: Any, out: Tensor) -> None:
    from paged_kernels.cpu.recording import room

    for number, layer in enumerate(layers, 1):
        y = out if number == len(layers) else room(("even", "odd")[number % 2], x.shape, x.dtype)
        x = layer.compute(x, cos, sin, attend, y)


# ---- comparison with the module itself -------------------------------------------------------------------------


class _StandInLayer(nn.Module):
    """Replaces a decoder layer in a trial: it scales its input a little, and records what it was called with."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._factor, self._calls = 0.5 + 0.01 * number, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        self._calls.append((args, named))
        return self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        return x * self._factor + self._factor

    def called_with(self, rotation: Sequence[Tensor], attend: Any) -> bool:
        """Return whether it was called once, with exactly the arguments that our decoder layer takes."""
        if len(self._calls) != 1 or self._calls[0][0]:
            return False
        named = self._calls[0][1]
        given = named.get("position_embeddings")
        return (
            named.get("attend") is attend
            and isinstance(given, tuple)
            and len(given) == len(rotation)
            and all(map(torch.equal, given, rotation))
            and not any(matters(value) for name, value in named.items() if name not in HONOURED)
        )


@torch.no_grad()
def _result_of(module: nn.Module) -> type | None:
    """Return the type of the module's result, if the module computes embeddings, all layers, then the norm; else
    None."""
    layers = module._modules["layers"]
    assert isinstance(layers, nn.ModuleList)
    twin, stand_ins = copy.copy(module), [_StandInLayer(number) for number in range(len(layers))]
    twin.__dict__["_modules"] = {**module._modules, "layers": nn.ModuleList(stand_ins)}
    embed, norm, rotate = (module.get_submodule(name) for name in ("embed_tokens", "norm", "rotary_emb"))
    positions = torch.arange(3, 3 + ROWS)[None]
    given = {"input_ids": torch.arange(ROWS)[None], "position_ids": positions, "attend": mixing_attend}
    try:
        theirs = type(module).forward(twin, **given, attention_mask=None, use_cache=False)
        x = embed(given["input_ids"])
        rotation = rotate(x, position_ids=positions)
        for each in stand_ins:
            x = each.computed(x)
        same = list(theirs) == ["last_hidden_state"] and torch.equal(theirs.last_hidden_state, norm(x))
    except Exception:  # the module needs other arguments, or its parts don't fit
        return None
    return type(theirs) if same and all(each.called_with(rotation, mixing_attend) for each in stand_ins) else None
