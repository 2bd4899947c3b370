"""Whether the weights have changed, found in a few milliseconds from identities, versions and some values of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import methodcaller
from typing import Any, Literal

from torch import Tensor, nn

from paged_core import WatchedTensors


class WatchedModules:
    """Remembers every parameter and buffer of ``modules``, and the ``loose`` tensors besides: changes of tensors as
    WatchedTensors finds them, and added or removed tensors."""

    def __init__(self, modules: Iterable[nn.Module], loose: dict[str, Tensor] | None = None) -> None:
        self._owners: list[Mapping[str, Tensor | None]] = []
        for module in modules:
            self._owners += (module._parameters, module._buffers)
        if loose:
            self._owners.append(loose)
        self._types: list[tuple[Any, ...]] | None = self._types_now()
        self._remember()

    def retyped(self) -> bool:
        """Whether tensors were added or removed, or changed shape, dtype or device."""
        return self._types is None or (not self._untouched() and self._types_now() != self._types)

    def distrust(self) -> None:
        """Make ``retyped`` true from now on."""
        self._types = None

    def changed(self) -> bool:
        """Whether weights changed since the last call. Each device is waited for once."""
        if self._untouched() and self._tensors.values_are_the_same():
            return False
        self._remember()
        return True

    def news(self) -> Literal["retyped", "changed"] | None:
        """Both in one pass. ``retyped`` stays true for the next call."""
        if self._types is None:
            return "retyped"
        untouched = self._untouched()
        if untouched and self._tensors.values_are_the_same():
            return None
        if not untouched and self._types_now() != self._types:
            return "retyped"
        self._remember()
        return "changed"

    def _untouched(self) -> bool:
        """Whether the same tensors are at the same places, and no visible write has happened."""
        return (
            not any(self._empty)
            and list(map(len, self._filled)) == self._lengths
            and list(chain.from_iterable(self._filled)) == self._names
            and self._tensors.untouched(chain.from_iterable(map(_entries, self._filled)))
        )

    def _remember(self) -> None:
        self._empty = [own for own in self._owners if not own]  # as most are
        self._filled = [own for own in self._owners if own]
        self._lengths = list(map(len, self._filled))
        self._names = list(chain.from_iterable(self._filled))
        self._tensors = WatchedTensors(chain.from_iterable(map(_entries, self._filled)))  # some are None

    def _types_now(self) -> list[tuple[Any, ...]]:
        held = chain.from_iterable(map(_entries, self._owners))
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in held if tensor is not None]


_entries = methodcaller("values")
