"""Weights and modules change between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
)

from paged_hf import paged_generate
from patched_calls import GREEDY, MODES, agrees, prompts, resize

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**prompts(3), labels=prompts(3)["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _load(model: Any) -> None:
    model.load_state_dict({name: weight.roll(1, 0) for name, weight in model.state_dict().items()})


def _edit_data(model: Any) -> None:
    for weight in model.parameters():
        weight.data.mul_(torch.linspace(0.5, 2, weight.shape[-1]))


def _replace_data(model: Any) -> None:
    for weight in model.parameters():
        weight.data = weight.data.roll(1, 0)


def _replace_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(3, 0))


def _tie(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.model.embed_tokens.weight = model.lm_head.weight


def _new_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: -forward(hidden)


def _new_module(model: Any) -> None:
    torch.manual_seed(2)
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(48, 32), nn.Tanh())


def _config(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 1.7


def _fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": _step,
    "load_state_dict": _load,
    "edits through data": _edit_data,
    "data replaced": _replace_data,
    "a parameter replaced": _replace_parameter,
    "tied": _tie,
    "embeddings resized": resize,
    "a forward replaced": _new_forward,
    "a module replaced": _new_module,
    "an attribute set": _config,
    "a layer removed": _fewer_layers,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_honours(model: Any, change: str) -> None:
    before = agrees(model)
    CHANGES[change](model)
    tier = "cache" if change == "a forward replaced" else "native"
    assert agrees(model, tier) != before, "the change changes nothing: it proves nothing"


def test_a_model_goes_to_another_dtype_and_back(model: Any) -> None:
    before = agrees(model)
    for there in (model.bfloat16, model.half, model.double):
        there()
        got = model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert model.generate.last_report().tier == "native"
        expected = model.generate.stock(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert got.logits[0].dtype == expected.logits[0].dtype
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=0.05, atol=0.1)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    model.float().load_state_dict(weights)
    assert len(agrees(model)) == len(before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_mode_without_dropout_is_native_and_with_dropout_is_stocks(make: Any, kind: str) -> None:
    for dropout, tier in ((0.0, "native"), (0.5, "stock")):
        names = ("attention_dropout",) if kind == "llama" else ("attn_pdrop", "resid_pdrop", "embd_pdrop")
        model = make(kind, **dict.fromkeys(names, dropout))
        model.generate = paged_generate(model, check=False)
        agrees(model)
        model.train()
        for options in MODES.values():
            answers = []
            for generate in (model.generate, model.generate.stock):
                torch.manual_seed(0)
                answers.append(generate(**prompts(), **GREEDY, **options))
            assert torch.equal(*answers)
        assert model.training
        model.generate(**prompts(), **GREEDY)
        assert model.generate.last_report().tier == tier
        model.eval()
        agrees(model)
        next(model.children()).train()  # one part of it only
        model.generate(**prompts(), **GREEDY)
        assert model.generate.last_report().tier == tier


def _checkpointing(model: Any, what: str) -> None:
    name = next(f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient")
                if hasattr(model, f"{kind}_checkpointing_{what}"))  # fmt: skip
    getattr(model, name)()


def test_gradient_checkpointing_and_frozen_weights_change_nothing(model: Any) -> None:
    before = agrees(model)
    _checkpointing(model, "enable")
    assert agrees(model) == before
    model.train()
    options = {**prompts(), **GREEDY}
    got = model.generate(**options)
    assert "checkpointing" in model.generate.last_report().reason
    assert torch.equal(got, model.generate.stock(**options))
    model.eval()
    _checkpointing(model, "disable")
    model.requires_grad_(False)
    assert agrees(model) == before
    model.requires_grad_(True)
    assert agrees(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_and_gradients_are_left_alone(model: Any, mode: Any) -> None:
    model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    def fails(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("mine")

    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        agrees(model)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        with pytest.raises(KeyError):
            model.generate(**prompts(), **GREEDY, logits_processor=LogitsProcessorList([fails]))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, before[name]) and weight.requires_grad and not weight.is_inference()
    model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    assert torch.allclose(model.lm_head.weight.grad, 2 * before["lm_head.weight"])
    agrees(model)


def test_forward_hooks_see_stocks_shapes_as_long_as_they_are_there(model: Any) -> None:
    before = agrees(model)
    layer = model.model.layers[1]
    shapes: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        shapes.append((args[0].shape, module is layer))

    handle = layer.register_forward_hook(note)
    for options in MODES.values():
        model.generate.stock(**prompts(), **GREEDY, **options)
        expected, shapes[:] = list(shapes), []
        model.generate(**prompts(), **GREEDY, **options)
        assert shapes == expected
        shapes.clear()
    handle.remove()
    assert agrees(model) == before
    change = layer.mlp.register_forward_hook(lambda module, args, output: -output)
    assert agrees(model, "cache") != before
    change.remove()
    steer = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    assert agrees(model, "cache") != before
    steer.remove()
    assert agrees(model) == before


def test_hidden_states_asked_for_once_keep_no_later_call_from_the_engine(model: Any) -> None:
    before = agrees(model)
    model(**prompts(), output_hidden_states=True, output_attentions=True)
    assert agrees(model) == before


def test_another_attention_implementation_is_honoured(model: Any) -> None:
    before = agrees(model)
    model.set_attn_implementation("eager")
    assert agrees(model) == before
    model.set_attn_implementation("sdpa")
    assert agrees(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_under_autocast_stocks_loop_computes(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        expected = model.generate.stock(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert model.generate.last_report().tier == "cache"
        assert "autocast" in model.generate.last_report().reason
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=0.05, atol=0.05)
    with torch.autocast("cpu", enabled=False):
        agrees(model)


def test_torchs_defaults_are_honoured_and_left_alone(model: Any) -> None:
    before = agrees(model)
    torch.set_default_dtype(torch.float64)
    try:
        model.generate.tiers.host.drop()
        assert agrees(model) == before
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        assert agrees(model) == before
    given = {**prompts(), **GREEDY}
    with torch.device("meta"):
        got = model.generate(**given)
        expected = model.generate.stock(**given)
    assert torch.equal(got, expected)
