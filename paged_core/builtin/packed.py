"""Packed linear layers that follow their modules' weights. This file knows torch modules; it never writes to one, but
to take weights away that nobody needs any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paged_core.builtin.linears import Linear, packable
from paged_core.builtin.trials import random_rows
from paged_core.execution.split_linear import SplitLinear
from paged_core.execution.watched import WatchedTensors

if TYPE_CHECKING:
    from paged_kernels.cpu.integers import Integers
    from paged_kernels.cpu.linear import Packed


class Layers:
    """Linear layers over one input, packed, and packed anew when one of their weights changes.

    Their tensors are looked up in the modules' own dictionaries at each call, so that a weight that was replaced is
    seen; the modules themselves are not held.

    Args:
        gated: see PackedLinear.
        weights: "int8" or "int4" for a product of integers; None: as they are.
    """

    def __init__(self, modules: Sequence[nn.Module], gated: bool = False, weights: str | None = None) -> None:
        self._linears = [Linear(module, weights) for module in modules]
        self._places = [place for linear in self._linears for place in linear.places]
        self._gated, self._kind = gated, weights
        self._stood_for: list[Tensor] = []
        self._pack()

    @property
    def sizes(self) -> list[int]:
        """How many columns each has."""
        return [linear.shape[0] for linear in self._linears]

    @property
    def alike(self) -> bool:
        """Whether they take rows of one length, and all lie in memory the same way round."""
        return len({(linear.shape[1], linear.turned) for linear in self._linears}) == 1

    def trial_rows(self) -> Tensor:
        """Random rows of a dtype that they take."""
        dtype = next((dtype for dtype in (torch.float32, torch.bfloat16) if dtype in self._dtypes), torch.float32)
        return random_rows(torch.empty(0, dtype=dtype, device="cpu"), self._linears[0].shape[1])

    def packed(self, x: Tensor) -> Any | None:
        """The product of all; None if x or the weights are not of a kind that it takes."""
        if not self._watched.same(self._tensors()):
            self._pack()
            self._stood_for = []
        return self._product if x.dtype in self._dtypes and x.device.type == "cpu" else None

    def stale(self) -> bool:
        return self._watched.stale(self._tensors())

    def alone(self, index: int, x: Tensor) -> Tensor:
        """One of them, as torch computes it; as it was packed, if that is all there is."""
        linear = self._linears[index]
        if not linear.is_released:
            return linear.stock(x)
        if self._product is None:
            raise RuntimeError("the weight was let go when it was packed, and has been replaced since")
        part: Tensor = torch.split(self._product(x), self.sizes, -1)[index]
        return part

    def take_stood_for(self) -> dict[int, Tensor]:
        """By the identity of a module's parameters, weights ``[N, K]`` that the integers stand for: once, for a
        trial."""
        taken, self._stood_for = self._stood_for, []
        return dict(zip((linear.identity for linear in self._linears), taken, strict=bool(taken)))

    def release(self) -> bool:
        """Leave the modules weights of no numbers: torch refuses to multiply with these (with weights on
        the meta device it does, and gives anything). Returns whether there were any."""
        if self._product is None:
            return False
        from paged_kernels.cpu.pages import let_go

        num_bytes = sum(linear.release() for linear in self._linears)
        self._watched = WatchedTensors(self._tensors())
        let_go(num_bytes)
        return True

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where its tensors are: in which dictionary, under which name."""
        return self._places

    def _tensors(self) -> list[Tensor | None]:
        return [owner.get(name) for owner, name in self._places]

    def _pack(self) -> None:
        self._watched = WatchedTensors(self._tensors())
        self._product: Packed | None = None
        self._dtypes: frozenset[torch.dtype] = frozenset.intersection(*(linear.dtypes for linear in self._linears))
        if self._dtypes:
            self._product = self._with_integers() if self._kind is not None else self._as_they_are()

    def _as_they_are(self) -> Packed | None:
        from paged_kernels.cpu.linear import PackedLinear

        weights = [linear.weight for linear in self._linears]
        whole = [weight for weight in weights if weight is not None]
        return PackedLinear(whole, self._biases(), self._gated) if len(whole) == len(weights) else None

    def _with_integers(self) -> Packed | None:
        from paged_kernels.cpu.grids import in_one_layout
        from paged_kernels.cpu.quantized import QuantizedLinear

        assert self._kind is not None
        found = [linear.integers(self._kind) for linear in self._linears]
        integers = in_one_layout(known) if len(known := _all_of(found)) == len(found) else None
        if integers is None:
            return None
        try:
            product = QuantizedLinear(integers, self._biases(), self._gated)
        except ValueError:  # groups that the kernels have no way for
            return None
        self._stood_for = [each.widened() for each in integers]
        return product

    def _biases(self) -> list[Tensor | None]:
        return [linear.bias for linear in self._linears]


def _all_of(found: Sequence[Integers | None]) -> list[Integers]:
    return [each for each in found if each is not None]


# ---- which modules ---------------------------------------------------------------------------------------------------


def is_packable(module: nn.Module | None, weights: str | None = None) -> bool:
    """A linear layer over plain weights, or over integers if these are asked for, with nobody's forward in the place
    of its own."""
    return module is not None and "forward" not in module.__dict__ and Linear.knows(module, weights)


def is_packable_shard(module: nn.Module | None) -> bool:
    """A SplitLinear over plain weights: what its ranks do before and after the product is for the caller to do."""
    if type(module) is not SplitLinear or "forward" in module.__dict__:
        return False
    return packable(module._parameters.get("weight")) is not None


def is_packable_end(module: nn.Module | None, weights: str | None = None) -> bool:
    """Plain, or such that ranks add up what it computes of inputs that each has of its own."""
    return is_packable(module, weights) or (is_packable_shard(module) and module.before is None)  # type: ignore[union-attr]


def added_up(linear: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What ranks do with the products of one that is_packable_end; None: nothing."""
    return linear.after if isinstance(linear, SplitLinear) else None
