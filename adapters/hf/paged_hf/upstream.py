"""What depends on how a release of transformers names and calls things.

A release may rename an argument, an output or a method that is its own. What holds today is found here by looking at
signatures, types and attributes, never at a version number, and nothing else in this package spells such a name. (What
modules of single models are made of stands in model/stand_ins.py.) This file decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import Cache, DynamicLayer, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

_KNOWN_TO_WORK = {"5.24.0": "", "5.20.2": " on Python 3.10"}  # those that constraints.txt pins


def way_out() -> str:
    """What a user can do where calls don't run as they should: half a sentence."""
    if transformers.__version__ in _KNOWN_TO_WORK:
        return "docs/coverage.md tells which model types do"
    known = ", ".join(f"{version}{where}" for version, where in _KNOWN_TO_WORK.items())
    return f"transformers {transformers.__version__} is installed; known to work: {known}"


# ---- the K/V cache: past_key_values until 5.23, cache from 5.24 on ----------------------------------------------


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which ``forward`` takes its K/V cache; the usual one if its signature doesn't tell."""
    return _typed_as_cache(forward) or CACHE


def _typed_as_cache(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters.values()
    return next((parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)), None)


CACHE = _typed_as_cache(GenerationMixin.prepare_inputs_for_generation) or "cache"
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


CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
"""Whether a layer's crop(0) empties it. It leaves it as it is where tokens to remove are counted."""

_FIELD = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if "Cache" in str(field.type))


def _name_in(arguments: Mapping[str, Any]) -> str:
    return next((name for name, value in arguments.items() if isinstance(value, Cache)), CACHE)


# ---- decoding loops ---------------------------------------------------------------------------------------------

SAMPLE, BEAM_SEARCH, ASSISTED = "_sample", "_beam_search", "_assisted_decoding"
LOOPS = (SAMPLE, BEAM_SEARCH, ASSISTED)
"""The methods of a model that generate() calls for its decoding modes."""


def has_the_usual_sampling(kind: type) -> bool:
    """Whether a class of models samples, and searches greedily, with the loop that all share."""
    return getattr(kind, SAMPLE) is getattr(GenerationMixin, SAMPLE)


def pad_token(config: Any) -> int | None:
    """What rows that have ended are padded with. ``config``: a call's GenerationConfig, as loops get it."""
    token = config._pad_token_tensor
    return None if token is None else int(token)


def answering(call: Callable[..., Any], reorder: Callable[..., Any]) -> dict[str, Any]:
    """Methods of a model that a loop runs on though ``call`` computes its outputs and ``reorder`` knows its beams. The
    model's settings are not such a call's to change, as others may be running."""
    return {
        "__call__": call,
        "_reorder_cache": reorder,
        "_optimize_model_for_decode": lambda self: contextlib.nullcontext(),
        "_valid_auto_compile_criteria": lambda self, *args, **kwargs: False,
    }


# ---- configs and hooks ------------------------------------------------------------------------------------------

ATTENTION = "_attn_implementation_internal"
"""Where a config keeps the name of the attention implementation."""

QUIET = {
    "_output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": False,
}
"""Settings of a config under which a forward returns logits and nothing else."""


def is_recorder(hook: Any) -> bool:
    """Whether a forward hook is one that stays on once anyone has asked for hidden states."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_marked_stateful(model: Any) -> bool:
    """Whether a model's class says that it keeps state outside attention. Not all that do say so."""
    return bool(getattr(model, "_is_stateful", False))
