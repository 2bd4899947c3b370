"""Weights as integers, eight or four bits each, with a scale for each group of a row, or for all of it.

This file knows torch tensors; how a product is computed with them is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paged_kernels.cpu import rotation

ZERO = {8: 128, 4: 8}  # the code that stands for nought where there are no minima
INT4_GROUP = 32  # weights that share a scale when this file makes four bits of them
_ROWS = 4096  # of weights that are widened to float32 at a time
_SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76)  # ranges that are tried: what is cut off at the ends makes steps smaller


@dataclass(frozen=True)
class Integers:
    """``weight[n, k] = scale[n, s] * code[n, k] + minimum[n, s]``, where ``s = k // group``. Without minima, nought is
    the code in the middle (ZERO). ``rotated_from``: these are weights of so many k that were filled up and rotated
    (rotation.py), as x must be to meet them; one group."""

    codes: Tensor  # uint8 [N, K], below 2**bits
    scales: Tensor  # float32, bfloat16 or float16 [N, S]
    minima: Tensor | None  # as scales
    bits: int  # 8, 4
    group: int  # weights of a row that share a scale; K: all of it
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
        """Numbers of x that a row meets."""
        return self.codes.shape[1] if self.rotated_from is None else self.rotated_from

    @property
    def layout(self) -> tuple[object, ...]:
        """What must be the same of weights that are packed together."""
        return self.depth, self.scales.dtype, self.minima is None, self.bits, self.group, self.rotated_from

    def widened(self) -> Tensor:
        """The weights that they stand for, float32 ``[N, K]``."""
        depth, each = self.codes.shape[1], self.group
        scales = self.scales.float().repeat_interleave(each, 1)[:, :depth]
        if self.minima is None:
            weight = (self.codes.float() - ZERO[self.bits]) * scales
            return weight if self.rotated_from is None else rotation.rotate(weight)[:, : self.depth].contiguous()
        return self.codes.float() * scales + self.minima.float().repeat_interleave(each, 1)[:, :depth]


def quantize(weight: Tensor, kind: str) -> Integers:
    """``weight [N, K]`` of any float dtype as "int8" or "int4".

    int8: rotated rows, with a scale in float32 each. int4: groups of INT4_GROUP between a minimum and a maximum in
    bfloat16, the range among _SHRINKS that errs least by squares; codes are chosen by what became of the two.
    """
    weight = weight.detach()
    if kind == "int4":
        return _int4(weight.float())
    parts = [_int8(rows.float()) for rows in torch.split(weight, _ROWS)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return Integers(codes, scales, None, 8, codes.shape[1], weight.shape[1])


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rotated rows."""
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
    """``[N, K]`` as ``[N, S, group]``, filled up with what adds nothing to a range."""
    rows, depth = weight.shape
    parts = -(-depth // group)
    edge = weight[:, -1:].expand(rows, parts * group - depth)
    return torch.cat([weight, edge], 1).view(rows, parts, group)


def _whole(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def or_one(scales: Tensor) -> Tensor:
    """Rows and groups of zeros have a scale all the same."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
