"""An engine with a tier: the tokens of one without, sooner; and nobody waits for anybody's blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from paged_core import Engine, RequestStatus, SamplingParams
from paged_core.execution.kv_cache import allocate
from paged_core.execution.packed_blocks import pack, unpack
from paged_core.tiers.costs import TierCosts
from tier_engines import SMALL, Slow, answers, filled_and_evicted, on_disk, prompts_like, stats
from tiny_model import ChangingModel, TinyModel

# ---- tokens ------------------------------------------------------------------------------------------------------


def test_two_hundred_requests_get_the_tokens_that_they_get_without_a_tier(tmp_path):
    prompts = prompts_like(0, 200)
    plain = answers(Engine(TinyModel(), SMALL), prompts)
    engine = on_disk(tmp_path)
    assert answers(engine, prompts) == plain
    assert engine.last_stats.total_preemptions > 0
    engine.close()
    again = on_disk(tmp_path)
    assert answers(again, prompts) == plain
    assert stats(again).total_tokens_loaded > 0
    again.close()


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"kv_cache_dtype": "int8"}, {}),
        ({"kv_cache_dtype": "float8_e4m3fn"}, {}),
        ({"kv_cache_dtype": "bfloat16"}, {}),
        ({"kv_cache_slab_bytes": 20_000}, {}),
        ({"lookahead": True}, {}),
        ({}, {"n": 3, "temperature": 0.8, "seed": 3}),
        ({}, {"n": 2, "use_beam_search": True, "max_tokens": 4}),
        ({}, {"prompt_logprobs": 1}),
    ],
)
def test_whatever_is_asked_tokens_are_the_same_after_a_restart(tmp_path, options, params):
    config, prompts = replace(SMALL, **options), prompts_like(1, 12)
    plain = answers(Engine(TinyModel(), config), prompts, **params)
    for _ in range(2):
        engine = on_disk(tmp_path, config)
        assert answers(engine, prompts, **params) == plain
        engine.close()
    assert stats(engine).total_tokens_loaded > 0 or "prompt_logprobs" in params


@pytest.mark.parametrize("window", [5, 12])
def test_a_sliding_window_takes_no_more_than_it_sees(tmp_path, window):
    prompts = prompts_like(2, 12)
    plain = answers(Engine(TinyModel(window=window), SMALL), prompts)
    for _ in range(2):
        engine = Engine(TinyModel(window=window), replace(SMALL, kv_disk_path=str(tmp_path)))
        assert answers(engine, prompts) == plain
        engine.close()
    assert stats(engine).total_tokens_loaded > 0


RESTART = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from tier_engines import answers, on_disk, prompts_like, stats
engine = on_disk(sys.argv[1])
told = answers(engine, prompts_like(3, 20))
loaded = stats(engine).total_tokens_loaded
engine.close()
print(json.dumps([sorted([*key, tokens] for key, tokens in told.items()), loaded]))
"""


def test_a_second_process_loads_what_the_first_has_computed(tmp_path):
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", RESTART, str(tmp_path), json.dumps(sys.path)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    (first, _), (second, loaded) = runs
    assert first == second
    assert loaded > 0


def test_a_salt_keeps_tenants_apart_in_a_tier_too(tmp_path):
    prompt = list(range(30))
    engine = on_disk(tmp_path)
    answers(engine, [prompt], cache_salt="a")
    engine.close()
    again = on_disk(tmp_path)
    answers(again, [prompt], cache_salt="b")
    assert stats(again).total_tokens_loaded == 0
    answers(again, [prompt], cache_salt="a")
    assert stats(again).total_tokens_loaded >= 28
    again.close()


def test_another_models_blocks_are_not_found(tmp_path):
    prompt = list(range(30))
    engine = on_disk(tmp_path)
    answers(engine, [prompt])
    engine.close()
    other = Engine(TinyModel(seed=1), replace(SMALL, kv_disk_path=str(tmp_path)))
    assert answers(other, [prompt]) == answers(Engine(TinyModel(seed=1), SMALL), [prompt])
    assert stats(other).total_tokens_loaded == 0
    other.close()


# ---- loading -----------------------------------------------------------------------------------------------------


def test_others_are_served_while_blocks_are_on_their_way():
    tier = Slow()
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    filled_and_evicted(engine, list(range(30)))
    (request,) = engine.add_request("loads", list(range(30)), SamplingParams(temperature=0, max_tokens=3))
    engine.step()
    assert request.status is RequestStatus.LOADING
    ended = []
    engine.add_request("other", [5, 6, 7], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    while not ended:
        ended += [output.request.id for output in engine.step() if output.finish_reason is not None]
    assert ended == ["other"]
    assert request.status is RequestStatus.LOADING
    assert engine.has_work
    tier.land()
    outputs = engine.step()
    assert request.num_cached == 28
    assert [output.request for output in outputs] == [request]
    engine.close()


def test_a_load_that_never_comes_is_computed(monkeypatch):
    tier = Slow()
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    filled_and_evicted(engine, list(range(30)))
    engine._offloading._costs.tokens_per_s = 10_000.0
    told = answers(engine, [list(range(30))])
    assert told == answers(Engine(TinyModel(), SMALL), [list(range(30))])
    assert stats(engine).total_loads_abandoned == 1
    tier.land()  # long after: it is for nobody
    assert answers(engine, [list(range(20, 30))]) == answers(Engine(TinyModel(), SMALL), [list(range(20, 30))])
    engine.close()


@pytest.mark.parametrize("way", ["abort", "stop", "close"])
def test_who_is_cancelled_while_loading_ends_once_and_frees_everything(way):
    tier = Slow()
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    filled_and_evicted(engine, list(range(30)))
    (request,) = engine.add_request("loads", list(range(30)), SamplingParams(temperature=0, max_tokens=3))
    engine.step()
    assert engine.memory.num_blocks_used > 0
    told = [engine.stop(request)] if way == "stop" else []
    if way == "abort":
        engine.abort("loads")
    elif way == "close":
        engine.close()
    assert engine.memory.num_blocks_used == 0
    tier.land()
    told += engine.step()
    assert [output.request for output in told if output.finish_reason is not None] == [request]
    assert not engine.has_work
    engine.check()


def test_when_weights_change_loads_are_given_up_and_nothing_old_is_found():
    tier, model = Slow(), ChangingModel()
    engine = Engine(model, SMALL, plugins=[tier])
    filled_and_evicted(engine, list(range(30)))
    engine.add_request("loads", list(range(30)), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    engine.step()
    new = TinyModel(seed=1)
    model.embed, model.qkv, model.out, model.unembed, model.changed = new.embed, new.qkv, new.out, new.unembed, True
    engine.refresh()
    told = []
    while engine.has_work:
        tier.land()
        told += [token for output in engine.step() for token in output.token_ids]
    expected = TinyModel(seed=1)
    expected.place = model.place
    assert told == expected.generate(list(range(30)), 3)
    engine.close()


def test_an_interrupt_while_a_load_begins_loses_the_load_and_no_request(monkeypatch):
    tier = Slow()
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    prompt = list(range(30))
    filled_and_evicted(engine, prompt)
    (request,) = engine.add_request("loads", prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(engine._offloading, "_begin", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert request.status is RequestStatus.LOADING
    told = []
    while engine.has_work:
        told += [token for output in engine.step() for token in output.token_ids]
        engine.check()
    assert told == TinyModel().generate(prompt, 3)
    engine.close()


def _interrupt(load):
    raise KeyboardInterrupt


# ---- preemption --------------------------------------------------------------------------------------------------


def test_what_is_swapped_comes_back_bit_for_bit(tmp_path, monkeypatch):
    """Recomputing it would do it in other batches; in bfloat16 that shows."""
    monkeypatch.setattr(TierCosts, "wants_more", True)
    monkeypatch.setattr(TierCosts, "wants_back", True)
    config = replace(SMALL, num_blocks=14, kv_cache_dtype="bfloat16", kv_disk_path=str(tmp_path))
    engine = Engine(TinyModel(), config)
    params = SamplingParams(temperature=0, max_tokens=22, ignore_eos=True)
    requests = [engine.add_request(str(number), [number * 7 + i for i in range(10)], params)[0] for number in range(3)]
    before, compared = {}, 0
    while engine.has_work:
        running = [request for request in requests if request.status is RequestStatus.RUNNING]
        held = {request: (request.num_computed, engine.read_kv(request)) for request in running}
        engine.step()
        before |= {request: kv for request, kv in held.items() if request.status is RequestStatus.WAITING}
        for request in list(before):
            if request.status is RequestStatus.RUNNING:
                num, kv = before.pop(request)
                assert request.num_computed >= num
                for mine, theirs in zip(engine.read_kv(request), kv, strict=True):
                    assert all(torch.equal(a[:, :num], b[:, :num]) for a, b in zip(mine, theirs, strict=True))
                compared += request.num_computed == num + 1  # one step after it came back
    assert engine.last_stats.total_preemptions > 0
    assert compared > 0, "no victim went on from where it was"
    engine.close()


def test_packed_blocks_are_unpacked_bit_for_bit_into_others():
    cache = allocate(TinyModel().spec, 12, 4, torch.int8)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).random_(0, 256)
    packed = torch.empty(2, cache.block_bytes, dtype=torch.uint8)
    pack(cache, [3, 7], packed)
    unpack(cache, [9, 1], packed)
    for tensor in cache.tensors:
        found = tensor.view(torch.uint8)
        assert torch.equal(found[[9, 1]], found[[3, 7]])
