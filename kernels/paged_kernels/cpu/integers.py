"""Weights as integers of eight or four bits, with a scale for each group of a row, or for the whole row.

This file knows torch tensors. It does not know how products are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paged_kernels.cpu import rotation

ZERO = {8: 128, 4: 8}  # the code that means zero if there are no minima
INT4_GROUP = 32  # weights that share a scale when ``quantize`` makes 4-bit codes
_ROWS = 4096  # weights that are widened to float32 at a time
_SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76)  # shares of a group's range that are tried: clipping makes the steps smaller


@dataclass(frozen=True)
class Integers:
    """Weights ``weight[n, k] = scale[n, s] * code[n, k] + minimum[n, s]``, where ``s = k // group``. Without minima,
    the middle code (ZERO) means zero. ``rotated_from``: if set, the weights' original number of inputs; rows were
    padded and rotated (rotation.py), as x must be, and each is one group."""

    codes: Tensor  # uint8 [N, K], below 2**bits
    scales: Tensor  # float32, bfloat16 or float16 [N, S]
    minima: Tensor | None  # in the form of scales
    bits: int  # 8, 4
    group: int  # weights of a row that share a scale; K: all of them
    rotated_from: int | None = None

    def __post_init__(self) -> None:
        (rows, depth), parts = self.codes.shape, -(-self.codes.shape[1] // self.group)
        if self.bits not in ZERO or self.codes.dtype is not torch.uint8:
            raise ValueError(f"codes of {self.bits} bits in {self.codes.dtype} are unknown; use 8 or 4 bits in uint8")
        if self.scales.shape != (rows, parts) or (self.minima is not None and self.minima.shape != (rows, parts)):
            raise ValueError(f"scales must be [{rows}, {parts}] for groups of {self.group} in rows of {depth}")
        if self.bits == 8 and self.minima is not None:
            raise ValueError("eight bits with minima aren't known; use scales alone")
        if self.rotated_from is not None and not self.rotated_from <= rotation.filled(self.rotated_from) == self.group:
            raise ValueError(f"rows of {self.rotated_from} that were rotated have one scale, not one for {self.group}")

    @property
    def depth(self) -> int:
        """The length of the rows of x that are multiplied."""
        return self.codes.shape[1] if self.rotated_from is None else self.rotated_from

    @property
    def layout(self) -> tuple[object, ...]:
        """The facts that weights must share to be packed together."""
        return self.depth, self.scales.dtype, self.minima is None, self.bits, self.group, self.rotated_from

    def widened(self) -> Tensor:
        """Return the weights that these mean, float32 ``[N, K]``."""
        depth, each = self.codes.shape[1], self.group
        scales = self.scales.float().repeat_interleave(each, 1)[:, :depth]
        if self.minima is None:
            weight = (self.codes.float() - ZERO[self.bits]) * scales
            return weight if self.rotated_from is None else rotation.rotate(weight)[:, : self.depth].contiguous()
        return self.codes.float() * scales + self.minima.float().repeat_interleave(each, 1)[:, :depth]


def quantize(weight: Tensor, kind: str) -> Integers:
    """Quantise ``weight [N, K]`` of any float dtype to "int8" or "int4".

    int8: rotated rows, each with a float32 scale. int4: groups of INT4_GROUP between a minimum and a maximum in
    bfloat16, with the range of _SHRINKS that has the smallest squared error. Codes are chosen after scale and minimum
    were rounded.
    """
    weight = weight.detach()
    if kind == "int4":
        return _int4(weight.float())
    parts = [_int8(rows.float()) for rows in torch.split(weight, _ROWS)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return Integers(codes, scales, None, 8, codes.shape[1], weight.shape[1])


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of rotated rows."""
    rows = rotation.rotate(weight).div_(rotation.factor(weight.shape[1]))
    scales = or_one(rows.abs().amax(-1, keepdim=True) / 127)
    return rows.div_(scales).round_().clamp_(-127, 127).add_(ZERO[8]).to(torch.uint8), scales


def _int4(weight: Tensor) -> Integers:
    groups = _groups(weight, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, half, least = (low + high) / 2, (high - low) / 2, None
    for shrink in _SHRINKS:
        minima = (middle - half * shrink).bfloat16()
        scales = or_one((half * (2 * shrink / 15)).bfloat16())
        codes = ((groups - minima.float()) / scales.float()).round_().clamp_(0, 15)
        error = (codes * scales.float() + minima.float()).sub_(groups).square_().sum(-1, keepdim=True)
        if least is None:
            least, best = error, [codes, scales, minima]
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip((codes, scales, minima), best, strict=True)]
    codes, scales, minima = best
    return Integers(_whole(codes, weight), scales.squeeze(-1), minima.squeeze(-1), 4, INT4_GROUP)


def _groups(weight: Tensor, group: int) -> Tensor:
    """Return ``[N, K]`` as ``[N, S, group]``, padded with values that don't extend a group's range."""
    rows, depth = weight.shape
    parts = -(-depth // group)
    edge = weight[:, -1:].expand(rows, parts * group - depth)
    return torch.cat([weight, edge], 1).view(rows, parts, group)


def _whole(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def or_one(scales: Tensor) -> Tensor:
    """Return the scales, with 1 in place of 0 for rows and groups of zeros."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
