"""Attention as one torch operator, so that a model compiled by torch may call it.

If the compiler traced into ``attend``, it would find a step's plan there, and would have to compile for each step. The
operator hides the plan: the compiler sees tensors in, one tensor of a known shape out, and two integers that never
change, the layer's number and the engine's. K/V are written to memory that no compiled graph sees.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from paged_core.execution.model import Attend

_HANDLES = count(1)
_UNDER_HANDLE: WeakValueDictionary[int, AttendOp] = WeakValueDictionary()


class AttendOp:
    """``attend``, called through the operator. This object must live as long as the operator is called."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.handle = next(_HANDLES)
        _UNDER_HANDLE[self.handle] = self

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """``q [T,H,D], k [T,K,D], v [T,K,Dv], sinks [H], key_bias f32 [H,P] -> [T,H,Dv]``"""
        out: Tensor = torch.ops.paged_core.attend(q, k, v, sinks, key_bias, layer, self.handle)
        return out


@torch.library.custom_op("paged_core::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None, layer: int, handle: int
) -> Tensor:
    return _UNDER_HANDLE[handle].attend(layer, q, k, v, sinks, key_bias)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None, layer: int, handle: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
