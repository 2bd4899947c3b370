"""A prompt whose tail comes from a tier while its head is computed: the tokens of an engine without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paged_core import ConfigError, Engine, RequestStatus, SamplingParams
from paged_core.engine import assembly
from paged_core.tiers.costs import TierCosts
from tier_engines import SMALL, Slow, answers, filled_and_evicted, prompts_like, stats
from tiny_model import ChangingModel, TinyModel

PROMPT = list(range(90))  # 22 blocks and two tokens; a step has room for eight
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def beside(monkeypatch):
    """Loading takes as long as computing, whatever is measured."""
    monkeypatch.setattr(TierCosts, "pays_beside", lambda self, num_blocks, num_tokens: True)
    monkeypatch.setattr(TierCosts, "num_to_compute", lambda self, num_blocks, num_tokens: num_tokens // 2)


@pytest.fixture
def tier():
    return Slow()


@pytest.fixture
def engine(tier, beside):
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    filled_and_evicted(engine, PROMPT)
    yield engine
    engine.close()


def begun(engine):
    (request,) = engine.add_request("r", PROMPT, PARAMS)
    engine.step()
    assert request.status is RequestStatus.RUNNING
    assert request.num_computed == 32
    return request


def rest(engine, request):
    while engine.has_work:
        engine.step()
        engine.check()
    assert request.output_token_ids == TinyModel().generate(PROMPT, 6)
    assert engine.memory.num_blocks_used == 0


def test_head_and_tail_meet(engine, tier):
    request = begun(engine)
    tier.bring(0, 8)  # the last eight of 22
    engine.step()
    assert request.num_computed == 32 + 12
    tier.bring(8, 11)  # and the three that lack
    engine.step()
    assert len(request.output_token_ids) == 1
    assert request.num_cached == stats(engine).total_tokens_loaded == 44
    rest(engine, request)
    assert (stats(engine).total_loads, stats(engine).total_loads_abandoned) == (1, 0)
    tier.land()  # the head's blocks, which nobody wants any more
    answers(engine, [[5, 6, 7]])


def test_others_that_come_meanwhile_are_served(engine, tier):
    request = begun(engine)
    other = engine.add_request("other", [7, 8, 9], PARAMS)[0]
    while not other.finished:
        engine.step()
    assert other.output_token_ids == TinyModel().generate([7, 8, 9], 6)
    rest(engine, request)


def test_what_never_comes_is_computed(engine, tier):
    request = begun(engine)
    rest(engine, request)
    assert stats(engine).total_tokens_loaded == 0
    tier.land()
    assert answers(engine, [PROMPT[:20]]) == answers(Engine(TinyModel(), SMALL), [PROMPT[:20]])


def test_what_is_late_is_computed_in_whole_steps(engine, tier):
    request = begun(engine)
    tier.bring(0, 3)
    engine._offloading._under_way[0].until = 0.0
    engine.step()
    assert request.num_computed == 32 + 32, "no longer half of what lacks"
    engine.step()
    assert len(request.output_token_ids) == 0
    assert request.num_computed == 88, "what has come in time is of use"
    assert stats(engine).total_loads_abandoned == 1
    rest(engine, request)
    assert stats(engine).total_tokens_loaded == 12


def test_blocks_that_are_lost_are_computed(engine, tier):
    request = begun(engine)
    tier.bring(0, 5)
    tier.inner.forget()
    tier.bring(5, 10)
    tier.asked.pop()[0].finish()
    rest(engine, request)
    assert stats(engine).total_tokens_loaded == 20
    assert stats(engine).total_loads_abandoned == 1


@pytest.mark.parametrize("way", ["abort", "stop"])
def test_who_is_cancelled_ends_once_and_frees_everything(engine, tier, way):
    request = begun(engine)
    tier.bring(0, 3)
    told = [engine.stop(request)] if way == "stop" else []
    if way == "abort":
        engine.abort("r")
    assert engine.memory.num_blocks_used == 0
    fetch = tier.asked[-1][0]
    tier.bring(3, 6)
    told += engine.step()
    assert [output.request for output in told if output.finish_reason is not None] == [request]
    assert fetch.cancelled
    assert not engine.has_work
    engine.check()


def test_an_interrupt_before_the_tier_is_asked_loses_the_load_and_no_request(engine, tier, monkeypatch):
    (request,) = engine.add_request("r", PROMPT, PARAMS)

    def interrupt(load):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(engine._offloading, "_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.step()
    assert request.num_computed == 32
    rest(engine, request)


def test_when_weights_change_the_tail_is_given_up(tier, beside):
    model = ChangingModel()
    engine = Engine(model, SMALL, plugins=[tier])
    filled_and_evicted(engine, PROMPT)
    begun(engine)
    tier.bring(0, 8)
    model.changed = True  # to the same, so that its tokens tell
    engine.refresh()
    tier.bring(8, 16)
    told = []
    while engine.has_work:
        told += [token for output in engine.step() for token in output.token_ids]
        engine.check()
    assert told == TinyModel().generate(PROMPT, 6)
    assert stats(engine).total_tokens_loaded == 0
    engine.close()


def test_a_tier_and_several_ranks_are_refused_together(engine):
    """A plugin's: those of the config are refused with it."""
    split = replace(SMALL, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="the first rank's part of the K/V only"):
        assembly.create_tiers(engine._manager, engine._model, split, engine.sizes, engine._runner.cache)


@pytest.mark.parametrize(
    ("options", "params", "window"),
    [
        ({}, {}, None),
        ({"kv_cache_dtype": "int8"}, {}, None),
        ({"kv_cache_dtype": "float8_e4m3fn"}, {"cache_salt": "a tenant's"}, None),
        ({"kv_cache_slab_bytes": 20_000}, {"n": 3, "temperature": 0.8, "seed": 3}, None),
        ({"lookahead": True}, {"n": 2, "use_beam_search": True, "max_tokens": 4}, None),
        ({}, {}, 12),  # behind a window there is nothing to compute: all of it is loaded
    ],
)
def test_tokens_from_a_disk_are_those_without_one(tmp_path, beside, options, params, window):
    config = replace(SMALL, **options)
    on_it = replace(config, kv_disk_path=str(tmp_path), kv_disk_bytes=50_000_000)
    prompts = prompts_like(7, 12)
    plain = Engine(TinyModel(window=window), config)
    engine = Engine(TinyModel(window=window), on_it)
    answers(engine, prompts, **params)
    engine.close()
    again = Engine(TinyModel(window=window), on_it)
    met: list[bool] = []
    tails = again._scheduler._tails
    begin = tails.begin
    tails.begin = lambda row, found: met.append(True) or begin(row, found)
    for prompt in prompts:  # one by one, so that each computes alone
        assert answers(again, [prompt], **params) == answers(plain, [prompt], **params)
    assert stats(again).total_tokens_loaded > 0
    assert bool(met) == (window is None and "use_beam_search" not in params)
    again.close()
