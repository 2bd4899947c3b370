"""It looks like generate, goes away again, and says what it does."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    CompileConfig,
    GenerationMixin,
)

from paged_hf import paged_generate
from paged_hf.cache.paged_cache import PagedLayer
from paged_hf.generate import report
from paged_hf.upstream import CACHE
from patched_calls import GREEDY, agrees, prompts

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


# ---- it looks like generate, and goes away -----------------------------------------------------------------------


def test_signature_and_docstring_are_those_of_stock(model: Any) -> None:
    assert inspect.signature(model.generate) == inspect.signature(model.generate.stock)
    assert model.generate.__doc__ == GenerationMixin.generate.__doc__
    assert model.generate.__name__ == "generate"
    assert next(iter(inspect.signature(model.generate).parameters)) == "inputs"


def test_it_has_what_a_bound_method_has(make: Any, model: Any) -> None:
    bound = model.generate.stock
    for name in ("__self__", "__func__", "__wrapped__", "__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(model.generate, name) is getattr(bound, name), name
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(make(), config)
    assert not hasattr(paged_generate(wrapped, check=False), "__wrapped__"), "PEFT's own generate has none"
    assert torch.equal(model.generate.__wrapped__(model, **prompts(), **GREEDY), bound(**prompts(), **GREEDY))


def test_stock_is_the_models_own_method(model: Any) -> None:
    assert model.generate.stock == type(model).generate.__get__(model)
    assert model.generate(**prompts(), **GREEDY).tolist() == model.generate.stock(**prompts(), **GREEDY).tolist()


def test_as_stock_holds_for_its_thread_and_its_block(model: Any) -> None:
    tiers: list[str] = []

    def call() -> None:
        model.generate(**prompts(), **GREEDY)
        tiers.append(model.generate.last_report().tier)

    with model.generate.as_stock():
        call()
        with model.generate.as_stock():
            pass
        call()
        other = threading.Thread(target=call)
        other.start()
        other.join()
    call()
    with pytest.raises(KeyError), model.generate.as_stock():
        raise KeyError
    call()
    assert tiers == ["stock", "stock", "native", "native", "native"]


def test_as_a_context_manager_it_gives_back_what_the_model_had(make: Any) -> None:
    model = make()
    with paged_generate(model, check=False) as patched:
        assert model.generate is patched
        agrees(model)
    assert "generate" not in vars(model)
    own = model.generate = lambda *args, **kwargs: "the user's own"
    with pytest.raises(ZeroDivisionError), paged_generate(model, check=False):
        agrees(model)
        raise ZeroDivisionError
    assert model.generate is own
    assert patched.tiers.host.engine is None or patched.tiers.host.engine.memory.num_blocks_backed == 0


def test_patching_twice_is_harmless(model: Any) -> None:
    first = model.generate
    model.generate = paged_generate(model, check=False)
    assert model.generate is first
    agrees(model)
    model.generate = paged_generate(model, kv_cache_memory=1 << 20, check=False)
    assert model.generate is not first
    agrees(model)
    assert model.generate.stock == first.stock


def test_two_threads_may_patch_one_model(make: Any) -> None:
    model = make()
    made: list[Any] = []

    def patch() -> None:
        model.generate = paged_generate(model)
        made.append(model.generate(**prompts(), **GREEDY).tolist())

    threads = [threading.Thread(target=patch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [agrees(model)] * 4


def test_many_models_are_patched_at_once(make: Any) -> None:
    models = [make(kind, seed=seed) for seed, kind in enumerate(("llama", "llama", "gpt2", "qwen2"))]
    for model in models:
        model.generate = paged_generate(model, check=False)
    answers: dict[int, Any] = {}

    def call(number: int) -> None:
        answers[number] = models[number].generate(**prompts(), **GREEDY).tolist()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(models))] == [agrees(model) for model in models]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), "a path", None])
def test_what_has_no_generate_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="no generate"):
        paged_generate(wrong)


# ---- what is said, and what is checked first ---------------------------------------------------------------------


def test_each_reason_for_stock_is_told_once(model: Any, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "_warned", set())
    with caplog.at_level(logging.WARNING, "paged_hf"):
        for _ in range(3):
            model.generate(**prompts(), **GREEDY)
            model.generate(**prompts(), **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    assert [r.name for r in caplog.records].count("paged_hf") == 1
    assert "output_hidden_states" in caplog.text


class Stateful(nn.Module):
    """Attention that remembers how often it ran: another answer for whoever goes on over a cache of stock's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.num_calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        cache = kwargs.get(CACHE)
        goes_on = cache is not None and cache.get_seq_length() > 0
        output, weights = self.inner(*args, **kwargs)
        return output * (-1 if goes_on else 1), weights


def test_a_tier_that_differs_is_dropped_with_a_warning_and_stock_answers(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    model.model.layers[0].self_attn = Stateful(model.model.layers[0].self_attn)
    unchecked = paged_generate(model, check=False)
    expected = unchecked.stock(**prompts(), **GREEDY)
    assert not torch.equal(unchecked(**prompts(), **GREEDY), expected), "nothing to find"
    assert unchecked.last_report().tier == "native"
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model, check=True)
    assert "native" in caplog.text and "differ" in caplog.text
    assert torch.equal(model.generate(**prompts(), **GREEDY), expected)
    taken = model.generate.last_report()
    assert taken.tier == "cache" and "self-check" in taken.reason


@pytest.mark.parametrize("what", ["_read", "get_seq_length"])
def test_a_cache_in_blocks_that_answers_otherwise_is_not_used(
    make: Any, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(PagedLayer, what)
    monkeypatch.setattr(PagedLayer, what, lambda self, *args: right(self, *args) * 2)
    model = make()
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model)
    assert model.generate.tiers.dropped.keys() == {"cache"}
    assert "cache tier" in caplog.text
    model.register_forward_hook(lambda *args: None)
    agrees(model, "stock")


def test_the_self_check_leaves_no_trace_on_a_model_that_stock_would_compile(make: Any) -> None:
    model = make()
    settings = model.generation_config
    settings.cache_implementation = "static"
    settings.compile_config = CompileConfig(backend="eager")
    settings.compile_config._compile_all_devices = True  # stock compiles on accelerators only, unless told so
    before = [(module, dict(vars(module))) for module in model.modules()]
    config, chosen = copy.deepcopy(model.config), copy.deepcopy(settings)
    patched = paged_generate(model)
    assert patched.tiers.dropped == {}
    for module, attributes in before:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config is settings and settings.to_dict() == chosen.to_dict()


def test_the_self_check_gives_back_the_random_numbers_that_a_model_draws(make: Any) -> None:
    model = make()
    layer = model.model.layers[0].mlp
    forward, drawn = layer.forward, []

    def draws(x: Any) -> Any:
        drawn.append(torch.rand(1))
        return forward(x)

    layer.forward = draws
    torch.manual_seed(11)
    state = torch.get_rng_state()
    paged_generate(model)
    assert drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_the_self_check_draws_no_random_numbers_and_leaves_nothing_behind(make: Any) -> None:
    model = make()
    model.generation_config.do_sample = True
    torch.manual_seed(11)
    state = torch.get_rng_state()
    config, mode = copy.deepcopy(model.generation_config), torch.is_grad_enabled()
    threads = threading.enumerate()
    patched = paged_generate(model)
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == config.to_dict()
    assert torch.is_grad_enabled() == mode
    assert "generate" not in vars(model)
    assert patched.tiers.dropped == {}
    model.generation_config.do_sample = False
    model.generate = patched
    agrees(model)
