"""K/V that take what a device has left beside the model and its largest step, told by a profiling step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from paged_core import ConfigError, Engine, EngineConfig, PagedModel
from paged_core.execution import kv_cache, profile
from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.schedule import Limits
from tiny_engine import greedy
from tiny_model import TinyModel

BLOCK = 4
BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 16 * 4  # layers, K and V, slots, kv heads, head dim, float32


class FakeGauge:
    """A device of 10 MB, 6 MB of them taken; a step takes 1 MB."""

    started = 0

    def __init__(self, device):
        self.device = device

    def start(self):
        FakeGauge.started += 1

    def total(self):
        return 10_000_000

    def used(self):
        return 6_000_000

    def peak(self):
        assert FakeGauge.started
        return 1_000_000


@pytest.fixture(autouse=True)
def a_device_that_tells(monkeypatch):
    monkeypatch.setitem(profile.GAUGES, "cpu", FakeGauge)
    monkeypatch.setattr(FakeGauge, "started", 0)


def make_engine(model=None, **config):
    usual = {"block_size": BLOCK, "max_num_seqs": 8, "max_num_batched_tokens": 50, "attention_backend": "reference"}
    return Engine(model or TinyModel(), EngineConfig(**{**usual, **config}))


def test_the_cache_takes_the_share_that_is_left_beside_model_and_step():
    engine = make_engine(gpu_memory_utilization=0.9)
    assert engine.sizes.num_blocks == (9_000_000 - 6_000_000 - 1_000_000) // BLOCK_BYTES
    assert engine.memory.num_blocks_backed == engine.sizes.num_blocks
    engine.add_request("a", [1, 2, 3], greedy(9))
    tokens = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == TinyModel().generate([1, 2, 3], 9)


def test_the_profiling_steps_are_the_largest_there_can_be():
    seen = []

    class Watched(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            seen.append((len(token_ids), len(sample_indices), int(positions.max())))
            return super().forward(token_ids, positions, attend, sample_indices)

    make_engine(Watched(), gpu_memory_utilization=0.9, max_model_len=100)
    assert seen == [(50, 8, 7), (8, 8, 99)]  # 50 tokens of 8 requests; 8 requests at their full length


def test_the_profiling_steps_read_no_memory_that_nobody_wrote(monkeypatch):
    logits = []

    class Watched(TinyModel):
        def forward(self, *given):
            logits.append(super().forward(*given))
            return logits[-1]

    def dirty(*given, **named):
        cache = allocate(*given, **named)
        for tensor in cache.tensors:
            tensor.fill_(float("nan"))
        return cache

    allocate = kv_cache.allocate
    monkeypatch.setattr(kv_cache, "allocate", dirty)
    make_engine(Watched(), gpu_memory_utilization=0.9, max_model_len=102, max_num_batched_tokens=8)
    assert len(logits) == 2
    assert all(torch.isfinite(found).all() for found in logits)


def test_no_more_blocks_than_could_ever_be_used():
    engine = make_engine(gpu_memory_utilization=0.9, max_model_len=40)
    assert engine.sizes.num_blocks == 8 * 10


def test_a_share_that_leaves_nothing_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"\(0.7\) leaves no room .* step of 50 tokens \(0 bytes on cpu\); raise it"):
        make_engine(gpu_memory_utilization=0.7)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization is 1\.5; it must be above 0 and at most 1"):
        make_engine(gpu_memory_utilization=1.5)


def test_an_explicit_budget_wins_and_nothing_is_run_to_find_one():
    assert make_engine(gpu_memory_utilization=0.9, kv_cache_bytes=20 * BLOCK_BYTES).sizes.num_blocks == 20
    assert make_engine(gpu_memory_utilization=0.9, num_blocks=30).sizes.num_blocks == 30
    assert not FakeGauge.started


def test_where_memory_cant_be_told_the_share_is_of_no_account(monkeypatch):
    monkeypatch.delitem(profile.GAUGES, "cpu")
    assert make_engine(gpu_memory_utilization=0.9).config == replace(make_engine().config, gpu_memory_utilization=0.9)


def test_each_device_must_have_room_for_its_own_layers():
    here, there = torch.device("cpu"), torch.device("meta")
    spec = TinyModel().spec
    layers = tuple(replace(spec.layers[0], device=device) for device in (here, there, there))
    spec = replace(spec, layers=layers)
    room = {here: 10 * BLOCK_BYTES, there: 10 * BLOCK_BYTES}
    assert profile.blocks_within(spec, room, BLOCK, torch.float32) == 10  # two of three layers: half as many


def test_memory_is_told_where_the_layers_are_though_token_ids_be_elsewhere(monkeypatch):
    class Elsewhere(TinyModel):
        def forward(self, token_ids, positions, attend, sample_indices):
            return torch.zeros(len(sample_indices), self.spec.vocab_size)

    model, there = Elsewhere(), torch.device("meta")
    model.spec = replace(model.spec, layers=tuple(replace(layer, device=there) for layer in model.spec.layers))
    monkeypatch.setitem(profile.GAUGES, "meta", FakeGauge)
    monkeypatch.delitem(profile.GAUGES, "cpu")
    backend, limits = SimpleNamespace(plan=lambda metadata: None), Limits(2, 8, 20, 0, 1)
    room = profile.bytes_left(PagedModel.of(model), backend, Sampler(), limits, BLOCK, torch.float32, 0.9)
    assert room == {there: 9_000_000 - 6_000_000 - 1_000_000}


def test_a_step_that_never_fits_is_refused_with_the_way_out():
    class Wide(TinyModel):
        def forward(self, *args):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(ConfigError, match="no memory for a step of 50 tokens; lower max_num_batched_tokens"):
        make_engine(Wide(), gpu_memory_utilization=0.9)


if torch.cuda.is_available():

    def test_a_gpu_tells_what_work_takes():
        gauge = profile.CudaGauge(torch.device("cuda", 0))
        gauge.start()
        used = gauge.used()
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        assert gauge.peak() == 64 << 20
        assert abs(gauge.used() - used) < 8 << 20
        assert gauge.total() > used
