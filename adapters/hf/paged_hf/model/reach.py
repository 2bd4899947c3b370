"""Everything besides weights that a model's forward can read, found once, so that changes can be noticed. The search
goes from each module to its attributes and their contents, to the closures of functions, to the module's class and its
base classes, and from the functions of a class to the globals that they name: other functions, registries, Python
modules. Of torch and the standard library, only the names that the model's code uses are compared.

This file knows torch modules and Python's objects. It knows nothing of attention or engines.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import sys
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paged_hf import upstream
from paged_hf.model.intercepted import is_users_hook
from paged_hf.model.places import Places, is_plain
from paged_hf.model.watch import WatchedModules

_MOST = 200_000  # most objects that are searched
_LONGEST = 4096  # most entries of a container that are compared; a longer one holds data, such as a vocabulary

_TORCHS_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, children and hooks are compared separately
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NEVER_READ = frozenset({"training", "_compiled_call_impl", "generate", "generation_config"})  # in a twin's forward
_GIVEN_BY_CALLS = upstream.QUIET.keys()  # attributes of configs
_READ_BY_PYTHON = frozenset(
    {"__call__", "__getattr__", "__getattribute__", "__getitem__", "__iter__", "__len__", "__contains__"}
    | {"__enter__", "__exit__", "__bool__", "__float__", "__get__", "__add__", "__radd__", "__mul__", "__rmul__"}
    | {"__torch_function__"}
)  # names between double underscores that may matter in a forward
_BASE_OF_MODELS = "transformers.modeling_utils"
_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__", "__getattribute__")
_CLOSED = sys.stdlib_module_names | {"torch", "torchgen", "numpy", "tokenizers", "paged_core", "paged_hf"}


class Reach:
    """What the forward of ``model`` can read now. ``whole``: False if that is too much to search."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []  # including those outside the tree: in lists, in closures
        self._places = Places()
        self._tensors: dict[int, Tensor] = {}  # that are no parameters or buffers
        self._weights: set[int] = set()
        self._seen: dict[int, Any] = {}  # keeps objects alive, so that ids stay unique
        self._named: dict[int, tuple[dict[str, Any], set[str]]] = {}  # namespaces, by their id: names that code uses
        self._open: deque[tuple[Any, str]] = deque([(model, type(model).__name__)])
        while self._open and len(self._seen) < _MOST:
            self._visit(*self._open.popleft())
        self.whole = not self._open
        for space, names in self._named.values():
            if names:
                read = functools.partial(itemgetter(min(names), *names), space)
                self._places.add_values(read, f"a global of {space.get('__name__')}")
        self.loose = {str(key): tensor for key, tensor in self._tensors.items() if key not in self._weights}
        self._watch = WatchedModules([], self.loose) if self.loose else None
        del self._tensors, self._weights, self._seen, self._named, self._open

    def changed(self) -> str | None:
        """The name of a place that has changed."""
        place = self._places.changed()
        if place is None and self._watch is not None and self._watch.news() is not None:
            return "a tensor that is no parameter"
        return place

    def settle(self) -> bool:
        """Compare no longer what is another now. Whether there is any such place."""
        return self._places.settle()

    # ---- one object after another --------------------------------------------------------------------------------

    def _push(self, value: Any, name: str) -> None:
        if not is_plain(value):
            self._open.append((value, name))

    def _push_all(self, values: Any, name: str) -> None:
        for value in values:
            self._push(value, name)

    def _visit(self, value: Any, name: str) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        for kind, visit in _VISITS:
            if isinstance(value, kind):
                visit(self, value, name)
                return
        if not _closed(type(value).__module__):
            self._object(value, name)

    def _module(self, module: nn.Module, name: str) -> None:
        self.modules.append(module)
        self._places.add_type(module, name)
        self._places.add_attributes(module.__dict__, name, _matters_in_a_module)
        self._places.add_mapping(module._modules, name)
        for key in _HOOKS:
            hooks = getattr(module, key)
            self._places.add_mapping(hooks, f"hooks of {name}", _matters_among_hooks)
            self._push_all((hook for hook in hooks.values() if is_users_hook(hook)), f"hook of {name}")
        for key, value in module.__dict__.items():
            if _matters_in_a_module(key, value):
                self._push(value, f"{name}.{key}")
        for key, child in module._modules.items():
            self._push(child, f"{name}.{key}")
        for own in (module._parameters, module._buffers):
            for key, weight in own.items():
                if weight is not None:
                    self._weights.add(id(weight))
                    self._attributes(weight, f"{name}.{key}")
        self._push(type(module), "")

    def _object(self, thing: Any, name: str) -> None:
        self._places.add_type(thing, name)
        self._attributes(thing, name)
        slots = [slot for slot in copyreg._slotnames(type(thing)) if hasattr(thing, slot)]  # type: ignore[attr-defined]
        if slots:
            read = functools.partial(attrgetter(slots[0], *slots), thing)
            self._places.add_values(read, name)
            self._push_all(read(), name)
        self._push(type(thing), "")

    def _attributes(self, thing: Any, name: str) -> None:
        own = getattr(thing, "__dict__", None)
        if type(own) is dict and (own or not isinstance(thing, (Tensor, types.FunctionType))):
            self._places.add_mapping(own, name, _matters_in_an_object)
            for key, value in own.items():
                self._push(value, f"{name}.{key}")

    def _mapping(self, mapping: Mapping[Any, Any], name: str) -> None:
        if type(mapping) not in (dict, types.MappingProxyType):
            self._kind_of_dict(mapping, name)
        elif len(mapping) <= _LONGEST:
            self._places.add_mapping(mapping, name)
            self._places.add_sequence(mapping, name)
            self._push_all(list(mapping.values()), name)
        else:
            self._places.add_values(lambda: (len(mapping),), name)

    def _kind_of_dict(self, own: Any, name: str) -> None:
        """Its own methods may do anything."""
        read = functools.partial(_entries, own)
        self._places.add_values(read, name)
        self._push_all(read(), name)
        if not _closed(type(own).__module__):
            self._object(own, name)

    def _sequence(self, values: Any, name: str) -> None:
        if len(values) > _LONGEST:
            self._places.add_values(lambda: (len(values),), name)
        else:
            if not isinstance(values, (tuple, frozenset)):
                self._places.add_sequence(values, name)
            self._push_all(list(values), name)
        if not _closed(type(values).__module__):
            self._attributes(values, name)

    def _tensor(self, tensor: Tensor, name: str) -> None:
        self._tensors[id(tensor)] = tensor
        self._attributes(tensor, name)

    def _array(self, array: np.ndarray[Any, Any], name: str) -> None:
        if array.dtype.kind in "biufc" and array.size and array.flags.writeable:
            self._tensors[id(array)] = torch.from_numpy(array)

    # ---- code ----------------------------------------------------------------------------------------------------

    def _class(self, kind: type, name: str) -> None:
        if not (issubclass(kind, nn.Module) or not _closed(kind.__module__)) or issubclass(kind, BaseException):
            return
        name, followed = kind.__name__, _followed(kind.__module__)
        if kind is nn.Module or kind.__module__ == _BASE_OF_MODELS:
            self._places.add_values(lambda: tuple(map(kind.__dict__.get, _CALLED)), name)
        elif followed or issubclass(kind, nn.Module):
            self._places.add_mapping(kind.__dict__, name, _matters_in_a_class)
        for key, value in kind.__dict__.items():
            if _matters_in_a_class(key, value) and (followed or key == "forward" or isinstance(value, _CONTAINERS)):
                self._push(value, f"{name}.{key}")
        self._push_all(kind.__bases__, "")

    def _function(self, function: types.FunctionType, name: str) -> None:
        self._places.add_function(function, name)
        self._attributes(function, name)
        self._push_all(function.__defaults__ or (), name)
        self._push(function.__kwdefaults__, name)
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._cell(cell, f"{variable} in {name}")
        module = function.__globals__.get("__name__", "")
        self._names(function.__globals__, frozenset(_names_in(function.__code__)), _followed(module))

    def _names(self, space: dict[str, Any], names: frozenset[str], followed: bool) -> None:
        """Names that code uses, in a namespace. ``followed``: whether their values are searched too."""
        _, known = self._named.setdefault(id(space), (space, set()))
        new = [each for each in names if each in space and each not in known]
        known.update(new)
        for each in new:
            value = space[each]
            if isinstance(value, types.ModuleType):
                self._names(vars(value), names, _followed(value.__name__))
            elif followed:
                self._push(value, each)

    def _method(self, method: types.MethodType, name: str) -> None:
        self._push_all((method.__func__, method.__self__), name)

    def _partial(self, partial: functools.partial[Any], name: str) -> None:
        self._push_all((partial.func, partial.args, partial.keywords), name)

    def _property(self, found: property, name: str) -> None:
        self._push(found.fget, name)

    def _wrapper(self, found: Any, name: str) -> None:
        self._push(getattr(found, "__func__", None) or getattr(found, "__wrapped__", None), name)

    def _cached(self, found: functools.cached_property[Any], name: str) -> None:
        self._push(found.func, name)

    def _cell(self, cell: types.CellType, name: str) -> None:
        try:
            self._push(cell.cell_contents, name)
        except ValueError:  # it is empty
            return
        self._places.add_cell(cell, name)

    def _reference(self, reference: weakref.ref[Any], name: str) -> None:
        self._push(reference(), name)

    def _nothing(self, thing: Any, name: str) -> None:
        pass


_CONTAINERS = (dict, list, set, deque)
_VISITS: tuple[tuple[Any, Callable[[Reach, Any, str], None]], ...] = (
    (nn.Module, Reach._module),
    (types.FunctionType, Reach._function),
    (Tensor, Reach._tensor),
    ((dict, types.MappingProxyType), Reach._mapping),
    ((list, tuple, deque, set, frozenset), Reach._sequence),
    (types.MethodType, Reach._method),
    (functools.partial, Reach._partial),
    (type, Reach._class),
    ((staticmethod, classmethod, functools._lru_cache_wrapper), Reach._wrapper),
    (property, Reach._property),
    (functools.cached_property, Reach._cached),
    (np.ndarray, Reach._array),
    (weakref.ref, Reach._reference),
    ((types.SimpleNamespace, UserDict, UserList), Reach._object),
    ((types.ModuleType, enum.Enum), Reach._nothing),
)


def _closed(module: str | None) -> bool:
    """Whether it is code whose objects hold no state of the model."""
    return (module or "").partition(".")[0] in _CLOSED


def _followed(module: str | None) -> bool:
    """Whether it is a model's own code, whose functions are searched: not torch's, nor code that all models share."""
    parts = (module or "").split(".")
    return not _closed(module) and (parts[0] != "transformers" or (parts[1:2] == ["models"] and parts[2:3] != ["auto"]))


def _entries(own: dict[Any, Any]) -> tuple[Any, ...]:
    return (*dict.keys(own), *dict.values(own))


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _matters_in_a_module(key: str, value: Any) -> bool:
    return key not in _NEVER_READ and key not in _TORCHS_OWN


def _matters_in_an_object(key: str, value: Any) -> bool:
    return key not in _GIVEN_BY_CALLS and key not in _NEVER_READ and not key.startswith("_dynamo_")  # torch.compile's


def _matters_in_a_class(key: str, value: Any) -> bool:
    hidden = key.startswith("__") and key.endswith("__")
    return key in _READ_BY_PYTHON if hidden else key != "_abc_impl"


def _matters_among_hooks(key: int, value: Any) -> bool:
    return is_users_hook(value)
