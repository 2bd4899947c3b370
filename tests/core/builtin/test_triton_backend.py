"""The GPU's attention backend in an engine: the tokens of the reference, and what it leaves to others.

Where there is no GPU, its kernels are interpreted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interpreter import DEVICE
from paged_core import Engine, EngineConfig, SamplingParams, UnsupportedModel
from paged_core.builtin.triton_attention import TritonBackend, create_attention_backend
from paged_core.engine.sizes import step_sizes
from paged_kernels.triton import launch, tiles, work
from tiny_model import TinyModel

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 20, 21, 22, 23, 24]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
CONFIG = EngineConfig(num_blocks=24, block_size=4, max_num_batched_tokens=8)


def tiny(**facts) -> TinyModel:
    """On the GPU where there is one."""
    model = TinyModel(**facts)
    for name in ("embed", "place", "unembed"):
        setattr(model, name, getattr(model, name).to(DEVICE))
    model.qkv, model.out = ([weight.to(DEVICE) for weight in weights] for weights in (model.qkv, model.out))
    layers = tuple(replace(layer, device=DEVICE) for layer in model.spec.layers)
    model.spec = replace(model.spec, layers=layers, device=DEVICE)
    return model


def answers(model: TinyModel, **config) -> dict[str, list[int]]:
    engine = Engine(model, replace(CONFIG, **config))
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, replace(GREEDY, n=2) if i == 0 else GREEDY)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(f"{output.request.id}/{output.request.index}", []).extend(output.token_ids)
    return tokens


def asked(name: str, spec, **config):
    return create_attention_backend(name, spec, step_sizes(replace(CONFIG, **config), spec))


@pytest.mark.parametrize("window", [None, 6])
def test_greedy_tokens_are_the_references(window):
    """Chunks of prompts beside decode rows, and blocks that are copied before siblings write."""
    expected = answers(tiny(window=window), attention_backend="reference")
    assert answers(tiny(window=window), attention_backend="triton") == expected
    assert len(expected) == 3 and all(len(tokens) == 3 for tokens in expected.values())


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_greedy_tokens_from_quantised_caches_are_the_references(dtype):
    expected = answers(tiny(), attention_backend="reference", kv_cache_dtype=dtype)
    assert answers(tiny(), attention_backend="triton", kv_cache_dtype=dtype) == expected


@pytest.fixture
def short_stretches(monkeypatch):
    """What is read together is read in stretches of eight keys; yields how many requests each item was for."""
    monkeypatch.setattr(tiles, "SPLITS", {"SPLIT": 8, "MAX_SPLITS": 8})
    counts: list[int] = []
    plan = launch.AttentionPlan.plan

    def watch(planned, *args):
        plan(planned, *args)
        rows, starts = planned.decode_items
        counts.extend(rows.view(-1, 1 + planned.decode_tile["ROOM"])[: int(starts[-1]), 0].tolist())

    monkeypatch.setattr(launch.AttentionPlan, "plan", watch)
    return counts


def test_samples_and_beams_that_read_their_prompt_together_are_the_references(short_stretches, monkeypatch):
    """And the same without that."""
    asked = {
        "samples": SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=2, ignore_eos=True),
        "beams": SamplingParams(n=2, use_beam_search=True, max_tokens=2, ignore_eos=True),
    }
    prompt = [7 * i % 90 for i in range(17)]

    def answered(backend: str) -> dict[str, list[list[int]]]:
        engine = Engine(tiny(), replace(CONFIG, attention_backend=backend, num_blocks=64, max_num_batched_tokens=24))
        for name, params in asked.items():
            engine.add_request(name, prompt, params)
        found: dict[str, list[list[int]]] = {}
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason is not None:
                    found.setdefault(output.request.id, []).append(output.request.output_token_ids)
        return found

    shared = answered("triton")
    assert max(short_stretches) > 2  # samples and beams together
    assert shared == answered("reference")
    monkeypatch.setattr(launch.AttentionPlan, "_can_share", lambda *_: False)
    short_stretches.clear()
    assert answered("triton") == shared and max(short_stretches) == 1


def test_warming_up_compiles_what_looks_for_blocks_in_common(monkeypatch):
    started = []

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **sizes: started.append(sizes)

    monkeypatch.setattr(work, "share_kernel", Watched())
    spec = tiny().spec
    TritonBackend(spec, spec.dtype, 4).warm_up()
    assert [sizes["BLOCK_SIZE"] for sizes in started] == [4]


def test_a_models_facts_reach_the_kernels(monkeypatch):
    """Layers that differ: each gets its own."""
    spec = tiny().spec
    first = replace(spec.layers[0], softcap=3.0, has_sinks=True, has_key_bias=True)
    backend = TritonBackend(replace(spec, layers=(first, replace(spec.layers[0], num_kv_heads=4))), torch.float32, 4)
    seen = []
    run = launch.AttentionPlan.run

    def watch(plan, q, k, v, cache, extras):
        seen.append((cache.keys.shape[1], extras.softcap, extras.sinks is not None, extras.key_bias is not None))
        return run(plan, q, k, v, cache, extras)

    monkeypatch.setattr(launch.AttentionPlan, "run", watch)
    told = []
    backend.warm_up(lambda what, done, total: told.append((done, total)))
    assert set(seen) == {(2, 3.0, True, True), (4, None, False, False)}
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_models_on_the_cpu_are_left_to_others_unless_it_is_asked_for_by_name():
    assert asked("auto", TinyModel().spec) is None
    assert asked("reference", TinyModel().spec) is None


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert asked("triton", TinyModel().spec) is None
    with pytest.raises(UnsupportedModel, match="no attention backend called 'triton'"):
        Engine(TinyModel(), replace(CONFIG, attention_backend="triton"))


@pytest.mark.parametrize(
    ("change", "config"),
    [({"head_dim": 576}, {}), ({"value_head_dim": 512}, {}), ({"head_dim": 300}, {})],
    ids=str,
)
def test_what_its_kernels_cannot_do_is_left_to_others(change, config):
    spec = tiny().spec
    other = replace(spec, layers=(spec.layers[0], replace(spec.layers[1], **change)))
    assert asked("triton", spec) is not None
    assert asked("triton", other, **config) is None


def test_warming_up_writes_to_no_slot_that_is_not_there(monkeypatch):
    written = []
    store = launch.store_kv

    def watched(k, v, cache, slots):
        written.append((int(slots.max()), cache.keys.shape[0] * cache.keys.shape[2]))
        return store(k, v, cache, slots)

    monkeypatch.setattr(launch, "store_kv", watched)
    spec = tiny().spec
    for block_size in (1, 2):
        TritonBackend(spec, spec.dtype, block_size).warm_up()
    assert written
    assert all(slot < num_slots for slot, num_slots in written)
