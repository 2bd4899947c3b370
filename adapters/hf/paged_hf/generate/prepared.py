"""Prepared: a generate() call as stock has prepared it for one of its decoding loops.

Stock has merged the configuration, validated it, built processors and criteria, and expanded rows to beams. Nothing
here decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from paged_hf import upstream
from paged_hf.model.intercepted import modules_of

_LOOP_ARGUMENTS = ("synced_gpus", "streamer", "tokenizer", "assistant_tokenizer")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One call of stock's decoding loop."""

    model: Any  # a transformers model: the user's, whose forward is to answer
    name: str  # of the loop
    loop: Callable[..., Any]  # stock's own: loop(model, input_ids, logits_processor=..., ...)
    input_ids: Tensor  # i64 [B,L], padded
    processors: Any  # LogitsProcessorList
    criteria: Any  # StoppingCriteriaList
    config: Any  # the call's GenerationConfig, resolved
    rest: Mapping[str, Any]  # what goes to the model, and more arguments of the loop

    def run(self, model: Any, *, criteria: Any = None, cache: Any = None) -> Any:
        """What stock's loop returns on ``model``; with other ``criteria`` or another ``cache`` than those prepared."""
        return self.loop(
            model,
            self.input_ids,
            logits_processor=self.processors,
            stopping_criteria=self.criteria if criteria is None else criteria,
            generation_config=self.config,
            **(self.rest if cache is None else upstream.with_cache(self.rest, cache)),
        )

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    @cached_property
    def cache(self) -> Any:
        """The K/V cache that stock has prepared, or the caller's; None if there is none."""
        return upstream.cache_in(self.rest)

    @property
    def uses_cache(self) -> bool:
        return bool(self.rest.get("use_cache", True))

    @property
    def returns_cache(self) -> bool:
        return bool(self.config.return_dict_in_generate) and self.uses_cache

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What is passed to the model, except token ids, the cache, and values that are None."""
        rest = upstream.without_cache(self.rest)
        return {name: value for name, value in rest.items() if name not in _LOOP_ARGUMENTS and _given(value)}

    @property
    def embeds(self) -> Tensor | None:
        """``[B,L,hidden]``"""
        return self.rest.get("inputs_embeds")

    @property
    def prompts(self) -> Tensor:
        """The embeddings, or else the token ids."""
        return self.input_ids if self.embeds is None else self.embeds

    @property
    def mask(self) -> Tensor | None:
        """``[B,L]`` as the prompts, unless the caller passed another shape."""
        return self.rest.get("attention_mask")

    @property
    def positions(self) -> Tensor | None:
        return self.rest.get("position_ids")

    @cached_property
    def hidden(self) -> Tensor | None:
        """``bool [B,L]``: where the mask isn't 1; None: it is everywhere."""
        if self.mask is None:
            return None
        hidden = self.mask != 1
        return hidden if bool(hidden.any()) else None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is: the same as ``model.device``, but faster."""
        first = (weight for module in self.modules for weight in module._parameters.values() if weight is not None)
        found = next(first, None)
        return self.input_ids.device if found is None else found.device

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules of the model. A module in two places may come twice."""
        return modules_of(self.model)


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not value)
