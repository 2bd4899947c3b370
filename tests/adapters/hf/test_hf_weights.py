"""weights="int8" and "int4": linear layers of integers in the engine, and what becomes of the model's own weights."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from bitsandbytes_model import bitsandbytes_int8
from paged_core import ConfigError, Engine, EngineConfig, EngineDeadError, hookimpl
from paged_core.builtin.forwards import create_module_forward
from paged_hf.loading.load import load_model
from paged_hf.model.paged_model import HFPagedModel

SIZES: dict[str, Any] = {"num_blocks": 32, "block_size": 8}


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("weights")
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def logits(model: HFPagedModel) -> torch.Tensor:
    """Of a pass whose attention gives the queries back."""
    ids = torch.arange(5, 25)
    return model.forward(ids, ids, lambda layer, q, k, v, sinks=None: q, ids - 5)


def accelerated(model: HFPagedModel, weights: str | None) -> HFPagedModel:
    config = EngineConfig(weights=weights)
    model.accelerate(lambda module: create_module_forward(module, torch.device("cpu"), config))
    return model


WHOLE = ["LlamaDecoderLayer", "LlamaDecoderLayer", "Linear"]  # of a model of two layers


def quantised(model: HFPagedModel) -> list[str]:
    """What runs from integers."""
    return [type(twin).__name__ for twin, forward in model.fast_forwards.items() if forward.quantized]


class Loader:
    """A plugin that remembers what it has loaded."""

    @hookimpl
    def load_model(self, source: Any, device: str | None, dtype: str | None) -> Any:
        self.loaded = load_model(source, device, dtype)
        return self.loaded


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("weights, error", [("int8", 0.06), ("int4", 0.4)])
def test_logits_move_by_what_rounding_costs(model_type: str, weights: str, error: float, tiny: Any) -> None:
    model = tiny(model_type)
    exact, ours = logits(HFPagedModel(model)), logits(accelerated(HFPagedModel(model), weights))
    moved = float((ours - exact).norm() / exact.norm())
    assert 0.1 * error < moved < error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_tokens_are_the_same_alone_and_in_a_batch(
    dtype: str, weights: str, tiny: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    model = tiny("llama", hidden_size=64, intermediate_size=128).to(getattr(torch, dtype))
    running = engine(HFPagedModel(model), weights=weights)
    together = paged(running, prompts, 8)
    assert [paged(running, [prompt], 8)[0] for prompt in prompts] == together


@pytest.mark.parametrize("weights", ["int8", None])
def test_an_engine_that_loads_the_model_lets_go_what_it_has_packed(
    weights: str | None, folder: Path, paged: Any, prompts: Any
) -> None:
    live, loader = load_model(folder), Loader()
    assert live is not None
    before = sum(weight.numel() for weight in live.model.parameters())
    tokens = paged(Engine(live.model, EngineConfig(weights=weights, **SIZES)), prompts, 8)
    assert sum(weight.numel() for weight in live.model.parameters()) == before, "a live model is left alone"
    owning = Engine(str(folder), EngineConfig(weights=weights, **SIZES), plugins=[loader])
    assert paged(owning, prompts, 8) == tokens == paged(owning, prompts, 8)
    assert loader.loaded is not None
    model = loader.loaded.model
    left = sum(weight.numel() for weight in model.parameters() if weight.ndim)
    assert left == model.get_input_embeddings().weight.numel() + sum(
        w.numel() for w in model.parameters() if w.ndim == 1
    )
    with pytest.raises(RuntimeError, match=r"size|shape|dimension"):
        model(torch.tensor([[5]]))
    with pytest.raises(EngineDeadError, match=r"packed this model's weights and let them go; load it anew"):
        Engine(loader.loaded, EngineConfig(**SIZES))


def test_what_it_shares_with_other_models_may_change_when_its_weights_are_gone(
    folder: Path, paged: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owning = Engine(str(folder), EngineConfig(weights="int8", **SIZES))
    tokens = paged(owning, prompts, 8)
    rotate = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: rotate(x))
    assert paged(owning, prompts, 8) == tokens


def test_weights_go_while_other_layers_are_still_to_be_packed(folder: Path) -> None:
    model = load_model(folder)
    assert model is not None
    first, gone = weakref.ref(model.model.model.layers[0].mlp.down_proj.weight), []

    def create(module: torch.nn.Module) -> Any:
        gone.append(first() is None)
        return create_module_forward(module, torch.device("cpu"), EngineConfig())

    model.hand_over()
    model.accelerate(create)
    assert not gone[0] and gone[-1], "all at once would double the memory"


def test_a_fingerprint_that_was_told_before_is_told_ever_after(folder: Path) -> None:
    model = load_model(folder)
    assert model is not None
    told = model.fingerprint()
    model.hand_over()
    assert accelerated(model, "int4").fingerprint() == told is not None
    assert not model.refresh(), "nothing has changed since"


def test_a_tier_of_a_plugin_is_told_which_model_it_is_though_the_weights_are_gone(folder: Path) -> None:
    told = []

    class Asks:
        @hookimpl
        def create_offload_tier(self, layout: Any) -> None:
            told.append(layout.fingerprint())

    Engine(str(folder), EngineConfig(**SIZES), plugins=[Asks()])
    live = load_model(folder)
    assert live is not None
    Engine(live, EngineConfig(**SIZES), plugins=[Asks()])
    assert told[0] == told[1] is not None


def test_what_cannot_be_quantised_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights is 'int8', but no layer .* float16 on cpu"):
        Engine(tiny("llama").half(), EngineConfig(weights="int8", attention_backend="reference", **SIZES))
    with pytest.raises(ConfigError, match="weights is 'int2'; use int8, int4 or None"):
        EngineConfig(weights="int2")
    with pytest.raises(ConfigError, match="leave compile_model and fast_forwards out"):
        EngineConfig(weights="int8", fast_forwards=False)


def torchao_model(tiny: Any, config: Any) -> Any:
    from torchao import quantization

    model = tiny("llama", hidden_size=64, intermediate_size=128)
    quantization.quantize_(model, config(quantization))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        lambda ao: ao.Int8WeightOnlyConfig(),
        lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int8),
        lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    ],
)
def test_torchaos_integers_are_taken_as_they_are(config: Any, dtype: str, tiny: Any, paged: Any, prompts: Any) -> None:
    model = torchao_model(lambda *args, **sizes: tiny(*args, **sizes).to(getattr(torch, dtype)), config)
    plain = logits(HFPagedModel(model)).float()
    taken = accelerated(HFPagedModel(model), "int8")
    assert quantised(taken) == WHOLE
    moved = float((logits(taken).float() - plain).norm() / plain.norm())
    assert moved < 0.04, "rows are rounded to eight bits, and nothing else"
    running = Engine(model, EngineConfig(weights="int8", **SIZES))
    together = paged(running, prompts, 8)
    assert [paged(running, [prompt], 8)[0] for prompt in prompts] == together


def test_integers_that_are_replaced_are_taken_anew(tiny: Any) -> None:
    model = torchao_model(tiny, lambda ao: ao.Int8WeightOnlyConfig())
    taken = accelerated(HFPagedModel(model), "int8")
    head, other = model.lm_head, model.model.layers[1].mlp.gate_proj
    forward = next(fast for twin, fast in taken.fast_forwards.items() if twin._parameters is head._parameters)
    head.weight = torch.nn.Parameter(other.weight.detach(), requires_grad=False)
    x = torch.randn(3, 64)
    exact = torch.nn.functional.linear(x, other.weight.dequantize())
    moved = float((forward(x) - exact).norm() / exact.norm())
    assert 1e-4 < moved < 0.02, "rows are rounded to eight bits, as before"


def test_layers_that_are_not_understood_run_as_they_are_and_the_log_says_so(tiny: Any, caplog: Any) -> None:
    from torchao import quantization

    model = tiny("llama", hidden_size=64, intermediate_size=128)
    quantization.quantize_(model.lm_head, quantization.Int8DynamicActivationInt8WeightConfig())
    layer = torch.nn.Sequential(model.lm_head)[0]
    assert create_module_forward(layer, torch.device("cpu"), EngineConfig(weights="int8")) is None
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    quantization.quantize_(model.lm_head, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int3))
    with caplog.at_level("WARNING", "paged_core"):
        Engine(model, EngineConfig(weights="int8", **SIZES))
    assert "1 linear layer runs as it is" in caplog.text


def test_bitsandbytes_integers_are_taken_as_they_are(tiny: Any, tmp_path: Path) -> None:
    model = bitsandbytes_int8(tiny("llama", hidden_size=64, intermediate_size=128), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own, on casts to float16
        for _ in range(2):  # the first call of a module moves its scales
            taken = accelerated(HFPagedModel(model), "int8")
            assert quantised(taken) == WHOLE
            plain = logits(HFPagedModel(model))
            moved = float((logits(taken) - plain).norm() / plain.norm())
            assert moved < 0.04
