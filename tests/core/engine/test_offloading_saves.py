"""What of the prefix cache is given to tiers when an engine ends, what is refused, and when a step waits for tiers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from paged_core import Engine, EngineConfig, FinishReason, SamplingParams, hookimpl
from paged_core.errors import ConfigError
from paged_core.tiers import host
from tier_engines import SMALL, TINY_BLOCK, Slow, answers, filled_and_evicted, on_disk, prompts_like, stats
from tiny_model import TinyModel


def test_what_was_used_last_is_saved_first_and_no_longer_than_is_said(tmp_path):
    engine = on_disk(tmp_path)
    answers(engine, [[1] * 20], max_tokens=1)
    answers(engine, [[2] * 20], max_tokens=1)
    first = engine._pool.findable()
    assert first[0].tokens == (2, 2, 2, 2)
    assert engine.save_prefix_cache(0.0) == 0
    assert engine.save_prefix_cache(30.0) == len(first)
    assert engine.save_prefix_cache(30.0) == 0, "it is there already"
    engine.close()


SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from tier_engines import answers, on_disk
engine = on_disk(sys.argv[1])
answers(engine, [list(range(30))])
"""


def test_a_script_that_closes_nothing_leaves_its_prefixes_all_the_same(tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(sys.path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    engine = on_disk(tmp_path)
    answers(engine, [list(range(30))])
    assert stats(engine).total_tokens_loaded == 28
    engine.close()


def test_what_cant_work_is_refused_in_a_sentence(tmp_path):
    for wrong, sentence in (
        ({"kv_host_bytes": 1 << 20}, "the model is on the CPU, and its K/V are in the host's memory already"),
        ({"kv_disk_path": str(tmp_path), "enable_prefix_caching": False}, "enable_prefix_caching is False"),
        ({"kv_disk_path": str(tmp_path), "kv_disk_bytes": 5000}, "has no room for two files of one block"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Engine(TinyModel(), replace(SMALL, **wrong))
    with pytest.raises(ConfigError, match="no kv_disk_path says where"):
        EngineConfig(kv_disk_bytes=1)
    nameless = TinyModel()
    nameless.fingerprint = lambda: None
    with pytest.raises(ConfigError, match="can't tell which one it is"):
        Engine(nameless, replace(SMALL, kv_disk_path=str(tmp_path)))


def test_a_host_tier_serves_a_device_that_has_less_memory():
    """Over CPU tensors, as a stand-in device: the class, its seams and the tokens are those of a GPU."""

    class Beside:
        @hookimpl
        def create_offload_tier(self, layout):
            return host.HostTier(200 * layout.block_bytes, layout.block_bytes, pinned=False)

    prompts = prompts_like(5, 40)
    engine = Engine(TinyModel(), SMALL, plugins=[Beside()])
    assert answers(engine, prompts) == answers(Engine(TinyModel(), SMALL), prompts)
    assert stats(engine).total_tokens_loaded > 0
    (told,) = stats(engine).tiers
    assert told.name == "host"
    assert told.bytes_in == told.blocks_in * TINY_BLOCK
    engine.close()


class Waits(threading.Event):
    """Counts who waits for it."""

    num = 0

    def wait(self, timeout=None):
        assert timeout < 0.1, "somebody might come meanwhile"
        self.num += 1


def test_where_nothing_is_left_but_to_wait_a_step_waits():
    tier = Slow()
    engine = Engine(TinyModel(), SMALL, plugins=[tier])
    filled_and_evicted(engine, list(range(30)))
    engine.add_request("loads", list(range(30)), SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    engine._offloading._arrived = waits = Waits()
    for _ in range(3):
        engine.step()
    assert waits.num == 3
    engine.close()
    assert tier.closed
    assert FinishReason.ABORT in [output.finish_reason for output in engine.step()]
