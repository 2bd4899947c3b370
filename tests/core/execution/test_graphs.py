"""Decode steps that are replayed: the same tokens as without graphs, and no capture that a step would wait for."""

import logging
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from graph_stand_in import CapturablePlugin, OpRecorder
from paged_core import ConfigError, Engine, EngineConfig, SamplingParams, Selection
from paged_core.engine import assembly
from paged_core.engine.sizes import step_sizes
from paged_core.execution import graphs
from paged_core.execution.graphs import length_classes, row_classes
from tiny_engine import greedy, run, tokens_of
from tiny_model import VOCAB, ChangingModel, TinyModel


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)


def make_engine(model=None, plugins=(), **config):
    usual = {
        "block_size": 4,
        "num_blocks": 200,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "seed": 0,
        "cuda_graphs": True,
        "max_model_len": 200,
    }
    return Engine(model or TinyModel(), EngineConfig(**{**usual, **config}), plugins=[*plugins, CapturablePlugin()])


def counting(model):
    """How often the model's own Python has run since."""
    calls = []
    forward = model.forward

    def counted(token_ids, *rest):
        calls.append(len(token_ids))
        return forward(token_ids, *rest)

    model.forward = counted
    return calls


def workload(engine, seed=1, num=14):
    rnd, truth, model = random.Random(seed), {}, TinyModel(window=engine.spec.layers[0].sliding_window)
    for i in range(num):
        prompt = [rnd.randrange(90) for _ in range(rnd.randrange(1, 40))]
        num_tokens = rnd.randrange(1, 30)
        engine.add_request(str(i), prompt, greedy(num_tokens, n=1 + i % 3))
        truth |= {(str(i), row): model.generate(prompt, num_tokens) for row in range(1 + i % 3)}
    return truth


@pytest.mark.parametrize("window", [None, 10], ids=["full", "windowed"])
@pytest.mark.parametrize("num_blocks", [200, 30], ids=["roomy", "preempting"])
def test_replayed_steps_give_the_tokens_of_dense_attention(window, num_blocks):
    model = TinyModel(window=window)
    engine = make_engine(model, num_blocks=num_blocks)
    calls = counting(model)
    truth = workload(engine)
    steps = 0
    found = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request.id, output.request.index), []).extend(output.token_ids)
        steps += 1
    assert found == truth
    assert len(calls) < steps - 20, "decode steps ran the model's Python"
    assert engine.last_stats.total_late_compiles == 0


def test_all_graphs_are_captured_while_the_engine_is_built_the_largest_first():
    told = []
    model = TinyModel()
    calls = counting(model)
    engine = Engine(
        model,
        EngineConfig(block_size=4, num_blocks=60, max_num_seqs=10, max_num_batched_tokens=32, cuda_graphs=True),
        plugins=[CapturablePlugin()],
        progress=lambda *what: told.append(what),
    )
    sizes = [10, 8, 4, 2, 1]
    assert calls == [size for size in sizes for _ in range(2)]  # once to warm up, once to capture
    assert told == [("capturing decode steps", done, 5) for done in range(6)]
    workload(engine)
    tokens_of(run(engine))
    assert engine.last_stats.total_late_compiles == 0


def test_classes_cover_every_size_and_waste_little():
    for most in (1, 2, 3, 7, 8, 9, 64, 100, 256, 1000):
        sizes = row_classes(most)
        assert sizes == sorted(set(sizes))
        assert (sizes[0], sizes[-1]) == (1, most)
        assert len(sizes) < 28
        assert all(b - a <= max(8, b // 4) for a, b in pairwise(sizes))
    assert length_classes(500) == [500]
    assert length_classes(32768) == [1024, 4096, 16384, 32768]


def test_each_length_has_a_graph_of_its_own(monkeypatch):
    engine = make_engine(TinyModel(), max_model_len=200)
    assert engine.captured_steps == {(rows, 200) for rows in (6, 4, 2, 1)}
    monkeypatch.setattr(graphs, "length_classes", lambda longest: [32, longest])
    engine = make_engine(TinyModel(), max_model_len=200)
    engine.release_memory()  # and the graphs: they are captured again when a step wants them
    engine.add_request("a", [1, 2, 3], greedy(60))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([1, 2, 3], 60)
    assert engine.captured_steps == {(1, 32), (1, 200)}


def test_sampled_tokens_are_those_of_an_engine_without_graphs():
    found = []
    for cuda_graphs in (True, False):
        engine = make_engine(cuda_graphs=cuda_graphs)
        for i in range(8):
            params = SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=20, logprobs=2, prompt_logprobs=1)
            engine.add_request(str(i), [i, 4, 5], params)
        found.append(tokens_of(run(engine)))
    assert found[0] == found[1]


def test_a_padding_row_writes_over_nothing():
    # Four rows, then three in the same graph, which soon need the block that the fourth wrote to last.
    engine = make_engine(enable_prefix_caching=False, num_blocks=37)
    lengths = {0: 40, 1: 40, 2: 40, 3: 6}
    for i, num in lengths.items():
        engine.add_request(str(i), [i] * 7, greedy(num))
    assert tokens_of(run(engine)) == {(str(i), 0): TinyModel().generate([i] * 7, num) for i, num in lengths.items()}


def test_a_growing_cache_is_not_captured_ahead_and_each_growth_drops_the_graphs():
    block_bytes = 2 * 2 * 4 * 2 * 16 * 4
    engine = make_engine(kv_cache_slab_bytes=8 * block_bytes)
    assert engine.captured_steps == set()
    truth = workload(engine)
    assert tokens_of(run(engine)) == truth
    assert engine.last_stats.total_late_compiles > 0
    assert engine.release_memory()
    assert not engine.captured_steps
    truth = workload(engine, seed=2)
    assert tokens_of(run(engine)) == truth


def test_weights_that_change_drop_the_graphs():
    model, other = ChangingModel(), TinyModel(seed=5)
    engine = make_engine(model)
    engine.add_request("a", [1, 2, 3], greedy(10))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([1, 2, 3], 10)
    model.unembed, model.embed, model.qkv, model.out, model.place, model.changed = (
        other.unembed, other.embed, other.qkv, other.out, other.place, True,
    )  # fmt: skip
    engine.add_request("b", [1, 2, 3], greedy(10))
    assert tokens_of(run(engine))["b", 0] == other.generate([1, 2, 3], 10)


def test_a_model_that_waits_for_its_device_runs_without_graphs_and_the_log_says_so_once(caplog):
    class Waiting(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            assert int(positions.max()) < 512
            return super().forward(token_ids, positions, attend, sample_indices)

    with caplog.at_level(logging.WARNING, "paged_core"):
        engine = make_engine(Waiting())
        truth = workload(engine)
        assert tokens_of(run(engine)) == truth
    told = [record.getMessage() for record in caplog.records if "without CUDA graphs" in record.getMessage()]
    assert len(told) == 1
    assert "not permitted when stream is capturing" in told[0]


def test_a_failing_step_is_searched_for_its_culprit_without_graphs(monkeypatch):
    class Trap(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            if 95 in token_ids.tolist():  # tolist is no operation: the capture doesn't see it
                raise ValueError("trap")
            return super().forward(token_ids, positions, attend, sample_indices)

    engine = make_engine(Trap())
    rerun = graphs.DecodeGraphs.run

    def failing(these, batch, *how):
        if 95 in batch.token_ids.tolist():
            raise RuntimeError("a replay failed")
        return rerun(these, batch, *how)

    monkeypatch.setattr(graphs.DecodeGraphs, "run", failing)
    prompts = {i: [i, 2, 3] for i in range(4)}
    for i, prompt in prompts.items():
        engine.add_request(str(i), prompt, greedy(20, logit_bias={95: 1000.0 if i == 2 else -1000.0}))
    ends = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                ends[output.request.id] = str(output.finish_reason)
    assert ends == {"0": "length", "1": "length", "2": "error", "3": "length"}


def test_logits_that_a_requests_own_selector_keeps_are_not_overwritten():
    class Keeping:
        def __init__(self):
            self.kept = []

        def select(self, logits, requests):
            self.kept.append((logits, logits.clone()))
            return Selection([int(row.argmax()) for row in logits])

    engine = make_engine()
    selector = Keeping()
    engine.add_request("a", [1, 2, 3], greedy(12), selector=selector)
    engine.add_request("b", [4, 5], greedy(15))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([1, 2, 3], 12)
    assert all(torch.equal(kept, seen) for kept, seen in selector.kept)


def test_asking_for_graphs_where_there_can_be_none_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ConfigError, match="attention backend 'reference' can't be captured; leave it out"):
        Engine(TinyModel(), EngineConfig(attention_backend="reference", cuda_graphs=True))
    monkeypatch.delitem(assembly.RECORDERS, "cpu")
    with pytest.raises(ConfigError, match="the model is on cpu, not on a CUDA device"):
        make_engine()
    assert make_engine(cuda_graphs=None).captured_steps is None


def test_a_model_on_several_devices_has_no_graphs_and_asking_for_them_is_refused():
    spec, backend = TinyModel().spec, CapturablePlugin().create_attention_backend("auto", TinyModel().spec)
    elsewhere = replace(spec.layers[1], device=torch.device("meta"))
    spec = replace(spec, layers=(spec.layers[0], elsewhere))
    sizes = step_sizes(EngineConfig(), spec)
    assert assembly.create_graphs(spec, EngineConfig(), sizes, backend) is None
    with pytest.raises(ConfigError, match="cuda_graphs is True, but the model's layers are on several devices; leave"):
        assembly.create_graphs(spec, EngineConfig(cuda_graphs=True), sizes, backend)


@pytest.mark.parametrize("device", ["cuda"] * torch.cuda.is_available() or ["cpu"])
def test_a_recorder_repeats_work_on_the_same_memory(device):
    x = torch.zeros(4, device=device)
    out = torch.empty(4, device=device)
    replay = assembly.RECORDERS[device](torch.device(device))(lambda: out.copy_((x + 1).relu()))
    for value in (1.0, -3.0, 5.0):
        x.fill_(value)
        replay()
        assert out.tolist() == [max(0.0, value + 1)] * 4


def test_no_token_of_the_vocabulary_is_out_of_a_graphs_reach():
    engine = make_engine()
    engine.add_request("a", [VOCAB - 1, 0], greedy(5))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([VOCAB - 1, 0], 5)


class Scarce(OpRecorder):
    """Has no memory for a capture while ``room`` is 0."""

    room = 100

    def __call__(self, work):
        if Scarce.room == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        Scarce.room -= 1
        return super().__call__(work)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_step_without_memory_for_its_graph_takes_a_larger_one_or_none_and_the_others_stay(room, monkeypatch, caplog):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", lambda device: Scarce())
    monkeypatch.setattr(Scarce, "room", room)
    model = TinyModel()
    with caplog.at_level(logging.WARNING, "paged_core"):
        engine = make_engine(model)  # the largest is captured first
    assert len(engine.captured_steps) == room
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["no memory for more CUDA graphs"]
    calls = counting(model)
    engine.add_request("a", [1, 2, 3], greedy(10))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([1, 2, 3], 10)
    assert len(calls) == (1 if room else 10)
    monkeypatch.setattr(Scarce, "room", 100)
    assert engine.release_memory()  # and with it what was remembered of memory
    engine.add_request("a", [1, 2, 3], greedy(10))
    assert tokens_of(run(engine))["a", 0] == TinyModel().generate([1, 2, 3], 10)
    assert engine.captured_steps == {(1, 200)}


def test_a_late_capture_without_memory_leaves_the_running_graphs_alone(monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", lambda device: Scarce())
    engine = make_engine()
    engine.release_memory()
    engine.add_request("long", [1, 2, 3], greedy(20))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(Scarce, "room", 0)
    engine.add_request("b", [4, 5], greedy(5))
    assert tokens_of(run(engine))["b", 0] == TinyModel().generate([4, 5], 5)
    assert engine.captured_steps == {(1, 200)}
