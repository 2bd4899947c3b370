"""A model under another class: the same ``__dict__``, nothing copied, and some methods of ours.

Stock's code looks methods up in the class of the model (``type(self)._sample``, ``self(...)``). A view lets it find
others there for one call, while the user's object stays as it is and other threads may use it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def subclass(kind: type, own: dict[str, Any]) -> type:
    """``kind`` with ``own`` methods, whose ``self._paged_part`` is what ``view`` was given."""
    # A view must keep its model alive: from Python 3.13 on, a dict that two objects share is its owner's to clear.
    own = own | {"__slots__": ("_paged_model", "_paged_part"), "__module__": kind.__module__}
    return type(kind)(kind.__name__, (kind,), own | {"__qualname__": kind.__qualname__})


def view(model: nn.Module, made: type, part: Any) -> Any:
    """``model`` as an instance of ``made``, a ``subclass`` of its own class."""
    seen = object.__new__(made)
    object.__setattr__(seen, "__dict__", model.__dict__)
    object.__setattr__(seen, "_paged_model", model)
    object.__setattr__(seen, "_paged_part", part)
    return seen
