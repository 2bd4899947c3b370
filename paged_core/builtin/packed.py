"""Packed linear layers that notice changes of their modules' weights. This file knows torch modules. It never writes to
one, except to free weights that nothing needs any more."""

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
    """Linear layers over one input, packed. They are packed again when one of their weights changes.

    The tensors are looked up in the modules' own dictionaries at each call, so that a replaced weight is noticed. No
    reference to the modules is kept.

    Args:
        gated: see PackedLinear.
        weights: "int8" or "int4" for a product of integers; None: the weights as they are.
    """

    def __init__(self, modules: Sequence[nn.Module], gated: bool = False, weights: str | None = None) -> None:
        self._linears = [Linear(module, weights) for module in modules]
        self._places = [place for linear in self._linears for place in linear.places]
        self._gated, self._kind = gated, weights
        self._stood_for: list[Tensor] = []
        self._pack()

    @property
    def sizes(self) -> list[int]:
        """The number of outputs of each layer."""
        return [linear.shape[0] for linear in self._linears]

    @property
    def alike(self) -> bool:
        """Whether all take rows of one length, and have the same order in memory."""
        return len({(linear.shape[1], linear.turned) for linear in self._linears}) == 1

    def trial_rows(self) -> Tensor:
        """Return random rows of a dtype that they take."""
        dtype = next((dtype for dtype in (torch.float32, torch.bfloat16) if dtype in self._dtypes), torch.float32)
        return random_rows(torch.empty(0, dtype=dtype, device="cpu"), self._linears[0].shape[1])

    def packed(self, x: Tensor) -> Any | None:
        """Return the product of all layers, or None if it can't take x or the weights."""
        if not self._watched.same(self._tensors()):
            self._pack()
            self._stood_for = []
        return self._product if x.dtype in self._dtypes and x.device.type == "cpu" else None

    def stale(self) -> bool:
        return self._watched.stale(self._tensors())

    def alone(self, index: int, x: Tensor) -> Tensor:
        """Compute one of them by torch, or from its packed weight if the module's weight was freed."""
        linear = self._linears[index]
        if not linear.is_released:
            return linear.stock(x)
        if self._product is None:
            raise RuntimeError("the weight was let go when it was packed, and has been replaced since")
        part: Tensor = torch.split(self._product(x), self.sizes, -1)[index]
        return part

    def take_stood_for(self) -> dict[int, Tensor]:
        """Return the weights ``[N, K]`` that the integers mean, by the identity of a module's parameters, for a trial.
        A second call returns none."""
        taken, self._stood_for = self._stood_for, []
        return dict(zip((linear.identity for linear in self._linears), taken, strict=bool(taken)))

    def release(self) -> bool:
        """Replace the modules' weights by tensors without numbers, with which torch refuses to multiply. (With weights
        on the meta device it would multiply, and return anything.) Returns whether there were any to replace."""
        if self._product is None:
            return False
        from paged_kernels.cpu.pages import let_go

        num_bytes = sum(linear.release() for linear in self._linears)
        self._watched = WatchedTensors(self._tensors())
        let_go(num_bytes)
        return True

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Return where its tensors are: dictionaries, and names in them."""
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
        except ValueError:  # groups of a size that the kernels don't support
            return None
        self._stood_for = [each.widened() for each in integers]
        return product

    def _biases(self) -> list[Tensor | None]:
        return [linear.bias for linear in self._linears]


def _all_of(found: Sequence[Integers | None]) -> list[Integers]:
    return [each for each in found if each is not None]


# ---- recognising modules ---------------------------------------------------------------------------------------


def is_packable(module: nn.Module | None, weights: str | None = None) -> bool:
    """Return whether it is a linear layer with plain weights, or with integers if these are asked for, and its class's
    own forward."""
    return module is not None and "forward" not in module.__dict__ and Linear.knows(module, weights)


def is_packable_shard(module: nn.Module | None) -> bool:
    """Return whether it is a SplitLinear with plain weights. The caller must do what its ranks do before and after the
    product."""
    if type(module) is not SplitLinear or "forward" in module.__dict__:
        return False
    return packable(module._parameters.get("weight")) is not None


def is_packable_end(module: nn.Module | None, weights: str | None = None) -> bool:
    """Return whether it is packable, or a packable shard whose ranks add up their results."""
    return is_packable(module, weights) or (is_packable_shard(module) and module.before is None)  # type: ignore[union-attr]


def added_up(linear: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return how ranks add up the products of a layer for which is_packable_end is true; None: it isn't split."""
    return linear.after if isinstance(linear, SplitLinear) else None
