"""Models whose modules accelerate has placed on devices: its hooks move tensors, in the engine's twin too."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import Engine, EngineConfig, SamplingParams

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


class Counting(ModelHook):
    """Notes whose forward it was called for, as a hook that moves tensors would be."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def tokens(model, **config):
    sizes = {"block_size": 4, "num_blocks": 100, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    engine = Engine(model, EngineConfig(**sizes, **config))
    for i in range(3):
        engine.add_request(str(i), [i, 2, 3 + i] * (1 + i), SamplingParams(temperature=0, max_tokens=9))
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found.setdefault(output.request.id, []).extend(output.token_ids)
    return found, engine


@pytest.mark.parametrize("fast", [True, False])
def test_a_dispatched_model_gives_its_tokens(fast):
    wanted, _ = tokens(make_model(), fast_forwards=fast)
    model = dispatch_model(make_model(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    found, engine = tokens(model, fast_forwards=fast)
    assert found == wanted
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 99)
    assert all(layer.device == torch.device("cpu") for layer in engine.spec.layers)


def test_each_modules_hook_is_called_with_the_twin_and_the_users_model_is_left_alone():
    model, hook = make_model(), Counting()
    wanted, _ = tokens(make_model())
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    add_hook_to_module(model.model.layers[2].mlp, hook)
    found, _ = tokens(model)
    assert found == wanted
    assert hook.calls
    assert all(module is not model.model.layers[2].mlp for module in hook.calls)


@pytest.mark.parametrize("count", [torch.cuda.device_count()] * (torch.cuda.device_count() > 1) or [0])
def test_layers_run_and_keep_their_cache_where_they_were_placed(count):
    devices = [f"cuda:{i}" for i in range(count)] or ["cpu"]
    places = {f"model.layers.{i}": devices[i * len(devices) // 4] for i in range(4)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), devices[0])
    model = dispatch_model(make_model(), places | rest, force_hooks=True)
    found, engine = tokens(model)
    assert found == tokens(make_model())[0]
    cached = [str(keys.device) for keys in engine._runner.cache.keys]
    assert cached == [places[f"model.layers.{i}"] for i in range(4)]
    assert engine.captured_steps is None  # of one device only
