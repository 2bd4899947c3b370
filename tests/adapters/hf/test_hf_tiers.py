"""transformers models over K/V on disk: which model it is, and that a restart finds them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import ConfigError, Engine, EngineConfig, SamplingParams
from paged_hf.model.paged_model import HFPagedModel

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
PROMPT = [3 * i % 90 for i in range(50)]


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **config)).eval()


def of(model):
    return HFPagedModel(model).fingerprint()


def edited(change):
    model = make_model()
    change(model)
    return model


def test_the_same_model_has_the_same_fingerprint_whenever_it_is_made():
    assert of(make_model()) == of(make_model()) is not None


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_model(seed=1),
        lambda: make_model(rope_parameters={"rope_type": "default", "rope_theta": 20_000.0}),
        lambda: make_model(rms_norm_eps=1e-3),
        lambda: make_model().to(torch.bfloat16),
        lambda: edited(lambda model: model.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(1e-3)),
        lambda: edited(lambda model: model.model.rotary_emb.inv_freq.mul_(1.01)),
        lambda: edited(lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.3)),
    ],
    ids=["weights", "rotary", "eps", "dtype", "one weight", "rotary table", "an attribute"],
)
def test_whatever_makes_other_keys_and_values_makes_another_fingerprint(other):
    assert of(other()) != of(make_model())


def test_a_model_with_a_users_hook_is_refused_with_a_disk(tmp_path):
    model = make_model()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    assert of(model) is None
    with pytest.raises(ConfigError, match="hooks and forwards of your own"):
        Engine(model, EngineConfig(num_blocks=30, kv_disk_path=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restart_finds_a_prompts_blocks_and_another_model_does_not(tmp_path, dtype):
    def told(model, path):
        config = EngineConfig(block_size=4, num_blocks=60, kv_disk_path=path)
        engine = Engine(model.to(getattr(torch, dtype)), config)
        (request,) = engine.add_request("r", PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        tokens = []
        while engine.has_work:
            tokens += [token for output in engine.step() for token in output.token_ids]
        engine.close()
        return tokens, request.num_cached

    plain, _ = told(make_model(), None)
    assert told(make_model(), str(tmp_path)) == (plain, 0)
    assert told(make_model(), str(tmp_path)) == (plain, 48)
    assert told(make_model(seed=1), str(tmp_path))[1] == 0
