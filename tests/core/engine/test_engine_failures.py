"""What raises or is no number costs its own request, and the engine goes on."""

from functools import partial

import pytest

from mixed_workload import greedy
from paged_core import (
    Engine,
    EngineConfig,
    SamplingParams,
    Selection,
    hookimpl,
)
from tiny_engine import ends_of, run, tiny_engine, tokens_of
from tiny_model import TinyModel

make_engine = partial(tiny_engine, max_num_batched_tokens=256)


def failing_processor(input_ids, scores):
    if input_ids.shape[1] > 5:
        raise RuntimeError("processor of mine")
    return scores


def test_a_logits_processor_that_raises_ends_its_own_request_only():
    model = TinyModel()
    engine = make_engine(model)
    engine.add_request("bad", [1, 2, 3], greedy(9, logits_processors=[failing_processor]))
    engine.add_request("good", [1, 2, 3], greedy(9))
    outputs = run(engine)
    assert ends_of(outputs)["good"] == ("length", None)
    assert tokens_of(outputs)["good", 0] == model.generate([1, 2, 3], 9)
    assert tokens_of(outputs)["bad", 0] == model.generate([1, 2, 3], 3)
    reason, error = ends_of(outputs)["bad"]
    assert reason == "error"
    assert "processor of mine" in error


class NanModel(TinyModel):
    """Token 13 poisons the logits of whoever has it last."""

    def forward(self, token_ids, positions, attend, sample_indices):
        logits = super().forward(token_ids, positions, attend, sample_indices)
        logits[token_ids[sample_indices] == 13] = float("nan")
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_their_own_request_only(temperature):
    engine = make_engine(NanModel())
    params = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True, logit_bias={13: -100.0})
    engine.add_request("bad", [1, 13], params)
    engine.add_request("good", [1, 2], params)
    ends = ends_of(run(engine))
    assert ends["good"] == ("length", None)
    assert ends["bad"][0] == "error"
    assert "NaN" in ends["bad"][1]


class FussyModel(TinyModel):
    """Raises on any batch that holds token 13."""

    def forward(self, token_ids, positions, attend, sample_indices):
        if (token_ids == 13).any():
            raise ValueError("I don't like 13")
        return super().forward(token_ids, positions, attend, sample_indices)


def test_when_the_model_raises_only_the_culprit_ends():
    model = FussyModel()
    engine = make_engine(model)
    engine.add_request("a", [1, 2, 3], greedy(5, logit_bias={13: -1e9}))
    outputs = engine.step()
    engine.add_request("culprit", [4, 13, 5], greedy(5, n=3))
    engine.add_request("b", [6, 7], greedy(5, logit_bias={13: -1e9}))
    while engine.has_work:
        outputs += engine.step()
    errors = [output for output in outputs if output.error]
    assert [output.request.index for output in errors] == [0, 1, 2]
    assert all("I don't like 13" in output.error for output in errors)
    assert tokens_of(outputs)["a", 0] == TinyModel().generate([1, 2, 3], 5)
    assert tokens_of(outputs)["b", 0] == TinyModel().generate([6, 7], 5)
    assert engine.memory.num_blocks_used == 0


def test_a_model_that_always_raises_answers_every_request():
    model = FussyModel()
    engine = make_engine(model)
    for id in "ab":
        engine.add_request(id, [13], greedy(5))
    ends = ends_of(run(engine))
    assert {reason for reason, _ in ends.values()} == {"error"}
    assert len(ends) == 2


@pytest.mark.parametrize("hook", ["on_request_added", "on_step_finished", "on_request_finished"])
def test_an_observer_that_raises_is_logged_and_changes_nothing(hook, caplog):
    class Observer:
        def _maybe(self, name):
            if name == hook:
                raise RuntimeError("observer of mine")

        @hookimpl
        def on_request_added(self, request):
            self._maybe("on_request_added")

        @hookimpl
        def on_step_finished(self, stats):
            self._maybe("on_step_finished")

        @hookimpl
        def on_request_finished(self, output):
            self._maybe("on_request_finished")

    config = EngineConfig(block_size=4, num_blocks=40, attention_backend="reference")
    engine = Engine(TinyModel(), config, plugins=[Observer()])
    engine.add_request("a", [1, 2], greedy(3))
    outputs = run(engine)
    assert tokens_of(outputs)["a", 0] == TinyModel().generate([1, 2], 3)
    assert "observer of mine" in caplog.text


def test_a_sampler_that_raises_ends_the_rows_of_that_step_and_the_engine_goes_on():
    class Moody:
        def __init__(self):
            self.calls = 0

        def select(self, logits, requests):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("sampler of mine")
            return Selection(logits.argmax(-1).tolist())

        def prompt_logprobs(self, logits, next_ids, num):
            raise NotImplementedError

    class Plugin:
        @hookimpl
        def create_sampler(self):
            return Moody()

    config = EngineConfig(block_size=4, num_blocks=40, attention_backend="reference")
    engine = Engine(TinyModel(), config, plugins=[Plugin()])
    engine.add_request("a", [1, 2], greedy(3))
    (end,) = ends_of(run(engine)).values()
    assert end[0] == "error"
    assert "sampler of mine" in end[1]
    engine.add_request("b", [1, 2], greedy(3))
    assert tokens_of(run(engine))["b", 0] == TinyModel().generate([1, 2], 3)


def test_a_selector_that_raises_ends_its_own_group_only():
    class Broken:
        def select(self, logits, requests):
            raise KeyError("selector of mine")

    engine = make_engine()
    engine.add_request("good", [1, 2], greedy(4))
    engine.add_group("bad", [[1], [2]], greedy(4), selector=Broken())
    outputs = run(engine)
    assert [o.error for o in outputs if o.request.id == "bad"] == [
        "choosing the next token failed: KeyError('selector of mine')"
    ] * 2
    assert tokens_of(outputs)["good", 0] == TinyModel().generate([1, 2], 4)
