"""Weights that were integers times scales before somebody multiplied them: the integers, found again in the numbers.

What is found stands for the weights to the last bit, or nothing is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paged_kernels.cpu.integers import ZERO, Integers


def of_known_scales(weight: Tensor, scales: Tensor, group: int) -> Integers | None:
    """``weight [N, K]`` of any float dtype as ``scales [N, S]`` times integers, of four bits where these suffice.

    None: a weight isn't such a product as its dtype rounds it, or the integers of a group lie too far apart.
    """
    depth = weight.shape[1]
    if scales.shape != (len(weight), -(-depth // group)) or depth % group or not bool(scales.isfinite().all()):
        return None
    steps = scales.float()[:, :, None]
    parts = weight.detach().view(len(weight), -1, group)
    multiples = torch.where(steps == 0, 0, parts.float() / steps).round_()
    if not torch.equal((multiples * steps).to(weight.dtype), parts):
        return None
    low, high = multiples.amin(-1, keepdim=True), multiples.amax(-1, keepdim=True)
    if (high - low).amax() < 2**4:
        return _of_four_bits(multiples, low, high, scales, group)
    if low.amin() < -ZERO[8] or high.amax() >= ZERO[8]:
        return None
    return Integers((multiples + ZERO[8]).to(torch.uint8).flatten(1), scales.contiguous(), None, 8, group)


def _of_four_bits(multiples: Tensor, low: Tensor, high: Tensor, scales: Tensor, group: int) -> Integers:
    if low.amin() >= -ZERO[4] and high.amax() < ZERO[4]:
        return Integers((multiples + ZERO[4]).to(torch.uint8).flatten(1), scales.contiguous(), None, 4, group)
    codes = (multiples - low).to(torch.uint8).flatten(1)
    scales = scales.float().contiguous()
    return Integers(codes, scales, low.squeeze(-1) * scales, 4, group)


def in_one_layout(weights: Sequence[Integers]) -> list[Integers] | None:
    """The same weights, such that they can be packed together. None: some have eight bits and some four, some are
    rotated and some not, or their rows are not of one length."""
    if len({weight.layout for weight in weights}) == 1:
        return list(weights)
    if len({(weight.depth, weight.bits, weight.rotated_from) for weight in weights}) > 1:
        return None
    group = math.gcd(*(weight.group for weight in weights))
    minima = any(weight.minima is not None for weight in weights)
    return [_laid_anew(weight, group, minima) for weight in weights]


def _laid_anew(weight: Integers, group: int, with_minima: bool) -> Integers:
    """In finer groups, with scales of float32."""
    parts, each = -(-weight.codes.shape[1] // group), weight.group // group
    scales = weight.scales.float()
    minima = weight.minima.float() if weight.minima is not None else -ZERO[weight.bits] * scales
    scales, minima = (x.repeat_interleave(each, 1)[:, :parts].contiguous() for x in (scales, minima))
    return replace(weight, scales=scales, minima=minima if with_minima else None, group=group)
