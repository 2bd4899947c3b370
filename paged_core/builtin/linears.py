"""One linear layer: where its tensors are, and its weights as floats or as integers.

This file knows torch modules. It reads the layer, and keeps no reference to it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paged_core.builtin.prequantized import integers_in, looks_quantized
from paged_core.execution.watched import plain_tensors

if TYPE_CHECKING:
    from paged_kernels.cpu.integers import Integers

_ROWS = frozenset({torch.float32, torch.bfloat16, torch.float16})  # dtypes of rows that products of integers take


class Linear:
    """An nn.Linear, a Conv1D as in GPT-2 (weight ``[K, N]``), or, if integers are asked for, a layer that is already
    quantised."""

    def __init__(self, module: nn.Module, weights: str | None) -> None:
        self._module = weakref.ref(module)
        self._prequantized = weights is not None and looks_quantized(module)
        self.turned = not (self._prequantized or isinstance(module, nn.Linear))
        self._parameters = module._parameters
        self.places: list[tuple[dict[str, Any], str]] = [(module._parameters, name) for name in ("weight", "bias")]
        if self._prequantized:
            self.places = [(owner, name) for owner in _owners(module) for name in owner]
        self.shape = _shape_of(module, self._prequantized, self.turned)

    @staticmethod
    def knows(module: nn.Module, weights: str | None) -> bool:
        """Return whether the module is such a layer, by its tensors."""
        if weights is not None and looks_quantized(module):
            return True
        weight = module._parameters.get("weight")
        if type(module) is nn.Linear:
            return packable(weight) is not None
        is_conv1d = type(module).__name__ == "Conv1D" and set(module._parameters) == {"weight", "bias"}
        return is_conv1d and module._parameters["bias"] is not None and packable(weight) is not None

    @property
    def identity(self) -> int:
        """The identity of the module's parameters, which is the same for all its twins."""
        return id(self._parameters)

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of rows that a product with it takes."""
        if self._prequantized:
            return _ROWS
        weight = self.weight
        return frozenset() if weight is None else frozenset({weight.dtype})

    @property
    def weight(self) -> Tensor | None:
        """Return the current weight as float ``[N, K]``, or None if it isn't a plain tensor."""
        weight = packable(self._parameters.get("weight"))
        return weight.t() if weight is not None and self.turned else weight

    @property
    def bias(self) -> Tensor | None:
        return next((owner.get(name) for owner, name in self.places if name == "bias"), None)

    def integers(self, kind: str) -> Integers | None:
        """Return the layer's own integers, if they can be read, else its plain weight quantised as ``kind``, else
        None."""
        from paged_kernels.cpu.grids import integers_of

        module = self._module()
        found = integers_in(module) if self._prequantized and module is not None else None
        if found is not None:
            return found
        return None if (weight := self.weight) is None else integers_of(weight, kind)

    def stock(self, x: Tensor) -> Tensor:
        """Compute the layer by torch."""
        if self._prequantized:
            module = self._module()
            assert module is not None, "it is the one that is called"
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        weight, bias = self._parameters["weight"], self.bias
        assert weight is not None
        return nn.functional.linear(x, weight.t() if self.turned else weight, bias)

    @property
    def is_released(self) -> bool:
        return any(tensor is not None and not tensor.numel() for tensor in self._matrices())

    def release(self) -> int:
        """Replace the weights by tensors without numbers. Returns how many freed bytes were malloc's, not a mapped
        file's."""
        from paged_kernels.cpu.pages import forget

        num_bytes = 0
        for owner, name in self.places:
            tensor = owner.get(name)
            if tensor is None or tensor.ndim < 2:  # a sibling may have been packed twice
                continue
            for plain in plain_tensors(tensor):
                num_bytes += 0 if forget(plain) else plain.numel() * plain.element_size()
            nothing = torch.empty(0, dtype=tensor.dtype, device="cpu")
            owner[name] = nn.Parameter(nothing, requires_grad=False) if owner is self._parameters else nothing
        return num_bytes

    def _matrices(self) -> list[Tensor | None]:
        return [owner.get(name) for owner, name in self.places if name != "bias"]


def _owners(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def packable(weight: Tensor | None) -> Tensor | None:
    """Return the weight if it can be packed as it is, else None."""
    from paged_kernels.cpu.linear import can_pack

    return weight if weight is not None and type(weight) in (Tensor, nn.Parameter) and can_pack(weight) else None


def _shape_of(module: nn.Module, came: bool, turned: bool) -> tuple[int, int]:
    """Return (outputs, inputs)."""
    if came:
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module._parameters["weight"]
    assert weight is not None
    rows, columns = weight.shape
    return (columns, rows) if turned else (rows, columns)
