"""Whether a model keeps state outside attention, found in the cache that it makes. The engine stores keys and values of
attention. Other floating-point tensors in a cache, such as the inputs of a convolution or the sums of linear attention,
depend on all earlier tokens, and the engine doesn't store them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache

_ATTENTIONS = ("keys", "values")
_DEEPEST = 8


def state_outside_attention(cache: Any) -> str | None:
    """Where a forward's cache keeps such state; None: nowhere, or there is no cache."""
    return next((name for name, tensor in _tensors(cache, "", _DEEPEST) if tensor.is_floating_point()), None)


def _tensors(thing: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a cache other than keys and values, with their names."""
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, name, depth - 1)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value, name, depth - 1)
    elif depth and (isinstance(thing, Cache) or (hasattr(thing, "__dict__") and not isinstance(thing, type))):
        for key, value in vars(thing).items():
            if key not in _ATTENTIONS:
                yield from _tensors(value, f"{type(thing).__name__}.{key}", depth - 1)
