"""ComparedCache: stock's cache with a paged cache beside it, given the same K/V. It tells whether both return the same.

The model gets stock's own K/V, so one run shows stock's answer, and whether the paged cache would have given the same
bits, which a comparison of logits could not tell. This file knows neither models nor loops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig

from paged_hf.cache.paged_cache import PagedCache, PagedLayer


class ComparedCache(DynamicCache):  # type: ignore[misc]
    """In place of ``DynamicCache(config=config)``, and the same for its user.

    Raises:
        UnsupportedModel: as ``PagedCache``.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers: list[Any]
        paged = PagedCache(config).layers
        self.layers = [
            _ComparedLayer(blocks) if isinstance(blocks, PagedLayer) else own
            for own, blocks in zip(self.layers, paged, strict=True)
        ]

    @property
    def same(self) -> bool:
        """Whether K/V were stored, and everything read so far is the same in the blocks."""
        compared = [layer for layer in self.layers if isinstance(layer, _ComparedLayer) and layer.is_initialized]
        return bool(compared) and all(layer.holds_the_same() for layer in compared)


class _ComparedLayer(DynamicLayer):  # type: ignore[misc]
    def __init__(self, blocks: PagedLayer) -> None:
        super().__init__()
        self._blocks = blocks
        self._same = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the paged layer's."""
        own: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        try:
            paged = self._blocks.update(key_states, value_states, *args, **kwargs)
            self._same &= all(map(_equal, own, paged))
        except Exception:  # the paged cache can't do what was asked, for any reason
            self._same = False
        return own

    def holds_the_same(self) -> bool:
        return (
            self._same
            and self.get_seq_length() == self._blocks.get_seq_length()
            and _equal(self.keys, self._blocks.keys)
            and _equal(self.values, self._blocks.values)
        )


def _equal(own: Tensor, paged: Tensor | None) -> bool:
    return (
        paged is not None
        and (own.shape, own.dtype, own.device) == (paged.shape, paged.dtype, paged.device)
        and (torch.equal(own, paged) or torch.allclose(own, paged, rtol=0.0, atol=0.0, equal_nan=True))
    )
