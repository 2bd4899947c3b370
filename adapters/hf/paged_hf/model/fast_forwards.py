"""Faster forwards that replace those of the twin's modules, and compute the same from the same weights. This file knows
modules and the results of ``create_module_forward``. It knows nothing of steps or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from paged_core import EngineDeadError, ModuleForward
from paged_hf.model import compressed
from paged_hf.model.intercepted import listened_to

CreateForward = Callable[[nn.Module], Any]  # a ModuleForward, or something that works as one; None: keep the module


class FastForwards(Mapping[nn.Module, ModuleForward]):
    """The replaced forwards of a twin's modules."""

    def __init__(self) -> None:
        self.create: CreateForward | None = None  # makes the forwards
        self.owned = False  # whether nobody else has the weights, so that packed ones are freed
        self.released = False  # whether some have been freed
        self._by_twin: dict[nn.Module, ModuleForward] = {}

    def __getitem__(self, twin: nn.Module) -> ModuleForward:
        return self._by_twin[twin]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._by_twin)

    def __len__(self) -> int:
        return len(self._by_twin)

    def ask_anew(self, create: CreateForward) -> None:
        """Call ``create`` from now on, and forget the forwards of earlier ones.

        Raises:
            EngineDeadError: the previous engine has freed weights.
        """
        if self.released:
            raise EngineDeadError("an engine has packed this model's weights and let them go; load it anew")
        self.create = create
        self.let_go()

    def let_go(self) -> None:
        """Forwards of another engine, over the same model."""
        for twin in self._by_twin:
            twin.__dict__.pop("forward", None)
        self.forget()

    def forget(self) -> None:
        """Forget all twins and their replaced forwards."""
        self._by_twin = {}

    def place(self, twin: nn.Module) -> None:
        """Replace the forwards of ``twin`` and of its modules, parents before children."""
        if not self.replace(twin) or self._by_twin[twin].calls_children:
            children = list(twin.children())
            for child in children:
                self.place(child)
            self._release(child for child in children if not child._modules)  # siblings are packed together
        else:
            self._release([twin] if twin._modules else [])

    def replace(self, twin: nn.Module) -> bool:
        """Replace the forward of one module, unless the user changed it or has hooks on it."""
        if twin in self._by_twin:
            del self._by_twin[twin], twin.__dict__["forward"]
        assert self.create is not None
        if "forward" in twin.__dict__ or any(is_users_own(part) for part in twin.modules() if part is not twin):
            return False
        forward = self.create(twin)
        if forward is not None:
            self._by_twin[twin], twin.__dict__["forward"] = ModuleForward.of(forward), forward
        return forward is not None

    def _release(self, twins: Iterable[nn.Module]) -> None:
        if self.owned:
            for twin in twins:
                if twin in self._by_twin:
                    self.released |= self._by_twin[twin].release()


def is_users_own(module: nn.Module) -> bool:
    """Whether the user has hooks on the module, or has replaced its forward."""
    forward = module.__dict__.get("forward")
    return listened_to(module) or not (forward is None or compressed.is_librarys(forward))
