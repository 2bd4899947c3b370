"""What happens to a score between q·k and the softmax, in base 2. It is the same for one query and for many."""

from __future__ import annotations

from numba import float32

from paged_kernels.cpu.exponents import vtanh
from paged_kernels.cpu.intrinsics import LANES, inline
from paged_kernels.cpu.memory import vload
from paged_kernels.cpu.sums import LOG2E, NOTHING
from paged_kernels.cpu.vectors import lane_numbers, vfma, vmul, vselect_less, vsplat


@inline
def cap(scores, softcap):
    """Return softcap * tanh(scores / softcap), for scores in base 2."""
    inner = vmul(scores, vsplat(float32(1.0) / (softcap * float32(LOG2E))))
    return vmul(vtanh(inner), vsplat(softcap * float32(LOG2E)))


@inline
def biased(scores, bias):
    """Return scores in base 2 plus their bias."""
    return vfma(bias, vsplat(float32(LOG2E)), scores)


@inline
def bias_of(args, query_head):
    """Return the address of a head's bias."""
    return args.key_bias + 4 * query_head * args.bias_stride


@inline
def capped_and_biased(args, scores, bias, tile, i):
    """Return a vector of one row's scores in base 2, from key number ``i`` of the tile on. ``bias``: an address, or
    0."""
    if args.softcap != 0.0:
        scores = cap(scores, args.softcap)
    if bias != 0:
        scores = biased(scores, vload(bias, tile + i))
    return scores


@inline
def as_seen(scores, i, low, high):
    """Return the scores, with NOTHING for keys before ``low`` and from ``high`` on."""
    if i + LANES > high:
        scores = vselect_less(lane_numbers(), vsplat(float32(high - i)), scores, vsplat(NOTHING))
    if i < low:
        scores = vselect_less(lane_numbers(), vsplat(float32(low - i)), vsplat(NOTHING), scores)
    return scores
