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

from paged_core import EngineDeadError, LayerSpec, PagedModel, UnsupportedModel
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


# ---- changed between two requests --------------------------------------------------------------------------------


def _add_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)


def _edit_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data *= 1.5


def _assign_parameter(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.gate_proj.weight * 2)


def _load_state_dict(model: Any) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def _merge_lora(model: Any) -> None:
    linear = model.model.layers[1].self_attn.v_proj
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 48, generator=generator), torch.randn(32, 4, generator=generator)
    linear.weight.data += b @ a * 0.2


def _wrap_in_lora(model: Any) -> None:
    class Lora(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(5)
    model.model.layers[1].self_attn.v_proj = Lora(model.model.layers[1].self_attn.v_proj)


@pytest.mark.parametrize(
    "change", [_add_in_place, _edit_data, _assign_parameter, _load_state_dict, _merge_lora, _wrap_in_lora]
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_change_of_the_model_is_in_the_next_answer(
    change: Any, accelerated: bool, tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    model = tiny("llama")
    running = engine(HFPagedModel(model), fast_forwards=accelerated)
    before = paged(running, prompts, 8)
    change(model)
    expected = stock(model, prompts, 8)
    assert expected != before
    assert paged(running, prompts, 8) == expected


def _edit_a_row_of_the_head(model: Any) -> None:
    model.lm_head.weight.data[8] += 9


def _edit_a_row_of_the_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[7] -= 2


def _edit_a_row_of_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[5] += 3


def _edit_a_column_of_a_layer(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.data[:, 5] += 3


@pytest.mark.parametrize(
    "change", [_edit_a_row_of_the_head, _edit_a_row_of_the_embedding, _edit_a_row_of_a_layer, _edit_a_column_of_a_layer]
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_row_or_column_written_through_data_is_in_the_next_answer(
    change: Any, accelerated: bool, tiny: Any, stock: Any, paged: Any, engine: Any
) -> None:
    prompts = [[3, 7, 3, 9, 11, 3, 7, 12, 3, 40]]
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    running = engine(HFPagedModel(model), fast_forwards=accelerated)
    before = paged(running, prompts, 12)
    change(model)
    expected = stock(model, prompts, 12)
    assert expected != before
    assert paged(running, prompts, 12) == expected


def test_a_change_is_not_forgotten_when_catching_up_with_it_fails(
    tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any, monkeypatch: Any
) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    running = engine(paged_model)
    paged(running, prompts, 8)
    _edit_data(model)
    monkeypatch.setattr(paged_model, "_create", _out_of_memory)
    with pytest.raises(MemoryError):
        paged_model.refresh()
    monkeypatch.undo()
    assert paged(running, prompts, 8) == stock(model, prompts, 8)


def _out_of_memory(module: nn.Module) -> Any:
    raise MemoryError


def test_refresh_says_whether_anything_changed(tiny: Any) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    assert not paged_model.refresh()
    _edit_data(model)
    assert paged_model.refresh()
    assert not paged_model.refresh()


def test_a_model_cast_to_another_dtype_needs_a_new_engine(tiny: Any, engine: Any, paged: Any, prompts: Any) -> None:
    model = tiny("llama")
    running = engine(model)
    paged(running, prompts, 2)
    model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="bfloat16"):
            running.add_request("late", prompts[0])
    model.to(torch.float32)
    assert paged(running, prompts, 2)


# ---- faster forwards ---------------------------------------------------------------------------------------------


class _PackedLinear:
    """Stands in for a linear: keeps its own copy of the weight, as a packed one would."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.weight, self.calls = module, module.weight.detach().clone(), 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.module.bias)

    def stale(self) -> bool:
        return not torch.equal(self.weight, self.module.weight)


def test_faster_forwards_are_used_by_the_engine_only(tiny: Any, paged: Any, stock: Any, prompts: Any) -> None:
    model = tiny("llama")
    paged_model = HFPagedModel(model)
    made: list[_PackedLinear] = []

    def create(module: nn.Module) -> _PackedLinear | None:
        if type(module) is not nn.Linear:
            return None
        made.append(_PackedLinear(module))
        return made[-1]

    assert paged_model.accelerate(create) == len(made) == 2 * 7 + 1
    expected = stock(model, prompts, 4)
    assert sum(forward.calls for forward in made) == 0
    _forward(paged_model, sample_indices=[0])
    assert all(forward.calls == 1 for forward in made)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert paged_model.refresh()
    assert len(made) == 16, "only the stale one is made again"
    assert stock(model, prompts, 4) != expected


@pytest.mark.parametrize("follows", [False, True])
def test_a_forward_that_follows_its_module_is_asked_only_when_the_model_changed(follows: bool, tiny: Any) -> None:
    model = tiny("llama")
    asked: list[nn.Module] = []

    class Forward(_PackedLinear):
        follows_module = follows

        def stale(self) -> bool:
            asked.append(self.module)
            return super().stale()

    paged_model = HFPagedModel(model)
    paged_model.accelerate(lambda module: Forward(module) if type(module) is nn.Linear else None)
    assert not paged_model.refresh()
    assert len(asked) == (0 if follows else 15)
    asked.clear()
    _edit_data(model)
    assert paged_model.refresh()
    assert len(asked) == 15


def test_parents_are_asked_first_and_what_they_hold_is_then_left_alone(tiny: Any) -> None:
    asked: list[str] = []

    def create(module: nn.Module) -> Any:
        asked.append(type(module).__name__)
        return type(module).forward.__get__(module) if type(module).__name__ == "LlamaMLP" else None

    assert HFPagedModel(tiny("llama")).accelerate(create) == 2
    assert asked.count("Linear") == 2 * 4 + 1
    assert asked.index("LlamaForCausalLM") < asked.index("LlamaDecoderLayer") < asked.index("LlamaMLP")


def test_modules_that_someone_listens_to_are_not_swallowed_by_their_parents(tiny: Any) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: None)
    asked: list[nn.Module] = []
    paged_model = HFPagedModel(model)
    paged_model.accelerate(lambda module: asked.append(module))
    twin = paged_model.shadow.twin_of
    assert twin(model.model.layers[0].mlp) not in asked
    assert twin(model.model.layers[0].mlp.up_proj) in asked
    assert twin(model.model.layers[1].mlp) in asked


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
