"""A device that fails: nobody's request is blamed, and the engine says that it is over."""

import pytest
import torch

from graph_stand_in import CapturablePlugin, OpRecorder
from paged_core import Engine, EngineConfig, EngineDeadError, hookimpl
from paged_core.engine import assembly
from paged_core.sampling.sampler import Sampler
from tiny_engine import greedy
from tiny_model import TinyModel


class Device:
    broken = False

    def use(self):
        if self.broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class OnDevice(TinyModel):
    def __init__(self, device):
        super().__init__()
        self._of = device

    def forward(self, *given):
        self._of.use()
        return super().forward(*given)


class SamplerOnDevice(Sampler):
    def __init__(self, device, places):
        super().__init__()
        self._of, self._places = device, places

    def choose(self, *given):
        if "choose" in self._places:
            self._of.use()
        return super().choose(*given)

    def select(self, *given):
        if "select" in self._places:
            self._of.use()
        return super().select(*given)


class SamplerPlugin:
    def __init__(self, sampler):
        self._sampler = sampler

    @hookimpl
    def create_sampler(self, spec):
        return self._sampler


def fails_once_begun(engine, device):
    for i in range(3):
        engine.add_request(str(i), [i, 2], greedy(10))
    engine.step()
    engine.step()
    device.broken = True
    with pytest.raises(EngineDeadError, match="its device has failed, which takes a new process: CUDA error: an ill"):
        for _ in range(3):  # a step that was begun before may still be told
            assert not any(output.error for output in engine.step())
    with pytest.raises(EngineDeadError, match="takes no more requests: its device has failed"):
        engine.add_request("new", [5], greedy(3))


@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in-turn"])
@pytest.mark.parametrize("place", ["model", "choose", "select"])
def test_an_error_of_the_device_ends_the_engine_and_blames_no_request(place, lookahead):
    device = Device()
    model = OnDevice(device) if place == "model" else TinyModel()
    places = {"select"} if place == "select" else {"choose", "select"}
    plugin = SamplerPlugin(SamplerOnDevice(device, places if place != "model" else ()))
    config = EngineConfig(
        block_size=4,
        num_blocks=100,
        max_num_seqs=4,
        attention_backend="reference",
        lookahead=lookahead and place != "select",
    )
    fails_once_begun(Engine(model, config, plugins=[plugin]), device)


def test_so_does_one_while_a_step_is_captured(monkeypatch):
    def recorder(device):
        def record(work):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        return record

    config = EngineConfig(block_size=4, num_blocks=100, max_num_seqs=4, cuda_graphs=True, max_model_len=100)
    monkeypatch.setitem(assembly.RECORDERS, "cpu", OpRecorder)
    engine = Engine(TinyModel(), config, plugins=[CapturablePlugin()])
    monkeypatch.setitem(assembly.RECORDERS, "cpu", recorder)
    engine.release_memory()  # its graphs are captured anew
    engine.add_request("a", [1], greedy(3))
    with pytest.raises(EngineDeadError, match="its device has failed"):
        while engine.has_work:
            engine.step()


def test_so_does_one_while_the_cache_grows(monkeypatch):
    config = EngineConfig(block_size=4, num_blocks=100, kv_cache_slab_bytes=4096, attention_backend="reference")
    engine = Engine(TinyModel(), config)
    device = Device()
    device.broken = True
    monkeypatch.setattr(engine._runner, "grow", lambda num_blocks: device.use())
    engine.add_request("a", [1], greedy(3))
    with pytest.raises(EngineDeadError, match="its device has failed"):
        engine.step()
