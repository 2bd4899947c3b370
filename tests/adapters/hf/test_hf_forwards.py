"""Whole decoder layers stood for by the core's own forward: the same answers, whatever is done to the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paged_core import Engine, EngineConfig
from paged_hf.model.paged_model import HFPagedModel
from rounded_parity import HALVES, assert_rows


def fast_engine(model: Any) -> Engine:
    return Engine(model, EngineConfig(num_blocks=96, max_num_seqs=4, max_num_batched_tokens=11))


def layers_stood_for(paged_model: HFPagedModel) -> int:
    return sum(type(forward).__name__ == "DecoderLayer" for forward in paged_model.fast_forwards.values())


@pytest.mark.parametrize(
    ("family", "own", "num_layers"),
    [
        ("llama", {}, 2),
        ("mistral", {}, 2),
        ("qwen2", {}, 2),
        ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
        ("gemma2", {}, 0),  # four norms a layer
        ("qwen3", {}, 0),  # norms inside its attention
        ("mixtral", {}, 0),
    ],
)
def test_a_layer_made_as_llamas_are_is_stood_for_and_others_are_not(
    family: str, own: dict[str, Any], num_layers: int, tiny: Any, stock: Any, paged: Any, prompts: Any
) -> None:
    model = tiny(family, **own)
    taken = HFPagedModel(model)
    tokens = paged(fast_engine(taken), prompts, 12)
    assert layers_stood_for(taken) == num_layers
    assert tokens == stock(model, prompts, 12)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_layers_of_bfloat16_are_stood_for_too_and_differ_by_rounding(
    family: str, tiny: Any, paged: Any, prompts: Any
) -> None:
    model = tiny(family).bfloat16()
    taken = HFPagedModel(model)
    tokens = paged(fast_engine(taken), prompts, 12)
    assert layers_stood_for(taken) == 2
    assert assert_rows(model, prompts, tokens, max_new_tokens=12) >= 12


@pytest.mark.parametrize("dtype", HALVES)
def test_changed_weights_of_16_bits_are_in_the_next_answer(dtype: str, tiny: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama").to(HALVES[dtype])
    engine = fast_engine(model)
    assert assert_rows(model, prompts, paged(engine, prompts, 9), max_new_tokens=9) >= 9
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(-1.5)
    assert assert_rows(model, prompts, paged(engine, prompts, 9), max_new_tokens=9) >= 9


def test_changed_weights_are_in_the_next_answer(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    taken = HFPagedModel(model)
    engine = fast_engine(taken)
    before = paged(engine, prompts, 12)
    layer = model.model.layers[1]
    for change in (
        lambda: layer.self_attn.o_proj.weight.data.mul_(-1.5),
        lambda: layer.post_attention_layernorm.weight.data.add_(0.7),
        lambda: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(layer.mlp.up_proj.weight * -1)),
    ):
        change()
        after = paged(engine, prompts, 12)
        assert after == stock(model, prompts, 12)
        assert after != before
        before = after
    assert layers_stood_for(taken) == 2


def test_a_buffer_of_a_layer_of_ones_own_is_honoured(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    layer = model.model.layers[1]
    kind = type(layer)
    layer.__class__ = type("Scaled", (kind,), {
        "forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs) * self.gain})  # fmt: skip
    layer.register_buffer("gain", torch.ones(1))
    engine = fast_engine(model)
    before = paged(engine, prompts, 12)
    layer.gain.mul_(-3)
    after = stock(model, prompts, 12)
    assert after != before
    assert paged(engine, prompts, 12) == after


def test_a_hook_put_on_a_part_of_a_layer_is_called_again(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    engine = fast_engine(model)
    paged(engine, prompts, 3)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * -2)
    assert paged(engine, prompts, 12) == stock(model, prompts, 12)
    handle.remove()
    assert paged(engine, prompts, 12) == stock(model, prompts, 12)


def test_a_second_engine_over_one_paged_model_notices_edits_too(
    tiny: Any, stock: Any, paged: Any, prompts: Any
) -> None:
    model = tiny("llama")
    taken = HFPagedModel(model)
    paged(fast_engine(taken), prompts, 3)
    second = fast_engine(taken)
    paged(second, prompts, 3)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(-2)
    assert paged(second, prompts, 12) == stock(model, prompts, 12)


def test_torchs_default_dtype_does_not_reach_the_kernels(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    expected = stock(model, prompts, 12)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert paged(fast_engine(model), prompts, 12) == expected
    finally:
        torch.set_default_dtype(torch.float32)
