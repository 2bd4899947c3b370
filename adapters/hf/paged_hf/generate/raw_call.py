"""RawCall: a generate() call as its caller has written it, and the rules that send it to stock at once. Each rule looks
for one obstacle and returns a reason, or None. The first line of its docstring says
when that is, for docs/generate.md. The rules here concern cases that stock would refuse or handle differently if it saw
our class; all others can wait until stock has prepared the call, and are in obstacles.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paged_hf import upstream


@dataclass(frozen=True, eq=False)
class RawCall:
    """Arguments of a call of a patched ``generate``."""

    model: Any  # has a generate() of its own
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    as_stock: bool  # whether as_stock() is in force
    by_wrapper: bool = True  # whether the patched model makes the call, and not a model inside it

    @functools.cached_property
    def given(self) -> Mapping[str, Any] | None:
        """The arguments by name; None: they don't fit ``generate``."""
        kind: type = type(self.model)
        try:
            found = _signature(kind).bind_partial(self.model, *self.args, **self.kwargs).arguments
        except TypeError:
            return None
        return {**found, **found.get("kwargs", {})}


@functools.cache
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.generate)  # type: ignore[attr-defined]


def not_patched_itself(call: RawCall) -> str | None:
    """The transformers model inside a patched PEFT model is called by itself."""
    return None if call.by_wrapper else "not this model is patched, but the one around it"


def arguments_fit_no_call(call: RawCall) -> str | None:
    """The arguments don't fit `generate`: stock says how."""
    return "the arguments don't fit" if call.given is None else None


def stock_is_in_force(call: RawCall) -> str | None:
    """The call is inside `model.generate.as_stock()`."""
    return "as_stock() is in force" if call.as_stock else None


def names_another_generate(call: RawCall) -> str | None:
    """`custom_generate` names a repository."""
    if isinstance(_given(call, "custom_generate"), str):
        return "custom_generate names a repository, which replaces generate() altogether"
    return None


def passes_a_loop_by_position(call: RawCall) -> str | None:
    """`custom_generate` is passed by position."""
    if "custom_generate" in (call.given or {}) and "custom_generate" not in call.kwargs:
        return "custom_generate is passed by position"
    return None


def wants_stocks_own_batching(call: RawCall) -> str | None:
    """`cache_implementation="paged"` is passed: stock's own continuous batching."""
    if _given(call, "cache_implementation") == "paged":
        return "cache_implementation='paged' asks for stock's own continuous batching"
    return None


def passes_a_cache(call: RawCall) -> str | None:
    """A cache is passed (`cache`, or `past_key_values` before transformers 5.24)."""
    if upstream.cache_in(call.given or {}) is not None:
        return "a cache of the caller's own was passed"
    return None


def model_prepares_inputs_otherwise(call: RawCall) -> str | None:
    """The model's `prepare_inputs_for_generation` has been replaced."""
    if "prepare_inputs_for_generation" in vars(call.model):
        return "its prepare_inputs_for_generation has been replaced"
    return None


def names_an_adapter_for_each_row(call: RawCall) -> str | None:
    """A PEFT model is called with `adapter_names`."""
    return "adapter_names are one a row of stock's batch" if "adapter_names" in call.kwargs else None


def _given(call: RawCall, name: str) -> Any:
    return (call.given or {}).get(name)
