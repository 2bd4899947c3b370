"""Steps that are begun before the last one's tokens are known: the same tokens, the same ends, nothing left over."""

import random

import pytest
import torch

from graph_stand_in import CapturablePlugin, OpRecorder
from mixed_workload import ROOMY, add_mixed_requests, greedy, in_every_size, in_every_way
from paged_core import Engine, EngineConfig, Greedy, SamplingParams, hookimpl
from paged_core.engine import assembly
from paged_core.sampling.sampler import Sampler, TokensOnDevice
from tiny_model import EOS, TinyModel


def make_engine(model=None, plugins=(), **config):
    usual = {"block_size": 4, "max_num_seqs": 8, "attention_backend": "reference", "seed": 0, "lookahead": True}
    return Engine(model or TinyModel(), EngineConfig(**{**usual, **ROOMY, **config}), plugins=plugins)


def run(engine, between=lambda: None):
    """Each row's tokens and end; and how many steps had been begun ahead."""
    tokens, ends, ahead = {}, {}, 0
    while engine.has_work:
        ahead += engine._lookahead._next is not None
        for output in engine.step():
            key = output.request.id, output.request.index
            tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                assert key not in ends
                ends[key] = str(output.finish_reason)
        engine.check()
        between()
    assert engine.memory.num_blocks_used == 0
    return tokens, ends, ahead


@in_every_way
def test_tokens_are_those_of_dense_attention(config, window, caching):
    model = TinyModel(window=window)
    engine = make_engine(model, enable_prefix_caching=caching, **config)
    truth = add_mixed_requests(engine, model)
    tokens, _, ahead = run(engine)
    assert tokens == truth
    assert ahead > 5


DRAWN = [
    {"temperature": 0.8},
    {"min_p": 0.05, "temperature": 1.5},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.2},
    {"temperature": 0},
]


@in_every_size
def test_drawn_tokens_are_those_that_each_row_gets_alone_and_without(config):
    rnd, model = random.Random(2), TinyModel()
    crowd, truth = make_engine(model, **config), {}
    for i in range(15):
        prompt = [rnd.randrange(90) for _ in range(rnd.randrange(1, 25))]
        params = SamplingParams(seed=i, n=1 + i % 2, max_tokens=rnd.randrange(2, 30), ignore_eos=True, **DRAWN[i % 5])
        alone = make_engine(model, lookahead=False)
        for engine in (alone, crowd):
            engine.add_request(str(i), prompt, params)
        truth |= run(alone)[0]
    tokens, _, ahead = run(crowd)
    assert tokens == truth
    assert ahead > 5


def test_a_steady_decode_of_drawn_rows_is_always_a_step_ahead():
    engine = make_engine()
    for i, params in enumerate(DRAWN):
        engine.add_request(str(i), [i, 2], SamplingParams(seed=i, max_tokens=12, ignore_eos=True, **params))
    assert run(engine)[2] == 11


def test_a_steady_decode_is_always_a_step_ahead_and_computes_no_token_too_many():
    computed = []

    class Counting(TinyModel):
        def forward(self, token_ids, *rest):
            computed.append(len(token_ids))
            return super().forward(token_ids, *rest)

    engine = make_engine(Counting())
    for i in range(3):
        engine.add_request(str(i), [i, 2], greedy(12))
    tokens, _, ahead = run(engine)
    assert tokens == {(str(i), 0): TinyModel().generate([i, 2], 12) for i in range(3)}
    assert computed == [6] + [3] * 11
    assert ahead == 11


def test_a_row_that_ends_unforeseen_takes_nobody_with_it():
    model = TinyModel()
    model.unembed[EOS] *= 1.5
    prompts = [[t] for t in range(40)]
    engine = make_engine(model, max_num_seqs=16)
    for prompt in prompts:
        engine.add_request(str(prompt[0]), prompt, greedy(30, ignore_eos=False))
    tokens, ends, ahead = run(engine)
    for prompt in prompts:
        truth, key = model.generate(prompt, 30), (str(prompt[0]), 0)
        stops = EOS in truth
        assert tokens[key] == (truth[: truth.index(EOS) + 1] if stops else truth)
        assert ends[key] == ("stop" if stops else "length")
    assert 5 < list(ends.values()).count("stop") < 40
    assert ahead > 20


def test_requests_may_come_be_cancelled_and_be_stopped_while_a_step_is_ahead():
    rnd, model = random.Random(4), TinyModel()
    engine = make_engine(model)
    rows, prompts = {}, {}

    def meddle():
        name = str(len(rows))
        if rnd.random() < 0.4 and len(rows) < 40:
            prompts[name] = [rnd.randrange(90) for _ in range(rnd.randrange(1, 20))]
            (rows[name],) = engine.add_request(name, prompts[name], greedy(rnd.randrange(1, 25)))
        running = [row for row in rows.values() if not row.finished]
        if running and rnd.random() < 0.1:
            engine.abort(rnd.choice(running).id)
        running = [row for row in rows.values() if not row.finished]
        if running and rnd.random() < 0.1:
            engine.stop(rnd.choice(running))

    ahead = 0
    for _ in range(3):
        while len(rows) < 3:
            meddle()
        ahead += run(engine, meddle)[2]
        for name, row in rows.items():
            assert row.finished
            assert row.output_token_ids == model.generate(prompts[name], len(row.output_token_ids))
        rows.clear()
    assert ahead > 20


def test_a_newcomer_waits_for_one_step_at_most():
    engine = make_engine()
    engine.add_request("a", [1, 2], greedy(50))
    for _ in range(5):
        engine.step()
    engine.add_request("b", [3, 4], greedy(3))
    told = [[output.request.id for output in engine.step()] for _ in range(3)]
    assert told[0] == ["a"]  # had been begun
    assert told[1] == ["a", "b"]


def test_requests_whose_next_step_needs_the_host_are_not_run_ahead_and_get_what_they_always_got():
    found = []
    for lookahead in (True, False):
        engine = make_engine(lookahead=lookahead)
        for i in range(3):
            engine.add_request(f"p{i}", [i, 2], greedy(10))
        engine.add_request("nucleus", [5], SamplingParams(seed=3, max_tokens=6, top_p=0.9))
        engine.add_request("told", [6], greedy(7, logprobs=1))
        engine.add_request("edited", [7], greedy(8, repetition_penalty=1.3))
        found.append(run(engine))
    assert found[0][:2] == found[1][:2]
    assert (found[0][2], found[1][2]) == (1, 0)  # the last step: only plain rows were left


def test_off_it_is_off_and_on_a_cpu_it_is():
    for config in ({"lookahead": False}, {"lookahead": None}):
        engine = make_engine(**config)
        engine.add_request("a", [1, 2], greedy(9))
        tokens, _, ahead = run(engine)
        assert (tokens["a", 0], ahead) == (TinyModel().generate([1, 2], 9), 0)


def test_with_graphs_the_logits_of_a_step_are_used_before_the_next_one_overwrites_them(monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    engine = make_engine(plugins=[CapturablePlugin()], max_model_len=100, max_num_seqs=5, cuda_graphs=True)
    truth = {}
    for i in range(9):
        engine.add_request(str(i), [i, 3, 4], greedy(5 + 4 * i))
        truth[str(i), 0] = TinyModel().generate([i, 3, 4], 5 + 4 * i)
    plain = make_engine(lookahead=False)
    for i, way in enumerate(DRAWN):
        params = SamplingParams(seed=i, max_tokens=20, ignore_eos=True, **way)
        for each in (plain, engine):
            each.add_request(f"drawn {i}", [i, 5], params)
    truth |= run(plain)[0]
    tokens, _, ahead = run(engine)
    assert tokens == truth
    assert ahead > 20
    assert engine.last_stats.total_late_compiles == 0


@pytest.mark.parametrize("error", [ValueError("trap"), torch.OutOfMemoryError("no room")], ids=["fails", "no room"])
def test_a_step_that_fails_ahead_is_computed_in_its_turn(error):
    class Failing(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            failing = 17 in positions.tolist() and len(token_ids) > 1
            logits = super().forward(token_ids, positions, attend, sample_indices)
            if failing:
                raise error
            return logits

    engine = make_engine(Failing())
    engine.add_request("a", [1, 2], greedy(30))
    engine.add_request("b", [4], greedy(30))
    if isinstance(error, ValueError):
        tokens, _, ahead = {}, {}, 0
        with pytest.raises(Exception, match="the model fails on batches"):
            run(engine)
        return
    tokens, _, ahead = run(engine)
    assert tokens == {("a", 0): TinyModel().generate([1, 2], 30), ("b", 0): TinyModel().generate([4], 30)}
    assert ahead > 20


@pytest.mark.parametrize("way", DRAWN, ids=str)
def test_a_model_whose_logits_break_ends_the_row_whose_logits_they_are(way):
    class Breaking(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            logits = super().forward(token_ids, positions, attend, sample_indices)
            logits[positions[sample_indices] == 9] = float("nan")
            return logits

    found = []
    for lookahead in (True, False):
        engine = make_engine(Breaking(), lookahead=lookahead)
        (long,) = engine.add_request("long", [1, 2], SamplingParams(seed=1, max_tokens=30, ignore_eos=True, **way))
        engine.add_request("short", [4], greedy(5))
        tokens, ends, ahead = run(engine)
        assert ends == {("long", 0): "error", ("short", 0): "length"}
        assert long.error == "the model's logits hold NaN"
        assert tokens["short", 0] == TinyModel().generate([4], 5)
        assert (ahead > 3) is lookahead
        found.append(tokens)
    assert found[0] == found[1]


def test_nobody_waits_before_the_tokens_are_needed(monkeypatch):
    order = []

    class Noting(TinyModel):
        def forward(self, *args):
            order.append("compute")
            return super().forward(*args)

    fetch = TokensOnDevice.fetch
    monkeypatch.setattr(TokensOnDevice, "fetch", lambda self: order.append("fetch") or fetch(self))
    engine = make_engine(Noting())
    engine.add_request("a", [1, 2], greedy(5))
    run(engine)
    assert order == ["compute", *["compute", "fetch"] * 4, "fetch"]


def test_rows_of_one_selector_that_can_choose_without_the_host_are_run_ahead_and_mixed_ones_are_not():
    likeliest = Greedy()
    for selectors, wanted in (((likeliest, likeliest), 14), ((likeliest, None), 5)):
        engine = make_engine()
        engine.add_request("a", [1, 2], greedy(9), selector=selectors[0])
        engine.add_request("b", [4], greedy(15), selector=selectors[1])
        tokens, _, ahead = run(engine)
        assert tokens == {("a", 0): TinyModel().generate([1, 2], 9), ("b", 0): TinyModel().generate([4], 15)}
        assert ahead == wanted


def test_a_sampler_whose_select_is_its_own_is_not_passed_over_by_a_choose_that_it_inherits():
    class Sevens(Sampler):
        def select(self, logits, requests):
            logits = logits.clone()
            logits[:, 7] += 1000
            return super().select(logits, requests)

    class Both(Sevens):
        def choose(self, logits, requests, num_unknown):
            logits = logits.clone()
            logits[:, 7] += 1000
            return super().choose(logits, requests, num_unknown)

    for kind, is_ahead in ((Sevens, False), (Both, True)):

        class Plugin:
            @hookimpl
            def create_sampler(self, spec, kind=kind):
                return kind()

        engine = make_engine(plugins=[Plugin()])
        engine.add_request("a", [1, 2], greedy(6))
        tokens, _, ahead = run(engine)
        assert tokens == {("a", 0): [7] * 6}
        assert (ahead > 0) is is_ahead
