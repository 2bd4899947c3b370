"""What depends on how a release of transformers names and calls things.

A release may rename an argument, an output or a method of its own. What holds today is found here by looking at
signatures, types and attributes, never at a version number; nothing else in this package spells such a name. This
file decides nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# ---- the K/V cache: past_key_values until 5.23, cache from 5.24 on ----------------------------------------------


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which ``forward`` takes its K/V cache.

    Raises:
        TypeError: it takes none.
    """
    for name, parameter in inspect.signature(forward).parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise TypeError(f"{forward.__qualname__} takes no cache")


CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation)
"""What generate() and its decoding loops call the K/V cache."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The K/V cache among the arguments of a call, whatever its name; None if there is none."""
    return arguments.get(_name_in(arguments))


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call but for its K/V cache."""
    name = _name_in(arguments)
    return {other: value for other, value in arguments.items() if other != name}


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a decoding loop with ``cache`` in place of their own."""
    return {**arguments, _name_in(arguments): cache}


def cache_in_result(result: Any) -> Any:
    """The K/V cache in what generate() returns, or None."""
    return cache_in(result) if isinstance(result, Mapping) else None


def set_cache_in_result(result: Any, cache: Any) -> None:
    """Put ``cache`` in place of the one in a result that has one."""
    result[_name_in(result)] = cache


def is_fresh(cache: Any) -> bool:
    """Whether generate() has made the cache itself for this call: it is nobody else's, and empty."""
    if getattr(cache, "_is_user_defined", False):
        return False
    try:
        return not cache.get_seq_length()
    except ValueError:  # none of its layers counts tokens
        return True


def output_with_cache(logits: Tensor, cache: Any) -> Any:
    """A forward's output: ``logits [B,T,vocab]`` and the K/V cache, or None."""
    return CausalLMOutputWithPast(logits=logits, **{_FIELD: cache})


_FIELD = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if "Cache" in str(field.type))


def _name_in(arguments: Mapping[str, Any]) -> str:
    return next((name for name, value in arguments.items() if isinstance(value, Cache)), CACHE)
