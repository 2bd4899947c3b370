"""One forward pass of a twin: packed tokens in, logits out, with the arguments that its class takes.

This file knows the arguments of transformers models. It knows nothing of what happens to the logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from paged_core import UnsupportedModel
from paged_hf.model.attention import UNDER_WAY, CountedAttend
from paged_hf.model.compiled import CompiledRoot
from paged_hf.model.embeds import Embeds
from paged_hf.model.shadow import Shadow
from paged_hf.model.state import state_outside_attention
from paged_hf.upstream import cache_in_result


class TwinCall:
    """Calls the twin of ``base``; ``embeds`` has the embeddings that ids above the vocabulary stand for."""

    def __init__(self, base: Any, shadow: Shadow, embeds: Embeds) -> None:
        self._base, self._shadow, self._embeds = base, shadow, embeds
        parameters = inspect.signature(type(base).forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.under_way: list[CountedAttend | None] = [None]  # where the twin's attention finds it
        shadow.give_all(UNDER_WAY, self.under_way)

    @torch.no_grad()
    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        step: CountedAttend | None,
        rows: Tensor | None = None,
        compiled: CompiledRoot | None = None,
    ) -> Tensor:
        """One forward pass of the twin over ``token_ids i64 [T]``: logits of ``rows``, or of all."""
        options: dict[str, Any] = {"attend": step} if step is not None and self._takes_kwargs else {}
        if self.takes_positions:
            options["position_ids"] = positions[None]
        if rows is not None and self._keeps_logits:
            options["logits_to_keep"] = rows
        self.under_way[0] = step
        try:
            output = self._run(token_ids, step, compiled, options)
        finally:
            self.under_way[0] = None  # its reference would keep the cache of a dropped engine alive
        logits: Tensor = output.logits[0]
        return logits if rows is None or self._keeps_logits else logits[rows]

    def _run(
        self, token_ids: Tensor, step: CountedAttend | None, compiled: CompiledRoot | None, options: dict[str, Any]
    ) -> Any:
        options |= {"attention_mask": None, "use_cache": False}
        if self._embeds.among(token_ids):
            embedding: nn.Module = self._shadow.twin_of(self._base.get_input_embeddings())
            return self._shadow.root(inputs_embeds=self._embeds.of(token_ids, embedding)[None], **options)
        if compiled is not None and step is not None:
            return compiled(step.rewind, input_ids=token_ids[None], **options)
        return self._shadow.root(input_ids=token_ids[None], **options)

    @torch.no_grad()
    def as_stock(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """``token_ids i64 [B,T], positions i64 [T] -> logits [B,T,vocab]``, over a cache that the model makes itself.

        Raises:
            UnsupportedModel: it keeps state outside attention.
        """
        options: dict[str, Any] = {"input_ids": token_ids, "attention_mask": None}
        if self.takes_positions:
            options["position_ids"] = positions.expand_as(token_ids)
        try:
            output = self._shadow.root(**options, use_cache=True)
        except Exception:  # if the cache is not the reason, the next call raises too
            output = self._shadow.root(**options, use_cache=False)
        place = state_outside_attention(cache_in_result(output))
        if place is not None:
            raise UnsupportedModel(f"{type(self._base).__name__} keeps state outside attention, in {place}")
        logits: Tensor = output.logits
        return logits
