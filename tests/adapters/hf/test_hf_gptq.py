"""Models of GPTQ and AWQ: their codes are read from the words that they are packed in, and nothing is rounded anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gptq_layers import awq_layer, gptq_layer, replace_linears
from paged_core import ConfigError, Engine, EngineConfig
from paged_core.builtin.forwards import create_module_forward
from paged_core.builtin.prequantized import integers_in
from paged_hf.model.paged_model import HFPagedModel

SIZES: dict[str, Any] = {"num_blocks": 32, "block_size": 8}
FORMS = {
    "gptq": lambda linear: gptq_layer(linear, 4, 32, first_version=True),
    "gptq, its second version": lambda linear: gptq_layer(linear, 4, 64, first_version=False),
    "gptq in eight bits": lambda linear: gptq_layer(linear, 8, 128, first_version=False),
    "awq": lambda linear: awq_layer(linear, 64),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("columns", [64, 96])
def test_codes_are_read_to_the_last_bit(form: str, columns: int) -> None:
    torch.manual_seed(3)
    layer = FORMS[form](nn.Linear(128, columns, bias=False))
    found = integers_in(layer)
    assert found is not None and found.bits == layer.bits
    assert torch.equal(found.widened().half(), layer._dense)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_of_them_runs_on_the_products_of_integers(form: str, dtype: torch.dtype, tiny: Any) -> None:
    model = replace_linears(tiny("llama", hidden_size=128, intermediate_size=128).to(dtype), FORMS[form])
    ids = torch.arange(5, 25)

    def logits(taken: HFPagedModel) -> torch.Tensor:
        return taken.forward(ids, ids, lambda layer, q, k, v, sinks=None: q, ids - 5).float()

    taken = HFPagedModel(model)
    plain = logits(taken)
    config = EngineConfig(weights="int8")  # for the head, which is plain
    taken.accelerate(lambda module: create_module_forward(module, torch.device("cpu"), config))
    names = [type(twin).__name__ for twin, forward in taken.fast_forwards.items() if forward.quantized]
    assert names.count("LlamaDecoderLayer") == 2 or (dtype is torch.float16 and names.count("PackedLayer") == 8)
    assert 1e-4 < float((logits(taken) - plain).norm() / plain.norm()) < 0.04


def test_inputs_grouped_in_another_order_run_as_they_do_without(tiny: Any, caplog: Any) -> None:
    model = replace_linears(
        tiny("llama", hidden_size=64, intermediate_size=128), lambda layer: gptq_layer(layer, 4, 32, False, True)
    )
    with caplog.at_level("WARNING", "paged_core"):
        Engine(model, EngineConfig(weights="int4", **SIZES))
    assert caplog.text.count("14 linear layers run as they are") == 1


def test_a_layer_that_computes_something_else_is_left_alone(tiny: Any) -> None:
    layer = FORMS["awq"](nn.Linear(128, 64, bias=False))
    layer._dense = layer._dense.flip(1)
    assert integers_in(layer) is None
    model = nn.Sequential(layer)
    assert create_module_forward(model[0], torch.device("cpu"), EngineConfig(weights="int4")) is None


def test_nothing_is_taken_that_was_not_asked_for(tiny: Any, paged: Any, stock: Any, prompts: Any) -> None:
    model = replace_linears(tiny("llama", hidden_size=64, intermediate_size=128), FORMS["gptq"])
    assert paged(Engine(model, EngineConfig(**SIZES)), prompts, 8) == stock(model, prompts, 8)
    with pytest.raises(ConfigError, match="no layer of this model"):
        Engine(replace_linears(tiny("gpt2").half(), FORMS["gptq"]), EngineConfig(weights="int8", **SIZES))
