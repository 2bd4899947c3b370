"""LayerCache and Extras: a layer's K/V and the facts of its attention, as arguments of launchers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's K/V in blocks. Caches of int8 or float8_e4m3fn come with a scale for each token and kv head."""

    keys: Tensor  # [blocks, K, bs, D]
    values: Tensor  # [blocks, K, bs, Dv]
    key_scales: Tensor | None = None  # f32 [blocks, K, bs]
    value_scales: Tensor | None = None  # the same


class Extras(NamedTuple):
    """The parts of a layer's attention beyond softmax(q·k) v."""

    scale: float  # factor of q·k
    sliding_window: int | None = None  # a query at position p sees the keys at p - window < key <= p
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # [H]: another logit of each head, which takes a share of the softmax and adds no value
    key_bias: Tensor | None = None  # f32 [H, P], P at least any sequence: added to scores after softcap (ALiBi)
