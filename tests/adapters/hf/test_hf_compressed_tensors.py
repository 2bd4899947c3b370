"""Models of compressed-tensors, as transformers loads them: as they are, and from their own integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressed_tensors_model import SCHEMES, save_compressed
from paged_core import Engine, EngineConfig
from paged_core.builtin.forwards import create_module_forward
from paged_core.builtin.prequantized import integers_in
from paged_hf.model.paged_model import HFPagedModel

SIZES: dict[str, Any] = {"num_blocks": 32, "block_size": 8}
WHOLE = ["LlamaDecoderLayer", "LlamaDecoderLayer", "Linear"]


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: Any) -> dict[str, Path]:
    made = {}
    for scheme in SCHEMES:
        made[scheme] = tmp_path_factory.mktemp(scheme)
        save_compressed(tiny("llama", hidden_size=64, intermediate_size=128), scheme, made[scheme])
    return made


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def logits(model: HFPagedModel) -> torch.Tensor:
    """Of a pass whose attention gives the queries back."""
    ids = torch.arange(5, 25)
    return model.forward(ids, ids, lambda layer, q, k, v, sinks=None: q, ids - 5).float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_they_give_stocks_tokens_and_the_users_model_still_works(
    scheme: str, folders: dict[str, Path], stock: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    expected = stock(loaded(folders[scheme]), prompts, 8)
    model = loaded(folders[scheme])
    running = engine(model)
    assert paged(running, prompts, 8) == expected
    assert stock(model, prompts, 8) == expected, "its layers had been packed when the engine took it in"
    assert paged(running, prompts, 8) == expected


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_layers_that_round_no_rows_run_as_plain_ones(scheme: str, folders: dict[str, Path]) -> None:
    taken = HFPagedModel(loaded(folders[scheme]))
    taken.accelerate(lambda module: create_module_forward(module, torch.device("cpu")))
    names = [type(twin).__name__ for twin in taken.fast_forwards]
    assert names.count("LlamaDecoderLayer") == 2 and names.count("Linear") == 1


@pytest.mark.parametrize("scheme, dtype", [*((each, torch.float32) for each in SCHEMES), ("W4A16", torch.bfloat16)])
def test_their_integers_are_taken_to_the_last_bit(scheme: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    taken = HFPagedModel(loaded(folders[scheme], dtype))
    plain = logits(taken)
    twin = taken.shadow.root.get_submodule("model.layers.0.mlp.down_proj")
    found = integers_in(twin)
    assert found is not None and found.bits == (4 if scheme == "W4A16" else 8)
    assert torch.equal(found.widened().to(dtype), twin.weight)
    config = EngineConfig(weights="int8")
    taken.accelerate(lambda module: create_module_forward(module, torch.device("cpu"), config))
    assert [type(twin).__name__ for twin, forward in taken.fast_forwards.items() if forward.quantized] == WHOLE
    assert 1e-4 < float((logits(taken) - plain).norm() / plain.norm()) < 0.04, "rows are rounded in groups"


def test_an_engine_that_loads_one_lets_the_widened_weights_go(
    folders: dict[str, Path], paged: Any, prompts: Any
) -> None:
    live = Engine(loaded(folders["W4A16"]), EngineConfig(weights="int4", **SIZES))
    owning = Engine(str(folders["W4A16"]), EngineConfig(weights="int4", **SIZES))
    assert paged(owning, prompts, 8) == paged(live, prompts, 8)


def test_weights_that_are_no_longer_on_their_grid_are_rounded_anew(folders: dict[str, Path]) -> None:
    taken = HFPagedModel(loaded(folders["W8A16"]))
    twin = taken.shadow.root.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        twin.weight[3, 5] *= 1.003
    assert integers_in(twin) is None
    forward = create_module_forward(twin, torch.device("cpu"), EngineConfig(weights="int8"))
    assert forward is not None
    x = torch.randn(4, twin.in_features, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.linear(x, twin.weight)
    assert float((forward(x) - exact).norm() / exact.norm()) < 0.02
