"""Engine: the tokens are those of the model, whatever else runs beside them; each request's trouble is its own."""

from functools import partial

import pytest
import torch

from mixed_workload import CHUNKED, ROOMY, TIGHT, add_mixed_requests, greedy, in_every_size, in_every_way
from paged_core import (
    ConfigError,
    Engine,
    EngineConfig,
    EngineDeadError,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
    Selection,
    hookimpl,
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


class BeamSelector:
    """Plain beam search over one lockstep group: sums of log-probabilities, no length penalty."""

    def __init__(self, num_beams):
        self.scores = torch.tensor([0.0] + [-1e9] * (num_beams - 1))

    def select(self, logits, requests):
        total = self.scores[:, None] + logits.log_softmax(-1)  # [beams, V]
        best = total.flatten().topk(len(requests))
        self.scores = best.values
        return Selection((best.indices % VOCAB).tolist(), parents=(best.indices // VOCAB).tolist())


def beam_search(model, prompt, num_beams, num_tokens):
    beams = [(0.0, [])]
    for _ in range(num_tokens):
        candidates = []
        for score, tokens in beams:
            all_ids = torch.tensor(prompt + tokens)
            last = torch.tensor([len(all_ids) - 1])
            logits = model.forward(all_ids, torch.arange(len(all_ids)), model.dense, last)
            values, ids = logits[0].log_softmax(-1).topk(num_beams)
            candidates += [(score + float(v), [*tokens, int(t)]) for v, t in zip(values, ids, strict=True)]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return [tokens for _, tokens in beams]


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_beams_in_lockstep_over_forked_blocks_find_what_plain_beam_search_finds(config):
    model, prompt = TinyModel(), [8, 6, 7, 5, 3, 0, 9]
    engine = make_engine(model, **config)
    for i in range(4):
        engine.add_request(f"busy{i}", [i] * 18, greedy(20))
    rows = engine.add_group("beams", [prompt] * 4, greedy(12), selector=BeamSelector(4))
    outputs = run(engine)
    assert [row.output_token_ids for row in rows] == beam_search(model, prompt, 4, 12)
    assert tokens_of(outputs)["busy2", 0] == model.generate([2] * 18, 20)


class LaterSelector:
    """Keeps what it is shown; the tokens come later, through ``Engine.resume``."""

    def __init__(self):
        self.logits = {}  # by request: f32 [V]

    def select(self, logits, requests):
        self.logits.update(zip(requests, logits, strict=True))
        return Selection([None] * len(requests))


@in_every_size
def test_beams_whose_tokens_are_brought_from_outside_are_those_of_plain_beam_search(config):
    model, prompt = TinyModel(), [8, 6, 7, 5, 3, 0, 9]
    engine = make_engine(model, **config)
    for i in range(4):
        engine.add_request(f"busy{i}", [i] * 18, greedy(20))
    later, beams = LaterSelector(), BeamSelector(4)
    rows = engine.add_group("beams", [prompt] * 4, greedy(13), selector=later)
    outputs = []
    for _ in range(12):
        while not all(row.held for row in rows):
            outputs += engine.step()
            engine.check()
        choice = beams.select(torch.stack([later.logits[row] for row in rows]), rows)
        engine.resume(rows, choice.token_ids, choice.parents)
    assert [row.output_token_ids for row in rows] == beam_search(model, prompt, 4, 12)
    engine.abort("beams")
    outputs += run(engine)
    assert tokens_of(outputs)["busy2", 0] == model.generate([2] * 18, 20)


def test_rows_of_a_group_with_one_prompt_share_the_blocks_of_that_prompt():
    engine, later = make_engine(), LaterSelector()
    rows = engine.add_group("same", [[5] * 10, [6] * 9, [5] * 10, [5] * 10], greedy(4), selector=later)
    engine.step()
    assert all(row.held for row in rows)
    assert engine.last_stats.num_tokens == 19, "each prompt is computed once"
    assert engine.last_stats.num_blocks_used == 3 + 3
    assert torch.equal(later.logits[rows[0]], later.logits[rows[3]])
    engine.resume(rows, [1, 1, 2, 3])
    engine.step()
    engine.check()
    assert engine.memory.num_blocks_used == 6 + 2, "two of the three rows that share a half-filled block have copied it"
    truth = TinyModel().generate([5] * 10 + [3], 1)
    assert [int(later.logits[rows[3]].argmax())] == truth


def test_a_group_that_cant_be_served_is_refused():
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="at least one prompt"):
        engine.add_group("empty", [], greedy(4), selector=LaterSelector())
    with pytest.raises(InvalidRequestError, match=r"prompt_logprobs.*add_request"):
        engine.add_group("asks", [[1, 2], [3]], greedy(4, prompt_logprobs=0), selector=LaterSelector())
    assert not engine.has_work
    assert engine.num_open == 0


def test_a_held_group_gives_way_to_others_and_goes_on_when_it_is_resumed():
    model, later = TinyModel(), LaterSelector()
    engine = make_engine(model, num_blocks=12, watermark=0)
    engine.add_request("old", [3] * 20, greedy(20))
    rows = engine.add_group("held", [[7] * 9], greedy(8), selector=later)
    outputs = [output for _ in range(19) for output in engine.step()]
    assert rows[0].held and not rows[0].block_table, "its blocks went to the older request"
    engine.resume(rows, [9])
    while not (rows[0].held and len(rows[0].tokens) == rows[0].num_computed):
        outputs += engine.step()
    assert [int(later.logits[rows[0]].argmax())] == model.generate([7] * 9 + [9], 1)
    assert tokens_of(outputs)["old", 0] == model.generate([3] * 20, 20)


def test_an_engine_whose_requests_are_all_held_has_nothing_to_do():
    engine = make_engine()
    rows = engine.add_group("held", [[7] * 8], greedy(8), selector=LaterSelector())
    engine.step()
    assert not engine.has_work
    assert engine.step() == []
    with pytest.raises(InvalidRequestError, match="token id 4000 was chosen; ids go from 0 to"):
        engine.resume(rows, [4000])
    engine.resume(rows, [1])
    with pytest.raises(InvalidRequestError, match="isn't held: there is nothing to resume"):
        engine.resume(rows, [1])
    engine.abort("held")
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]


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
