"""A transformers model through the engine gives the tokens that its own generate gives."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from paged_core import LayerSpec, PagedModel, UnsupportedModel
from paged_hf.model.paged_model import HFPagedModel
from rounded_parity import HALVES, assert_rows

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "olmo2",
    "gpt_oss",
    "starcoder2",
    "stablelm",
    "phimoe",
    "deepseek_v3",
    "cohere",
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_stock_generate(
    family: str, backend: str, tiny: Any, engine: Any, stock: Any, paged: Any, prompts: Any
) -> None:
    model = tiny(family)
    expected = stock(model, prompts, 12)
    assert len({token for row in expected for token in row}) > 6, "a degenerate model proves nothing"
    assert paged(engine(model, attention_backend=backend), prompts, 12) == expected


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("family", "backend"), [("llama", "reference"), ("llama", "cpu"), ("mistral", "cpu"), ("gemma2", "cpu")]
)
def test_greedy_tokens_in_16_bits_differ_from_stocks_at_near_ties_alone(
    family: str, backend: str, dtype: str, tiny: Any, engine: Any, paged: Any, prompts: Any
) -> None:
    model = tiny(family).to(HALVES[dtype])
    tokens = paged(engine(model, attention_backend=backend), prompts, 9)
    assert assert_rows(model, prompts, tokens, max_new_tokens=9) >= 9


def test_layers_tell_their_windows_softcaps_and_sinks(tiny: Any) -> None:
    def layers(family: str) -> tuple[LayerSpec, ...]:
        return HFPagedModel(tiny(family)).spec.layers

    assert [layer.sliding_window for layer in layers("gemma3_text")] == [9, None]
    assert [layer.sliding_window for layer in layers("llama")] == [None, None]
    assert {layer.sliding_window for layer in layers("phimoe")} == {9}  # told by its mask alone
    assert {layer.softcap for layer in layers("gemma2")} == {3.0}
    assert all(layer.has_sinks for layer in layers("gpt_oss"))
    assert {(layer.head_dim, layer.value_head_dim) for layer in layers("deepseek_v3")} == {(24, 12)}


def test_it_is_a_paged_model_with_the_facts_of_its_config(tiny: Any) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [5, 6]
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20
    paged_model = HFPagedModel(model, name="mine")
    spec = paged_model.spec
    assert isinstance(paged_model, PagedModel)
    assert (spec.vocab_size, spec.max_model_len, spec.dtype) == (96, 256, torch.float32)
    assert (spec.eos_token_ids, spec.name) == ((5, 6), "mine")
    assert spec.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert spec.layers[0].num_heads == 4 and spec.layers[0].num_kv_heads == 2


def test_the_head_is_computed_for_sampled_rows_only(tiny: Any) -> None:
    model = tiny("gemma2")
    rows: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape))
    paged_model = HFPagedModel(model)
    rows.clear()
    logits = _forward(paged_model, sample_indices=[5, 2, 5])
    assert [shape[1] for shape in rows] == [3]
    assert logits.shape == (3, 96)
    assert torch.equal(logits[0], logits[2])
    assert _forward(paged_model, sample_indices=[]).shape == (0, 96)


def test_no_attention_mask_is_built_for_the_engine(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paged_model = HFPagedModel(tiny("gemma3_text"))
    masks = []
    decoder = paged_model.shadow.root.get_decoder()
    for layer in decoder.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    _forward(paged_model, sample_indices=[0])
    assert masks == [None, None]


# ---- the user's model stays the user's ---------------------------------------------------------------------------


def test_the_users_model_is_left_exactly_as_it_was(tiny: Any, paged: Any, prompts: Any) -> None:
    model = tiny("gemma3_text")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    config, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    implementation = model.config._attn_implementation
    paged(model, prompts, 3)
    assert model.config._attn_implementation == implementation != "paged_core"
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_the_users_model_can_be_copied_and_pickled_while_an_engine_has_it(
    tiny: Any, stock: Any, paged: Any, prompts: Any
) -> None:
    model = tiny("llama")
    expected = paged(model, prompts, 6)
    assert stock(copy.deepcopy(model), prompts, 6) == expected
    assert stock(pickle.loads(pickle.dumps(model)), prompts, 6) == expected


def test_another_thread_may_call_stock_generate_meanwhile(
    tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    model = tiny("gemma2")
    expected = stock(model, prompts, 8)
    running = engine(model)
    from_stock: list[Any] = []
    thread = threading.Thread(target=lambda: from_stock.extend(stock(model, prompts, 8) for _ in range(4)))
    thread.start()
    from_engine = [paged(running, prompts, 8) for _ in range(4)]
    thread.join()
    assert from_stock == from_engine == [expected] * 4


def test_dropout_of_a_model_in_training_mode_is_not_applied(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("gpt2")  # whose config has dropout
    expected = stock(model, prompts, 6)
    model.train()
    assert paged(model, prompts, 6) == expected
    assert model.training


def test_hooks_of_the_user_run_in_the_engine_too(tiny: Any, paged: Any, engine: Any, prompts: Any) -> None:
    model = tiny("llama")
    running = engine(model)
    plain = paged(running, prompts, 6)
    seen: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1]) or output * -1
    )
    changed = paged(running, prompts, 6)
    assert seen and changed != plain
    handle.remove()
    assert paged(running, prompts, 6) == plain


def test_a_forward_that_the_user_wrapped_is_honoured(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    inner = attention.forward  # bound to the user's module

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = inner(*args, **kwargs)
        return output * 2, weights

    attention.forward = doubled
    assert paged(model, prompts, 6) == stock(model, prompts, 6)


def test_modules_kept_in_plain_lists_are_twinned_too(tiny: Any, stock: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    layers = list(model.model.layers)
    model.model.layers = None
    object.__setattr__(model.model, "hidden_layers", layers)
    model.model.__dict__["layers"] = layers
    del model.model._modules["layers"]
    assert paged(model, prompts, 5) == stock(model, prompts, 5)


# ---- what can't be honoured --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "own", "reason"),
    [
        ("xlm", {"num_key_value_heads": None, "head_dim": None, "emb_dim": 48, "n_heads": 4, "n_layers": 2},
         "attention interface"),
        ("mamba", {}, "position_ids"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0,
                        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                        "linear_value_head_dim": 16}, "state outside attention"),
    ],
)  # fmt: skip
def test_an_unsupported_model_is_refused_with_the_reason(family: str, own: Any, reason: str, tiny: Any) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        HFPagedModel(tiny(family, **own))


def test_a_model_that_can_keep_no_cache_is_taken_in(tiny: Any) -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None, **rest: Any) -> Any:
            if use_cache:
                raise NotImplementedError("it keeps nothing")
            return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=False, **rest)

    model = tiny("llama")
    model.__class__ = Forgetful
    assert len(HFPagedModel(model).spec.layers) == model.config.num_hidden_layers


def test_something_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="isn't a transformers model"):
        HFPagedModel(nn.Linear(2, 2))


def test_rotary_frequencies_that_follow_the_longest_request_limit_the_length(tiny: Any) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 6, "short_factor": [1.0] * 6,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert HFPagedModel(model).spec.max_model_len == 64


def _forward(paged_model: HFPagedModel, sample_indices: list[int]) -> torch.Tensor:
    def attend(layer: int, q: Any, k: Any, v: Any, sinks: Any = None) -> torch.Tensor:
        return q[..., : v.shape[-1]]

    ids = torch.arange(6)
    return paged_model.forward(ids, ids, attend, torch.tensor(sample_indices, dtype=torch.int64))
