"""A model that its user changes between two requests: the next answer is the changed model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paged_core import EngineDeadError
from paged_hf.model.paged_model import HFPagedModel


def _add_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)


def _edit_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data *= 1.5


def _assign_parameter(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.gate_proj.weight * 2)


def _load_state_dict(model: Any) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def _merge_lora(model: Any) -> None:
    linear = model.model.layers[1].self_attn.v_proj
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 48, generator=generator), torch.randn(32, 4, generator=generator)
    linear.weight.data += b @ a * 0.2


def _wrap_in_lora(model: Any) -> None:
    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(5)
    model.model.layers[1].self_attn.v_proj = Lora(model.model.layers[1].self_attn.v_proj)


@pytest.mark.parametrize(
    "change", [_add_in_place, _edit_data, _assign_parameter, _load_state_dict, _merge_lora, _wrap_in_lora]
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_change_of_the_model_is_in_the_next_answer(
    change: Any, accelerated: bool, tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    model = tiny("llama")
    running = engine(HFPagedModel(model), fast_forwards=accelerated)
    before = paged(running, prompts, 8)
    change(model)
    expected = stock(model, prompts, 8)
    assert expected != before
    assert paged(running, prompts, 8) == expected


def _edit_a_row_of_the_head(model: Any) -> None:
    model.lm_head.weight.data[8] += 9


def _edit_a_row_of_the_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[7] -= 2


def _edit_a_row_of_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[5] += 3


def _edit_a_column_of_a_layer(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.data[:, 5] += 3


@pytest.mark.parametrize(
    "change", [_edit_a_row_of_the_head, _edit_a_row_of_the_embedding, _edit_a_row_of_a_layer, _edit_a_column_of_a_layer]
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_row_or_column_written_through_data_is_in_the_next_answer(
    change: Any, accelerated: bool, tiny: Any, stock: Any, paged: Any, engine: Any
) -> None:
    prompts = [[3, 7, 3, 9, 11, 3, 7, 12, 3, 40]]
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    running = engine(HFPagedModel(model), fast_forwards=accelerated)
    before = paged(running, prompts, 12)
    change(model)
    expected = stock(model, prompts, 12)
    assert expected != before
    assert paged(running, prompts, 12) == expected


def test_a_change_is_not_forgotten_when_catching_up_with_it_fails(
    tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any, monkeypatch: Any
) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    running = engine(paged_model)
    paged(running, prompts, 8)
    _edit_data(model)
    monkeypatch.setattr(paged_model.fast_forwards, "create", _out_of_memory)
    with pytest.raises(MemoryError):
        paged_model.refresh()
    monkeypatch.undo()
    assert paged(running, prompts, 8) == stock(model, prompts, 8)


def _out_of_memory(module: nn.Module) -> Any:
    raise MemoryError


def test_refresh_says_whether_anything_changed(tiny: Any) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    assert not paged_model.refresh()
    _edit_data(model)
    assert paged_model.refresh()
    assert not paged_model.refresh()


def test_a_model_cast_to_another_dtype_needs_a_new_engine(tiny: Any, engine: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    running = engine(model)
    paged(running, prompts, 2)
    model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="bfloat16"):
            running.add_request("late", prompts[0])
    model.to(torch.float32)
    assert paged(running, prompts, 2)
