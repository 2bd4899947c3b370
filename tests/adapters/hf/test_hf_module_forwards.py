"""Faster forwards that plugins bring for a model's modules: the engine's own steps use them, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paged_hf.model.paged_model import HFPagedModel


class _PackedLinear:
    """Stands in for a linear: keeps its own copy of the weight, as a packed one would."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.weight, self.calls = module, module.weight.detach().clone(), 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.module.bias)

    def stale(self) -> bool:
        return not torch.equal(self.weight, self.module.weight)


def test_faster_forwards_are_used_by_the_engine_only(tiny: Any, paged: Any, stock: Any, prompts: Any) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    made: list[_PackedLinear] = []

    def create(module: nn.Module) -> _PackedLinear | None:
        if type(module) is not nn.Linear:
            return None
        made.append(_PackedLinear(module))
        return made[-1]

    assert paged_model.accelerate(create) == len(made) == 2 * 7 + 1
    expected = stock(model, prompts, 4)
    assert sum(forward.calls for forward in made) == 0
    _forward(paged_model, sample_indices=[0])
    assert all(forward.calls == 1 for forward in made)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert paged_model.refresh()
    assert len(made) == 16, "only the stale one is made again"
    assert stock(model, prompts, 4) != expected


@pytest.mark.parametrize("follows", [False, True])
def test_a_forward_that_follows_its_module_is_asked_only_when_the_model_changed(follows: bool, tiny: Any) -> None:
    model = tiny("llama")
    asked: list[nn.Module] = []

    class Forward(_PackedLinear):
        follows_module = follows

        def stale(self) -> bool:
            asked.append(self.module)
            return super().stale()

    paged_model = HFPagedModel(model)
    paged_model.accelerate(lambda module: Forward(module) if type(module) is nn.Linear else None)
    assert not paged_model.refresh()
    assert len(asked) == (0 if follows else 15)
    asked.clear()
    model.model.layers[0].mlp.up_proj.weight.data *= 1.5
    assert paged_model.refresh()
    assert len(asked) == 15


def test_parents_are_asked_first_and_what_they_hold_is_then_left_alone(tiny: Any) -> None:
    asked: list[str] = []

    def create(module: nn.Module) -> Any:
        asked.append(type(module).__name__)
        return type(module).forward.__get__(module) if type(module).__name__ == "LlamaMLP" else None

    assert HFPagedModel(tiny("llama")).accelerate(create) == 2
    assert asked.count("Linear") == 2 * 4 + 1
    assert asked.index("LlamaForCausalLM") < asked.index("LlamaDecoderLayer") < asked.index("LlamaMLP")


def test_modules_that_someone_listens_to_are_not_swallowed_by_their_parents(tiny: Any) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: None)
    asked: list[nn.Module] = []
    paged_model = HFPagedModel(model)
    paged_model.accelerate(lambda module: asked.append(module))
    twin = paged_model.shadow.twin_of
    assert twin(model.model.layers[0].mlp) not in asked
    assert twin(model.model.layers[0].mlp.up_proj) in asked
    assert twin(model.model.layers[1].mlp) in asked


def _forward(paged_model: HFPagedModel, sample_indices: list[int]) -> torch.Tensor:
    def attend(layer: int, q: Any, k: Any, v: Any, sinks: Any = None) -> torch.Tensor:
        return q[..., : v.shape[-1]]

    ids = torch.arange(6)
    return paged_model.forward(ids, ids, attend, torch.tensor(sample_indices, dtype=torch.int64))
