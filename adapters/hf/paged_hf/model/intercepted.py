"""Code between the call of a module and its class's forward: hooks, and methods replaced on the instance. Such code may
rely on stock's layout of a batch: one row, the last token, a step of one token. The engine packs all rows into one, so
such models are found here first.

This file knows torch modules, and the harmless hooks that libraries put on them.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from paged_hf import upstream
from paged_hf.model import compressed

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FOR_TRAINING = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' and PEFT's: harmless here
_PLACEMENT = "accelerate.hooks"  # move tensors between devices
_disjoint: Callable[[Any, frozenset[str]], bool] = type({}.keys()).isdisjoint
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod)


def interception(model: nn.Module, modules: Sequence[nn.Module]) -> str | None:
    """The hook or method that sees batches inside ``model`` and its ``modules``; None: there is none."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return "there is a forward hook on all modules"
    for module in modules if _any_stands_between(modules) else ():
        if listened_to(module):
            return f"there is a forward hook on {_name_of(module, model)}"
        for method in replaced_methods(module):
            return f"{method} of {_name_of(module, model)} has been replaced"
    return None


def _any_stands_between(modules: Sequence[nn.Module]) -> bool:
    """Whether one of them has a hook or a replaced method. The loops run in C, because models have hundreds of modules
    and nearly all have neither."""
    own = list(map(attrgetter("__dict__"), modules))
    hooks = chain(*(map(itemgetter(kind), own) for kind in _HOOKS))
    return any(hooks) or not all(map(_disjoint, map(dict.keys, own), map(_methods, map(type, modules))))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, in a fifth of the time; a module in two places may come twice."""
    found = [model]
    for module in found:  # it grows
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _name_of(module: nn.Module, model: nn.Module) -> str:
    names = (name for name, each in model.named_modules() if each is module)
    return next(names, "") or type(model).__name__


def listened_to(module: nn.Module) -> bool:
    """Whether the module has a forward hook, except those that libraries leave there for training or for hidden states,
    which do nothing otherwise."""
    own = module.__dict__
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"]):
        return False
    return any(is_users_hook(hook) for hooks in _HOOKS for hook in own[hooks].values())


def is_users_hook(hook: Any) -> bool:
    return not upstream.is_recorder(hook) and getattr(hook, "__name__", None) not in _FOR_TRAINING


def replaced_methods(module: nn.Module) -> list[str]:
    """Methods of the module's class that the instance replaces, unless they compute the same. Libraries of kernels put
    one class's forward on an instance of another class; such a forward is model code like that of its own class.
    """
    kind: type = type(module)
    own, methods = module.__dict__, _methods(kind)
    if own.keys().isdisjoint(methods) or uncompiled(module) is not module:
        return []
    return [name for name in methods & own.keys() if not _computes_the_same(module, name, own[name])]


def compiled_part(model: nn.Module) -> str | None:
    """The name of a module compiled by torch.compile, whose code works with stock's own caches only; None: there is
    none."""
    for module in modules_of(model):
        own = module.__dict__
        forward = own.get("forward")
        if (
            own.get("_compiled_call_impl")
            or uncompiled(module) is not module
            or uncompiled_method(forward) is not forward
        ):
            return _name_of(module, model)
    return None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def uncompiled_method(method: Any) -> Any:
    """The original of a ``method`` that torch.compile has compiled."""
    while (inner := getattr(method, "_torchdynamo_orig_callable", None)) is not None:
        method = inner
    return method


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Names of methods that may run in a forward: the class's own functions, not those of all modules."""
    general = {name for base in kind.__mro__ if _is_general(base) for name in vars(base)}
    own = {name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, _FUNCTIONS)}
    return frozenset({"forward"} | (own - general - {"prepare_inputs_for_generation"}))


def _is_general(kind: type) -> bool:
    """Whether it is a base of all models."""
    module = kind.__module__
    shared = module.startswith("transformers.") and not module.startswith("transformers.models.")
    return kind in (object, nn.Module) or shared


def _computes_the_same(module: nn.Module, name: str, method: Any) -> bool:
    method = uncompiled_method(method)
    original = getattr(type(module), name)
    if isinstance(method, functools.partial) and getattr(method.func, "__module__", None) == _PLACEMENT:
        return _only_places(module.__dict__.get("_hf_hook")) and _computes_the_same(
            module, name, module.__dict__.get("_old_forward")
        )
    function = getattr(method, "__func__", None)
    bound = isinstance(method, types.MethodType) and method.__self__ is module
    return bound and (function is original or _is_a_classes_forward(function) or compressed.is_librarys(function))


def _only_places(hook: Any) -> bool:
    parts = getattr(hook, "hooks", (hook,))
    return all(type(part).__module__ == _PLACEMENT for part in (hook, *parts))


def _is_a_classes_forward(function: Any) -> bool:
    owner: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    *path, name = getattr(function, "__qualname__", "").split(".")
    for part in path:
        owner = getattr(owner, part, None)
    return isinstance(owner, type) and issubclass(owner, nn.Module) and vars(owner).get(name) is function
