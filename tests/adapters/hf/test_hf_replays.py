"""A model's layers, whose launches are made again by one call: to the bit what they gave when Python made each."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paged_core import EngineConfig
from paged_core.builtin import replayed
from paged_core.builtin.attention import CpuBackend
from paged_core.builtin.decoder_layer import DecoderLayer
from paged_core.builtin.forwards import create_module_forward
from paged_core.execution.batch import AttentionMetadata, Batch
from paged_core.execution.kv_cache import allocate
from paged_core.execution.model_runner import ModelRunner
from paged_hf.model.paged_model import HFPagedModel
from paged_kernels.cpu.replay import Replay

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 8


class Computing:
    """A model with a cache of its own, and steps over it."""

    def __init__(self, model: Any, weights: str | None = None, kv_dtype: torch.dtype | None = None) -> None:
        self.model, config = HFPagedModel(model), EngineConfig(weights=weights)
        self.model.accelerate(lambda module: create_module_forward(module, torch.device("cpu"), config))
        spec = self.model.spec
        kv_dtype = kv_dtype or spec.dtype
        self.cache = allocate(spec, 40, BLOCK, kv_dtype, 60)
        self.runner = ModelRunner(self.model, CpuBackend(spec, kv_dtype, BLOCK, weights), self.cache)

    def step(self, lengths: Sequence[int], computed: Sequence[int], first: int = 5) -> Tensor:
        """Logits of requests of these lengths, all tokens of each but those that were computed before."""
        starts, slots, positions = [0], [], []
        tables = torch.arange(1, 1 + 10 * len(lengths), dtype=torch.int32).view(len(lengths), 10)
        for table, length, start in zip(tables.tolist(), lengths, computed, strict=True):
            positions += range(start, length)
            slots += [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, length)]
            starts.append(len(positions))
        at = torch.tensor(positions)
        longest = max(b - a for a, b in pairwise(starts))
        attention = AttentionMetadata(
            torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), tables,
            torch.tensor(slots), longest, max(lengths),
        )  # fmt: skip
        wanted = torch.arange(len(positions))
        return self.runner.run(Batch((at * 7 + first) % 50 + 5, at, attention, wanted, (), (), (), False))

    def in_turn(self, num_rows: int, times: int = 5) -> list[Tensor]:
        return [self.step([num_rows], [0], first) for first in range(times)]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread of each time that launches were made again."""
    threads: list[int] = []
    honest = Replay.__call__

    def counted(self: Replay, num_rows: int, *tensors: Tensor) -> None:
        threads.append(threading.get_ident())
        honest(self, num_rows, *tensors)

    monkeypatch.setattr(Replay, "__call__", counted)
    return threads


SIZES = {
    "hidden_size": 96,  # whole tiles, for all products: then a residual is added in the launch
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with no launch made again."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(replayed, "MOST_ROWS", 0)
            return function()

    return call


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, bias", [(192, False), (100, False), (192, True)])
def test_logits_are_the_same_to_the_bit(
    width: int, bias: bool, dtype: Any, weights: Any, tiny: Any, replays: Any, by_python: Any
) -> None:
    sizes = {**SIZES, "intermediate_size": width, "attention_bias": bias, "mlp_bias": bias}
    computing = Computing(tiny("llama", **sizes).to(dtype), weights)
    for num_rows in (1, 2, 33, 64, 3, 12, 70):
        again = computing.in_turn(num_rows)
        plain = by_python(lambda num_rows=num_rows: computing.in_turn(num_rows))
        assert all(map(torch.equal, again, plain)), num_rows
    assert len(replays) == 7 * 5 - 3 or (not replays and (width == 100 or bias)), "once for 16, 64 and 128 rows"


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_requests_come_and_go_and_others_plan(
    dtype: Any, kv_dtype: Any, tiny: Any, replays: Any, by_python: Any
) -> None:
    computing = Computing(tiny("llama", **SIZES).to(dtype), kv_dtype=kv_dtype)
    steps = [([20], [0]), ([21, 40], [20, 0]), ([22, 41, 9], [21, 40, 0]), ([42, 10], [41, 9]), ([43], [42])] * 2

    def run() -> list[Tensor]:
        return [computing.step(*step) for step in steps]

    plain = by_python(run)
    assert all(map(torch.equal, run(), plain))
    assert len(replays) == len(steps) - 2, "rooms for 16 rows and for 64"


def test_a_cache_that_lies_elsewhere_is_seen(tiny: Any, replays: Any, by_python: Any) -> None:
    computing = Computing(tiny("llama", **SIZES))
    want = by_python(lambda: computing.in_turn(6))
    for _ in range(2):
        assert all(map(torch.equal, computing.in_turn(6), want))
        computing.cache.release()
        computing.cache.grow(50)
        assert computing.cache.keys[0].abs().sum() == 0, "K/V are written where the cache is now"
    assert replays


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_changes_is_seen_and_the_old_one_is_let_go(dtype: Any, tiny: Any, replays: Any) -> None:
    stock = tiny("llama", **SIZES).to(dtype)
    computing = Computing(stock)
    computing.in_turn(3)
    layer = next(each for each in computing.model.fast_forwards.values() if isinstance(each, DecoderLayer))
    old = [weakref.ref(layers.packed(torch.empty(1, dtype=dtype))) for layers in layer._layers()]
    for part in ("self_attn.k_proj", "input_layernorm", "mlp.down_proj", "post_attention_layernorm"):
        module = stock.model.layers[0].get_submodule(part)
        module.weight = nn.Parameter(module.weight.detach() * 1.5)
        got, want = computing.in_turn(3), Computing(stock).in_turn(3)
        assert all(map(torch.equal, got, want)), part
    gc.collect()
    assert [product() is None for product in old] == [True, False, False, True], "of q, k, v; of down"
    assert replays


def test_a_hook_is_heard_and_a_layer_that_is_added_computes(tiny: Any, replays: Any) -> None:
    stock = tiny("llama", **SIZES)
    computing = Computing(stock)
    computing.in_turn(3)
    seen: list[Any] = []
    hook = stock.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    num_replays = len(replays)
    heard = computing.in_turn(3)
    assert len(seen) == 5 and len(replays) == num_replays
    hook.remove()
    assert all(map(torch.equal, computing.in_turn(3), heard))
    assert len(replays) == num_replays + 5


def test_threads_have_recordings_of_their_own(tiny: Any, replays: Any) -> None:
    computing = [Computing(tiny("llama", **SIZES)) for _ in range(2)]
    want = computing[0].in_turn(4, 9)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda each: each.in_turn(4, 9), computing):
            assert all(map(torch.equal, got, want))
    assert len(set(replays)) == 3


def test_another_number_of_threads_is_honoured(tiny: Any) -> None:
    computing, before = Computing(tiny("llama", **SIZES)), torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(computing.in_turn(6))
        assert all(all(map(torch.equal, each, results[0])) for each in results)
    finally:
        torch.set_num_threads(before)
