"""Where transformers' attention meets paged_core's: functions in transformers' registry of implementations.

``attend`` is passed as a keyword argument of the forward pass. Some models' layers don't pass keyword arguments on; for
them each module of the twin also holds the current step. Only the names of the implementations are global, so two
engines in two threads never interfere.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from paged_core import Attend, KeyedAttend

PAGED = "paged_core"
PROBE = "paged_core_probe"
PROBE_WITH_MASKS = "paged_core_probe_with_masks"
UNDER_WAY = "_paged_core_step"  # attribute of every twin: a list with the CountedAttend of the current pass


class CountedAttend(KeyedAttend):
    """``attend`` for one forward pass: counts the calls, so that the n-th is layer n."""

    __slots__ = ("attend", "layer", "positions")

    def __init__(self, attend: Attend, positions: Tensor) -> None:
        self.attend = attend
        self.layer = 0
        self.positions = positions  # i64 [T], for models whose forward doesn't take them

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, facts: dict[str, Any]
    ) -> None:
        """Called for each attention call, with all its arguments, while the probe examines a model."""

    def replay_key(self) -> Hashable | None:
        """As AttentionBackend's, for the next layers."""
        key = KeyedAttend.of(self.attend).replay_key()
        return None if key is None else (self.layer, key)

    def skip(self, num_layers: int) -> None:
        """Count layers whose launches were repeated without a call."""
        self.layer += num_layers

    def rewind(self) -> None:
        """The forward pass starts again."""
        self.layer = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        """``q [T,H,D], k [T,K,D], v [T,K,Dv], sinks [H], key_bias f32 [H,P] -> [T,H,Dv]``"""
        layer = self.layer
        self.layer = layer + 1
        if key_bias is None:
            return self.attend(layer, q, k, v, sinks)
        return self.attend(layer, q, k, v, sinks, key_bias)


def _paged_attention(
    module: nn.Module,
    query: Tensor,  # [1,H,T,D]
    key: Tensor,  # [1,K,T,D]
    value: Tensor,  # [1,K,T,Dv]
    attention_mask: Tensor | None,
    attend: CountedAttend | None = None,
    s_aux: Tensor | None = None,  # [H]
    key_bias: Tensor | None = None,  # f32 [H,P]
    **facts: Any,  # checked by the probe when it examined the model
) -> tuple[Tensor, None]:
    if attend is None:
        attend = getattr(module, UNDER_WAY)[0]
    out = attend(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), s_aux, key_bias
    )  # [T,H,Dv]
    return out.unsqueeze(0), None


def _probing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: Any = None,
    **facts: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        attend = getattr(module, UNDER_WAY)[0]
    attend.record(module, query, key, value, attention_mask, facts)
    return _paged_attention(module, query, key, value, None, attend, facts.get("s_aux"), facts.get("key_bias"))


def attend_through(
    step: CountedAttend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    **facts: Any,
) -> Tensor:
    """For modules that don't ask the registry: ``query [1,H,T,D], key [1,K,T,D], value [1,K,T,Dv] -> [1,T,H,Dv]``."""
    return _probing_attention(module, query, key, value, mask, step, **facts)[0]


def _mask_with_its_rule(q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
    """An empty mask that carries the rule from which a real mask would have been made."""
    mask = torch.zeros(1, 1, q_length, kv_length, dtype=torch.bool)
    mask.rule = mask_function  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(PAGED, _paged_attention)  # no mask function has this name, so no mask is built
AttentionInterface.register(PROBE, _probing_attention)
AttentionInterface.register(PROBE_WITH_MASKS, _probing_attention)
AttentionMaskInterface.register(PROBE_WITH_MASKS, _mask_with_its_rule)
