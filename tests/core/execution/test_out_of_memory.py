"""A step that memory has no room for: it is computed in parts, nobody is ended, later steps are smaller for a while."""

import logging
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from paged_core import EngineDeadError, SamplingParams, hookimpl
from paged_core.sampling.sampler import Sampler
from tiny_engine import greedy, tiny_engine
from tiny_model import TinyModel

make_engine = partial(tiny_engine, max_num_seqs=4)


class Narrow(TinyModel):
    """Has memory for so many tokens at a time."""

    def __init__(self, room, **options):
        super().__init__(**options)
        self.room = room
        self.tried = []

    def forward(self, token_ids, positions, attend, sample_indices):
        self.tried.append(len(token_ids))
        if len(token_ids) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(token_ids)} tokens")
        return super().forward(token_ids, positions, attend, sample_indices)


def run(engine):
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found.setdefault((output.request.id, output.request.index), []).append(output)
        engine.check()
    return found


def tokens_of(found):
    return {key: [t for output in outputs for t in output.token_ids] for key, outputs in found.items()}


@pytest.mark.parametrize("room", [1, 3, 7, 30])
@pytest.mark.parametrize("window", [None, 10], ids=["full", "windowed"])
def test_no_request_is_lost_and_every_token_is_right(room, window):
    model, truth, rnd = Narrow(room, window=window), {}, random.Random(2)
    engine = make_engine(model)
    for i in range(8):
        prompt = [rnd.randrange(90) for _ in range(rnd.randrange(1, 60))]
        engine.add_request(str(i), prompt, greedy(12, n=1 + i % 3))
        truth |= {(str(i), row): TinyModel(window=window).generate(prompt, 12) for row in range(1 + i % 3)}
    assert tokens_of(run(engine)) == truth
    assert engine.last_stats.total_steps_divided > 0


def test_logprobs_of_prompt_and_output_are_those_of_undivided_steps():
    found = []
    for room in (1000, 5):
        engine = make_engine(Narrow(room))
        for i in range(3):
            params = SamplingParams(seed=i, max_tokens=6, logprobs=1, prompt_logprobs=1, n=2)
            engine.add_request(str(i), list(range(i, 20)), params)
        found.append(run(engine))
    whole, divided = found
    assert tokens_of(whole) == tokens_of(divided)
    for key, outputs in whole.items():
        for mine, theirs in zip(outputs, divided[key], strict=True):
            assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
            for a, b in zip(mine.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
                assert (a and a.keys()) == (b and b.keys())


def test_later_steps_are_smaller_and_grow_back_slowly(caplog):
    model = Narrow(16)
    engine = make_engine(model)
    with caplog.at_level(logging.WARNING, "paged_core"):
        engine.add_request("a", [1] * 300, greedy(2))
        engine.step()
        assert model.tried[:3] == [64, 32, 16]
        assert "in parts of at most 16 tokens" in caplog.text
        model.tried.clear()
        engine.step()
    assert model.tried == [16]
    model.room = 1000
    run(engine)
    *prompt, _, _ = model.tried  # but its last chunk, and the decode
    assert prompt == sorted(prompt)
    assert 16 < prompt[-1] < 64
    engine.add_request("b", [2] * 300, greedy(60))
    run(engine)
    engine.add_request("c", [3] * 300, greedy(60))
    model.tried.clear()
    engine.step()
    assert model.tried == [64]


def test_every_running_request_still_gets_its_token_in_each_step():
    model = Narrow(2)
    engine = make_engine(model)
    for i in range(4):
        engine.add_request(str(i), [i], greedy(10))
    steps = 0
    while engine.has_work:
        outputs = engine.step()
        steps += 1
        assert len(outputs) == 4
    assert steps == 10


def test_a_request_that_fails_is_still_told_from_those_that_merely_found_no_room():
    class Trap(Narrow):
        def forward(self, token_ids, positions, attend, sample_indices):
            logits = super().forward(token_ids, positions, attend, sample_indices)
            if 95 in token_ids.tolist():
                raise ValueError("trap")
            return logits

    engine = make_engine(Trap(5))
    engine.add_request("bad", [95] * 12, greedy(5))
    engine.add_request("good", [3] * 12, greedy(5))
    ends = {}
    while engine.has_work:
        ends |= {output.request.id: output for output in engine.step() if output.finish_reason}
    assert {id: str(output.finish_reason) for id, output in ends.items()} == {"bad": "error", "good": "length"}
    assert "trap" in ends["bad"].error
    assert ends["good"].request.output_token_ids == TinyModel().generate([3] * 12, 5)


def test_without_room_for_a_single_token_the_engine_says_so():
    engine = make_engine(Narrow(0))
    engine.add_request("a", [1, 2, 3], greedy(5))
    with pytest.raises(EngineDeadError, match=r"no memory for a step of a single token; .*kv_cache_bytes"):
        engine.step()


def test_choosing_tokens_is_done_in_parts_too():
    class NarrowSampler(Sampler):
        def select(self, logits, requests):
            if len(requests) > 1:
                raise torch.OutOfMemoryError("no room for so many rows")
            return super().select(logits, requests)

    plugin = SimpleNamespace(create_sampler=hookimpl(lambda spec: NarrowSampler()))
    found = []
    for plugins in ((), (plugin,)):
        engine = make_engine(TinyModel(), plugins)
        for i in range(5):
            engine.add_request(str(i), [i, 2], SamplingParams(seed=i, max_tokens=9, logprobs=1))
        found.append({key: [o[1:] for o in outputs] for key, outputs in run(engine).items()})
    assert found[0] == found[1]


def test_a_prompt_whose_logprobs_never_fit_ends_its_own_request_only():
    class Cramped(Sampler):
        def prompt_logprobs(self, logits, next_ids, num):
            raise torch.OutOfMemoryError("no room for a single row")

    engine = make_engine(TinyModel(), [SimpleNamespace(create_sampler=hookimpl(lambda spec: Cramped()))])
    engine.add_request("asks", [1, 2, 3], greedy(5, prompt_logprobs=0))
    engine.add_request("good", [3] * 12, greedy(5))
    ends = {}
    while engine.has_work:
        ends |= {output.request.id: output for output in engine.step() if output.finish_reason}
    assert {id: str(output.finish_reason) for id, output in ends.items()} == {"asks": "error", "good": "length"}
    assert "logprobs of its prompt" in ends["asks"].error
    assert ends["good"].request.output_token_ids == TinyModel().generate([3] * 12, 5)
