"""transformers models through torch.compile: stock's tokens, whole graphs, few of them, and a way back.

The compiler's own backends stand in for its code generator, which takes minutes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from paged_core import ConfigError
from paged_hf.model import compiled
from paged_hf.model.paged_model import HFPagedModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts what is compiled."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled, "BACKEND", counted)
    yield counted
    torch._dynamo.reset()


def told(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "paged_core"]


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])  # llama below
def test_a_compiled_model_gives_the_tokens_of_stock_by_graphs_of_its_warm_up_alone(
    family: str, tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any, graphs: Any, caplog: Any
) -> None:
    model = tiny(family, num_hidden_layers=2, **({"layer_types": None} if family == "gpt_oss" else {}))
    expected = stock(model, prompts, 12)
    running = engine(model, compile_model=True)
    num_graphs = graphs.frame_count
    assert 0 < num_graphs <= 4
    assert paged(running, prompts, 12) == expected
    assert graphs.frame_count == num_graphs
    assert told(caplog) == []


def test_a_change_of_the_weights_is_in_the_next_answer(
    tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any, graphs: Any, caplog: Any
) -> None:
    """In place, by the graphs of the warm-up; then another module's, which are compiled for."""
    model = tiny("llama", num_hidden_layers=1)
    running = engine(model, compile_model=True)
    num_graphs = graphs.frame_count
    assert 0 < num_graphs <= 4
    answers = [paged(running, prompts, 8)]
    assert answers == [stock(model, prompts, 8)]
    for replaced in (False, True):
        if replaced:
            model.model.layers[0] = tiny("llama", seed=3, num_hidden_layers=1).model.layers[0]
        else:
            model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
        expected = stock(model, prompts, 8)
        assert expected not in answers
        answers.append(paged(running, prompts, 8))
        assert answers[-1] == expected
        assert (graphs.frame_count > num_graphs) == replaced
    assert told(caplog) == []


def test_a_model_that_the_compiler_can_not_follow_runs_without_it_and_one_warning_says_so(
    tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any, caplog: Any
) -> None:
    model = tiny("llama", num_hidden_layers=1)
    expected = stock(model, prompts, 8)
    model.model.layers[0].register_forward_hook(lambda module, args, output: print(end="") or None)
    model.model.layers[0].register_forward_hook(lambda module, args, output: torch._dynamo.graph_break())
    running = engine(model, compile_model=True)
    assert paged(running, prompts, 8) == expected
    (warning,) = told(caplog)
    assert "without torch.compile" in warning


def test_a_compiler_that_fails_in_a_step_costs_no_request(
    tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any, caplog: Any, monkeypatch: Any
) -> None:
    model = tiny("llama", num_hidden_layers=1)
    running = engine(model, compile_model=True)

    def broken(**given: Any) -> None:
        running._model._compiled._root(**given)  # K/V are stored and layers are counted before it fails
        raise RuntimeError("the code it made is wrong")

    monkeypatch.setattr(running._model._compiled, "_compiled", broken)
    assert paged(running, prompts, 8) == stock(model, prompts, 8)
    (warning,) = told(caplog)
    assert "the code it made is wrong" in warning


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("a bad request")])
def test_what_is_not_the_compilers_fault_is_raised_and_the_model_stays_compiled(error: Exception, tiny: Any) -> None:
    calls = []

    class Root(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            raise error

    root = compiled.CompiledRoot(Root())
    root._compiled = root._root
    for _ in range(2):
        with pytest.raises(type(error)):
            root(lambda: None, x=torch.zeros(2))
    assert len(calls) == (2 if isinstance(error, torch.OutOfMemoryError) else 4)


def test_a_compiled_model_that_answers_otherwise_is_refused(tiny: Any, engine: Any, monkeypatch: Any) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: tuple(each + 2 if torch.is_tensor(each) else each for each in graph(*given))

    monkeypatch.setattr(compiled, "BACKEND", wrong)
    with pytest.raises(ConfigError, match="compile_model"):
        engine(tiny("llama", num_hidden_layers=1), compile_model=True)


def test_the_next_engine_of_the_same_model_compiles_only_if_it_is_told_to(
    tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any, graphs: Any
) -> None:
    model = tiny("llama", num_hidden_layers=1)
    expected, shared = stock(model, prompts, 8), HFPagedModel(model)
    for wanted in (False, True, False, True):
        assert paged(engine(shared, compile_model=wanted, attention_backend="cpu"), prompts, 8) == expected
        assert shared.compiled == wanted
        assert not (wanted and shared.fast_forwards)
