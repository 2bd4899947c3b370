"""Forwards that stand in for a GPU's modules: the same answers, whatever is changed.

Where there is no GPU, through Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from interpreter import DEVICE, round_as_gpus_do
from modules_to_accelerate import CPU, GatedMLP, LlamaNorm
from paged_core import Engine, EngineConfig, SamplingParams, hookimpl
from paged_core.builtin import gpu_forwards, sampler
from paged_core.builtin.gpu_forwards import gpu_forward
from paged_hf.model.paged_model import HFPagedModel
from paged_kernels.triton import sampling


@pytest.fixture(autouse=True)
def seed_and_rounding(monkeypatch):
    torch.manual_seed(0)
    round_as_gpus_do(monkeypatch)


def ask(module):
    return gpu_forward(module, DEVICE)


def tiny(dtype=torch.float32, config=LlamaConfig, model=LlamaForCausalLM):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    made = model(config(**sizes, **heads, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False))
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return made.to(DEVICE, dtype).eval()


@torch.inference_mode()
def assert_same(forward, module, x):
    tolerance = 1e-5 if x.dtype == torch.float32 else 0.03
    torch.testing.assert_close(forward(x), module(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [GatedMLP, LlamaNorm])
def test_a_module_on_a_gpu_gives_the_same_answers(make, dtype):
    module = make().to(DEVICE, dtype)
    forward = ask(module)
    for shape in ((1, 48), (1, 7, 48), (2, 3, 48), (0, 48)):
        assert_same(forward, module, torch.randn(shape).to(DEVICE, dtype))


@pytest.mark.parametrize("make", [GatedMLP, LlamaNorm])
def test_weights_that_change_are_honoured_at_the_next_call(make):
    module, x = make().to(DEVICE), torch.randn(3, 48).to(DEVICE)
    forward = ask(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.5)
    assert_same(forward, module, x)
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                setattr(part, name, nn.Parameter(parameter.detach() * 3))
    assert_same(forward, module, x)
    module.double()
    torch.testing.assert_close(forward(x.double()), module(x.double()))


def test_an_epsilon_or_an_activation_that_changes_makes_the_forward_stale():
    norm, mlp = LlamaNorm().to(DEVICE), GatedMLP().to(DEVICE)
    forwards = [ask(norm), ask(mlp)]
    assert not any(forward.stale() for forward in forwards)
    norm.variance_epsilon, mlp.act_fn = 0.5, nn.SiLU()
    assert all(forward.stale() for forward in forwards)


def test_parts_of_an_mlp_are_called_as_modules_and_a_hook_on_its_activation_still_runs():
    mlp, seen, x = GatedMLP().to(DEVICE), [], torch.randn(2, 48).to(DEVICE)
    forward = ask(mlp)
    assert forward.calls_children
    mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    with torch.no_grad():
        forward(x)
        mlp.act_fn.register_forward_hook(lambda module, args, out: out * 0 if seen.append("act") is None else None)
        assert not forward(x).any()
    assert seen == ["up", "act", "up"]


class Scaled(LlamaNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class PlusOne(LlamaNorm):
    def forward(self, x):
        return super().forward(x) + super().forward(x) / self.weight


class Doubled(GatedMLP):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [Scaled, PlusOne, Doubled, lambda: GatedMLP(act=nn.GELU), lambda: LlamaNorm().double(), lambda: nn.Linear(4, 4),
     lambda: nn.LayerNorm(48)],
)  # fmt: skip
def test_what_is_not_plainly_understood_is_left_alone(make):
    assert ask(make().to(DEVICE)) is None


def test_a_module_that_is_not_there_is_left_alone():
    assert ask(LlamaNorm().to("meta")) is None


def test_nothing_is_stood_for_and_nothing_compiled_where_there_is_no_gpu():
    assert gpu_forwards.create_module_forward(LlamaNorm(), CPU) is None
    assert not gpu_forwards.triton_works(CPU)


def test_a_card_that_triton_cannot_use_runs_the_modules_as_they_are(caplog):
    """Here torch knows no such card; on a machine without a C compiler it would be Triton that fails."""
    assert gpu_forwards.create_module_forward(LlamaNorm(), torch.device("cuda", 99)) is None
    assert "Triton can't be used on cuda:99" in caplog.text


# ---- a whole model ---------------------------------------------------------------------------------------------


class OnAGpu:
    """What the built-in plugin does on a GPU, and would do if the CPU were one. Counts what was taken."""

    def __init__(self):
        self.taken = []

    @hookimpl
    def create_module_forward(self, module):
        forward = gpu_forward(module, DEVICE)
        self.taken += [type(forward).__name__] if forward is not None else []
        return forward


def tokens(model, plugins=(), **params):
    config = EngineConfig(num_blocks=16, block_size=16, attention_backend="reference", fast_forwards=bool(plugins))
    engine = Engine(HFPagedModel(model), config, plugins=plugins)
    for row in range(3):
        engine.add_request(str(row), list(range(5 + row, 12)), SamplingParams(max_tokens=4, ignore_eos=True, **params))
    found = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request.id, []).extend(output.token_ids)
    return found


@pytest.mark.parametrize(
    ("config", "make", "norms"), [(LlamaConfig, LlamaForCausalLM, 2), (Qwen3Config, Qwen3ForCausalLM, 4)]
)
def test_a_model_answers_as_it_does_without(config, make, norms):
    model, plugin = tiny(config=config, model=make), OnAGpu()
    assert tokens(model, [plugin], temperature=0) == tokens(model, temperature=0)
    taken = {name: plugin.taken.count(name) for name in plugin.taken}
    assert taken == {"_DecoderLayer": 2, "_GatedMLP": 2, "_Rotating": 2, "_Norm": 2 * norms + 1}


def test_a_layer_whose_parts_are_put_together_in_another_way_is_left_to_its_parts():
    layer = tiny().model.layers[0]

    class Scaled(type(layer)):
        def forward(self, hidden_states, **named):
            return super().forward(0.5 * hidden_states, **named)

    layer.__class__ = Scaled
    assert ask(layer) is None


def test_the_sampler_draws_the_same_tokens_with_the_kernels(monkeypatch):
    model = tiny()
    monkeypatch.setattr(sampler, "triton_works", lambda device: False)
    plain = tokens(model, temperature=0.8, top_k=5, seed=3)
    monkeypatch.setattr(sampler, "triton_works", lambda device: True)
    assert sampler.create_sampler(HFPagedModel(model).spec)._top is sampling.top_rows
    assert tokens(model, temperature=0.8, top_k=5, seed=3) == plain
