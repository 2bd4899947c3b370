"""Decoder layers whose launches are made again by one call: to the bit what they gave when Python made each of them."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paged_core import EngineConfig
from paged_core.builtin import replayed
from paged_core.builtin.forwards import create_module_forward
from paged_core.builtin.trials import mixing_attend
from paged_hf.model.paged_model import HFPagedModel
from paged_kernels.cpu.replay import Replay

DTYPES = [torch.float32, torch.bfloat16]


def accelerated(model: Any, weights: str | None = None) -> HFPagedModel:
    paged, config = HFPagedModel(model), EngineConfig(weights=weights)
    paged.accelerate(lambda module: create_module_forward(module, torch.device("cpu"), config))
    return paged


def logits(model: HFPagedModel, num_rows: int, first: int = 5) -> Tensor:
    positions = torch.arange(num_rows)
    ids = (positions * 7 + first) % 50 + 5
    return model.forward(ids, positions, lambda layer, q, k, v, sinks=None: mixing_attend(q, k, v), positions)


def in_turn(model: HFPagedModel, num_rows: int, times: int = 5) -> list[Tensor]:
    return [logits(model, num_rows, first) for first in range(times)]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread of each time that launches were made again."""
    threads: list[int] = []
    honest = Replay.__call__

    def counted(self: Replay, *tensors: Tensor) -> None:
        threads.append(threading.get_ident())
        honest(self, *tensors)

    monkeypatch.setattr(Replay, "__call__", counted)
    return threads


SIZES = {
    "hidden_size": 96,  # whole tiles, for all products: then a residual is added in the launch
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, bias", [(192, False), (100, False), (192, True)])
def test_logits_are_the_same_to_the_bit(
    width: int, bias: bool, dtype: Any, weights: Any, tiny: Any, replays: Any, monkeypatch: Any
) -> None:
    model = accelerated(
        tiny("llama", **{**SIZES, "intermediate_size": width, "attention_bias": bias, "mlp_bias": bias}).to(dtype),
        weights,
    )
    for num_rows in (1, 2, 33, 64):
        again = in_turn(model, num_rows)
        with monkeypatch.context() as patch:
            patch.setattr(replayed, "MOST_ROWS", 0)
            plain = in_turn(model, num_rows)
        assert all(map(torch.equal, again, plain)), num_rows
    both, one = 4 * 3 * 3 * 2, 4 * 3 * 3  # layers, from the third time on: both halves; one, where there is more to do
    assert len(replays) == both or (len(replays) == one and (width == 100 or bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_changes_is_seen_and_the_old_one_is_let_go(dtype: Any, tiny: Any, replays: Any) -> None:
    stock = tiny("llama", **SIZES).to(dtype)
    model = accelerated(stock)
    in_turn(model, 3)
    (layer, *_) = model._fast.values()
    old = [weakref.ref(layers.packed(torch.empty(1, dtype=dtype))) for layers in layer._layers()]
    for part in ("self_attn.k_proj", "input_layernorm", "mlp.down_proj", "post_attention_layernorm"):
        module = stock.model.layers[0].get_submodule(part)
        module.weight = nn.Parameter(module.weight.detach() * 1.5)
        got, want = in_turn(model, 3), in_turn(accelerated(stock), 3)
        assert all(map(torch.equal, got, want)), part
    gc.collect()
    assert [product() is None for product in old] == [True, False, False, True], "of q, k, v; of down"
    assert replays


def test_threads_have_recordings_of_their_own(tiny: Any, replays: Any) -> None:
    models = [accelerated(tiny("llama", **SIZES)) for _ in range(2)]
    want = in_turn(models[0], 4, 9)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda number: in_turn(models[number % 2], 4, 9), range(6)):
            assert all(map(torch.equal, got, want))
    assert len(set(replays)) == 3


def test_another_number_of_threads_is_honoured(tiny: Any) -> None:
    model, before = accelerated(tiny("llama", **SIZES)), torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(in_turn(model, 6))
        assert all(all(map(torch.equal, each, results[0])) for each in results)
    finally:
        torch.set_num_threads(before)
