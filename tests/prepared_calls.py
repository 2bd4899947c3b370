"""Calls as stock prepares them for its decoding loop, and changes to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from paged_hf import upstream
from paged_hf.generate import loops
from paged_hf.generate.prepared import Prepared

IDS = torch.tensor([[7, 8, 9], [4, 5, 6]])
Change = Callable[[Prepared], Prepared]


class Recorder:
    """Answers as stock does, and keeps the calls."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[Prepared] = []

    def answer(self, call: Prepared) -> Any:
        self.calls.append(call)
        return call.run(call.model)


def prepared(model: Any, **options: Any) -> Prepared:
    recorder = Recorder(model)
    seen = loops.twin(model, recorder)
    type(seen).generate(seen, IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, pad_token_id=0, **options)
    return replace(recorder.calls[0], rest=upstream.with_cache(recorder.calls[0].rest, DynamicCache()))


def passing(**inputs: Any) -> Change:
    return lambda call: replace(call, rest={**call.rest, **inputs})


def configured(**settings: Any) -> Change:
    def change(call: Prepared) -> Prepared:
        config = copy.deepcopy(call.config)
        for name, value in settings.items():
            setattr(config, name, value)
        return replace(call, config=config)

    return change


def named(loop: str, **inputs: Any) -> Change:
    return lambda call: passing(**inputs)(replace(call, name=loop))


def of_model(change: Callable[[Any], Any]) -> Change:
    def changed(call: Prepared) -> Prepared:
        model = copy.deepcopy(call.model)
        change(model)
        return replace(call, model=model)

    return changed


def over(cache: Callable[[Any], Any]) -> Change:
    return lambda call: replace(call, rest=upstream.with_cache(call.rest, cache(call.model.config)))


def full_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.update(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), 0)
    return cache


def of_a_class_of_its_own(model: Any) -> None:
    own = {"prepare_inputs_for_generation": lambda self, *args, **kwargs: {}}
    model.__class__ = type("Own", (type(model),), own)


def masked(*rows: list[int]) -> Change:
    return passing(attention_mask=torch.tensor(rows))


def padded_with(token: int) -> Change:
    def change(call: Prepared) -> Prepared:
        return masked([0, 1, 1], [1, 1, 1])(replace(call, input_ids=torch.tensor([[token, 8, 9], [4, 5, 6]])))

    return change
