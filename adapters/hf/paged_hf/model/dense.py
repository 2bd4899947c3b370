"""Attention over plain K/V lists, for the probe's few tokens: slow, dense and obviously correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_core import Attend, LayerSpec


class DenseAttend:
    """Keeps each sequence's K/V of each layer in one tensor. ``bind(lengths)`` gives the Attend of one step, whose
    tokens are those of the sequences one after another."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self.layers = layers
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, sequence) -> [K,L,D], [K,L,Dv]

    def bind(self, lengths: Sequence[int]) -> Attend:
        def attend(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            sinks: Tensor | None = None,
            key_bias: Tensor | None = None,
        ) -> Tensor:
            return self.run(lengths, layer, q, k, v, sinks, key_bias)

        return attend

    def run(
        self,
        lengths: Sequence[int],
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        parts = zip(*(torch.split(tensor, list(lengths)) for tensor in (q, k, v)), strict=True)
        out = []
        for sequence, (queries, keys, values) in enumerate(parts):
            keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # [K,T,D], [K,T,Dv]
            if (layer, sequence) in self._kv:
                old_keys, old_values = self._kv[layer, sequence]
                keys, values = torch.cat([old_keys, keys], dim=1), torch.cat([old_values, values], dim=1)
            self._kv[layer, sequence] = keys, values
            out.append(_attention(self.layers[layer], queries.transpose(0, 1), keys, values, sinks, key_bias))
        return torch.cat(out)  # [T,H,Dv]


def _attention(
    spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None
) -> Tensor:
    """The queries are the last T of L tokens: ``q [H,T,D], k [K,L,D], v [K,L,Dv] -> [T,H,Dv]``."""
    repeats = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(repeats, dim=0).float(), v.repeat_interleave(repeats, dim=0).float()
    scores = q.float() @ k.transpose(1, 2) * spec.scale  # [H,T,L]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    num_queries, num_keys = scores.shape[1:]
    if key_bias is not None:
        scores = scores + key_bias[:, None, :num_keys]
    key = torch.arange(num_keys, device=q.device)
    query = key[num_keys - num_queries :, None]
    hidden = key > query
    if spec.sliding_window is not None:
        hidden |= key <= query - spec.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, num_queries, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return (weights @ v).to(q.dtype).transpose(0, 1)
