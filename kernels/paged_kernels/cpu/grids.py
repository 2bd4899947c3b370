"""Finds the integers and scales from which float weights were once computed.

The integers found mean the same weights to the last bit; otherwise nothing is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paged_kernels.cpu.integers import ZERO, Integers, or_one, quantize

_GROUP = 32  # of GGUF's formats
_HEAD = 8


def integers_of(weight: Tensor, kind: str) -> Integers:
    """Return ``weight [N, K]`` as integers: those from which it was computed, if they can be found, else those of
    ``quantize``.

    An output layer (a weight with _HEAD times as many rows as columns) keeps eight bits, because its errors change
    tokens most."""
    if kind == "int4" and len(weight) > _HEAD * weight.shape[1]:
        kind = "int8"
    for bits, minima in ((8, False), (4, False), (4, True)):
        if bits == 8 or kind == "int4":
            found = _found(weight.detach(), bits, minima)
            if found is not None:
                return found
    return (of_products(weight) if kind == "int4" else None) or quantize(weight, kind)


def _found(weight: Tensor, bits: int, minima: bool) -> Integers | None:
    """Return the integers of a weight whose groups of 32 are as GGUF's Q8_0, Q4_0 and Q4_1 make them: multiples of a
    scale, of which the largest in a group is the last possible one. None if any number is not such a multiple, to the
    last bit."""
    if weight.shape[1] % _GROUP:
        return None
    for rows in (weight[:2], weight):  # two rows suffice to refuse most weights
        found = _on_grid(rows.float(), bits, minima)
        if found is None:
            return None
    return found


def _on_grid(weight: Tensor, bits: int, minima: bool) -> Integers | None:
    groups = weight.reshape(len(weight), -1, _GROUP)
    if minima:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales, zero = (high - low) / 15, low
    else:
        far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales, zero = (far / -8 if bits == 4 else far.abs() / 127), torch.zeros(())
    scales, lowest = or_one(scales).half(), zero.half()
    steps = scales.float()
    codes = ((groups - lowest.float()) / or_one(steps)).round_()
    if not torch.equal(codes * steps + lowest.float(), groups):
        return None
    if not minima:
        codes += ZERO[bits]
    if codes.amin() < 0 or codes.amax() >= 2**bits:
        return None
    least = lowest.squeeze(-1) if minima else None
    return Integers(codes.flatten(1).to(torch.uint8), scales.squeeze(-1), least, bits, _GROUP)


def of_known_scales(weight: Tensor, scales: Tensor, group: int) -> Integers | None:
    """Return ``weight [N, K]`` of any float dtype as ``scales [N, S]`` times integers, of four bits if these suffice.

    Returns None if a weight is not such a product, rounded to its dtype, or if the integers of a group are too far
    apart.
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


def of_products(weight: Tensor) -> Integers | None:
    """Return the integers of a float32 ``weight [N, K]`` whose groups of 32 are ``scale * code - minimum`` with 4-bit
    codes, as GGUF's Q4_K makes them: scale and minimum are a float16 number times a 6-bit one, so that each has 17
    bits.

    Returns None if any group is not so.
    """
    if weight.dtype is not torch.float32 or weight.shape[1] % _GROUP:
        return None
    groups = weight.detach().reshape(-1, _GROUP)
    few = 2 * weight.shape[1] // _GROUP  # two rows suffice to refuse most weights
    found = None if _of_spans(groups[:few]) is None else _of_spans(groups)
    if found is None:
        return None
    codes, scales, minima = found
    parts = weight.shape[1] // _GROUP
    return Integers(codes.view(weight.shape), scales.view(-1, parts), minima.view(-1, parts), 4, _GROUP)


def _of_spans(groups: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Map groups ``[G, 32]`` -> codes uint8 ``[G, 32]``, scales and minima ``[G, 1]``. The smallest and the largest
    number of a group are assumed to be 15 steps apart; where that doesn't fit, 14, and so on."""
    codes = torch.zeros(groups.shape, dtype=torch.uint8, device="cpu")
    scales, minima = torch.ones(len(groups), 1, device="cpu"), groups[:, :1].clone()
    left = (groups != minima).any(1).nonzero()[:, 0]
    for span in range(15, 0, -1):
        for shift in range(16 - span):
            if not len(left):
                return codes, scales, minima
            rest = groups[left]
            low, high = rest.amin(1, keepdim=True), rest.amax(1, keepdim=True)
            step = _of_17_bits((high - low) / span)
            least = low if shift == 0 else _of_17_bits(low - shift * step)
            steps = ((rest - low) / step).round_().add_(shift)
            fits = (steps * step + least == rest).all(1)
            done = left[fits]
            codes[done], scales[done], minima[done] = steps[fits].to(torch.uint8), step[fits], least[fits]
            left = left[~fits]
    return None if len(left) else (codes, scales, minima)


def _of_17_bits(x: Tensor) -> Tensor:
    """Return the nearest float32 whose last seven bits are zero."""
    return (x.view(torch.int32) + 0x40 & ~0x7F).view(torch.float32)


def in_one_layout(weights: Sequence[Integers]) -> list[Integers] | None:
    """Return the same weights in a form that can be packed together. None if some have eight bits and some four, some
    are rotated and some not, or their rows differ in length."""
    if len({weight.layout for weight in weights}) == 1:
        return list(weights)
    if len({(weight.depth, weight.bits, weight.rotated_from) for weight in weights}) > 1:
        return None
    group = math.gcd(*(weight.group for weight in weights))
    minima = any(weight.minima is not None for weight in weights)
    return [_laid_anew(weight, group, minima) for weight in weights]


def _laid_anew(weight: Integers, group: int, with_minima: bool) -> Integers:
    """Return the weight with smaller groups, and scales in float32."""
    parts, each = -(-weight.codes.shape[1] // group), weight.group // group
    scales = weight.scales.float()
    minima = weight.minima.float() if weight.minima is not None else -ZERO[weight.bits] * scales
    scales, minima = (x.repeat_interleave(each, 1)[:, :parts].contiguous() for x in (scales, minima))
    return replace(weight, scales=scales, minima=minima if with_minima else None, group=group)
