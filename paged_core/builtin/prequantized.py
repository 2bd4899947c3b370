"""Linear layers whose checkpoint is already quantised: reads their integers, without rounding anything again.

A layer is recognised by its parts, without importing the library that made it: torchao's int8 and int4 tensors (codes,
scales, zero points), bitsandbytes' int8 (codes, a scale for each row), what compressed-tensors leaves after widening a
weight (the weight, and the scales that it was made with), and GPTQ's and AWQ's 32-bit words (packed_words.py). Layers
that are not plainly one of these run unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paged_core.builtin.packed_words import has_packed_words, of_packed_words

if TYPE_CHECKING:
    from paged_kernels.cpu.integers import Integers

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def looks_quantized(module: nn.Module) -> bool:
    """Return whether a module on the CPU has the parts of such a layer."""
    return _format_of(module) is not None


def integers_in(module: nn.Module) -> Integers | None:
    """Return the integers of a layer with such parts, or None if they don't have the expected form."""
    integers_of = _format_of(module)
    return None if integers_of is None else integers_of(module)


def _format_of(module: nn.Module) -> Callable[[nn.Module], Integers | None] | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return of_packed_words if has_packed_words(module) else None
    if weight.device.type != "cpu" or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear) and "weight_scale" in module._parameters:
        return _of_compressed_tensors
    if type(module) is nn.Linear:
        return _of_torchao if type(weight) is not nn.Parameter else None
    return _of_bitsandbytes if type(module).__name__ == "Linear8bitLt" else None


def _of_torchao(module: nn.Module) -> Integers | None:
    """Return int8 codes ``[N, K]`` and scales ``[N, S]``; 4-bit codes are -8 to 7."""
    from paged_kernels.cpu.integers import ZERO, Integers

    weight: Any = module._parameters["weight"]
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


def _of_bitsandbytes(module: nn.Module) -> Integers | None:
    """Return int8 codes ``[N, K]``. The library keeps the largest number of each row, which code 127 means, in one of
    two places."""
    from paged_kernels.cpu.integers import ZERO, Integers

    weight = module._parameters["weight"]
    assert weight is not None
    largest = getattr(weight, "SCB", None)
    if largest is None:
        largest = getattr(getattr(module, "state", None), "SCB", None)
    if weight.dtype is not torch.int8 or type(largest) is not Tensor or largest.shape != weight.shape[:1]:
        return None
    codes = (weight.data.view(torch.int8).short() + ZERO[8]).to(torch.uint8).as_subclass(Tensor)
    return Integers(codes, (largest.float() / 127)[:, None], None, 8, weight.shape[1])


def _of_compressed_tensors(module: nn.Module) -> Integers | None:
    """Return a widened float weight ``[N, K]`` and its scales ``[N, S]``, ``[N, 1]`` or ``[1]``."""
    from paged_kernels.cpu.grids import of_known_scales

    weight, scale = module._parameters["weight"], module._parameters["weight_scale"]
    if weight is None or scale is None or weight.dtype not in _FLOATS or scale.dtype not in _FLOATS:
        return None
    (rows, depth), parts = weight.shape, scale.shape[-1] if scale.ndim > 1 else 1
    if parts == 0 or depth % parts or scale.numel() not in (parts, rows * parts):
        return None
    return of_known_scales(weight.detach(), scale.detach().reshape(-1, parts).expand(rows, -1), depth // parts)
