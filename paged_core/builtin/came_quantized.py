"""Linear layers that come quantised, from the integers that they have: nothing is rounded anew, and none is widened.

A weight is known by what it is made of: torchao's int8 and int4 tensors (codes, scales, zero points) and bitsandbytes'
int8 (codes, a scale a row). What isn't plainly one of these is left alone, and runs as it always did.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paged_core.builtin.trials import INTEGERS, alike, random_rows
from paged_core.execution.model import ModuleForward
from paged_core.execution.watched import WatchedTensors

if TYPE_CHECKING:
    from paged_kernels.cpu.integers import Integers
    from paged_kernels.cpu.quantized import QuantizedLinear

_FLOATS = (torch.float32, torch.bfloat16)  # of rows that the kernels read


def came_quantized_forward(module: nn.Module) -> ModuleForward | None:
    """None if the module isn't such a layer."""
    integers = _integers_of(module)
    if integers is None:
        return None
    forward = _CameQuantized(module, integers)
    if not forward.packed:
        return None
    widened, bias = integers.widened(), module._parameters.get("bias")
    x = random_rows(widened, widened.shape[1])
    theirs = nn.functional.linear(x, widened, None if bias is None else bias.float())
    return forward if alike(forward(x), theirs, INTEGERS) else None


class _CameQuantized(ModuleForward):
    follows_module = True
    quantized = True

    def __init__(self, module: nn.Module, integers: Integers) -> None:
        self._module, self._owner = weakref.ref(module), module._parameters
        self._product: QuantizedLinear | None = None
        self._pack(integers)

    def __call__(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        module = self._module()
        assert module is not None, "it is the one that is called"
        if not self._watched.same(self._tensors()):
            self._pack(_integers_of(module))
        if self._product is None or x.dtype not in _FLOATS:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        out: Tensor = self._product(x)
        return out

    @property
    def packed(self) -> bool:
        """Whether there is a way to compute with its integers."""
        return self._product is not None

    def stale(self) -> bool:
        return self._module() is None or self._watched.stale(self._tensors())

    def _tensors(self) -> list[Tensor | None]:
        return [self._owner.get("weight"), self._owner.get("bias")]

    def _pack(self, integers: Integers | None) -> None:
        from paged_kernels.cpu.quantized import QuantizedLinear

        self._watched, self._product = WatchedTensors(self._tensors()), None
        if integers is not None:
            with suppress(ValueError):  # groups that the kernels have no way for
                self._product = QuantizedLinear([integers], [self._owner.get("bias")])


def _integers_of(module: nn.Module) -> Integers | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or weight.ndim != 2:
        return None
    if type(module) is nn.Linear and type(weight) is not nn.Parameter:
        return _of_torchao(weight)
    return _of_bitsandbytes(module, weight) if type(module).__name__ == "Linear8bitLt" else None


def _of_torchao(weight: Any) -> Integers | None:
    """Codes int8 ``[N, K]`` and scales ``[N, S]``; of four bits, the codes are -8 to 7."""
    from paged_kernels.cpu.integers import ZERO, Integers

    codes, scale, zero = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    block = list(getattr(weight, "block_size", ()))
    plain = type(codes) is Tensor and codes.dtype is torch.int8 and type(scale) is Tensor and scale.dtype in _FLOATS
    rounds_rows = any(
        getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization")
    )
    if (
        not plain
        or rounds_rows
        or len(block) != 2
        or block[0] != 1
        or getattr(weight, "act_pre_scale", None) is not None
    ):
        return None
    bits = 4 if getattr(weight, "target_dtype", None) is getattr(torch, "int4", ...) else 8
    if bits == 8 and getattr(weight, "target_dtype", torch.int8) is not torch.int8:
        return None
    centre = torch.zeros((), dtype=torch.float32) if zero is None else zero.float()
    if bits == 8 and centre.any():
        return None
    assert codes is not None and scale is not None
    minima = None if bits == 8 else -(ZERO[4] + centre) * scale.float()
    scales = scale if bits == 8 else scale.float()
    return Integers((codes.short() + ZERO[bits]).to(torch.uint8), scales.contiguous(), minima, bits, block[1])


def _of_bitsandbytes(module: nn.Module, weight: Any) -> Integers | None:
    """Codes int8 ``[N, K]``; the largest number of each row, which 127 stands for, is kept here or there."""
    from paged_kernels.cpu.integers import ZERO, Integers

    largest = getattr(weight, "SCB", None)
    if largest is None:
        largest = getattr(getattr(module, "state", None), "SCB", None)
    if weight.dtype is not torch.int8 or type(largest) is not Tensor or largest.shape != weight.shape[:1]:
        return None
    codes = (weight.data.view(torch.int8).short() + ZERO[8]).to(torch.uint8).as_subclass(Tensor)
    return Integers(codes, (largest.float() / 127)[:, None], None, 8, weight.shape[1])
