"""transformers models under graphs: their forwards are captured as they are, on whatever device the tests have."""

import gc
import logging
import weakref

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from graph_stand_in import CapturablePlugin, OpRecorder
from paged_core import Engine, EngineConfig, SamplingParams
from paged_core.engine import assembly
from paged_hf.model.paged_model import HFPagedModel

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
MODELS = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "gemma2": SIZES | {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mixtral": SIZES | {"num_local_experts": 4},
}


def make_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**MODELS[name])).eval()


def tokens(model, **config):
    sizes = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 5, "max_num_batched_tokens": 32, "max_model_len": 100}
    # The CPU's own forwards are no operations of torch: the recorder would not see them.
    config = EngineConfig(**sizes, **config, fast_forwards=False)
    engine = Engine(model, config, plugins=[CapturablePlugin()])
    for i in range(5):
        engine.add_request(str(i), [i, 2, 3 + i] * (1 + i), SamplingParams(temperature=0, max_tokens=4 + 3 * i))
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found.setdefault(output.request.id, []).extend(output.token_ids)
    return found, engine


@pytest.mark.parametrize("name", [*MODELS])
def test_a_models_decode_steps_are_captured_and_replayed_with_the_same_tokens(name, monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    model = make_model(name)
    plain, _ = tokens(model, cuda_graphs=False)
    replayed, engine = tokens(model, cuda_graphs=True)
    assert replayed == plain
    assert engine.captured_steps
    assert engine.last_stats.total_late_compiles == 0


def test_frequencies_that_follow_the_longest_request_are_not_captured_and_the_tokens_stay_right(monkeypatch, caplog):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES, rope_parameters=rope)).eval()
    plain, _ = tokens(model, cuda_graphs=False)
    with caplog.at_level(logging.WARNING, "paged_core"):
        eager, engine = tokens(model, cuda_graphs=True)
    assert eager == plain
    assert "without CUDA graphs" in caplog.text
    assert engine.captured_steps == set()


def make_engine(model, **config):
    sizes = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 100}
    config = EngineConfig(**{**sizes, "cuda_graphs": True, "fast_forwards": False, **config})
    return Engine(model, config, plugins=[CapturablePlugin()])


def run(engine, prompt, between=lambda step: None):
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    found, step = [], 0
    while engine.has_work:
        between(step)
        step += 1
        found += [token for output in engine.step() for token in output.token_ids]
    return found


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_what_a_user_does_in_python_is_done_in_every_step(way, monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    model, strength, calls = make_model("llama"), [0.0], []
    module = model.model.layers[0].mlp

    def add(value):
        calls.append(value)
        return value + strength[0]

    def strengthen(step):
        if step == 0:
            calls.clear()  # of the pass that took the module in
        strength[0] = 5.0 * (step > 4)

    plain = run(make_engine(model), [1, 2, 3])
    engine = make_engine(model)
    assert engine.captured_steps
    handle = None
    if way == "hook":
        handle = module.register_forward_hook(lambda _, given, out: add(out))
    elif way == "pre-hook":
        handle = module.register_forward_pre_hook(lambda _, given: (add(given[0]),))
    else:
        own = module.forward
        module.forward = lambda x: add(own(x))
    changed = run(engine, [1, 2, 3], strengthen)
    assert len(calls) == 10
    assert changed == run(make_engine(model), [1, 2, 3], strengthen)
    assert changed[:4] == plain[:4]
    assert changed != plain
    if handle is not None:
        handle.remove()
    else:
        del module.forward
    assert run(engine, [1, 2, 3]) == plain
    assert engine.captured_steps


def test_prompts_that_are_embeddings_do_not_cost_others_their_graphs(monkeypatch):
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    model = make_model("llama")
    paged = HFPagedModel(model)
    plain = run(make_engine(model), [1, 2, 3])
    engine = make_engine(paged, kv_cache_slab_bytes=4096)  # nothing is captured ahead
    ids = paged.acquire_ids(model.get_input_embeddings()(torch.tensor([1, 2, 3])).detach())
    assert run(engine, ids) == plain
    assert not engine.captured_steps
    paged.release_ids(ids)
    assert run(engine, [1, 2, 3]) == plain
    assert engine.captured_steps
    captures = engine.last_stats.total_late_compiles
    ids = paged.acquire_ids(model.get_input_embeddings()(torch.tensor([1, 2, 3])).detach())
    assert run(engine, ids) == plain
    assert engine.last_stats.total_late_compiles == captures, "what is captured is replayed"


def test_a_model_that_outlives_its_engine_keeps_none_of_its_memory():
    paged = HFPagedModel(make_model("llama"))
    engine = make_engine(paged, cuda_graphs=False)
    run(engine, [1, 2, 3])
    cache = weakref.ref(engine._runner.cache)
    del engine
    gc.collect()
    assert cache() is None
