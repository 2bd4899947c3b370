"""The model of an episode, in float64, so that rounding is too small to change a token in any batch.

So rows can be compared token by token. For some (token, position) pairs it always raises or computes NaN; those faults
belong to the request. All other faults are injected from outside, and pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paged_kernels import reference
from tiny_model import HEAD_DIM, HEADS, KV_HEADS, TinyModel

_FATES = 997
_RAISES, _IS_NAN = 0, 1


@dataclass(frozen=True)
class Kind:
    """The facts that a row's answer depends on, besides the request itself and the present weights."""

    windows: tuple[int | None, ...]  # of each layer, at most two
    kv_dtype: str | None


class FuzzModel(TinyModel):
    """A model whose engine asks whether its weights have changed."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        layers = tuple(replace(self.spec.layers[0], sliding_window=window) for window in kind.windows)
        self.spec = replace(self.spec, layers=layers, dtype=torch.float64)
        self._kv_dtype = getattr(torch, kind.kv_dtype) if kind.kv_dtype else None
        self.weights = 0  # which of two sets of weights
        self._changed = False
        self._matrices = [_matrices(TinyModel(seed)) for seed in (0, 1)]
        self.use_weights(0)
        self.room: int | None = None  # tokens of a step for which there is memory
        self.num_raising = 0  # how many of the next calls of forward raise
        self.num_nan = 0  # how many of the next calls compute NaN in the first row of logits
        self.num_nan_kv = 0  # how many of the next calls compute NaN for their first token, K/V included

    def use_weights(self, which: int) -> None:
        self._changed |= which != self.weights
        self.weights = which
        self.embed, self.place, self.unembed, self.qkv, self.out = self._matrices[which]

    def accelerate(self, create):
        return 0

    def refresh(self) -> bool:
        changed, self._changed = self._changed, False
        return changed

    def forward(self, token_ids, positions, attend, sample_indices):
        if self.room is not None and len(token_ids) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(token_ids)} tokens")
        if self.num_raising:
            self.num_raising -= 1
            raise RuntimeError("for a moment")
        fates = self.fates(token_ids, positions)
        if (fates == _RAISES).any():
            raise ValueError("a token that it can't take")
        is_nan = fates == _IS_NAN
        if self.num_nan_kv:
            self.num_nan_kv -= 1
            is_nan[0] = True
        logits = self._forward(token_ids, positions, attend, sample_indices, is_nan)
        if self.num_nan and len(logits):
            self.num_nan -= 1
            logits[0] = float("nan")
        return logits

    def fates(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return (token_ids * 31 + positions * 17 + self.weights * 5) % _FATES

    def _forward(self, token_ids, positions, attend, sample_indices, is_nan):
        x = self.embed[token_ids] + self.place[positions]  # [T, hidden]
        x[is_nan] = float("nan")
        for i in range(len(self.spec.layers)):
            heads = (x @ self.qkv[i]).view(len(x), -1, HEAD_DIM)
            q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
            x = x + 2 * torch.tanh(attend(i, q, k, v).reshape(len(x), -1) @ self.out[i])
        return x[sample_indices] @ self.unembed.T

    # ---- without engine and cache ---------------------------------------------------------------------------------

    def next_token(self, tokens: list[int]) -> int | None:
        """Return the most likely token after ``tokens``, by computing all of them; None: there is none."""
        logits = self._by_itself(tokens, self.dense)
        return None if logits is None else int(logits[0].argmax())

    def keys_and_values(self, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's ``(k f64 [K,n,D], v f64 [K,n,D])`` as a cache should hold them, or nothing if they can't
        be computed."""
        found: list[tuple[Tensor, Tensor]] = []

        def attend(layer, q, k, v):
            found.append((self._rounded(k).transpose(0, 1), self._rounded(v).transpose(0, 1)))
            return self.dense(layer, q, k, v)

        self._by_itself(tokens, attend)
        return found

    def _by_itself(self, tokens: list[int], attend) -> Tensor | None:
        token_ids, positions = torch.tensor(tokens), torch.arange(len(tokens))
        fates = self.fates(token_ids, positions)
        if (fates <= _IS_NAN).any():
            return None
        return self._forward(token_ids, positions, attend, positions[-1:], fates == _IS_NAN)

    def dense(self, layer, q, k, v, sinks=None):
        return super().dense(layer, q, self._rounded(k), self._rounded(v), sinks)

    def _rounded(self, x: Tensor) -> Tensor:
        if self._kv_dtype is None:
            return x
        codes, scale = reference.quantize(x, self._kv_dtype)
        return (codes.float() * scale[..., None]).double()


def _matrices(model: TinyModel):
    one = (model.embed.double(), model.place.double(), model.unembed.double())
    return (*one, [m.double() for m in model.qkv], [m.double() for m in model.out])
