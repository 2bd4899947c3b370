"""Which models have all their layers stood for at once: those that do nothing else with their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from paged_core.builtin.decoder_stack import decoder_stack_forward


def run(
    self: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Any = None, use_cache: Any = None, **named: Any
) -> Any:
    x = self.embed_tokens(input_ids)
    rotation = self.rotary_emb(x, position_ids=position_ids)
    for layer in self.layers:
        x = layer(x, position_embeddings=rotation, **named)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


def sums_up(self: Any, input_ids: Tensor, position_ids: Tensor, **named: Any) -> Any:
    x = total = self.embed_tokens(input_ids)
    rotation = self.rotary_emb(x, position_ids=position_ids)
    for layer in self.layers:
        x = layer(x, position_embeddings=rotation, **named)
        total = total + x
    return BaseModelOutputWithPast(last_hidden_state=self.norm(total))


def leaves_one_out(self: Any, input_ids: Tensor, position_ids: Tensor, **named: Any) -> Any:
    x = self.embed_tokens(input_ids)
    rotation = self.rotary_emb(x, position_ids=position_ids)
    for layer in self.layers[:-1]:
        x = layer(x, position_embeddings=rotation, **named)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


def turns_less_and_less(self: Any, input_ids: Tensor, position_ids: Tensor, **named: Any) -> Any:
    x = self.embed_tokens(input_ids)
    for number, layer in enumerate(self.layers):
        rotation = self.rotary_emb(x, position_ids=position_ids // (number + 1))
        x = layer(x, position_embeddings=rotation, **named)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


def scales(self: Any, *args: Any, **named: Any) -> Any:
    result = run(self, *args, **named)
    result.last_hidden_state = result.last_hidden_state * 2
    return result


def tells_more(self: Any, *args: Any, **named: Any) -> Any:
    result = run(self, *args, **named)
    result.hidden_states = (result.last_hidden_state,)
    return result


def asks_for_a_mask(self: Any, *args: Any, **named: Any) -> Any:
    return run(self, *args, **named, mask=torch.ones(1))


def model_with(forward: Any, tiny: Any) -> Any:
    model = tiny("llama").model
    model.__class__ = type("Variant", (LlamaModel,), {"forward": forward})
    return model


@pytest.mark.parametrize("forward", [sums_up, leaves_one_out, turns_less_and_less, scales, tells_more, asks_for_a_mask])
def test_a_model_that_does_something_else_is_left_alone(forward: Any, tiny: Any) -> None:
    assert decoder_stack_forward(model_with(forward, tiny)) is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "qwen3"])
def test_a_model_that_does_nothing_else_is_stood_for(name: str, tiny: Any) -> None:
    assert decoder_stack_forward(tiny(name).model) is not None


def test_a_forward_that_is_replaced_is_seen(tiny: Any) -> None:
    model = model_with(run, tiny)
    ours = decoder_stack_forward(model)
    assert ours is not None and not ours.stale()
    type(model).forward = sums_up
    assert ours.stale()


def test_the_model_s_layers_are_as_they_were(tiny: Any) -> None:
    model = tiny("llama")
    layers, state = list(model.model.layers), {name: each.clone() for name, each in model.state_dict().items()}
    assert decoder_stack_forward(model.model) is not None
    assert list(model.model.layers) == layers
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
