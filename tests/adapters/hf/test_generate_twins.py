"""A view of a model: its forward is the model's, and tells its signature as the model's does, whoever replaces it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_hf.generate import loops


class Nobody:
    """Answers nothing."""

    model: Any = None

    def answer(self, call: Any) -> Any:
        raise AssertionError("no loop is called here")


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama", num_hidden_layers=1, hidden_size=32)


def test_a_views_forward_is_the_models(model: Any) -> None:
    seen, ids = loops.twin(model, Nobody()), torch.tensor([[5, 6, 7]])
    assert torch.equal(seen.forward(ids).logits, model.forward(ids).logits)
    assert torch.equal(seen(ids).logits, model(ids).logits)


def test_a_views_forward_has_the_signature_of_the_models_at_any_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_class(self: Any, input_ids: Tensor, colour: str = "red") -> None:
        pass

    def of_the_model(input_ids: Tensor, taste: str = "sweet") -> None:
        pass

    seen = loops.twin(model, Nobody())
    usual = inspect.signature(model.forward)
    assert inspect.signature(seen.forward) == usual and "input_ids" in usual.parameters
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", of_the_class)
        assert inspect.signature(seen.forward) == inspect.signature(model.forward) != usual
    model.forward = of_the_model
    assert inspect.signature(seen.forward) == inspect.signature(of_the_model)
    del model.forward
    assert inspect.signature(seen.forward) == usual
