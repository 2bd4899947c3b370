"""A model under another class: the same ``__dict__``, nothing copied, and some methods of ours.

Stock's code looks methods up in the class of the model (``type(self)._sample``, ``self(...)``). A twin lets it find
others there for one call, while the user's object stays as it is and other threads may use it.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import nn


def subclass(kind: type, own: dict[str, Any]) -> type:
    """``kind`` with ``own`` methods, whose ``self._paged_part`` is what ``twin`` was given."""
    # A twin must keep its model alive: from Python 3.13 on, a dict that two objects share is its owner's to clear.
    own = own | {"__slots__": ("_paged_model", "_paged_part"), "__module__": kind.__module__}
    return type(kind)(kind.__name__, (kind,), own | {"__qualname__": kind.__qualname__})


class ToldForward:
    """The forward of a class, for a twin of it. Stock's generate() asks for its signature five times in a call, and
    each time Python works it out anew: here it is known."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._known: tuple[Any, inspect.Signature] | None = None

    def __get__(self, seen: Any, made: type) -> Any:
        function, known = self._kind.forward, self._known
        if seen is None:
            return function
        if known is None or known[0] is not function:  # anyone may replace it
            known = self._known = function, inspect.signature(MethodType(function, seen))
        forward = functools.partial(function, seen)
        forward.__signature__ = known[1]  # type: ignore[attr-defined]
        return forward


def twin(model: nn.Module, made: type, part: Any) -> Any:
    """``model`` as an instance of ``made``, a ``subclass`` of its own class."""
    seen: Any = object.__new__(made)
    object.__setattr__(seen, "__dict__", model.__dict__)
    object.__setattr__(seen, "_paged_model", model)
    object.__setattr__(seen, "_paged_part", part)
    return seen
