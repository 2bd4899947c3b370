"""A twin of a module tree: the same classes over the same tensors, with its own configs and its own children.

With the twin, the engine runs a user's model with another attention implementation and other forwards, and never writes
to the user's own object, which other threads may be calling. Parameters, buffers and hooks are the very same
dictionaries, so an optimiser step, ``load_state_dict`` or a hook registered later is seen by the twin at once.

This file knows torch modules and transformers configs. It knows nothing of attention, engines or requests.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from paged_hf import upstream
from paged_hf.model import compressed
from paged_hf.model.intercepted import uncompiled, uncompiled_method

_SHARED = frozenset(vars(nn.Module())) - {"training", "_modules"}  # parameters, buffers, hooks: the same objects
_NOT_MENDED = _SHARED | {"training", "_modules", "_compiled_call_impl", "generate", "generation_config"}


class Shadow:
    """The twin of ``model``; call ``root`` instead of it."""

    root: nn.Module

    def __init__(self, model: nn.Module) -> None:
        self._twins: dict[int, nn.Module] = {}
        self._originals: list[tuple[nn.Module, nn.Module]] = []  # (user's module, twin), parents first
        self._configs: dict[int, tuple[PretrainedConfig, PretrainedConfig]] = {}
        self._model = model
        self.root = self._twin(model)
        for module, twin in self._originals:  # grows when modules outside the tree are found
            self._mend(module, twin)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(user's module, twin), each parent before its children."""
        return iter(self._originals)

    def twin_of(self, module: nn.Module) -> nn.Module:
        return self._twins[id(module)]

    def give_all(self, name: str, value: Any) -> None:
        """Set an attribute of every twin."""
        for _, twin in self._originals:
            twin.__dict__[name] = value

    def use_attention(self, name: str | None) -> None:
        """Set the attention implementation of the twin to ``name``; None: the user's own choice."""
        for config, copy in self._configs.values():
            own = config.__dict__.get(upstream.ATTENTION)
            copy.__dict__[upstream.ATTENTION] = own if name is None else name

    def _twin(self, module: nn.Module) -> nn.Module:
        module = uncompiled(module)
        known = self._twins.get(id(module))
        if known is not None:
            return known
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        for slot in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
            if hasattr(module, slot):
                object.__setattr__(twin, slot, getattr(module, slot))
        self._twins[id(module)] = twin
        self._originals.append((module, twin))
        twin.__dict__["training"] = False
        twin.__dict__["_compiled_call_impl"] = None  # a compiled call is bound to the user's module
        if _rewrites_buffers(module):
            twin.__dict__["_buffers"] = {
                name: None if tensor is None else tensor.clone() for name, tensor in module._buffers.items()
            }
        twin.__dict__["_modules"] = {
            name: None if child is None else self._twin(child) for name, child in module._modules.items()
        }
        return twin

    def _mend(self, module: nn.Module, twin: nn.Module) -> None:
        """Replace references in the module's attributes by references to twins: configs, bound methods, modules in
        lists."""
        for name, value in module.__dict__.items():
            if name not in _NOT_MENDED:
                mended = twin.__dict__[name] = self._mended(value, depth=3)
                if uncompiled_method(value) is not value and _is_own(mended, twin, name):
                    del twin.__dict__[name]
        compressed.leave_to_class(twin)

    def _mended(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            return self._twin(value)
        if isinstance(value, PretrainedConfig):
            return self._config(value)
        if depth == 0:
            return value
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._twin(value.__self__))
        if isinstance(value, types.FunctionType) and (inner := uncompiled_method(value)) is not value:
            return self._mended(inner, depth)
        if isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
            mended = [self._mended(part, depth - 1) for part in parts]
            if all(a is b for a, b in zip(parts, mended, strict=True)):
                return value
            keywords = dict(zip(value.keywords, mended[1 + len(value.args) :], strict=True))
            return functools.partial(mended[0], *mended[1 : 1 + len(value.args)], **keywords)
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._mended_function(value, depth)
        if type(value) in (list, tuple):
            items = [self._mended(item, depth - 1) for item in value]
            return value if all(a is b for a, b in zip(value, items, strict=True)) else type(value)(items)
        if type(value) is dict:
            entries = {key: self._mended(item, depth - 1) for key, item in value.items()}
            return value if all(entries[key] is value[key] for key in value) else entries
        return value

    def _mended_function(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        """A wrapped forward with its closure's reference to the module replaced by one to the twin."""
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # an empty cell
            return function
        mended = [self._mended(content, depth - 1) for content in cells]
        if all(a is b for a, b in zip(cells, mended, strict=True)):
            return function
        closure = tuple(types.CellType(content) for content in mended)
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin

    def _config(self, config: PretrainedConfig) -> PretrainedConfig:
        if id(config) in self._configs:
            return self._configs[id(config)][1]
        copy = object.__new__(type(config))
        copy.__dict__.update(config.__dict__)
        self._configs[id(config)] = (config, copy)
        copy.__dict__.update({key: value for key, value in upstream.QUIET.items() if key in config.__dict__})
        for name, value in config.__dict__.items():
            if name not in upstream.QUIET:
                copy.__dict__[name] = self._mended(value, depth=2)
        return copy


def _is_own(method: Any, module: nn.Module, name: str) -> bool:
    """Whether it is the method that the module has by its class."""
    own = isinstance(method, types.MethodType) and method.__self__ is module
    return own and method.__func__ is getattr(type(module), name, None)


def _rewrites_buffers(module: nn.Module) -> bool:
    """Whether the module's forward writes its own buffers, as rotary embeddings do whose frequencies depend on the
    length."""
    rope_type = getattr(module, "rope_type", None)
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind in ("dynamic", "longrope") for kind in kinds)
