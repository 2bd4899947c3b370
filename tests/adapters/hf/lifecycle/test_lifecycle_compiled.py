"""A patched model that torch.compile has, or gets: before or after, whole or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paged_hf import paged_generate
from patched_calls import GREEDY, MODES, agrees, prompts


def test_a_compiled_model_is_patched_as_the_model_inside(make: Any) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    compiled.generate = paged_generate(compiled, check=False)
    got = compiled.generate(**prompts(), **GREEDY)
    assert compiled.generate.last_report().tier == "native"
    assert torch.equal(got, type(model).generate(model, **prompts(), **GREEDY))


def _forward_as_one_graph(model: Any) -> None:
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")


def _layers_as_graphs(model: Any) -> None:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")


def _child_in_a_wrapper(model: Any) -> None:
    model.model = torch.compile(model.model, fullgraph=True, backend="eager")


def _compile_method(model: Any) -> None:
    model.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize("first", ["patched", "compiled"])
@pytest.mark.parametrize("compiled", [_forward_as_one_graph, _layers_as_graphs, _child_in_a_wrapper, _compile_method])
def test_compiled_forwards_are_run_by_the_engine_as_they_were(make: Any, compiled: Any, first: str) -> None:
    model, plain = make(), make()
    if first == "compiled":
        compiled(model)
    model.generate = paged_generate(model, check=False)
    if first == "patched":
        agrees(model)
        compiled(model)
    for own in MODES.values():
        assert torch.equal(model.generate(**prompts(), **GREEDY, **own), plain.generate(**prompts(), **GREEDY, **own))
        assert model.generate.last_report().tier == "native"


def test_calls_of_a_compiled_model_that_the_engine_does_not_know_are_stocks(make: Any) -> None:
    model, plain = make(), make()
    model.generate = paged_generate(model, check=False)
    _forward_as_one_graph(model)
    given = {**prompts(rows=1), **GREEDY, "max_new_tokens": 2, "prefill_chunk_size": 4}
    assert torch.equal(model.generate(**given), plain.generate(**given))
    taken = model.generate.last_report()
    assert taken.tier == "stock" and "compiled" in taken.reason
