"""Packed linear layers that follow their modules' weights. This file knows torch modules; it never writes to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paged_core.execution.split_linear import SplitLinear
from paged_core.execution.watched import WatchedTensors

if TYPE_CHECKING:
    from paged_kernels.cpu.linear import Packed


class Layers:
    """Linear layers over one input, packed, and packed anew when one of their weights changes.

    Their parameters are looked up in the modules' own dictionaries at each call, so that a weight that was replaced is
    seen; the modules themselves are not held.

    Args:
        gated: see PackedLinear.
        weights: "int8" or "int4" for a product of integers; None: as they are.
    """

    def __init__(self, modules: Sequence[nn.Module], gated: bool = False, weights: str | None = None) -> None:
        self._owners = [module._parameters for module in modules]
        self._sizes = [shape_of(module)[0] for module in modules]
        self._turned = not isinstance(modules[0], nn.Linear)  # weights [K, N] instead of [N, K]
        self._gated, self._kind = gated, weights
        self._stood_for: list[Tensor] = []
        self._pack()

    def packed(self, x: Tensor) -> Any | None:
        """The product of all; None if x or the weights are not of a kind that it takes."""
        if not self._watched.same(self._tensors()):
            self._pack()
            self._stood_for = []
        return self._product if x.dtype is self._dtype and x.device.type == "cpu" else None

    def stale(self) -> bool:
        return self._watched.stale(self._tensors())

    def alone(self, index: int, x: Tensor) -> Tensor:
        """One of them, as torch computes it; as it was packed, if that is all there is."""
        weight, bias = self._owners[index]["weight"], self._owners[index].get("bias")
        assert weight is not None
        if not weight.numel():
            if self._product is None:
                raise RuntimeError("the weight was let go when it was packed, and has been replaced since")
            part: Tensor = torch.split(self._product(x), self._sizes, -1)[index]
            return part
        return nn.functional.linear(x, weight.t() if self._turned else weight, bias)

    def take_stood_for(self) -> dict[int, Tensor]:
        """By the identity of a module's parameters, weights that the integers stand for: once, for a trial."""
        taken, self._stood_for = self._stood_for, []
        owners = [id(owner) for owner in self._owners]
        return dict(zip(owners, (w.t() if self._turned else w for w in taken), strict=bool(taken)))

    def release(self) -> bool:
        """Leave the modules weights of no numbers: torch refuses to multiply with these (with weights on
        the meta device it does, and gives anything). Returns whether there were any."""
        if self._product is None:
            return False
        from paged_kernels.cpu.pages import forget

        for owner in self._owners:
            weight = owner["weight"]
            assert weight is not None
            if weight.numel():  # a sibling may have been packed twice
                forget(weight)
                owner["weight"] = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self._watched = WatchedTensors(self._tensors())
        return True

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where its tensors are: in which dictionary, under which name."""
        return [(owner, name) for owner in self._owners for name in ("weight", "bias")]

    def _tensors(self) -> list[Tensor | None]:
        return [owner.get(name) for owner in self._owners for name in ("weight", "bias")]

    def _pack(self) -> None:
        tensors = self._tensors()
        self._watched = WatchedTensors(tensors)
        self._product: Packed | None = None
        self._dtype: torch.dtype | None = None
        weights = [packable(weight) for weight in tensors[::2]]
        whole = [w.t() if self._turned else w for w in weights if w is not None]
        if len(whole) == len(weights) and len({w.dtype for w in whole}) == 1:
            self._product = self._packed_as(self._kind, whole, tensors[1::2])
            self._dtype = whole[0].dtype

    def _packed_as(self, kind: str | None, weights: list[Tensor], biases: list[Tensor | None]) -> Packed | None:
        if kind is None:
            from paged_kernels.cpu.linear import PackedLinear

            return PackedLinear(weights, biases, self._gated)
        from paged_kernels.cpu.integers import integers_of
        from paged_kernels.cpu.quantized import QuantizedLinear

        integers = [integers_of(weight, kind) for weight in weights]
        if len({each.layout for each in integers}) > 1:
            return None
        self._stood_for = [each.widened().to(w.dtype) for each, w in zip(integers, weights, strict=True)]
        return QuantizedLinear(integers, biases, self._gated)


def packable(weight: Tensor | None) -> Tensor | None:
    from paged_kernels.cpu.linear import can_pack

    return weight if weight is not None and type(weight) in (Tensor, nn.Parameter) and can_pack(weight) else None


def is_packable(module: nn.Module | None) -> bool:
    """What has_plain_weight says, with nobody's forward in the place of its own."""
    return module is not None and "forward" not in module.__dict__ and has_plain_weight(module)


def has_plain_weight(module: nn.Module) -> bool:
    """nn.Linear itself, or a Conv1D as GPT-2 has it (weight [K, N]), over plain weights."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module) is nn.Linear:
        return packable(weight) is not None
    is_conv1d = type(module).__name__ == "Conv1D" and set(module._parameters) == {"weight", "bias"}
    return is_conv1d and bias is not None and packable(weight) is not None


def is_packable_shard(module: nn.Module | None) -> bool:
    """A SplitLinear over plain weights: what its ranks do before and after the product is for the caller to do."""
    if type(module) is not SplitLinear or "forward" in module.__dict__:
        return False
    return packable(module._parameters.get("weight")) is not None


def is_packable_end(module: nn.Module | None) -> bool:
    """Plain, or such that ranks add up what it computes of inputs that each has of its own."""
    return is_packable(module) or (is_packable_shard(module) and module.before is None)  # type: ignore[union-attr]


def added_up(linear: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What ranks do with the products of one that is_packable_end; None: nothing."""
    return linear.after if isinstance(linear, SplitLinear) else None


def shape_of(linear: nn.Module) -> tuple[int, int, bool]:
    """(outputs, inputs, whether the weight lies turned)"""
    weight, turned = linear._parameters["weight"], not isinstance(linear, nn.Linear)
    assert weight is not None
    rows, columns = weight.shape
    return (columns, rows, turned) if turned else (rows, columns, turned)
