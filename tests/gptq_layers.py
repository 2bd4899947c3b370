"""Layers of GPTQ and AWQ, made by the papers' codes and the layout of their files. Each computes what its codes mean.

They share only the format with the reader under test: codes are packed into words by arithmetic on Python's integers
here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the place of each neighbour in a word, lowest bits first


class PackedLayer(nn.Module):
    """The tensors of GPTQModel's layers, with the plainest forward."""

    def __init__(self, tensors: dict[str, Tensor], weight: Tensor, bits: int) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias, self.bits, self._dense = None, bits, weight.to(tensors["scales"].dtype)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._dense.to(x.dtype))


def gptq_layer(linear: nn.Linear, bits: int, group: int, first_version: bool, act_order: bool = False) -> PackedLayer:
    depth = linear.in_features
    groups = torch.arange(depth) // group
    groups = groups[torch.randperm(depth, generator=torch.Generator().manual_seed(0))] if act_order else groups
    codes, zeros, scales = _quantized(linear.weight.detach(), bits, groups)
    tensors = {
        "qweight": _words(codes.t(), bits, range(32 // bits)).t().contiguous(),
        "qzeros": _words(zeros - int(first_version), bits, range(32 // bits)),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return PackedLayer(tensors, _dense(codes, zeros, scales, groups), bits)


def awq_layer(linear: nn.Linear, group: int) -> PackedLayer:
    groups = torch.arange(linear.in_features) // group
    codes, zeros, scales = _quantized(linear.weight.detach(), 4, groups)
    tensors = {"qweight": _words(codes, 4, AWQ_ORDER), "qzeros": _words(zeros, 4, AWQ_ORDER), "scales": scales}
    return PackedLayer(tensors, _dense(codes, zeros, scales, groups), 4)


def replace_linears(model: nn.Module, make: Any) -> Any:
    """Return ``model`` with its projections replaced by ``make(linear)``."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.endswith("_proj"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, make(module))
    return model


def _quantized(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes ``[K, N]``, zeros and scales ``[G, N]``. With eight bits, zero is the middle code."""
    top, parts = 2**bits - 1, int(groups.max()) + 1
    members = [weight[:, groups == part] for part in range(parts)]
    low = torch.stack([each.amin(1).clamp(max=0) for each in members])
    high = torch.stack([each.amax(1).clamp(min=0) for each in members])
    if bits == 8:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / (top - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, top).int()
    codes = (weight.t() / scales.float()[groups] + zeros[groups]).round().clamp(0, top).int()
    return codes, zeros, scales


def _dense(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return ((codes - zeros[groups]) * scales.float()[groups]).t().contiguous()


def _words(codes: Tensor, bits: int, order: Any) -> Tensor:
    """Pack ``[R, C]`` of codes below ``2**bits`` into int32 ``[R, C * bits / 32]``."""
    width = 32 // bits
    rows = []
    for row in codes.tolist():
        words = [row[at : at + width] for at in range(0, len(row), width)]
        rows.append([sum(word[neighbour] << bits * at for at, neighbour in enumerate(order)) for word in words])
    signed = [[word - (1 << 32) if word >> 31 else word for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32)
