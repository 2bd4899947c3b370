"""Engine: the tokens are those of the model, whatever else runs beside them; each request's trouble is its own."""

from functools import partial

import pytest
import torch

from mixed_workload import CHUNKED, ROOMY, TIGHT, add_mixed_requests, greedy, in_every_way
from paged_core import (
    ConfigError,
    EngineDeadError,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
    Selection,
)
from tiny_engine import ends_of, run, tiny_engine, tokens_of
from tiny_model import EOS, VOCAB, ChangingModel, TinyModel

make_engine = partial(tiny_engine, max_num_batched_tokens=256)


@in_every_way
def test_greedy_tokens_are_those_of_dense_attention(config, window, caching):
    model = TinyModel(window=window)
    engine = make_engine(model, enable_prefix_caching=caching, **config)
    truth = add_mixed_requests(engine, model)
    assert tokens_of(run(engine)) == truth
    if config is TIGHT and window is None:
        assert engine.last_stats.total_preemptions > 0


def test_sampled_tokens_depend_on_the_seed_and_on_nothing_around_them():
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True, n=2)
    prompt = [5, 4, 3, 2, 1, 9, 9]
    alone = make_engine()
    alone.add_request("x", prompt, params)
    expected = tokens_of(run(alone))
    assert expected["x", 0] != expected["x", 1], "samples of one prompt differ"
    for config in (CHUNKED, TIGHT, {**ROOMY, "enable_prefix_caching": False}):
        crowd = make_engine(**config)
        for i in range(6):
            crowd.add_request(
                f"a{i}", [i] * (3 + 4 * i), SamplingParams(temperature=0.9, max_tokens=25, ignore_eos=True)
            )
        crowd.add_request("x", prompt, params)
        for i in range(4):
            crowd.add_request(f"b{i}", prompt, SamplingParams(temperature=0.7, max_tokens=9, ignore_eos=True))
        found = tokens_of(run(crowd))
        assert {key: found[key] for key in expected} == expected


def test_requests_without_a_seed_differ_and_an_engine_seed_repeats_them():
    def sample(seed):
        engine = make_engine(seed=seed)
        for i in range(3):
            engine.add_request(str(i), [1, 2, 3], SamplingParams(max_tokens=12, ignore_eos=True))
        return tokens_of(run(engine))

    first = sample(3)
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    assert sample(3) == first
    assert sample(None) != sample(None)


def test_the_models_eos_ends_a_request_unless_ignored():
    model = TinyModel()
    model.unembed[EOS] *= 1.5
    prompt = next([t] for t in range(90) if EOS in model.generate([t], 30))
    truth = model.generate(prompt, 30)
    engine = make_engine(model)
    engine.add_request("stops", prompt, SamplingParams(temperature=0, max_tokens=30))
    engine.add_request("goes on", prompt, greedy(30))
    outputs = run(engine)
    assert tokens_of(outputs)["stops", 0] == truth[: truth.index(EOS) + 1]
    assert tokens_of(outputs)["goes on", 0] == truth
    assert ends_of(outputs) == {"stops": ("stop", None), "goes on": ("length", None)}


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(3), "prompt is empty"),
        ([1, VOCAB], greedy(3), f"token id {VOCAB}; ids go from 0 to {VOCAB - 1}"),
        ([-1], greedy(3), "token id -1"),
        (["1"], greedy(3), "token id '1'"),
        (b"ab", greedy(3), "of type bytes; give token ids"),
        ([1] * 600, greedy(3), r"600 tokens.*max_model_len \(512\)"),
        ([1] * 100, greedy(80), "may need 45 K/V blocks but the cache has 40"),
        ([1], greedy(3, n=9), "max_num_seqs is 8"),
        ([1], greedy(3, logit_bias={VOCAB: 1.0}), f"logit_bias holds token id {VOCAB}"),
        ([1], greedy(3, allowed_token_ids=[-5]), "allowed_token_ids holds token id -5"),
        ([1], greedy(3, stop_token_ids=[1000]), "stop_token_ids holds token id 1000"),
    ],
)
def test_a_request_that_cant_be_served_is_refused_and_hurts_nobody(prompt, params, message):
    model = TinyModel()
    engine = make_engine(model, num_blocks=40)
    engine.add_request("good", [1, 2, 3], greedy(6))
    engine.step()
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("bad", prompt, params)
    outputs = run(engine)
    assert ends_of(outputs) == {"good": ("length", None)}


def test_an_id_can_be_used_again_only_when_its_request_has_ended():
    engine = make_engine()
    engine.add_request("a", [1], greedy(2))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add_request("a", [1], greedy(2))
    run(engine)
    engine.add_request("a", [1], greedy(2))
    assert len(tokens_of(run(engine))["a", 0]) == 2


def test_cancelling_always_answers_and_frees_the_blocks():
    engine = make_engine(**CHUNKED)
    for id in ("waiting", "running", "other"):
        engine.add_request(id, [1] * 30, greedy(20, n=2))
    engine.step()
    for id in ("running", "waiting"):
        engine.abort(id)
        engine.abort(id)  # once more changes nothing
    engine.abort("never heard of it")
    outputs = run(engine)
    aborted = [(o.request.id, o.request.index) for o in outputs if o.finish_reason is FinishReason.ABORT]
    assert sorted(aborted) == [("running", 0), ("running", 1), ("waiting", 0), ("waiting", 1)]
    assert tokens_of(outputs)["other", 0] == TinyModel().generate([1] * 30, 20)


def test_a_row_can_be_stopped_between_steps():
    engine = make_engine()
    (row,) = engine.add_request("a", [1, 2], greedy(50))
    engine.step()
    engine.step()
    final = engine.stop(row)
    assert final.finish_reason is FinishReason.STOP
    assert engine.stop(row) is None
    assert not engine.has_work
    assert engine.memory.num_blocks_used == 0


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_sample_that_is_stopped_before_the_fork_takes_nothing_from_its_siblings(which, num_steps):
    model = TinyModel()
    engine = make_engine(model, **CHUNKED)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    rows = engine.add_request("a", prompt, greedy(6, n=3, prompt_logprobs=0))
    for _ in range(num_steps):
        assert engine.step() == []
    assert engine.stop(rows[which]).request is rows[which]
    outputs = run(engine)
    others = [index for index in range(3) if index != which]
    assert tokens_of(outputs) == {("a", index): model.generate(prompt, 6) for index in others}
    told = [output for output in outputs if output.prompt_logprobs is not None]
    assert [output.request.index for output in told] == others[:1]
    assert [next(iter(entry)) for entry in told[0].prompt_logprobs[1:]] == prompt[1:]


def test_a_closed_engine_ends_what_runs_and_takes_no_more():
    engine = make_engine()
    engine.add_request("a", [1], greedy(50))
    engine.step()
    engine.close()
    assert ends_of(engine.step()) == {"a": ("abort", None)}
    with pytest.raises(EngineDeadError, match="closed"):
        engine.add_request("b", [1], greedy(5))


@pytest.mark.parametrize("config", [ROOMY, CHUNKED, {**TIGHT, "max_prompt_logprob_rows": 3}])
def test_prompt_logprobs_are_those_of_the_model(config):
    model = TinyModel()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    logits = model.forward(torch.tensor(prompt), torch.arange(len(prompt)), model.dense, torch.arange(len(prompt)))
    truth = logits.log_softmax(-1)
    engine = make_engine(model, **config)
    for i in range(4):
        engine.add_request(f"busy{i}", [i] * 20, greedy(12))
    engine.add_request("a", prompt, greedy(6, prompt_logprobs=2, n=2))
    told = [output for output in run(engine) if output.prompt_logprobs is not None]  # once, preempted or not
    assert [(output.request.id, output.request.index) for output in told] == [("a", 0)]
    found = told[0].prompt_logprobs
    assert found[0] is None
    assert len(found) == len(prompt)
    for position in range(1, len(prompt)):
        entry = found[position][prompt[position]]
        assert entry.logprob == pytest.approx(float(truth[position - 1, prompt[position]]), abs=1e-4)
        assert entry.rank == int((truth[position - 1] > truth[position - 1, prompt[position]]).sum()) + 1
        assert len(found[position]) in (2, 3)


def test_prompt_logprobs_are_told_once_though_a_row_computes_its_prompt_again():
    class HoldsTheSecondOnce:
        held = False

        def select(self, logits, requests):
            tokens = logits.argmax(-1).tolist()
            if len(requests) == 2 and not self.held:
                self.held, tokens[1] = True, None
            return Selection(tokens)

    model = TinyModel()
    engine = make_engine(model)
    prompt = [3, 1, 4, 1, 5, 9]
    rows = engine.add_request("a", prompt, greedy(4, n=2, prompt_logprobs=0), selector=HoldsTheSecondOnce())
    outputs = engine.step()
    assert engine.preempt_held()
    engine.recompute(rows)
    outputs += run(engine)
    assert tokens_of(outputs) == {("a", index): model.generate(prompt, 4) for index in range(2)}
    assert [o.request.index for o in outputs if o.prompt_logprobs is not None] == [0]


def test_cached_prefixes_are_dropped_when_the_weights_have_changed():
    model = ChangingModel()
    engine = make_engine(model)
    prompt = list(range(20))
    engine.add_request("before", prompt, greedy(5))
    run(engine)
    for qkv in model.qkv:
        qkv.mul_(1.5)
    model.changed = True
    engine.add_request("after", prompt, greedy(5))
    assert tokens_of(run(engine))["after", 0] == model.generate(prompt, 5)
    assert engine.last_stats.total_prefix_hits == 0


def test_weights_changed_after_the_last_request_was_cancelled_are_noticed_too():
    model = ChangingModel()
    engine = make_engine(model)
    prompt = list(range(20))
    engine.add_request("before", prompt, greedy(50))
    engine.step()
    engine.abort("before")  # its end has not been told yet
    for qkv in model.qkv:
        qkv.mul_(1.5)
    model.changed = True
    engine.add_request("after", prompt, greedy(5))
    assert tokens_of(run(engine))["after", 0] == model.generate(prompt, 5)


def test_a_prompt_of_one_token_has_one_prompt_logprob_which_is_none():
    engine = make_engine()
    engine.add_request("a", [3], greedy(2, prompt_logprobs=1))
    assert [o.prompt_logprobs for o in run(engine)] == [[None], None]


def test_waste_is_the_unfilled_rest_of_last_blocks():
    engine = make_engine()
    engine.add_request("a", [1, 2, 3, 4, 5], greedy(9))
    engine.step()
    assert engine.last_stats.num_blocks_used == 2
    assert engine.last_stats.num_slots_wasted == 3
    assert engine.last_stats.kv_waste == 3 / 8
    run(engine)


def test_waste_counts_a_block_that_samples_share_once():
    engine = make_engine()
    engine.add_request("a", [1, 2, 3, 4, 5], greedy(9, n=8))
    engine.step()
    assert engine.last_stats.num_blocks_used == 2
    assert engine.last_stats.num_blocks_shared == 14
    assert engine.last_stats.kv_waste == 3 / 8
    run(engine)


def test_sizes_that_cant_work_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(4\) is below max_num_seqs \(8\)"):
        make_engine(max_num_batched_tokens=4)
    with pytest.raises(ConfigError, match="holds no block"):
        make_engine(num_blocks=None, kv_cache_bytes=100)
    with pytest.raises(ConfigError, match="block_size is 0"):
        make_engine(block_size=0)


def test_the_cache_is_sized_from_a_budget_of_bytes():
    bytes_per_block = 2 * 2 * 4 * 2 * 16 * 4  # layers, K and V, slots, kv heads, head dim, float32
    engine = make_engine(num_blocks=None, kv_cache_bytes=10 * bytes_per_block + 5)
    assert engine.sizes.num_blocks == 10
    assert engine.memory.num_bytes == 11 * bytes_per_block  # and the null block


@pytest.mark.parametrize(("watermark", "num_running"), [(0.0, 2), (0.5, 1)])
def test_a_newcomer_leaves_those_who_run_the_share_of_blocks_that_was_wished(watermark, num_running):
    engine = make_engine(num_blocks=10, watermark=watermark)
    for name in ("first", "second"):
        engine.add_request(name, [len(name)] * 15, SamplingParams(max_tokens=2, ignore_eos=True))  # four blocks each
    engine.step()
    assert engine.view().num_running == num_running
