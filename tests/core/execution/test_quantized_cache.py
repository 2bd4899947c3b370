"""K/V in int8 and float8: tokens are those of a model whose K/V are rounded so, whatever else runs; memory shrinks."""

import functools
import random
from functools import partial

import pytest
import torch

from paged_core import ConfigError, EngineConfig, KVCache, hookimpl
from paged_core.builtin.attention import ReferenceBackend
from paged_core.execution.kv_cache import allocate, bytes_per_block
from paged_kernels import reference
from tiny_engine import greedy, run, tiny_engine, tokens_of
from tiny_model import TinyModel

make_engine = partial(tiny_engine, kv_cache_dtype="int8", max_num_batched_tokens=256)

DTYPES = ["int8", "float8_e4m3fn"]
BACKENDS = ["reference", "cpu"]
ROOMY = {"num_blocks": 400, "max_num_batched_tokens": 256}
CHUNKED = {"num_blocks": 400, "max_num_batched_tokens": 8}
TIGHT = {"num_blocks": 26, "max_num_batched_tokens": 16}  # preempts
GROWING = {"num_blocks": 400, "max_num_batched_tokens": 64, "kv_cache_slab_bytes": 1}


class Rounded(TinyModel):
    """Attends over K/V that were rounded as the cache rounds them, and has no cache."""

    def __init__(self, dtype, window=None):
        super().__init__(window=window)
        self.kv_dtype = getattr(torch, dtype)

    def dense(self, layer, q, k, v, sinks=None):
        return super().dense(layer, q, self.rounded(k), self.rounded(v), sinks)

    def rounded(self, x):
        codes, scale = reference.quantize(x, self.kv_dtype)
        return codes.float() * scale[..., None]


@functools.cache
def workload():
    """``[(prompt, num_tokens, n)]``: some prompts begin alike, some want several samples."""
    rnd, found = random.Random(1), []
    for i in range(14):
        prompt = [rnd.randrange(90) for _ in range(rnd.randrange(1, 40))]
        found.append((list(range(12)) + prompt[:5] if i % 3 == 0 else prompt, rnd.randrange(1, 30), 1 + i % 3))
    return found


@functools.cache
def truth(dtype, window):
    model = Rounded(dtype, window)
    return [model.generate(prompt, num_tokens) for prompt, num_tokens, _ in workload()]


# ---- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROOMY, CHUNKED, TIGHT, GROWING], ids=["roomy", "chunked", "tight", "growing"])
@pytest.mark.parametrize("window", [None, 10], ids=["full", "windowed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_rounded_keys_and_values_whatever_else_runs(backend, dtype, window, config):
    engine = make_engine(TinyModel(window=window), attention_backend=backend, kv_cache_dtype=dtype, **config)
    for i, (prompt, num_tokens, n) in enumerate(workload()):
        engine.add_request(str(i), prompt, greedy(num_tokens, n=n))
    found = tokens_of(run(engine))
    assert len(found) == sum(n for _, _, n in workload())
    assert {int(id): tokens for (id, _), tokens in found.items()} == dict(enumerate(truth(dtype, window)))
    if window is None:
        assert (engine.last_stats.total_preemptions > 0) == (config is TIGHT)


def test_rounding_shows_in_the_tokens():
    assert truth("int8", None) != truth("float8_e4m3fn", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_found_in_the_cache_goes_on_as_one_that_was_computed(backend, dtype):
    engine = make_engine(attention_backend=backend, kv_cache_dtype=dtype)
    prompt = list(range(30))
    for name in ("first", "again"):
        engine.add_request(name, prompt, greedy(20))
        found = tokens_of(run(engine))
        assert found[name, 0] == Rounded(dtype).generate(prompt, 20)
    assert engine.last_stats.total_prefix_hits >= 28


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_part_in_the_middle_of_a_block_take_their_scales_along(backend, dtype):
    engine, prompt = make_engine(attention_backend=backend, kv_cache_dtype=dtype), list(range(30))
    engine.add_request("a", prompt, greedy(12, n=3))
    found = tokens_of(run(engine))
    assert len(found) == 3
    assert set(map(tuple, found.values())) == {tuple(Rounded(dtype).generate(prompt, 12))}


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bytes_hold_more_blocks(dtype):
    def blocks(kv_cache_dtype):
        engine = make_engine(num_blocks=None, kv_cache_bytes=100_000, kv_cache_dtype=kv_cache_dtype)
        assert engine.memory.num_blocks_backed == engine.sizes.num_blocks
        assert engine.memory.num_bytes <= 100_000 * (1 + 1 / engine.sizes.num_blocks)
        return engine.sizes.num_blocks

    # A head of 16 dims takes 16 bytes and 4 for its scale, in place of 64 or 32.
    assert (blocks(dtype), blocks("bfloat16"), blocks("float32")) == (156, 97, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_counted_grow_and_go_back(dtype):
    spec, kind = TinyModel().spec, getattr(torch, dtype)
    cache = allocate(spec, 3, 4, kind, max_blocks=1000)
    per_block = bytes_per_block(spec, 4, kind)
    assert (len(cache.tensors), cache.num_bytes) == (8, 4 * per_block)
    cache.key_scales[1][3] = 7
    cache.grow(1000)
    assert (cache.num_blocks, cache.num_bytes) == (1000, 1001 * per_block)
    assert {t.shape[0] for t in cache.tensors} == {1001}
    assert cache.key_scales[1][3].eq(7).all()
    cache.release()
    assert (cache.num_blocks, cache.num_bytes) == (0, per_block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_gives_what_the_codes_stand_for(dtype):
    engine, floats = make_engine(kv_cache_dtype=dtype), make_engine(kv_cache_dtype=None)
    found = []
    for each in (engine, floats):
        [request] = each.add_request("a", list(range(11)), greedy(5))
        each.step()
        found.append(each.read_kv(request))
    for pair, wanted_pair in zip(*found, strict=True):
        for x, wanted in zip(pair, wanted_pair, strict=True):
            assert (x.dtype, x.shape) == (torch.float32, wanted.shape)
    rounded = Rounded(dtype).rounded(found[1][0][0])  # the first layer: what comes in is the same
    torch.testing.assert_close(found[0][0][0], rounded, rtol=1e-6, atol=1e-6)


def test_read_gives_zeros_for_blocks_that_were_given_back():
    cache = allocate(TinyModel().spec, 3, 4, torch.int8)
    for tensor in cache.tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    for k, v in cache.read([0], 4):
        assert k.eq(0).all()
        assert v.eq(0).all()


# ---- plugins -----------------------------------------------------------------------------------------------------


def test_a_plugins_cache_without_scales_works_whatever_the_config_says():
    class Floats:
        @hookimpl
        def create_kv_cache(self, spec, num_blocks, config):
            cache = allocate(spec, num_blocks, config.block_size, torch.float32)
            return KVCache(cache.keys, cache.values, config.block_size)

    for backend in BACKENDS:
        engine = make_engine(plugins=[Floats()], attention_backend=backend)
        engine.add_request("a", list(range(9)), greedy(12, n=2))
        assert set(map(tuple, tokens_of(run(engine)).values())) == {tuple(TinyModel().generate(list(range(9)), 12))}


def test_a_plugins_quantized_cache_without_scales_is_refused():
    class Bare:
        @hookimpl
        def create_kv_cache(self, spec, num_blocks, config):
            cache = allocate(spec, num_blocks, config.block_size, torch.int8)
            return KVCache(cache.keys, cache.values, config.block_size)

    for backend in BACKENDS:
        engine = make_engine(plugins=[Bare()], attention_backend=backend)
        engine.add_request("a", list(range(9)), greedy(3))
        [output] = engine.step()
        assert "needs key_scales and value_scales" in output.error


def test_a_backend_that_reads_no_scales_never_gets_a_quantized_cache():
    class Plain(ReferenceBackend):
        name, reads_scales = "plain", False

    class PlainPlugin:
        @hookimpl
        def create_attention_backend(self, name, spec):
            return Plain(spec) if name == "plain" else None

    with pytest.raises(ConfigError, match=r"attention backend 'plain' does not read the scales .* in int8; leave"):
        make_engine(plugins=[PlainPlugin()], attention_backend="plain")


def test_an_unknown_cache_dtype_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8'; use float32, .* int8, float8_e4m3fn or None"):
        EngineConfig(kv_cache_dtype="fp8")
