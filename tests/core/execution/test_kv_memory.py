"""K/V memory: it grows with what requests need, and goes back when asked for. Tokens stay the same."""

import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from growing_engine import BLOCK, BLOCK_BYTES, Copying, make_engine, prompt_of, run
from paged_core import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    KVCache,
    hookimpl,
)
from paged_core.execution import kv_cache
from paged_core.execution.kv_cache import allocate
from places import TESTS
from tiny_engine import greedy
from tiny_model import TinyModel


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


# ---- growing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", [(), (Copying(),)], ids=["reserved", "copying"])
@pytest.mark.parametrize("window", [None, 10], ids=["full", "windowed"])
def test_tokens_are_the_same_while_the_cache_grows_under_them(plugins, window):
    model = TinyModel(window=window)
    engine = make_engine(model, plugins)
    wanted, sizes = {}, set()
    for i in range(10):
        prompt = prompt_of(3 + 5 * i, seed=i % 7)
        for row in range(1 + i % 3):
            wanted[str(i), row] = model.generate(prompt, 20)
        engine.add_request(str(i), prompt, greedy(20, n=1 + i % 3))
    found = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request.id, output.request.index), []).extend(output.token_ids)
        sizes.add(engine.memory.num_blocks_backed)
    assert found == wanted
    assert len(sizes) >= 4


def test_memory_is_what_requests_need_and_not_what_the_limit_allows():
    engine = make_engine()
    assert engine.memory.num_bytes == 3 * BLOCK_BYTES  # two blocks, and the null block
    for i in range(6):  # one after another: 10 blocks each
        engine.add_request(str(i), prompt_of(20, seed=i), greedy(20))
        run(engine)
    assert 10 <= engine.memory.num_blocks_backed <= 15
    assert engine.memory.num_bytes == (engine.memory.num_blocks_backed + 1) * BLOCK_BYTES
    assert engine.last_stats.num_blocks == 400


def test_what_fits_into_the_limit_runs_and_what_does_not_is_refused_however_small_the_slabs_are():
    engine = make_engine(num_blocks=12, kv_cache_slab_bytes=1)
    assert engine.memory.num_blocks_backed == 1
    with pytest.raises(InvalidRequestError, match="may need 13 K/V blocks but the cache has 12"):
        engine.add_request("long", prompt_of(30), greedy(20))
    engine.add_request("a", prompt_of(30), greedy(19))
    engine.add_request("b", prompt_of(30, seed=1), greedy(19))
    found = run(engine)
    assert found["a", 0] == TinyModel().generate(prompt_of(30), 19)
    assert found["b", 0] == TinyModel().generate(prompt_of(30, seed=1), 19)
    assert engine.memory.num_blocks_backed == 12


def test_without_slabs_the_cache_is_whole_from_the_start():
    engine = make_engine(kv_cache_slab_bytes=None)
    assert engine.memory.num_blocks_backed == engine._pool.num_backed == 400
    with pytest.raises(ConfigError, match="kv_cache_slab_bytes is 0"):
        make_engine(kv_cache_slab_bytes=0)


def test_a_plugins_cache_that_cant_grow_is_used_whole_and_kept():
    class Whole:
        @hookimpl
        def create_kv_cache(self, spec, num_blocks, config):
            made.append(replace(allocate(spec, num_blocks, config.block_size, spec.dtype), max_blocks=None))
            return made[0]

    made: list[KVCache] = []
    engine = make_engine(plugins=[Whole()])
    address = made[0].keys[0].data_ptr()
    for _ in range(2):
        engine.add_request("a", prompt_of(30), greedy(10))
        assert run(engine)["a", 0] == TinyModel().generate(prompt_of(30), 10)
        assert engine.release_memory()
    assert (made[0].num_blocks, made[0].keys[0].data_ptr()) == (400, address)


def test_an_engine_that_gets_no_memory_says_so_and_takes_no_more_requests():
    class Full(KVCache):
        def grow(self, num_blocks):
            if num_blocks > self.num_blocks:
                raise torch.OutOfMemoryError("out of memory")

    class Plugin:
        @hookimpl
        def create_kv_cache(self, spec, num_blocks, config):
            cache = allocate(spec, 2, config.block_size, spec.dtype)
            return Full(cache.keys, cache.values, cache.block_size, num_blocks)

    engine = make_engine(plugins=[Plugin()])
    engine.add_request("small", prompt_of(5), greedy(2))
    assert run(engine)["small", 0] == TinyModel().generate(prompt_of(5), 2)
    engine.add_request("large", prompt_of(20), greedy(2))
    with pytest.raises(EngineDeadError, match=r"no memory for a K/V cache of 6 blocks; .*kv_cache_bytes"):
        engine.step()
    with pytest.raises(EngineDeadError, match="takes no more requests: no memory"):
        engine.add_request("next", [1], greedy(1))


def test_a_cache_that_a_device_has_no_memory_for_is_refused_with_the_way_out(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kv_cache, "_empty", full)
    with pytest.raises(ConfigError, match=rf"K/V cache of 400 blocks, {400 * BLOCK_BYTES} bytes; lower kv_cache_bytes"):
        make_engine(kv_cache_slab_bytes=None)


def test_an_engine_built_and_grown_in_inference_mode_works_outside_of_it():
    prompt = prompt_of(6)
    with torch.inference_mode():
        engine = make_engine()
        engine.add_request("first", prompt_of(30), greedy(3))
        engine.step()
    run(engine)
    engine.add_request("forked", prompt, greedy(9, n=3))  # copies a block on write
    found = run(engine)
    assert [found["forked", row] for row in range(3)] == [TinyModel().generate(prompt, 9)] * 3
    with torch.inference_mode():
        assert engine.release_memory()
    engine.add_request("forked", prompt, greedy(9, n=3))
    assert run(engine) == found


# ---- giving back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab_bytes", [2 * BLOCK_BYTES, None], ids=["slabs", "whole"])
@pytest.mark.parametrize("plugins", [(), (Copying(),)], ids=["reserved", "copying"])
def test_released_memory_is_gone_with_its_prefixes_and_the_next_request_takes_it_anew(plugins, slab_bytes):
    engine = make_engine(plugins=plugins, kv_cache_slab_bytes=slab_bytes)
    prompt = prompt_of(30)
    for _ in range(2):
        engine.add_request("a", prompt, greedy(10))
        assert run(engine)["a", 0] == TinyModel().generate(prompt, 10)
        assert engine.last_stats.total_prefix_hits == 0
        assert engine.release_memory()
        engine.check()
        assert (engine.memory.num_blocks_backed, engine.memory.num_blocks_cached) == (0, 0)
        assert engine.release_memory()  # twice is harmless


def test_memory_that_running_requests_need_is_not_released():
    engine = make_engine()
    engine.add_request("a", prompt_of(30), greedy(10))
    engine.step()
    assert not engine.release_memory()
    assert run(engine)["a", 0] == TinyModel().generate(prompt_of(30), 10)[1:]
    assert engine.release_memory()


def test_memory_is_released_while_requests_only_wait():
    engine = make_engine()
    engine.add_request("a", prompt_of(30), greedy(10))
    run(engine)
    engine.add_request("b", prompt_of(30), greedy(10))
    assert engine.release_memory()
    assert run(engine)["b", 0] == TinyModel().generate(prompt_of(30), 10)


def test_on_a_cpu_released_pages_go_back_to_the_system():
    spec = TinyModel().spec
    cache = allocate(spec, 16, 1024, torch.float32, max_blocks=4096)  # 128 KiB a block and tensor, 2 GiB reserved
    reserved = resident_bytes()
    cache.grow(128)  # 64 MiB
    assert resident_bytes() - reserved < 8 << 20
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1)
    assert resident_bytes() - reserved > 56 << 20
    cache.release()
    assert resident_bytes() - reserved < 8 << 20
    cache.grow(4096)
    assert resident_bytes() - reserved < 8 << 20
    cache.keys[1][4096] = 7
    assert cache.keys[1][4096].eq(7).all()


def test_growing_keeps_what_blocks_hold():
    spec = TinyModel().spec
    layout = [(t.shape, t.dtype) for t in allocate(spec, 3, BLOCK, torch.float32).keys]
    copying = KVCache(*(tuple(torch.empty(shape) for shape, _ in layout) for _ in range(2)), BLOCK, max_blocks=50)
    for cache in (allocate(spec, 3, BLOCK, torch.float32, max_blocks=50), copying):
        for i, tensor in enumerate((*cache.keys, *cache.values)):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + i)
        before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
        cache.grow(2)  # has more already
        assert cache.num_blocks == 3
        cache.grow(50)
        assert cache.num_blocks == 50
        for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
            assert new.shape == (51, *old.shape[1:])
            assert torch.equal(new[:4], old)


def test_a_forked_process_does_not_write_to_its_parents_cache():
    script = """
import os, torch
from tiny_model import TinyModel
from paged_core.execution.kv_cache import allocate
cache = allocate(TinyModel().spec, 10, 4, torch.float32)
cache.keys[0].fill_(1)
child = os.fork()
if not child:
    cache.keys[0][3] = 2
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert cache.keys[0].eq(1).all()
"""
    tests = str(TESTS)
    done = subprocess.run([sys.executable, "-c", script], cwd=tests, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
